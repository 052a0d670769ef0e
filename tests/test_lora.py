"""LoRA adapters: the tokens and logits of PEFT over transformers, alone and in any mixture."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import (
    greedy,
    make_llm,
    next_logits,
    nothing_is_left,  # noqa: F401
    random_prompts,
    session_folder,
    shared_model,
    tiny_model,
)

from nanovllm import LLM, BeamSearchParams, SamplingParams
from nanovllm.kernels import cpu
from nanovllm.lora.request import LoRARequest

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TABLES = ["embed_tokens", "lm_head"]
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
PROMPTS = random_prompts([3, 17, 40, 33], seed=5)
EXPECTED: dict[tuple[str, tuple[int, ...]], list[int]] = {}


def save_adapter(folder: Path, base: Any, seed: int = 0, **config: Any) -> Any:
    """PEFT's model of a random adapter over `base`, saved to the folder."""
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": LAYERS, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(base, peft.LoraConfig(**{**defaults, **config})).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    model.save_pretrained(folder)
    return model


@cache
def adapter(family: str, name: str) -> tuple[str, Any]:
    """(folder, PEFT's model) of an adapter of ADAPTERS over the shared model of the family."""
    base = transformers.AutoModelForCausalLM.from_pretrained(
        shared_model(family)[0], dtype=torch.float32
    )
    folder = session_folder() / f"lora-{family}-{name}"
    seed = list(ADAPTERS).index(name)
    return str(folder), save_adapter(folder, base, seed, **ADAPTERS[name])


ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {},
    "other": {},
    "third": {"r": 1, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 9, "use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
        "alpha_pattern": {"v_proj": 3, "0.self_attn.o_proj": 16},
    },
    "tables": {"target_modules": [*LAYERS, *TABLES]},
    "first-layer": {"target_modules": ["down_proj"], "layers_to_transform": [0]},
}


def request(name: str, family: str = "Qwen3") -> LoRARequest:
    number = 1 + list(ADAPTERS).index(name)
    return LoRARequest(name, number, adapter(family, name)[0])


def expected(name: str | None, prompt: list[int], family: str = "Qwen3") -> list[int]:
    """The greedy tokens of PEFT, or of the model alone."""
    model = shared_model(family)[1] if name is None else adapter(family, name)[1]
    key = (f"{family} {name}", tuple(prompt))
    if key not in EXPECTED:
        EXPECTED[key] = greedy(model, prompt, GREEDY.max_tokens or 0)
    return EXPECTED[key]


def engine(family: str = "Qwen3", **kwargs: Any) -> LLM:
    defaults = {"enable_lora": True, "max_loras": 4, "skip_tokenizer_init": True}
    return make_llm(shared_model(family)[0], **{**defaults, **kwargs})


@cache
def shared_engine() -> LLM:
    return engine()


def tokens_of(llm: LLM, lora_request: Any, prompts: Any = PROMPTS, **kwargs: Any) -> Any:
    outs = llm.generate(prompts, GREEDY, use_tqdm=False, lora_request=lora_request, **kwargs)
    return [out.outputs[0].token_ids for out in outs]


# -- the same tokens as PEFT -----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Qwen3", "Qwen2", "Llama", "Mistral"])
def test_greedy_tokens_are_those_of_peft(family):
    llm = engine(family)
    name = request("all", family)
    wanted = [expected("all", prompt, family) for prompt in PROMPTS]
    without = [expected(None, prompt, family) for prompt in PROMPTS]
    assert wanted != without
    for _ in range(3):  # module by module, then recorded, then replayed
        assert tokens_of(llm, name) == wanted
        assert tokens_of(llm, None) == without


def test_an_adapter_of_projections_that_the_checkpoint_fuses_is_that_of_peft(tmp_path):
    """Phi-3 has Q, K and V in one matrix."""
    folder, _ = tiny_model(tmp_path / "model", "Phi3")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    fused = {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
    model = save_adapter(tmp_path / "adapter", base, **fused)
    llm = make_llm(folder, enable_lora=True, skip_tokenizer_init=True)
    found = tokens_of(llm, LoRARequest("fused", 1, str(tmp_path / "adapter")))
    assert found == [greedy(model, prompt, GREEDY.max_tokens or 0) for prompt in PROMPTS]


@pytest.mark.parametrize("name", ["rslora", "patterns", "tables", "first-layer"])
def test_every_kind_of_adapter_is_that_of_peft(name):
    wanted = [expected(name, prompt) for prompt in PROMPTS]
    assert tokens_of(shared_engine(), request(name)) == wanted
    (out,) = shared_engine().generate(
        [PROMPTS[2]],
        SamplingParams(max_tokens=1, prompt_logprobs=0),
        lora_request=request(name),
        use_tqdm=False,
    )
    logprobs = next_logits(adapter("Qwen3", name)[1], PROMPTS[2]).log_softmax(-1)
    for i, token in enumerate(PROMPTS[2][1:]):
        assert out.prompt_logprobs[i + 1][token].logprob == pytest.approx(
            float(logprobs[i, token]), abs=2e-3
        )


@pytest.mark.parametrize("target_modules", [TABLES[:1], TABLES[1:]])
def test_tied_embeddings_change_only_where_peft_changes_them(tmp_path, target_modules):
    folder, base = tiny_model(tmp_path / "model", "Llama", tie_word_embeddings=True)
    without = greedy(base, PROMPTS[1], 10)
    model = save_adapter(tmp_path / "adapter", base, target_modules=target_modules)
    llm = make_llm(folder, enable_lora=True, skip_tokenizer_init=True)
    lora = LoRARequest("tied", 1, str(tmp_path / "adapter"))
    wanted = greedy(model, PROMPTS[1], 10)
    assert wanted != without
    assert tokens_of(llm, [lora], [PROMPTS[1]]) == [wanted]
    assert tokens_of(llm, None, [PROMPTS[1]]) == [without]


def test_a_merged_adapter_gives_the_same_tokens(tmp_path):
    merged = transformers.AutoModelForCausalLM.from_pretrained(shared_model()[0])
    merged = peft.PeftModel.from_pretrained(merged, adapter("Qwen3", "all")[0]).merge_and_unload()
    merged.save_pretrained(tmp_path)
    llm = make_llm(str(tmp_path), skip_tokenizer_init=True)
    assert tokens_of(llm, None) == tokens_of(shared_engine(), request("all"))


def test_a_quantised_base_with_an_adapter_is_the_dequantised_one_with_peft(tmp_path):
    gguf = pytest.importorskip("gguf")
    from test_loader import write_gguf

    _, base = tiny_model(tmp_path / "model", "Llama")
    kind = gguf.GGMLQuantizationType.Q8_0
    file = write_gguf(tmp_path / "m.gguf", "llama", base, kind)
    for parameter in base.parameters():
        if parameter.dim() == 2:  # blocks lie in rows, so the rows' places do not matter
            packed = gguf.quants.quantize(parameter.data.numpy(), kind)
            parameter.data.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind)))
    model = save_adapter(tmp_path / "adapter", base)
    lora = LoRARequest("a", 1, str(tmp_path / "adapter"))
    exact = make_llm(str(file), enable_lora=True, quantization="none", skip_tokenizer_init=True)
    wanted = [greedy(model, prompt, 10) for prompt in PROMPTS]
    assert tokens_of(exact, lora) == wanted
    llm = make_llm(str(file), enable_lora=True, skip_tokenizer_init=True)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    outs = llm.generate([PROMPTS[2]] * 2, params, use_tqdm=False, lora_request=[lora, None])
    found, without = (
        np.array([out.prompt_logprobs[i + 1][t].logprob for i, t in enumerate(PROMPTS[2][1:])])
        for out in outs
    )
    logprobs = next_logits(model, PROMPTS[2]).log_softmax(-1).numpy()
    theirs = logprobs[np.arange(len(PROMPTS[2]) - 1), PROMPTS[2][1:]]
    assert np.abs(found - theirs).mean() < 0.2  # products round inputs to 8 bits
    assert np.abs(without - theirs).mean() > 1


# -- mixtures --------------------------------------------------------------------------------------


def test_a_mixture_gives_every_request_what_it_gets_alone():
    llm = shared_engine()
    names = ["all", None, "tables", "third", None, "other", "all"]
    prompts = random_prompts([5, 20, 9, 40, 1, 16, 33], seed=8)
    loras = [None if name is None else request(name) for name in names]
    wanted = [expected(name, prompt) for name, prompt in zip(names, prompts)]
    assert tokens_of(llm, loras, prompts) == wanted


def test_rows_are_bitwise_equal_alone_and_in_company():
    llm = engine(dtype="bfloat16")
    names = [request("all"), None, request("tables"), request("third")]
    params = SamplingParams(
        temperature=0.8, seed=3, max_tokens=8, logprobs=2, prompt_logprobs=1, ignore_eos=True
    )
    together = llm.generate(PROMPTS, params, use_tqdm=False, lora_request=names)
    for out, prompt, name in zip(together, PROMPTS, names):
        llm.reset_prefix_cache()
        (alone,) = llm.generate([prompt], params, use_tqdm=False, lora_request=name)
        assert alone.outputs == out.outputs
        assert alone.prompt_logprobs == out.prompt_logprobs
        assert out.lora_request is name


def test_chunks_and_preemption_keep_the_adapters():
    llm = engine(
        max_num_batched_tokens=16, max_num_seqs=8, max_model_len=100, num_gpu_blocks_override=9
    )
    names = ["all", None, "other", "third"] * 2
    prompts = random_prompts([40, 3, 17, 22, 5, 31, 2, 18], seed=4)
    loras = [None if name is None else request(name) for name in names]
    wanted = [expected(name, prompt) for name, prompt in zip(names, prompts)]
    for overlap in (False, True):
        llm.llm_engine.overlap = overlap
        llm.reset_prefix_cache()
        assert tokens_of(llm, loras, prompts) == wanted
    assert llm.llm_engine.stats.num_preemptions > 0


def test_a_step_has_at_most_max_loras_adapters_and_every_request_its_turn():
    llm = engine(max_loras=2, max_cpu_loras=3)
    scheduler = llm.llm_engine.scheduler
    schedule = scheduler.schedule
    counts: list[int] = []

    def counted() -> Any:
        step = schedule()
        if step is not None:
            seqs = [scheduler.table.seqs[int(row)] for row in step.rows]
            counts.append(len({seq.adapter for seq in seqs} - {None}))
        return step

    scheduler.schedule = counted
    names = ["all", "other", "third", None, "rslora"] * 3
    prompts = [PROMPTS[i % 4] for i in range(len(names))]
    loras = [None if name is None else request(name) for name in names]
    wanted = [expected(name, prompt) for name, prompt in zip(names, prompts)]
    assert tokens_of(llm, loras, prompts) == wanted
    assert max(counts) == 2
    assert len(llm.llm_engine.list_loras()) <= 3


def test_steps_of_one_adapter_and_of_none_are_recorded_programs():
    llm = engine()
    programs = llm.llm_engine.executor.runner.programs
    if cpu.load() is None:
        pytest.skip("no C++ compiler")
    for _ in range(2):
        tokens_of(llm, request("tables"))
        tokens_of(llm, None)
    kinds = {kind.adapter for kind in programs.programs}
    assert len(kinds) == 2
    assert 0 in kinds
    assert not programs.reported
    llm.llm_engine.remove_lora(request("tables").lora_int_id)
    assert {kind.adapter for kind in programs.programs} == {0}


def test_an_engine_without_adapters_has_no_wrapper_and_no_part():
    llm = make_llm(skip_tokenizer_init=True)
    model = llm.llm_engine.executor.runner.model
    assert not [
        m for m in model.modules() if type(getattr(m, "storage", None)).__name__ == "LoRAWeight"
    ]
    with pytest.raises(ValueError, match="lora_request needs an engine with enable_lora=True"):
        tokens_of(llm, request("all"))
    for call in (llm.llm_engine.remove_lora, llm.llm_engine.pin_lora):
        with pytest.raises(ValueError, match="enable_lora=True"):
            call(1)


# -- pages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("caching", [True, False])
def test_adapters_never_share_pages(caching):
    llm = engine(enable_prefix_caching=caching, block_size=8)
    (prompt,) = random_prompts([50], seed=2)
    names = ["all", "other", None, "all", None]
    cached = []
    for name in names:
        lora = None if name is None else request(name)
        (out,) = llm.generate([prompt], GREEDY, use_tqdm=False, lora_request=lora)
        assert out.outputs[0].token_ids == expected(name, prompt)
        cached.append(out.num_cached_tokens)
    assert cached == ([0, 0, 0, 48, 48] if caching else [0] * 5)


def test_an_adapter_that_is_read_again_hits_no_page_of_the_old_one(tmp_path):
    llm = engine()
    folder = tmp_path / "adapter"
    (prompt,) = random_prompts([40], seed=3)
    for name in ("all", "other"):
        shutil.copytree(adapter("Qwen3", name)[0], folder, dirs_exist_ok=True)
        lora = LoRARequest("mine", 1, str(folder), load_inplace=True)
        assert tokens_of(llm, lora, [prompt, prompt]) == [expected(name, prompt)] * 2
    assert llm.llm_engine.list_loras() == {1}


def test_changed_files_of_an_adapter_that_left_memory_hit_no_page_of_the_old_ones(copied):
    llm = engine(max_cpu_loras=1, max_loras=1)
    mine = LoRARequest("mine", 77, str(copied))
    (prompt,) = random_prompts([40], seed=3)
    assert tokens_of(llm, mine, [prompt]) == [expected("all", prompt)]
    tokens_of(llm, request("third"), [prompt])
    shutil.copytree(adapter("Qwen3", "other")[0], copied, dirs_exist_ok=True)
    assert tokens_of(llm, mine, [prompt]) == [expected("other", prompt)]


def test_files_that_change_under_a_waiting_request_end_only_that_request(copied):
    llm = engine(max_loras=1, max_cpu_loras=1)
    core = llm.llm_engine
    core.add_request("0", PROMPTS[0], GREEDY, lora_request=request("all"))
    core.add_request("1", PROMPTS[1], GREEDY, lora_request=LoRARequest("bad", 77, str(copied)))
    shutil.copytree(adapter("Qwen3", "other")[0], copied, dirs_exist_ok=True)
    outs = {}
    while core.has_unfinished_requests():
        outs.update({out.request_id: out.outputs[0] for out in core.step() if out.finished})
    assert outs["0"].token_ids == expected("all", PROMPTS[0])
    assert outs["1"].finish_reason == "error"
    assert "have changed since they were checked" in outs["1"].stop_reason


# -- the life of adapters --------------------------------------------------------------------------


def changes(llm: LLM) -> set[int]:
    """The numbers of all adapters in the memory of rank 0."""
    found: set[int] = set()
    for module in llm.llm_engine.executor.runner.model.modules():
        storage = getattr(module, "storage", None)
        if storage is not None:
            found |= storage.linear_changes.keys() | storage.embedding_changes.keys()
    return found


def test_the_least_recently_used_adapter_makes_room_and_pinned_ones_stay():
    llm = engine(max_loras=1, max_cpu_loras=2)
    core = llm.llm_engine
    numbers = {name: request(name).lora_int_id for name in ADAPTERS}
    assert core.add_lora(request("all"))
    assert core.add_lora(request("other"))
    assert core.list_loras() == {numbers["all"], numbers["other"]}
    assert core.pin_lora(numbers["all"])
    assert tokens_of(llm, request("third"), PROMPTS[:1]) == [expected("third", PROMPTS[0])]
    assert core.list_loras() == {numbers["all"], numbers["third"]}
    assert core.pin_lora(numbers["third"])
    with pytest.raises(ValueError, match="max_cpu_loras=2 adapters are pinned or running"):
        core.add_lora(request("other"))
    (out,) = llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False, lora_request=request("other"))
    assert out.outputs[0].finish_reason == "error"
    assert "pinned" in out.outputs[0].stop_reason
    assert core.remove_lora(numbers["all"])
    assert not core.remove_lora(numbers["all"])
    assert tokens_of(llm, request("other"), PROMPTS[:1]) == [expected("other", PROMPTS[0])]
    with pytest.raises(ValueError, match="lora_id=99 is not known"):
        core.pin_lora(99)
    assert len(changes(llm)) == 2


def test_an_adapter_in_use_is_neither_removed_nor_replaced():
    llm = shared_engine()
    stream = llm.stream(PROMPTS, GREEDY, lora_request=request("all"))
    first = next(stream)
    assert first.lora_request is not None
    number = request("all").lora_int_id
    with pytest.raises(ValueError, match=f"lora_int_id={number} is used by unfinished requests"):
        llm.llm_engine.remove_lora(number)
    other = LoRARequest("x", number, adapter("Qwen3", "other")[0])
    with pytest.raises(ValueError, match="give the adapter another number"):
        llm.generate(PROMPTS, GREEDY, lora_request=other)
    stream.close()


def test_a_refused_request_does_not_replace_an_adapter():
    llm = engine()
    core = llm.llm_engine
    core.add_lora(request("all"))
    core.pin_lora(request("all").lora_int_id)
    folder = adapter("Qwen3", "other")[0]
    other = LoRARequest("x", request("all").lora_int_id, folder, load_inplace=True)
    bad = GREEDY.clone()
    bad.top_p = 7
    with pytest.raises(ValueError, match="top_p"):
        llm.generate(PROMPTS, bad, use_tqdm=False, lora_request=other)
    assert core.list_loras() == {request("all").lora_int_id}
    assert core.adapters.known[other.lora_int_id].is_pinned
    assert tokens_of(llm, request("all")) == [expected("all", prompt) for prompt in PROMPTS]


def test_threads_list_adapters_in_turn():
    core = engine().llm_engine
    loaded = core.adapters.loaded

    def checked() -> Any:
        assert core.lock.mine
        return loaded()

    core.adapters.loaded = checked
    assert core.list_loras() == set()


def test_sleep_keeps_the_adapters():
    llm = engine()
    wanted = [expected("all", prompt) for prompt in PROMPTS]
    assert tokens_of(llm, request("all")) == wanted
    for level in (1, 2):
        llm.sleep(level)
        llm.wake_up()
        assert tokens_of(llm, request("all")) == wanted


def test_beam_search_uses_the_adapter():
    llm = shared_engine()
    params = BeamSearchParams(beam_width=1, max_tokens=10, ignore_eos=True)
    loras = [request("all"), None]
    outs = llm.beam_search(PROMPTS[:2], params, lora_request=loras)
    for out, prompt, name, lora in zip(outs, PROMPTS, ["all", None], loras):
        assert out.sequences[0].tokens == prompt + expected(name, prompt)
        assert out.sequences[0].lora_request is lora


def test_chat_uses_the_adapter():
    llm = engine(skip_tokenizer_init=False)
    messages = [{"role": "user", "content": "the"}]
    (out,) = llm.chat(messages, GREEDY, use_tqdm=False, lora_request=request("all"))
    assert out.outputs[0].token_ids == expected("all", out.prompt_token_ids)


def test_hundreds_of_random_steps_leave_no_page_and_no_adapter():
    generator = random.Random(1)
    llm = engine(max_loras=2, max_cpu_loras=3, num_gpu_blocks_override=20, max_model_len=64)
    core = llm.llm_engine
    names: list[str | None] = [None, "all", "other", "third", "rslora"]
    wanted: dict[str, list[int]] = {}
    finished: dict[str, list[int]] = {}
    for number in range(250):
        action = generator.random()
        name = generator.choice(names)
        if action < 0.25:
            prompt = PROMPTS[generator.randrange(4)]
            lora = None if name is None else request(name)
            core.add_request(str(number), prompt, GREEDY, lora_request=lora)
            wanted[str(number)] = expected(name, prompt)
        elif action < 0.3 and wanted:
            core.abort_request(generator.choice(list(wanted)))
        elif action < 0.4 and name is not None:
            change = generator.choice(
                [core.add_lora, lambda each: core.remove_lora(each.lora_int_id)]
            )
            with suppress(ValueError):  # the adapter is in use, or all are running
                change(request(name))
        else:
            for out in core.step():
                if out.finished:
                    finished[out.request_id] = out.outputs[0].token_ids
        assert len(changes(llm)) == len(core.list_loras()) <= 3
    while core.has_unfinished_requests():
        for out in core.step():
            if out.finished:
                finished[out.request_id] = out.outputs[0].token_ids
    assert len(finished) > 30
    assert all(tokens == wanted[i] for i, tokens in finished.items())
    for number in core.list_loras():
        core.remove_lora(number)
    assert not changes(llm)


# -- refused ---------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path):
    """A copy of an adapter, whose files a test may change."""
    folder = tmp_path / "copied"
    shutil.copytree(adapter("Qwen3", "all")[0], folder)
    return folder


def refused(folder: Path, match: str, **kwargs: Any) -> None:
    """The adapter is refused by a sentence, and other requests are right."""
    llm = shared_engine() if not kwargs else engine(**kwargs)
    loaded = llm.llm_engine.list_loras()
    with pytest.raises(ValueError, match=match):
        llm.generate(PROMPTS[:1], GREEDY, lora_request=LoRARequest("bad", 77, str(folder)))
    with pytest.raises(ValueError, match=match):
        llm.llm_engine.add_lora(LoRARequest("bad", 77, str(folder)))
    assert llm.llm_engine.list_loras() == loaded
    assert tokens_of(llm, None, PROMPTS[:1]) == [expected(None, PROMPTS[0])]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"),
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("lora_bias", True),
        ("bias", "all"),
        ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 1]]),
        ("init_lora_weights", "pissa"),
        ("r", 0),
        ("lora_alpha", "much"),
        ("use_rslora", "yes"),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"(": 1}),
    ],
)
def test_a_config_that_would_change_the_result_is_refused(copied, field, value):
    path = copied / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    refused(copied, rf"adapter_config\.json: {field} is")


PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({f"{PREFIX}.lora_A.weight": torch.zeros(4, 63)}, r"q_proj\.lora_A.* \[4, 63\].*\[4, 64\]"),
        ({f"{PREFIX}.lora_B.weight": torch.zeros(99, 4)}, r"q_proj\.lora_B.*\[99, 4\].*\[128, 4\]"),
        ({f"{PREFIX}.lora_A.weight": torch.zeros(5, 64)}, r"q_proj\.lora_A.*r=4"),
        ({f"{PREFIX}.lora_A.weight": None}, r"q_proj\.lora_B.*without its lora factor A"),
        ({f"{PREFIX}.lora_B.bias": torch.zeros(128)}, r"q_proj\.lora_B\.bias is no factor"),
        ({f"{PREFIX.replace('0', '9')}.lora_A.weight": torch.zeros(4, 64)}, r"9.* no place"),
        ({f"{PREFIX}.lora_A.weight": torch.zeros(4, 64, dtype=torch.int8)}, "q_proj.*int8"),
        (
            {"base_model.model.model.embed_tokens.base_layer.weight": torch.zeros(301, 64)},
            r"embed_tokens.*\[301, 64\].*another vocabulary",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(copied, changed, match):
    path = copied / "adapter_model.safetensors"
    tensors = {**load_file(path), **changed}
    save_file({name: t for name, t in tensors.items() if t is not None}, path)
    refused(copied, match)


def test_an_adapter_above_the_limit_names_tensor_and_limit():
    folder = Path(adapter("Qwen3", "rslora")[0])
    refused(folder, r"lora_A\.weight has rank 9, and max_lora_rank=8", max_lora_rank=8)


def test_files_that_cannot_be_read_are_a_sentence(copied, tmp_path):
    path = copied / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(copied, r"adapter_model\.safetensors .* cannot be read as safetensors")
    path.rename(copied / "adapter_model.bin")
    refused(copied, r"no adapter_model\.safetensors.*adapter_model\.bin may run code")
    (copied / "adapter_config.json").write_text("{")
    refused(copied, r"no adapter_model\.safetensors")
    refused(tmp_path / "nowhere", "is no folder here, and the Hugging Face hub")
    with pytest.raises(ValueError, match="lora_path is empty"):
        shared_engine().llm_engine.add_lora(LoRARequest("bad", 77))


def test_a_file_that_vanishes_ends_only_its_own_request(copied):
    llm = engine(max_loras=1, max_cpu_loras=1)
    core = llm.llm_engine
    core.add_request("0", PROMPTS[0], GREEDY, lora_request=request("all"))
    core.add_request("1", PROMPTS[1], GREEDY, lora_request=LoRARequest("bad", 77, str(copied)))
    core.step()
    shutil.rmtree(copied)
    outs = {}
    while core.has_unfinished_requests():
        outs.update({out.request_id: out.outputs[0] for out in core.step() if out.finished})
    assert outs["0"].token_ids == expected("all", PROMPTS[0])
    assert outs["1"].finish_reason == "error"
    assert core.list_loras() <= {request("all").lora_int_id}


def test_refused_records_and_arguments():
    for number in (0, -1):
        with pytest.raises(ValueError, match=f"lora_int_id={number} must be at least 1"):
            LoRARequest("x", number)
    with pytest.raises(TypeError, match="lora_int_id='1' must be an int"):
        LoRARequest("x", "1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lora_request has 1 items for 4 prompts"):
        tokens_of(shared_engine(), [None, request("all")][1:])
    with pytest.raises(ValueError, match="max_cpu_loras=1 must be at least max_loras=2"):
        engine(max_loras=2, max_cpu_loras=1)
    with pytest.raises(ValueError, match="lora_dtype"):
        engine(lora_dtype="int8")


# -- several ranks, and the kernel -----------------------------------------------------------------


def test_two_ranks_load_their_slices():
    llm = engine(device="cpu", tensor_parallel_size=2)
    names = ["tables", None, "all", "patterns"]
    loras = [None if name is None else request(name) for name in names]
    wanted = [expected(name, prompt) for name, prompt in zip(names, PROMPTS)]
    assert tokens_of(llm, loras) == wanted
    assert tokens_of(llm, request("tables")) == [expected("tables", p) for p in PROMPTS]
    llm.llm_engine.executor.close()


def test_two_engines_of_two_ranks_and_functions_of_a_script():
    folder = Path(__file__).parent
    script = folder / "tp_scripts" / "engines_of_ranks.py"
    done = subprocess.run(
        [sys.executable, str(script), shared_model()[0], adapter("Qwen3", "all")[0]],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(folder.parent), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
    names = ["all", None, "all", None]
    wanted = [expected(name, prompt)[:8] for name, prompt in zip(names, prompts)]
    assert found["tokens"] == wanted
    assert found["ranks"] == [[0, 2], [1, 2]] * 2
    assert (found["world"], found["loras"]) == (4, [1])


# -- several engines -------------------------------------------------------------------------------


@cache
def two_engines() -> LLM:
    return LLM(
        shared_model()[0],
        dtype="float32",
        device="cpu",
        num_gpu_blocks_override=64,
        max_num_batched_tokens=256,
        data_parallel_size=2,
        enable_lora=True,
        max_loras=2,
        max_cpu_loras=3,
    )


@pytest.fixture
def several() -> Iterator[LLM]:
    """The shared engines, at first without adapters. Afterwards nothing is left of a request."""
    llm = two_engines()
    core = llm.llm_engine
    for number in list(core.adapters.known):
        core.remove_lora(number)
    llm.reset_prefix_cache()
    assert core.list_loras() == set()
    yield llm
    assert not core.placed
    assert core.placement.work == [0, 0]
    assert next(m.value for m in llm.get_metrics() if m.name.endswith("usage_perc")) == 0


def test_adapters_reach_every_engine(several):
    names = ["all", None, "tables", "third", "other", None, "all"]
    prompts = random_prompts([5, 20, 9, 40, 1, 16, 33], seed=8)
    loras = [None if name is None else request(name) for name in names]
    outs = several.generate(prompts, GREEDY, use_tqdm=False, lora_request=loras)
    wanted = [expected(name, prompt) for name, prompt in zip(names, prompts)]
    assert [out.outputs[0].token_ids for out in outs] == wanted
    assert [out.lora_request for out in outs] == loras
    params = BeamSearchParams(beam_width=1, max_tokens=10, ignore_eos=True)
    beams = several.beam_search(PROMPTS[:2], params, lora_request=[request("all"), None])
    for out, prompt, name in zip(beams, PROMPTS, ["all", None]):
        assert out.sequences[0].tokens == prompt + expected(name, prompt)
    (out,) = several.chat([{"role": "user", "content": "the"}], GREEDY, False, request("all"))
    assert out.outputs[0].token_ids == expected("all", out.prompt_token_ids)


def test_a_prefix_is_found_again_with_the_same_adapter_only(several):
    (prompt,) = random_prompts([64], seed=2)
    cached = []
    for name in ["all", "other", "all", "other"]:
        (out,) = several.generate([prompt], GREEDY, use_tqdm=False, lora_request=request(name))
        cached.append(out.num_cached_tokens)
    assert cached == [0, 0, 63, 63]


def test_adapters_of_several_engines_are_listed_pinned_replaced_and_removed(several, tmp_path):
    core = several.llm_engine
    folder = tmp_path / "adapter"
    shutil.copytree(adapter("Qwen3", "all")[0], folder)
    mine = LoRARequest("mine", 50, str(folder))
    assert core.add_lora(mine)
    assert core.pin_lora(50)
    shutil.rmtree(folder)  # the engines have read it
    for name in ("other", "third", "rslora", "tables"):
        assert core.add_lora(request(name))
    assert len(core.list_loras()) == 3
    assert 50 in core.list_loras()
    assert tokens_of(several, mine) == [expected("all", prompt) for prompt in PROMPTS]
    stream = several.stream(PROMPTS, GREEDY, lora_request=mine)
    with pytest.raises(ValueError, match="lora_int_id=50 is used by unfinished requests"):
        core.remove_lora(50)
    stream.close()
    with pytest.raises(ValueError, match="give the adapter another number"):
        several.generate(PROMPTS, GREEDY, lora_request=LoRARequest("x", 50, "/elsewhere"))
    other = LoRARequest("x", 50, adapter("Qwen3", "other")[0], load_inplace=True)
    assert tokens_of(several, other) == [expected("other", prompt) for prompt in PROMPTS]
    assert core.remove_lora(50)
    assert not core.remove_lora(50)
    assert 50 not in core.list_loras()
    with pytest.raises(ValueError, match="lora_id=99 is not known"):
        core.pin_lora(99)


def test_a_refused_adapter_changes_nothing_in_several_engines(several):
    bad = LoRARequest("bad", 77, adapter("Qwen3", "all")[0] + "-nowhere")
    for call in (several.llm_engine.add_lora, lambda lora: tokens_of(several, lora)):
        with pytest.raises(ValueError, match="is no folder here"):
            call(bad)
    assert several.llm_engine.list_loras() == set()
    assert tokens_of(several, None) == [expected(None, prompt) for prompt in PROMPTS]


def test_a_request_that_cannot_be_sent_replaces_no_adapter(several):
    mine = LoRARequest("mine", 60, adapter("Qwen3", "all")[0])
    assert tokens_of(several, mine) == [expected("all", prompt) for prompt in PROMPTS]
    other = LoRARequest("mine", 60, adapter("Qwen3", "other")[0], load_inplace=True)
    params = SamplingParams(logits_processors=[lambda tokens, logits: logits])
    with pytest.raises(TypeError, match="a request cannot be sent"):
        several.generate(PROMPTS, params, use_tqdm=False, lora_request=other)
    same = LoRARequest("mine", 60, adapter("Qwen3", "all")[0])
    assert tokens_of(several, same) == [expected("all", prompt) for prompt in PROMPTS]


@pytest.mark.skipif(cpu.load() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [5, 32, 70])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_a_product_is_added_to_columns_of_a_matrix(dtype, columns, rows):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 64, generator=generator).to(dtype)[:, 16:48]
    weight = torch.randn(columns, 32, generator=generator).to(dtype)
    out = torch.randn(rows, 100, generator=generator).to(dtype)
    wanted = out.double()
    wanted[:, 10 : 10 + columns] += x.double() @ weight.double().T
    cpu.to_panels(weight)
    assert cpu.add_linear_panels(out[:, 10 : 10 + columns], x, weight)
    torch.testing.assert_close(out, wanted.to(dtype), rtol=2**-6, atol=2e-2)
