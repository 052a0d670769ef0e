"""How fast decode attention reads K and V, beside the speed of a plain copy on the same GPU.

    PYTHONPATH=. python tests/gpu/attention_bandwidth.py [--kv-cache-dtype fp8]

Only the bytes of K and V count, and each byte once. One CUDA graph runs many layers, so that
no cache of the GPU can hold their K and V.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

import torch

from nanovllm.attention.base import AttentionSpec
from nanovllm.attention.triton_backend import TritonAttention
from nanovllm.cache.spec import PagedKV
from nanovllm.core.batch import AttentionMetadata, ceil_div
from nanovllm.kernels.gpu_table import decode_programs, device_properties

BATCHES, CONTEXTS, PAGES = (1, 8, 32, 128, 256), (256, 1024, 4096), (16, 64, 256)


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Median time of one replay of `work` as a CUDA graph. Without a GPU: of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        work()  # compiles
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times[3:])[repeats // 2]


def copy_bandwidth(device: torch.device, size: int = 2 << 30) -> float:
    """Bytes a second that a copy on the device reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)


def decode_bandwidth(
    batch: int,
    context: int,
    page: int,
    *,
    heads: tuple[int, int] = (16, 8),
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    kv_cache_dtype: str = "auto",
    total: int = 1 << 30,
    shape: dict[str, int] | None = None,
) -> float:
    """Bytes of K and V that decode attention reads a second.

    The step has `batch` sequences of `context` tokens, in the shape of Qwen3-0.6B. The layers
    together have about `total` bytes of K and V. The step's plan is made once, as in a model, and
    counts. shape: replaces values of `decode_shape` (TILE, num_warps, num_stages, maxnreg).
    """
    where = torch.device(device)
    pages = ceil_div(context, page)
    itemsize = 1 if kv_cache_dtype == "fp8" else dtype.itemsize
    layer_bytes = 2 * batch * context * heads[1] * head_dim * itemsize
    layers = max(1, min(64, total // layer_bytes))
    spec = AttentionSpec((PagedKV(*heads, head_dim),) * layers, page, dtype, where)
    backend = TritonAttention(spec, kv_cache_dtype)
    if shape:
        gpu = device_properties(where)
        (launch,) = backend.shapes.values()
        launch.decode |= shape
        launch.programs = decode_programs(gpu, launch.decode, head_dim, backend.cache_dtype)
    backend.allocate(batch * pages)
    for tensor in itertools.chain(*backend.pages):
        tensor.copy_(torch.randn(tensor.shape, dtype=dtype, device=where))
    tokens = torch.arange(batch, dtype=torch.int32, device=where)
    meta = AttentionMetadata(
        positions=torch.full_like(tokens, context - 1),
        slot_mapping=torch.full_like(tokens, -1),
        query_start=torch.arange(batch + 1, dtype=torch.int32, device=where),
        context_lens=torch.full_like(tokens, context),
        block_tables=torch.randperm(batch * pages, device=where).int().view(batch, pages),
        max_query_len=1,
        num_prefills=0,
        max_context_len=context,
    )
    q = torch.randn(batch, heads[0], head_dim, dtype=dtype, device=where)

    def step() -> None:
        backend.begin(meta)
        for layer in range(layers):
            backend.attend(layer, q)

    return layers * layer_bytes / seconds(step, where)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "fp8"))
    kv_cache_dtype = parser.parse_args().kv_cache_dtype
    copy = copy_bandwidth(torch.device("cuda"))
    print(f"copy {copy / 1e12:.2f} TB/s\nbatch context page  TB/s  of copy")
    for batch, context, page in itertools.product(BATCHES, CONTEXTS, PAGES):
        rate = decode_bandwidth(batch, context, page, kv_cache_dtype=kv_cache_dtype)
        print(f"{batch:5} {context:7} {page:4} {rate / 1e12:5.2f} {rate / copy:8.0%}", flush=True)


if __name__ == "__main__":
    main()
