"""The code of docs/extending.md runs, and does what the page says."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from attention_reference import make_case
from tiny import greedy, make_llm, next_logits, shared_model, tiny_model, tiny_tokenizer

from nanovllm import SamplingParams
from nanovllm.attention.select import BACKENDS
from nanovllm.kernels.choice import KernelChoice, kernel_choice
from nanovllm.models.registry import MODELS
from nanovllm.sampling import sampler

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
BLOCK = re.compile(r"^```python\n# (\w+)\.py\n(.*?)^```$", re.MULTILINE | re.DOTALL)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5, 6, 7], list(range(20, 60)), [200]]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a block of the page by its file name. Afterwards the registries are as they were."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sampler, "PROCESSORS", list(sampler.PROCESSORS))
    for registry in (BACKENDS, MODELS):
        for name, value in registry.items():
            monkeypatch.setitem(registry, name, value)
    before = (dict(BACKENDS), dict(MODELS))

    def imported(name: str) -> ModuleType:
        blocks = dict(BLOCK.findall(PAGE.read_text()))
        (tmp_path / f"{name}.py").write_text(blocks[name])
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    yield imported
    for registry, then in zip((BACKENDS, MODELS), before):
        registry.clear()
        registry.update(then)


def tokens(llm: Any, prompts: list[list[int]] = PROMPTS, params: SamplingParams = GREEDY) -> Any:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def test_every_block_is_tested():
    names = [name for name, _ in BLOCK.findall(PAGE.read_text())]
    assert names == [
        "seed_oss",
        "low_rank",
        "top_n_sigma",
        "ban_token",
        "plain_attention",
        "squared_relu",
    ]
    assert PAGE.read_text().count("```python") == len(names)


def test_a_new_model_equals_transformers(example, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="4.56")
    assert hasattr(transformers, "SeedOssConfig")
    example("seed_oss")
    sizes = {"head_dim": 16, "attention_bias": True, "attention_out_bias": False}
    folder, model = tiny_model(tmp_path / "model", "SeedOss", **sizes)
    tiny_tokenizer().save_pretrained(folder)
    assert tokens(make_llm(folder)) == [greedy(model, prompt, 12) for prompt in PROMPTS]


def test_a_wrapped_weight_changes_the_product_as_the_formula_says(example):
    low_rank = example("low_rank")
    folder, reference = shared_model()
    llm = make_llm(folder)
    before = tokens(llm)
    llm.apply_model(low_rank.add_to_down_proj)
    llm.reset_prefix_cache()

    wrapped = llm.apply_model(lambda model: model)[0]
    state = {name: value.clone() for name, value in reference.state_dict().items()}
    try:
        for ours, theirs in zip(wrapped.model.layers, reference.model.layers):
            storage = ours.mlp.down_proj.storage
            theirs.mlp.down_proj.weight.data += storage.b @ storage.a
        expected = [greedy(reference, prompt, 12) for prompt in PROMPTS]
    finally:
        reference.load_state_dict(state)
    assert tokens(llm) == expected != before


def test_a_new_logits_processor_keeps_what_its_formula_keeps(example):
    example("top_n_sigma")
    llm = make_llm()
    params = SamplingParams(temperature=1.5, max_tokens=30, ignore_eos=True, logprobs=-1, seed=4)
    params.top_n_sigma = 1.0
    llm.llm_engine.args.max_logprobs = -1
    plain = SamplingParams(temperature=1.5, max_tokens=30, ignore_eos=True, seed=4)
    filtered, other = llm.generate([[5, 6], [5, 6]], [params, plain], use_tqdm=False)
    drawn = filtered.outputs[0]
    for token, entry in zip(drawn.token_ids, drawn.logprobs):
        logprobs = np.array([entry[i].logprob for i in range(300)])
        assert logprobs[token] >= logprobs.max() - logprobs.std(ddof=1) * 1.0001
    assert other.outputs[0].token_ids != drawn.token_ids
    assert tokens(make_llm(), [[5, 6]], plain) == [other.outputs[0].token_ids]


def test_a_class_of_vllms_protocol_bans_a_token_of_the_requests_that_ask_for_it(example):
    llm = make_llm(logits_processors=[example("ban_token").BanToken])
    plain = tokens(llm)
    params = GREEDY.clone()
    params.extra_args = {"ban": plain[1][0]}
    found = llm.generate(PROMPTS, [GREEDY, params, GREEDY], use_tqdm=False)
    banned = found[1].outputs[0].token_ids
    assert [found[0]["token_ids"], found[2]["token_ids"]] == [plain[0], plain[2]]
    assert plain[1][0] not in banned
    logits = next_logits(shared_model()[1], PROMPTS[1])[-1]
    assert banned[0] == int(logits.topk(2).indices[1])


@pytest.mark.parametrize("window", [None, 7])
def test_a_new_backend_equals_the_reference(example, window):
    plain = example("plain_attention")
    case = make_case([33, 2, 1], [50, 18, 17], heads=(6, 2), head_dim=32, windows=(None, window))
    found = case.run(plain.PlainAttention(case.spec), 1)
    torch.testing.assert_close(found, case.expected(1), atol=2e-6, rtol=1e-5)
    if window is None:
        assert tokens(make_llm(attention_backend="plain")) == tokens(make_llm())


def test_a_new_operation_equals_its_formula_with_one_compilation_for_all_numbers_of_rows(example):
    squared_relu = example("squared_relu").squared_relu
    choice = KernelChoice(compiles=True, backend="eager")
    for rows in (3, 8, 2):
        x = torch.randn(rows, 5, generator=torch.Generator().manual_seed(rows))
        with kernel_choice(choice):
            found = squared_relu(x)
        assert torch.equal(found, x.clamp(min=0) ** 2)
    assert choice.done.count == 1
