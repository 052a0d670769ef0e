"""The host's work on the model of a step that holds prompts: eagerly, and by pieces.

The model has 28 layers and few features, because the host's work does not depend on their
number. Triton's launches run all of their Python code and stop before the driver. Matrix
products and replays of CUDA graphs are only counted, and torch's other operations run on the
CPU. So the time is that of Python and of torch's dispatcher. The calls into cuBLAS and CUDA's
driver come on top, one for each launch and replay.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm import kernels
from nanovllm.attention.base import AttentionSpec
from nanovllm.core.batch import Batch, ceil_div
from nanovllm.core.sequence import Sequence
from nanovllm.engine.batch_builder import build_batch
from nanovllm.engine.scheduler import Scheduler
from nanovllm.kernels import cpu
from nanovllm.models.config import ModelConfig
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.parallel import TensorParallel
from nanovllm.runner import pieces
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.sampling_params import SamplingParams

PAGE = 64
LAYERS = 28
DECODES, CONTEXT = 224, 500
PROMPTS, LENGTH = 4, 200
REPEATS = 30


def mixed_batch() -> Batch[np.ndarray]:
    """A step of 224 decodes with contexts of 500 tokens, and 4 prompts of 200 tokens."""
    count = DECODES + PROMPTS
    scheduler = Scheduler(
        num_blocks=count * ceil_div(CONTEXT + 100, PAGE),
        block_size=PAGE,
        max_model_len=CONTEXT + 100,
        max_num_seqs=count,
        max_num_batched_tokens=DECODES * CONTEXT,
        enable_prefix_caching=False,
    )
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    for length, group in ((CONTEXT, DECODES), (LENGTH, PROMPTS)):
        for _ in range(group):
            number = len(scheduler.unfinished)
            tokens = np.full(length, number, np.int32)
            scheduler.add(Sequence(number, params, tokens, length + 50, request_number=number))
        step = scheduler.schedule()
        assert step is not None
        batch, _ = build_batch(scheduler.table, step, PAGE)
        scheduler.update(step, np.full(len(step.sampled), 7))
    return batch


class NoDriver:
    """Stands for Triton's driver of a Hopper GPU, of which a launch asks these things."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@contextmanager
def triton_without_gpu() -> Iterator[list[int]]:
    """Inside the `with` a Triton launch does all but compile and call the driver.

    Gives a list to which each launch adds an item.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from nanovllm.kernels import triton_ops

    launches: list[int] = []

    def launched(*args: object) -> None:
        launches.append(1)

    kernel = SimpleNamespace(
        run=launched, function=0, packed_metadata=(), launch_metadata=lambda *args: None
    )

    def compiled(function: Any, key: object, signature: object, device: int, *more: object) -> Any:
        function.device_caches[device][0][key] = kernel
        return kernel

    with ExitStack() as patches:
        for owner, name, value in (
            (JITFunction, "_do_compile", compiled),
            (driver, "_active", NoDriver()),
            (kernels, "triton_for", lambda x, name: triton_ops),
            *((cpu, name, lambda *args: None) for name in ("load", "kernel", "panel")),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        yield launches


@contextmanager
def counted_products() -> Iterator[list[int]]:
    """Inside the `with` a matrix product only makes the tensor of its result."""
    products: list[int] = []

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        products.append(1)
        return x.new_empty(len(x), len(weight))

    with mock.patch.object(torch.nn.functional, "linear", linear):
        yield products


class LaunchCounter(TorchDispatchMode):
    """Counts the operations of torch but views and new memory."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        schema = function._schema
        is_view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        is_new = schema.name.startswith(("aten::empty", "aten::new_empty"))
        self.count += not (is_view or is_new)
        return function(*args, **(kwargs or {}))


class CountingRecorder:
    """Records nothing. A replay of a piece is counted."""

    def __init__(self) -> None:
        self.replays = 0

    @contextmanager
    def ready(self, work: Callable[[], object], largest: bool) -> Iterator[None]:
        work()
        yield

    @contextmanager
    def piece(self) -> Iterator[Callable[[], None]]:
        yield self.replay

    def replay(self) -> None:
        self.replays += 1


def make_runner() -> Any:
    """What `ModelRunner.forward` reads, for a Qwen3 of 28 layers."""
    from nanovllm.attention.triton_backend import TritonAttention

    config = ModelConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=16,
        num_layers=LAYERS,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        max_position=1024,
        tie_embeddings=True,
        rope={"rope_type": "default", "rope_theta": 1e6},
        attention_bias=False,
        mlp_bias=False,
        sliding_windows=(None,) * LAYERS,
    )
    device = torch.device("cpu")
    model = Qwen3ForCausalLM(config, 1024, TensorParallel()).to(torch.bfloat16).eval()
    spec = AttentionSpec.of(
        model.cache_specs(), block_size=PAGE, dtype=torch.bfloat16, device=device
    )
    attention = TritonAttention(spec)
    attention.allocate(4)
    last_tokens = torch.zeros(DECODES + PROMPTS + 1, dtype=torch.int64)
    return SimpleNamespace(
        model=model,
        attention=attention,
        last_tokens=last_tokens,
        lora=None,
        programs=None,
        compiled=None,
    )


def make_pieces(runner: Any) -> pieces.Pieces:
    setup: Any = SimpleNamespace(
        device=torch.device("cpu"),
        block_size=PAGE,
        max_num_batched_tokens=8192,
        max_num_seqs=DECODES + PROMPTS,
    )
    made = pieces.Pieces(setup, runner.attention, CountingRecorder())
    size = pieces.graph_size(DECODES + PROMPTS * LENGTH, made.sizes)
    # The aliases of a true recording point into memory that graphs keep.
    with mock.patch.object(pieces, "alias", lambda x: x):
        made.record(size, lambda batch, attention: ModelRunner.forward(runner, batch, attention))
    return made


def mixed_step_time() -> dict[str, dict[str, float]]:
    """For "eager" and "pieces": median microseconds, and the numbers of launches."""
    host_batch = mixed_batch()
    batch = host_batch.map(torch.from_numpy)
    found = {}
    with torch.inference_mode(), triton_without_gpu() as launches, counted_products() as products:
        runner = make_runner()
        recorded = make_pieces(runner)
        recorder: Any = recorded.recorder
        works: dict[str, Callable[[], object]] = {
            "eager": lambda: ModelRunner.forward(runner, batch),
            "pieces": lambda: recorded.forward(host_batch, batch),
        }
        for name, work in works.items():
            seconds = []
            for _ in range(REPEATS):
                start = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - start)
            launches.clear()
            products.clear()
            recorder.replays = 0
            with LaunchCounter() as counter:
                work()
            found[name] = {
                "us": 1e6 * statistics.median(seconds),
                "Triton": len(launches),
                "products": len(products),
                "other operations": counter.count,
                "replays": recorder.replays,
            }
    return found


if __name__ == "__main__":
    for name, values in mixed_step_time().items():
        print(name, values)
