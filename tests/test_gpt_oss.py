"""gpt-oss: the same tokens as transformers, from floats, MXFP4 and GGUF files, whole and sharded."""

from __future__ import annotations

import copy
import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import Q, finish, gguf, pack, start_gguf
from safetensors.torch import load_file, save_file
from tiny import greedy, make_llm, next_logits, random_prompts, session_folder, tiny_model
from torch import Tensor
from transformers import GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from nanovllm import LLM, SamplingParams
from nanovllm.kernels import cpu, moe, moe_cpu
from nanovllm.layers.rotary import rope_frequencies
from nanovllm.loader.gpt_oss import split_experts
from nanovllm.loader.mxfp4 import Mxfp4Matrix

WINDOW = 24
SIZES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "head_dim": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": WINDOW,
    "swiglu_limit": 1.5,  # small, so that numbers of this size are clamped
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = random_prompts([1, 15, 60, 33, 24, 90, 25, 5], seed=3)
EXPERTS = ("gate_up_proj", "down_proj")


@cache
def floats() -> tuple[str, Any]:
    """(folder, transformers model) in float32."""
    return tiny_model(session_folder() / "GptOss", "GptOss", **SIZES)


@cache
def expected() -> list[list[int]]:
    return [greedy(floats()[1], prompt, GREEDY.max_tokens) for prompt in PROMPTS]


def engine(folder: str, **kwargs: Any) -> LLM:
    return make_llm(folder, skip_tokenizer_init=True, device="cpu", **kwargs)


def tokens_of(llm: LLM, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return [out.outputs[0].token_ids for out in llm.generate(prompts, GREEDY, use_tqdm=False)]


def metric(llm: LLM, name: str) -> float:
    return next(m.value for m in llm.get_metrics() if m.name.endswith(name))


# -- an MXFP4 checkpoint ---------------------------------------------------------------------------


def blocks_of(matrices: Tensor) -> np.ndarray:
    """float32 [..., columns] -> uint8 [..., columns / 32, 17], by the gguf package's quantiser."""
    rows = matrices.reshape(-1, matrices.shape[-1]).numpy()
    packed = gguf.quants.quantize(rows, Q.MXFP4)
    return packed.reshape(*matrices.shape[:-1], -1, 17)


def hub_layout(packed: np.ndarray) -> tuple[Tensor, Tensor]:
    """Blocks of GGUF -> (codes [..., 16] of neighbouring pairs, scales), as the hub has them."""
    bytes = packed[..., 1:]
    codes = np.concatenate((bytes & 15, bytes >> 4), axis=-1)  # [..., 32]
    pairs = codes[..., 0::2] | codes[..., 1::2] << 4
    return torch.from_numpy(pairs), torch.from_numpy(packed[..., 0].copy())


@cache
def mxfp4() -> tuple[str, Any]:
    """(folder of an MXFP4 checkpoint, transformers model of the dequantised weights)."""
    folder = session_folder() / "GptOss-mxfp4"
    folder.mkdir()
    source, model = floats()
    model = type(model)(model.config).eval()
    state = load_file(Path(source, "model.safetensors"))
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.endswith(EXPERTS):
            stored[name] = tensor
            continue
        packed = blocks_of(tensor.mT)  # [E, outputs, blocks, 17]
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = hub_layout(packed)
        flat = gguf.dequantize(packed.reshape(1, -1), Q.MXFP4)
        state[name] = torch.from_numpy(flat).view_as(tensor.mT).mT
    model.load_state_dict(state)
    save_file(stored, folder / "model.safetensors")
    config = json.loads(Path(source, "config.json").read_text())
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder), model


@cache
def gguf_file(feed_forward_length: int | None = None) -> str:
    """The MXFP4 checkpoint as llama.cpp's conversion script writes it. Other matrices are F16.

    feed_forward_length: of the metadata, if it is not that of the experts.
    """
    _, model = mxfp4()
    config = model.config
    path = session_folder() / f"gpt-oss-{feed_forward_length}.gguf"
    stated = copy.copy(config)
    stated.intermediate_size = feed_forward_length or config.intermediate_size
    writer = start_gguf(path, stated, "gpt-oss", config.rope_parameters)
    writer.add_sliding_window(config.sliding_window)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT_OSS, config.num_hidden_layers)
    for name, tensor in gguf_parameters(model).items():
        stored = names.get_name(name, (".weight", ".bias"))
        array = np.ascontiguousarray(tensor.numpy())
        if ".experts." in name and array.ndim == 3:
            rows = pack(array.reshape(-1, array.shape[2]), Q.MXFP4)
            blocks = rows.reshape(*array.shape[:2], -1)
            writer.add_tensor(stored, blocks, raw_dtype=Q.MXFP4)
        else:
            kind = Q.F16 if is_half(name, tensor) else Q.F32
            writer.add_tensor(stored, pack(array, kind), raw_dtype=kind)
    finish(writer)
    return str(path)


def gguf_parameters(model: Any) -> dict[str, Tensor]:
    """The parameters of transformers' model by the names that the gguf package maps."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        kind = "bias" if name.endswith("_bias") else "weight"
        is_expert = ".experts." in name and kind == "weight"
        matrix = tensor.mT if is_expert else tensor
        if "gate_up_proj" in name:
            gate, up = matrix.unflatten(1, (-1, 2)).unbind(2)
            experts = name.partition(".gate_up_proj")[0]
            found[f"{experts}.gate_proj.{kind}"] = gate
            found[f"{experts}.up_proj.{kind}"] = up
        elif ".experts.down_proj" in name:
            found[f"{name.removesuffix('_bias')}.{kind}"] = matrix
        elif name.endswith("sinks"):
            found[f"{name}.weight"] = tensor
        else:
            found[name] = tensor
    return found


@cache
def expected_of_mxfp4() -> list[list[int]]:
    return [greedy(mxfp4()[1], prompt, GREEDY.max_tokens) for prompt in PROMPTS]


def weight_types(llm: LLM) -> set[str]:
    """The types in which the engine keeps the experts."""
    model = llm.llm_engine.executor.runner.model
    found: set[str] = set()
    for layer in model.model.layers:
        for name in EXPERTS:
            types = getattr(getattr(layer.mlp.experts, name).storage, "types", {0: "floats"})
            found |= set(types.values())
    return found


# -- the same tokens as transformers ---------------------------------------------------------------


def test_tokens_equal_transformers_with_chunks_preemption_and_prefix_hits() -> None:
    llm = engine(
        floats()[0],
        max_num_batched_tokens=32,
        num_gpu_blocks_override=10,
        max_model_len=112,
        max_num_seqs=8,
    )
    assert tokens_of(llm) == expected()
    assert metric(llm, "preemptions") > 0
    hits = metric(llm, "prefix_cache_hits")
    assert tokens_of(llm, PROMPTS[5:6] * 2) == expected()[5:6] * 2
    assert metric(llm, "prefix_cache_hits") > hits
    assert [tokens_of(llm, [prompt])[0] for prompt in PROMPTS[:3]] == expected()[:3]


@pytest.mark.parametrize(
    ("checkpoint", "kwargs", "tolerance"),
    [
        (floats, {}, 1e-4),
        (mxfp4, {"quantization": "none"}, 1e-4),
        (mxfp4, {}, 1e-3),  # products with blocks round their inputs to 16 bits
    ],
)
def test_log_probabilities_equal_transformers(
    checkpoint: Any, kwargs: dict[str, Any], tolerance: float
) -> None:
    folder, model = checkpoint()
    llm = engine(folder, max_logprobs=-1, **kwargs)
    params = SamplingParams(max_tokens=1, prompt_logprobs=-1)
    prompt = PROMPTS[5]
    (out,) = llm.generate([prompt], params, use_tqdm=False)
    wanted = next_logits(model, prompt).log_softmax(-1)
    for at, found in enumerate(out.prompt_logprobs[1:]):
        ours = torch.tensor([found[token].logprob for token in range(wanted.shape[1])])
        torch.testing.assert_close(ours, wanted[at], atol=tolerance, rtol=0)


def test_experts_in_mxfp4_stay_as_they_are_stored() -> None:
    llm = engine(mxfp4()[0], max_num_batched_tokens=32, max_num_seqs=8)
    assert weight_types(llm) == {"MXFP4"}
    assert tokens_of(llm) == expected_of_mxfp4()
    layer = llm.llm_engine.executor.runner.model.model.layers[0].mlp
    numbers = 4 * (2 * 128 * 64 + 64 * 128)
    stored = sum(getattr(layer.experts, name).weight.nbytes for name in EXPERTS)
    assert stored < numbers * 5 // 8  # bytes


def test_experts_in_mxfp4_are_dequantised_on_demand(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="nanovllm"):
        llm = engine(mxfp4()[0], quantization="none")
    assert weight_types(llm) == {"floats"}
    assert tokens_of(llm) == expected_of_mxfp4()
    lines = [record.message for record in caplog.records if "MXFP4" in record.message]
    assert lines == [
        "experts in MXFP4 are dequantised to torch.float32, because of quantization='none'"
    ]


def test_small_steps_are_recorded() -> None:
    if cpu.load() is None:
        pytest.skip("cpu.cpp does not build here (no C++ compiler)")
    llm = engine(mxfp4()[0], quantization="mxfp4")
    for _ in range(3):
        assert tokens_of(llm) == expected_of_mxfp4()
    programs = llm.llm_engine.executor.runner.programs
    assert not programs.reported
    assert len(PROMPTS) in {kind.num_tokens for kind in programs.programs}


@pytest.mark.parametrize("feed_forward_length", [None, 96])
def test_a_gguf_file_gives_the_same_tokens(feed_forward_length: int | None) -> None:
    """Experts are as in the checkpoint, and other matrices are rounded to float16.

    Files do not say where the SwiGLU is clamped: all released models have 7.
    """
    _, model = mxfp4()
    config = copy.deepcopy(model.config)
    config.swiglu_limit = 7.0
    rounded = type(model)(config).eval()
    rounded.load_state_dict(
        {
            name: tensor.half().float() if is_half(name, tensor) else tensor
            for name, tensor in model.state_dict().items()
        }
    )
    path = gguf_file(feed_forward_length)
    llm = engine(path, max_num_batched_tokens=32, max_num_seqs=8)
    assert weight_types(llm) == {"MXFP4"}
    assert tokens_of(llm) == [greedy(rounded, prompt, GREEDY.max_tokens) for prompt in PROMPTS]


def is_half(name: str, tensor: Tensor) -> bool:
    """Whether the file has a parameter in float16."""
    return tensor.ndim == 2 and not any(part in name for part in (".router.", "bias"))


@pytest.mark.parametrize("kwargs", [{}, {"enable_expert_parallel": True}])
def test_two_ranks_share_heads_and_experts(kwargs: dict[str, Any]) -> None:
    llm = engine(mxfp4()[0], tensor_parallel_size=2, **kwargs)
    try:
        assert tokens_of(llm) == expected_of_mxfp4()
        assert weight_types(llm) == {"MXFP4"}
    finally:
        llm.llm_engine.executor.close()


def test_weights_of_a_trainer_replace_the_old_ones() -> None:
    """Tensors in the form that transformers has in memory."""
    llm = engine(mxfp4()[0])
    state = floats()[1].state_dict()
    llm.collective_rpc(lambda worker: worker.model_runner.model.load_weights(state.items()))
    assert tokens_of(llm) == expected()


# -- parts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_definition_of_the_clamped_swiglu_equals_transformers(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The C++ kernel is compared with a formula in test_moe.py."""
    monkeypatch.setattr(moe_cpu, "clamped_swiglu", lambda *arguments: None)
    x = (torch.randn(5, 140, generator=torch.Generator().manual_seed(0)) * 8).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    both = torch.stack((gate, up), dim=-1).flatten(1)
    theirs = GptOssExperts._apply_gate(torch.nn.Module.__new__(LimitsOnly), both)
    ours = moe.clamped_swiglu(x, LimitsOnly.alpha, LimitsOnly.limit)
    torch.testing.assert_close(ours, theirs.to(dtype))


class LimitsOnly(GptOssExperts):
    """What `_apply_gate` reads of the experts."""

    alpha = 1.702
    limit = 7.0


@pytest.mark.parametrize("truncate", [False, True])
def test_yarn_of_the_released_models_equals_transformers(truncate: bool) -> None:
    config = GptOssConfig()
    config.rope_parameters["truncate"] = truncate
    theirs, factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    ours, scale = rope_frequencies(config.rope_parameters, config.head_dim, 131072)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert scale == pytest.approx(factor)


def test_mxfp4_matrices_equal_transformers() -> None:
    """Whole and in slices, dequantised and as blocks of a GGUF file."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (2, 6, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 150, (2, 6, 3), generator=generator, dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(codes, scales, dtype=torch.float32)  # transposed
    whole = theirs[1].T[1::2]
    matrix = Mxfp4Matrix(codes, scales, expert=1, first=1, step=2)
    assert torch.equal(matrix[...], whole)
    assert torch.equal(matrix[1:3], whole[1:3])
    assert torch.equal(matrix[:, 40:90], whole[:, 40:90])
    part = (slice(1, 3), slice(32, 96))
    found = matrix.blocks(part)
    assert found is not None
    numbers = gguf.dequantize(found.rows[found.row_order], Q.MXFP4)
    np.testing.assert_array_equal(numbers, whole[part].numpy())
    assert matrix.blocks((slice(None), slice(16, 96))) is None


# -- what does not fit is a sentence ---------------------------------------------------------------


def test_codes_without_scales_are_refused() -> None:
    codes = torch.zeros(2, 6, 3, 16, dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.down_proj"
    with pytest.raises(ValueError, match=r"down_proj_blocks has no .*down_proj_scales beside it"):
        list(split_experts([(f"{name}_blocks", codes)]))
    pair = [(f"{name}_blocks", codes), (f"{name}_scales", torch.zeros(2, 6, 4))]
    with pytest.raises(
        ValueError, match=r"accepted are uint8 blocks \[experts, rows, blocks, 16\]"
    ):
        list(split_experts(pair))


def test_other_formats_are_refused(tmp_path: Path) -> None:
    source, _ = floats()
    config = json.loads(Path(source, "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(Path(source, "model.safetensors"))
    with pytest.raises(ValueError, match=r"quant_method is 'fp8'; .* other than GGUF and mxfp4"):
        engine(str(tmp_path))
    with pytest.raises(ValueError, match=r"quantization='mxfp4': .* holds no weights in mxfp4"):
        engine(source, quantization="mxfp4")
