"""The limit of a machine: the time of a workload if only its kernels took time.

Knows how fast the machine copies and multiplies, and the sizes of a model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.ours import Host, ModelConfig
from benchmarks.workloads import Workload

LARGE_GPU_STEP = 16384  # tokens: the default of vLLM and nanovllm on GPUs with 70 GiB and more


@dataclass
class Machine:
    """The speed of a machine.

    bandwidth: bytes a second that a large copy reads and writes. flops: floating-point
    operations a second of a large matrix product in the model's dtype.
    """

    bandwidth: float
    flops: float


def probe(device: str, dtype: str) -> Machine:
    """Measures the machine.

    The best of several tries counts, because other programs slow it.
    """
    source, target, a, b = probed_tensors(device, dtype)

    def best(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(8):
            start = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    bandwidth = 2 * source.nbytes / best(lambda: target.copy_(source))
    return Machine(bandwidth, 2 * len(a) ** 3 / best(lambda: a @ b))


def probed_tensors(device: str, dtype: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(source, target) of a copy and (a, b) of a product.

    On a GPU they take little memory, because an engine may use nearly all of it meanwhile.
    The two of the copy are several times as large as the caches of any GPU.
    """
    size = 8192 if device == "cuda" else 2048
    copied = 512 << 20 if device == "cuda" else 256 << 20  # bytes
    source = torch.zeros(copied // 4, device=device)
    target = torch.ones_like(source)
    # Drawn in their dtype, because float32 numbers would take twice the memory meanwhile.
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    return source, target, a, b


@dataclass
class Sizes:
    """The sizes of a model.

    The bytes of the K/V and of logits are for numbers of `itemsize` bytes.
    """

    matrices: list[tuple[int, int]]  # (out_features, in_features) of the matrices of one layer
    num_layers: int
    num_heads: int
    head_dim: int
    vocab_size: int
    hidden_size: int
    kv_bytes: int  # the K/V of one token in all layers
    weight_bytes: int
    itemsize: int
    weight_itemsize: float  # bytes of one weight, a fraction if weights are quantised


def sizes_of(config: ModelConfig, itemsize: int, weight_bytes: int | None = None) -> Sizes:
    """weight_bytes: of all weights. None: each weight has `itemsize` bytes."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    matrices = [(q + 2 * kv, hidden), (hidden, q), (2 * inner, hidden), (hidden, inner)]
    embeddings = config.vocab_size * hidden * (1 if config.tie_embeddings else 2)
    weights = config.num_layers * sum(a * b for a, b in matrices) + embeddings
    return Sizes(
        matrices=matrices,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        kv_bytes=2 * kv * config.num_layers * itemsize,
        weight_bytes=weights * itemsize if weight_bytes is None else weight_bytes,
        itemsize=itemsize,
        weight_itemsize=itemsize if weight_bytes is None else weight_bytes / weights,
    )


def limit(work: Workload, model: Sizes, machine: Machine, step_tokens: int) -> dict[str, float]:
    """Seconds that a workload takes if every kernel runs at its own roofline.

    Kernels run one after another, and the host takes no time. A kernel takes the longer
    of two times: its bytes at the copy bandwidth, and its operations at the matmul rate.
    In a pass attention reads the K/V of each context and writes the K/V of the new
    tokens. A matrix product reads its weights. The head writes the logits, and the
    sampler reads them.
    """
    attention = products = head = 0.0
    per_pair = 4 * model.num_layers * model.num_heads * model.head_dim
    longest = max(len(p) + n for p, n in zip(work.prompts, work.outputs))
    for starts, ends, sampled in Host(work.prompts, work.outputs, longest, step_tokens).passes():
        starts = starts.astype(np.int64)
        ends = ends.astype(np.int64)
        tokens = int((ends - starts).sum())
        pairs = int((ends * (ends + 1) // 2 - starts * (starts + 1) // 2).sum())
        kv = model.kv_bytes * (int(ends.sum()) + tokens)
        attention += max(kv / machine.bandwidth, per_pair * pairs / machine.flops)
        for rows, columns in model.matrices:
            read = model.weight_itemsize * rows * columns / machine.bandwidth
            compute = 2 * tokens * rows * columns / machine.flops
            products += model.num_layers * max(read, compute)
        weights = model.vocab_size * model.hidden_size
        logits = sampled * model.vocab_size
        compute = 2 * logits * model.hidden_size / machine.flops
        head += max(model.weight_itemsize * weights / machine.bandwidth, compute)
        head += 2 * model.itemsize * logits / machine.bandwidth
    return {
        "attention": attention,
        "products": products,
        "head": head,
        "seconds": attention + products + head,
    }
