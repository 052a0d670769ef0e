"""Writes GGUF files as llama.cpp's conversion script does, with the gguf package.

Quantisers of the package make the blocks. Blocks of the types that it only reads are random bytes
with scales of a sane size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

gguf = pytest.importorskip("gguf")
Q = gguf.GGMLQuantizationType
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
FAMILIES: dict[str, tuple[Any, Any, Any]] = {
    "llama": (gguf.MODEL_ARCH.LLAMA, LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True)),
    "llama-tied": (
        gguf.MODEL_ARCH.LLAMA,
        LlamaForCausalLM,
        LlamaConfig(**SIZES, tie_word_embeddings=True),
    ),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, Qwen2ForCausalLM, Qwen2Config(**{**SIZES, "head_dim": 16})),
    "qwen3": (
        gguf.MODEL_ARCH.QWEN3,
        Qwen3ForCausalLM,
        Qwen3Config(**SIZES, tie_word_embeddings=True),
    ),
    "gemma2": (
        gguf.MODEL_ARCH.GEMMA2,
        Gemma2ForCausalLM,
        Gemma2Config(
            **SIZES,
            sliding_window=16,
            query_pre_attn_scalar=32,
            attn_logit_softcapping=20.0,
            final_logit_softcapping=15.0,
        ),
    ),
    "gemma3": (
        gguf.MODEL_ARCH.GEMMA3,
        Gemma3ForCausalLM,
        Gemma3TextConfig(**SIZES, sliding_window=16, query_pre_attn_scalar=32),
    ),
}
# The bytes of a block that hold float16 scales.
SCALES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
    "IQ2_XXS": [0],
    "TQ1_0": [52],
    "MXFP4": [],
}


def state(model: Any) -> dict[str, torch.Tensor]:
    tied = model.config.tie_word_embeddings
    return {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}


def start_gguf(path: Path, config: Any, arch: str, rope: dict[str, Any] | None = None) -> Any:
    """A writer that holds what llama.cpp's conversion script says of such a config."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    if getattr(config, "sliding_window", None) and "gemma" in arch:
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    rope = rope or {}
    if arch == "gemma3":
        rope = config.rope_parameters["full_attention"]
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    return writer


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(path: Path, family: str, model: Any, kind: Any = Q.F32) -> Path:
    """The model as llama.cpp would convert it: its names, its row order of Q and K for Llama,
    matrices quantised.
    """
    return write_mixture(path, family, model, lambda _: kind)


def write_mixture(path: Path, family: str, model: Any, kind_of: Callable[[str], Any]) -> Path:
    """The same with the type `kind_of(name in the file)` for each matrix."""
    arch = FAMILIES[family][0]
    writer = start_gguf(path, model.config, gguf.MODEL_ARCH_NAMES[arch])
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    for name, tensor in state(model).items():
        array = tensor.numpy()
        heads = rotated_heads(family, model.config, name)
        if heads:
            array = swap_rows(array, heads, 2, -1)
        array = array + norm_offset(family, name)
        stored = names.get_name(name, (".weight", ".bias"))
        kind = kind_of(stored) if array.ndim == 2 else Q.F32
        writer.add_tensor(stored, pack(np.ascontiguousarray(array), kind), raw_dtype=kind)
    finish(writer)
    return path


def norm_offset(family: str, name: str) -> np.float32:
    """llama.cpp adds 1 to the weights of Gemma's norms."""
    is_norm = family.startswith("gemma") and name.endswith("norm.weight")
    return np.float32(1.0 if is_norm else 0.0)


def rotated_heads(family: str, config: Any, name: str) -> int:
    """The heads of a matrix whose rows llama.cpp reorders. 0 for other matrices."""
    if not family.startswith("llama"):
        return 0
    if "q_proj" in name:
        return config.num_attention_heads
    return config.num_key_value_heads if "k_proj" in name else 0


def swap_rows(array: np.ndarray, heads: int, first: int, second: int) -> np.ndarray:
    """Rows (head, first, second) as rows (head, second, first)."""
    rows = array.reshape(heads, first, second, *array.shape[1:])
    return rows.swapaxes(1, 2).reshape(array.shape)


@torch.no_grad()
def read_back(path: Path, family: str, model: Any) -> Any:
    """Fills the model with what the file holds, as gguf.dequantize gives it, and returns it."""
    arch = FAMILIES[family][0]
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, tensor in state(model).items():
        found = stored[names.get_name(name, (".weight", ".bias"))]
        array = numbers_of(found).reshape(tensor.shape)
        heads = rotated_heads(family, model.config, name)
        if heads:
            array = swap_rows(array, heads, -1, 2)
        array = array - norm_offset(family, name)
        tensor.copy_(torch.from_numpy(array.astype(np.float32)))
    return model


def numbers_of(tensor: Any) -> np.ndarray:
    """The weights of a gguf.ReaderTensor, in one row.

    A few blocks at a time, in one row: the package is much slower with many rows.
    """
    kind = tensor.tensor_type
    size = gguf.GGML_QUANT_SIZES[kind][1] << 12 if tensor.data.dtype == np.uint8 else 1 << 17
    flat = tensor.data.reshape(-1)
    parts = [flat[at : at + size].reshape(1, -1) for at in range(0, len(flat), size)]
    return np.concatenate([gguf.dequantize(part, kind).reshape(-1) for part in parts])


# Blocks


def pack(array: np.ndarray, kind: Any) -> np.ndarray:
    """float32 [rows, depth] in blocks, as uint8 [rows, bytes] or as floats.

    The blocks are random where the package has no quantiser for the type.
    """
    try:
        return gguf.quants.quantize(array, kind)
    except NotImplementedError:
        return random_blocks(kind, *array.shape, spread=float(array.std()))


def random_blocks(kind: Any, rows: int, depth: int, spread: float = 0.1, seed: int = 0) -> Any:
    """uint8 [rows, bytes]: any codes, and scales that give weights of this standard deviation.

    Scales have both signs.
    """
    rng = np.random.default_rng([seed, int(kind), rows, depth])
    if kind.name in ("F32", "F16", "BF16"):
        array = rng.normal(0, spread, (rows, depth)).astype(np.float32)
        return gguf.quants.quantize(array, kind).view(np.uint8).reshape(rows, -1)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows, depth // block, block_bytes), np.uint8)
    if kind.name == "MXFP4":
        blocks[:, :, 0] = rng.integers(118, 126, blocks.shape[:2])  # 2^(e - 128)
        return blocks.reshape(rows, -1)
    set_scales(blocks, kind, np.ones((len(SCALES[kind.name]), *blocks.shape[:2])))
    unit = gguf.dequantize(blocks.reshape(rows, -1), kind).std()
    scales = rng.normal(0, spread / unit, (len(SCALES[kind.name]), *blocks.shape[:2]))
    set_scales(blocks, kind, scales)
    return blocks.reshape(rows, -1)


def set_scales(blocks: np.ndarray, kind: Any, scales: np.ndarray) -> None:
    """blocks: uint8 [rows, blocks, bytes]. scales: [scales of a block, rows, blocks]."""
    for at, numbers in zip(SCALES[kind.name], scales):
        blocks[:, :, at : at + 2] = numbers.astype(np.float16)[..., None].view(np.uint8)


def dequantise(packed: np.ndarray, kind: Any, depth: int) -> torch.Tensor:
    """uint8 [rows, bytes] -> float64 [rows, depth], by the gguf package."""
    plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    numbers = gguf.dequantize(packed if plain is None else packed.view(plain), kind)
    return torch.from_numpy(numbers.astype(np.float64).reshape(-1, depth))
