"""Writes a GGUF file of a Qwen3-MoE with random weights: python -m benchmarks.moe_file PATH.

The layers have the sizes of Qwen3-30B-A3B. There are fewer of them, and fewer tokens in the
vocabulary, so that the file is small and experts take most of a step. Blocks are random
bytes with scales of a sane size, because speed does not depend on them. The router has
random weights, so tokens use all experts alike.
"""

from __future__ import annotations

import argparse
from typing import Any

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 2048, 32, 4, 128
EXPERTS, EXPERTS_PER_TOKEN, EXPERT_SIZE = 128, 8, 768
Q = gguf.GGMLQuantizationType
# The bytes of a block that hold float16 scales.
SCALES = {"Q4_0": [0], "Q8_0": [0], "Q4_K": [0, 2], "Q6_K": [208]}
# File format -> the types of most matrices, and of FINER, which llama.cpp stores finer.
FORMATS = {"Q4_0": ("Q4_0", "Q4_0"), "Q8_0": ("Q8_0", "Q8_0"), "Q4_K_M": ("Q4_K", "Q6_K")}
FINER = ("output", "attn_v", "ffn_down_exps")


def layer_shapes() -> dict[str, tuple[int, ...]]:
    """Name of a tensor in a layer, without ".weight" -> its shape."""
    return {
        "attn_norm": (HIDDEN,),
        "attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_q_norm": (HEAD_DIM,),
        "attn_k_norm": (HEAD_DIM,),
        "attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "ffn_norm": (HIDDEN,),
        "ffn_gate_inp": (EXPERTS, HIDDEN),
        "ffn_gate_exps": (EXPERTS, EXPERT_SIZE, HIDDEN),
        "ffn_up_exps": (EXPERTS, EXPERT_SIZE, HIDDEN),
        "ffn_down_exps": (EXPERTS, HIDDEN, EXPERT_SIZE),
    }


def random_blocks(kind: Any, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """uint8 [*shape[:-1], bytes]: weights of a standard deviation of about 0.02."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows = int(np.prod(shape[:-1]))
    blocks = rng.integers(0, 256, (rows * shape[-1] // block, block_bytes), np.uint8)
    for at in SCALES[kind.name]:
        blocks[:, at : at + 2] = np.array([1.0], np.float16).view(np.uint8)
    unit = gguf.dequantize(blocks[:256].reshape(1, -1), kind).std()
    scales = rng.normal(0, 0.02 / unit, (len(blocks), 1)).astype(np.float16)
    for at in SCALES[kind.name]:
        blocks[:, at : at + 2] = scales.view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def start(path: str, num_layers: int, vocab_size: int) -> Any:
    """A writer with the metadata, without a tokenizer."""
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(num_layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(6144)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(1000000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(EXPERTS_PER_TOKEN)
    writer.add_expert_feed_forward_length(EXPERT_SIZE)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(vocab_size)
    return writer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--format", choices=FORMATS, default="Q4_0")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=16384)
    args = parser.parse_args()
    plain, finer = FORMATS[args.format]
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (args.vocab, HIDDEN),
        "output_norm": (HIDDEN,),
        "output": (args.vocab, HIDDEN),
    }
    for layer in range(args.layers):
        shapes.update({f"blk.{layer}.{name}": shape for name, shape in layer_shapes().items()})
    writer = start(args.path, args.layers, args.vocab)
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        stem = name.rpartition(".")[2]
        # llama.cpp stores the down projections of every other layer finer.
        is_finer = stem in FINER and not (stem == "ffn_down_exps" and int(name.split(".")[1]) % 2)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
        elif stem == "ffn_gate_inp":
            router = rng.normal(0, 0.05, shape).astype(np.float32)
            writer.add_tensor(f"{name}.weight", router)
        else:
            kind = Q[finer if is_finer else plain]
            writer.add_tensor(f"{name}.weight", random_blocks(kind, shape, rng), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
