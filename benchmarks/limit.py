"""The limit of a machine: how fast it copies and multiplies, and how long a workload would take if nothing else cost time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.ours import Host, ModelConfig
from benchmarks.workloads import Workload

LARGE_GPU_STEP = 16384  # tokens, the default of vLLM and ours on GPUs of 70 GiB and more


@dataclass
class Machine:
    bandwidth: float  # bytes a second, read and written by a large copy
    flops: float  # a second, of a large matrix product in the model's dtype


def probe(device: str, dtype: str) -> Machine:
    """Best of a few tries: the machine as it is when nothing else runs on it."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    source = torch.zeros((2 << 30 if device == "cuda" else 256 << 20) // 4, device=device)
    target = torch.ones_like(source)

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
    return Machine(bandwidth, 2 * size**3 / best(lambda: a @ b))


@dataclass
class Sizes:
    """What the limit needs to know of a model; an element of a weight or of K/V has `itemsize` bytes."""

    matrices: list[tuple[int, int]]  # of one layer
    num_layers: int
    num_heads: int
    head_dim: int
    vocab_size: int
    hidden_size: int
    kv_bytes: int  # of one token, all layers
    weight_bytes: int
    itemsize: int


def sizes_of(config: ModelConfig, itemsize: int) -> Sizes:
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
        weight_bytes=weights * itemsize,
        itemsize=itemsize,
    )


def limit(work: Workload, model: Sizes, machine: Machine, step_tokens: int) -> dict[str, float]:
    """Seconds that a workload takes where every kernel is at its own roofline, one after another, and the host is free.

    A kernel takes as long as its bytes at the copy bandwidth, or as its products at the matmul rate, whichever is
    longer. Attention reads the K/V of each sequence's context once a pass and writes that of the new tokens; a matrix product
    reads its weights; the head's logits are written once and read once by the sampler.
    """
    attention = products = head = 0.0
    per_pair = 4 * model.num_layers * model.num_heads * model.head_dim
    longest = max(len(p) + n for p, n in zip(work.prompts, work.outputs))
    for starts, ends, sampled in Host(work.prompts, work.outputs, longest, step_tokens).passes():
        starts, ends = starts.astype(np.int64), ends.astype(np.int64)
        tokens = int((ends - starts).sum())
        pairs = int((ends * (ends + 1) // 2 - starts * (starts + 1) // 2).sum())
        kv = model.kv_bytes * (int(ends.sum()) + tokens)
        attention += max(kv / machine.bandwidth, per_pair * pairs / machine.flops)
        for rows, columns in model.matrices:
            read, work_done = model.itemsize * rows * columns, 2 * tokens * rows * columns
            products += model.num_layers * max(read / machine.bandwidth, work_done / machine.flops)
        weights, logits = model.vocab_size * model.hidden_size, sampled * model.vocab_size
        compute = 2 * logits * model.hidden_size / machine.flops
        head += max(model.itemsize * weights / machine.bandwidth, compute)
        head += 2 * model.itemsize * logits / machine.bandwidth
    return {"attention": attention, "products": products, "head": head, "seconds": attention + products + head}
