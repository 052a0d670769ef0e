"""How matrices lie in memory: names and rows are as in checkpoints, for every format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import make_llm, random_prompts, shared_model
from torch import nn

from nanovllm import SamplingParams
from nanovllm.kernels import cpu
from nanovllm.weights.dense import DenseWeight
from nanovllm.weights.lora import LoRARows, LoRAWeight
from nanovllm.weights.panels import PanelWeight
from nanovllm.weights.select import new_weight

needs_library = pytest.mark.skipif(
    cpu.load() is None, reason="cpu.cpp does not build here (no C++ compiler)"
)
NAMES = {
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.qkv_proj.weight",
    "model.layers.0.self_attn.q_norm.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
}


@pytest.fixture(scope="module")
def model() -> Any:
    return make_llm(dtype="bfloat16").llm_engine.executor.runner.model


def test_parameters_have_the_names_of_modules(model: Any) -> None:
    names = {name for name, _ in model.named_parameters()}
    assert names >= NAMES
    assert names == set(model.state_dict())
    assert all(isinstance(model.get_parameter(name), nn.Parameter) for name in names)


def test_unpacked_weights_are_the_rows_of_the_checkpoint(model: Any) -> None:
    theirs = shared_model()[1].state_dict()
    prefix = "model.layers.1.self_attn"
    rows = torch.cat([theirs[f"{prefix}.{name}_proj.weight"] for name in "qkv"]).bfloat16()
    weight = model.get_parameter(f"{prefix}.qkv_proj.weight")
    before = weight.clone()
    with model.unpacked():
        assert torch.equal(weight, rows)
        assert torch.equal(model.lm_head.weight, theirs["lm_head.weight"].bfloat16())
    assert torch.equal(weight, before)


@pytest.mark.parametrize("kind", [DenseWeight, PanelWeight, LoRAWeight])
def test_swiglu_of_a_weight_is_silu_of_the_gate_times_the_rest(kind: type) -> None:
    if kind is PanelWeight and cpu.load() is None:
        pytest.skip("there are no panels without a C++ compiler")
    layer = nn.Module()
    weight = (PanelWeight if kind is PanelWeight else DenseWeight)(layer, 64, 32)
    rows = torch.randn(64, 32) / 6
    layer.get_parameter("weight").data.copy_(rows)
    weight.finish_loading(layer)
    if kind is LoRAWeight:
        weight = LoRAWeight(weight, LoRARows())
    x, bias = torch.randn(5, 32), torch.randn(64)
    gate, up = (x.double() @ rows.double().T + bias.double()).chunk(2, dim=1)
    out = weight.swiglu(layer, x, bias)
    torch.testing.assert_close(out.double(), gate * gate.sigmoid() * up, atol=1e-5, rtol=1e-5)


def test_what_is_written_while_unpacked_is_used() -> None:
    llm = make_llm()
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    prompts = random_prompts([5, 20])
    before = [out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)]
    model = llm.llm_engine.executor.runner.model
    with model.unpacked():
        model.lm_head.weight.data.copy_(model.lm_head.weight.flip(0).clone())
    llm.reset_prefix_cache()
    first = [out.outputs[0].token_ids[0] for out in llm.generate(prompts, params, use_tqdm=False)]
    assert first == [299 - tokens[0] for tokens in before], (
        "the largest logit is now that of the mirrored id"
    )


@needs_library
@pytest.mark.parametrize(
    ("dtype", "in_features", "format_"),
    [
        (torch.float32, 33, PanelWeight),
        (torch.bfloat16, 64, PanelWeight),
        (torch.float16, 64, PanelWeight),
        (torch.float64, 64, DenseWeight),
    ],
)
def test_a_cpu_has_panels_wherever_it_has_kernels(
    dtype: torch.dtype, in_features: int, format_: type
) -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        layer = nn.Module()
        weight = new_weight(layer, 40, in_features)
    finally:
        torch.set_default_dtype(default)
    assert type(weight) is format_
    assert layer.weight.shape == (40, in_features)
