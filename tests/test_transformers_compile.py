"""transformers' own code under torch.compile: equal tokens, one graph, and no stale code.

GPUs compile by default, and CPUs do not. So the tests turn it on, and matrices are as on GPUs.
Most tests take the graph and leave out Inductor, which takes long.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lora import PROMPTS, engine, expected, request
from test_lora import tokens_of as adapted_tokens
from test_transformers_backend import IDS, make_llm, tokens_of
from tiny import greedy, tiny_model
from tiny_decoders import VOCAB_SIZE, tiny_decoder
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from nanovllm import LLM, SamplingParams, kernels
from nanovllm.kernels import cpu
from nanovllm.models.transformers_attention import PAGES


@pytest.fixture(autouse=True)
def as_on_gpus(monkeypatch):
    """Matrices are not in panels, and torch multiplies them."""
    monkeypatch.setattr(cpu, "fits_panels", lambda depth, dtype: False)
    monkeypatch.setattr(kernels, "linear", F.linear)
    monkeypatch.setattr(kernels, "embedding", F.embedding)
    counters.clear()


@pytest.fixture
def qwen3(tmp_path):
    return tiny_model(tmp_path / "qwen3", "Qwen3", vocab_size=VOCAB_SIZE)


def compiled_llm(folder: str | Path, backend: str = "eager", **kwargs: Any) -> LLM:
    llm = make_llm(folder, **kwargs)
    compile_model(llm, backend)
    return llm


def compile_model(llm: LLM, backend: Any = "eager") -> None:
    llm.llm_engine.executor.runner.compile_model(backend)


def expected_tokens(model: Any) -> list[list[int]]:
    return [greedy(model, ids, 12) for ids in IDS]


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.message for each in caplog.records if "without torch.compile" in each.message]


# -- what is compiled ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "backend"),
    [
        ("Qwen3ForCausalLM", "aot_eager"),
        ("CohereForCausalLM", "aot_eager"),
        ("GptOssForCausalLM", "eager"),
    ],
)
def test_tokens_are_those_of_transformers(tmp_path, caplog, architecture, backend):
    """Steps of many sizes take two graphs, one of them for a single token, without breaks."""
    folder, model = tiny_decoder(tmp_path, architecture)
    llm = compiled_llm(folder, backend)
    with caplog.at_level(logging.WARNING, logger="nanovllm"):
        assert tokens_of(llm) == expected_tokens(model)
        for ids, tokens in zip(IDS, expected_tokens(model)):
            params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
            assert llm.generate([ids], params, use_tqdm=False)[0].outputs[0].token_ids == tokens
    assert not warnings_of(caplog)
    assert not counters["graph_break"]
    assert num_graphs() == 2


def test_tokens_of_inductor_are_those_of_transformers(tmp_path, caplog):
    folder, model = tiny_model(tmp_path, "Qwen3", vocab_size=VOCAB_SIZE, num_hidden_layers=1)
    llm = compiled_llm(folder, "inductor")
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outs = llm.generate(IDS[1:3], params, use_tqdm=False)
    tokens = [out.outputs[0].token_ids for out in outs]
    assert tokens == [greedy(model, ids, 12) for ids in IDS[1:3]]
    assert not warnings_of(caplog)
    assert num_graphs() == 1


def test_a_cpu_does_not_compile_by_default(qwen3):
    assert make_llm(qwen3[0]).llm_engine.executor.runner.compiled is None


def test_our_own_models_are_not_compiled(qwen3):
    llm = make_llm(qwen3[0], model_impl="vllm")
    compile_model(llm)
    assert llm.llm_engine.executor.runner.compiled is None


def test_two_engines_share_no_code(tmp_path):
    folders = [tiny_decoder(tmp_path / each, f"{each}ForCausalLM") for each in ("Llama", "Cohere")]
    llms = [compiled_llm(folder) for folder, _ in folders]
    for _ in range(2):
        for llm, (_, model) in zip(llms, folders):
            assert tokens_of(llm) == expected_tokens(model)


def test_more_engines_of_one_family_than_torch_keeps_versions_of_a_function(qwen3, caplog):
    first = expected_tokens(qwen3[1])
    limit = torch._dynamo.config.recompile_limit
    with torch._dynamo.config.patch(recompile_limit=2):
        assert limit > 2
        for _ in range(3):
            assert tokens_of(compiled_llm(qwen3[0])) == first
    assert not warnings_of(caplog)


def test_a_deleted_engine_is_freed(qwen3):
    gc.collect()
    before = len(PAGES)
    llm = compiled_llm(qwen3[0])
    tokens_of(llm)
    model = weakref.ref(llm.llm_engine.executor.runner.model)
    assert len(PAGES) == before + 2
    del llm
    gc.collect()
    assert model() is None
    assert len(PAGES) == before


def test_a_model_that_does_not_compile_runs_eagerly_and_one_line_says_why(qwen3, caplog):
    def broken(graph: Any, inputs: Any) -> Callable[..., Any]:
        raise NotImplementedError("no such vector")

    llm = make_llm(qwen3[0])
    compile_model(llm, broken)
    for _ in range(2):
        assert tokens_of(llm) == expected_tokens(qwen3[1])
    (line,) = warnings_of(caplog)
    assert "torch.compile failed" in line
    assert "no such vector" in line


# -- changes after the compilation -----------------------------------------------------------------


@pytest.fixture
def running(qwen3):
    """(an engine whose model is compiled, transformers' model)."""
    llm = compiled_llm(qwen3[0], enable_sleep_mode=True)
    tokens_of(llm)
    return llm, qwen3[1]


def doubled(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


def test_a_hook_takes_effect_and_so_does_its_removal(running, caplog):
    llm, model = running
    handles = llm.apply_model(lambda own: layer(own).register_forward_hook(doubled))
    handles.append(layer(model).register_forward_hook(doubled))
    llm.reset_prefix_cache()
    with_hook = expected_tokens(model)
    assert tokens_of(llm) == with_hook
    assert "it was changed after it was compiled" in warnings_of(caplog)[0]
    for handle in handles:
        handle.remove()
    llm.reset_prefix_cache()
    assert tokens_of(llm) == expected_tokens(model) != with_hook


def test_a_hook_before_the_first_step_takes_effect(qwen3, caplog):
    llm = compiled_llm(qwen3[0])
    llm.apply_model(lambda own: layer(own).register_forward_hook(doubled))
    layer(qwen3[1]).register_forward_hook(doubled)
    assert tokens_of(llm) == expected_tokens(qwen3[1])
    assert "it has a forward hook" in warnings_of(caplog)[0]


def layer(model: Any) -> nn.Module:
    return model.model.layers[0].mlp


def set_relu(model: Any) -> None:
    layer(model).act_fn = nn.ReLU()


def set_eps(model: Any) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 50.0


def set_method(model: Any) -> None:
    forward = layer(model).forward
    layer(model).forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize("change", [set_relu, set_eps, set_method])
def test_changed_modules_take_effect(running, change):
    llm, model = running
    before = expected_tokens(model)
    llm.apply_model(change)
    llm.reset_prefix_cache()
    change(model)
    assert tokens_of(llm) == expected_tokens(model) != before


def test_replaced_parameters_are_read_by_the_compiled_code(running, caplog):
    llm, model = running
    graphs, before = num_graphs(), expected_tokens(model)

    def replace(model: Any) -> None:
        old = layer(model).down_proj.weight
        layer(model).down_proj.weight = nn.Parameter(3 * old, requires_grad=False)

    llm.apply_model(replace)
    llm.reset_prefix_cache()
    replace(model)
    assert tokens_of(llm) == expected_tokens(model) != before
    assert num_graphs() == graphs
    assert not warnings_of(caplog)


@pytest.mark.parametrize("level", [1, 2])
def test_weights_that_slept_are_read_by_the_compiled_code(running, caplog, level):
    llm, model = running
    graphs = num_graphs()
    llm.sleep(level)
    llm.wake_up()
    assert tokens_of(llm) == expected_tokens(model)
    assert num_graphs() == graphs
    assert not warnings_of(caplog)


def test_adapters_take_effect(caplog):
    """Steps with adapters run eagerly, and steps without them compiled."""
    llm = engine(model_impl="transformers")
    compile_model(llm)
    names = ["all", None, "other", "tables"]
    adapters = [None if name is None else request(name) for name in names]
    without = [expected(None, prompt) for prompt in PROMPTS]
    mixed = [expected(name, prompt) for name, prompt in zip(names, PROMPTS)]
    for asked, tokens in ((None, without), (adapters, mixed), (None, without)):
        assert adapted_tokens(llm, asked) == tokens
    assert num_graphs() == 1
    assert not warnings_of(caplog)
