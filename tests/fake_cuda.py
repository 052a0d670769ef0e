"""A CUDA device that computes nothing, for machines without one: what is queued on it is checked.

Tensors are fake (torch.FakeTensorMode): they have shapes, types and a device, and no contents. While a step is queued

- an operation that reads a number on the host raises, because a fake tensor has none;
- a copy between host and device must be non-blocking, and its host side pinned;
- all tensors of an operation lie on one device, but for numbers (0 dimensions);
- a Triton kernel gets pointers of 16 bytes' alignment into contiguous tensors, and a grid that a GPU accepts.

The engine runs as on a Hopper GPU. Every result that reaches the host is zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from nanovllm import kernels
from nanovllm.kernels import cpu, moe, moe_triton, triton_ops
from nanovllm.models.base import LanguageModel
from nanovllm.parallel import TensorParallel
from nanovllm.runner import cuda_graphs, load_model, model_runner
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.runner.setup import Setup

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
LARGEST_GRID = (2**31 - 1, 65535, 65535)
# Parameters of kernels that get the tensor's strides beside its pointer. The last stride is 1.
STRIDED = {
    "_tile_sum_kernel": {"logits_ptr"},
    "_threshold_kernel": {"logits_ptr"},
    "_draw_kernel": {"logits_ptr"},
    "_write_kernel": {"k_cache", "v_cache"},
    "_decode_kernel": {"tables"},
    "_prefill_kernel": {"tables"},
}


class FakeGPU:
    """What was queued. `watching`: a step is being queued, so everything is checked."""

    def __init__(self) -> None:
        self.watching = False
        self.launched: set[str] = set()  # names of Triton kernels
        self.num_copies = 0  # between host and device, while a step was queued

    @contextmanager
    def watch(self) -> Iterator[None]:
        before = self.watching
        self.watching = True
        try:
            yield
        finally:
            self.watching = before

    def launch(self, kernel: JITFunction, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Checks what a GPU would get of one launch."""
        name = kernel.__name__
        self.launched.add(name)
        grid = options["grid"]
        for size, most in zip(grid, LARGEST_GRID):
            assert isinstance(size, int), (name, grid)
            assert 0 < size <= most, (name, grid)
        given = {**dict(zip(kernel.arg_names, args)), **options}
        for parameter, x in given.items():
            if isinstance(x, Tensor):
                where = f"{name}: {parameter} {list(x.shape)}, strides {x.stride()}"
                assert x.device == DEVICE, where
                assert x.storage_offset() * x.itemsize % 16 == 0, f"{where} is not aligned"
                if parameter in STRIDED.get(name, ()):
                    assert x.stride(-1) == 1, where
                else:
                    assert x.is_contiguous(), f"{where} is not contiguous"

    def check(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Checks one operation of torch: a copy, or anything else on one device."""
        if operation is aten.copy_.default:
            target, source, *others = args
            non_blocking = others[0] if others else kwargs.get("non_blocking", False)
            host = source if target.is_cuda else target
            self.check_copy(source.device, target.device, host, non_blocking)
        elif operation is aten._to_copy.default:
            (source,) = args
            target = torch.device(kwargs.get("device") or source.device)
            self.check_copy(source.device, target, source, kwargs.get("non_blocking", False))
        else:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            devices = {x.device for x in tensors if x.dim()}
            assert len(devices) < 2, f"{operation} of tensors on {devices}"

    def check_copy(
        self, source: torch.device, target: torch.device, host: Tensor, non_blocking: bool
    ) -> None:
        """host: the side whose memory must be pinned."""
        if source == target:
            return
        self.num_copies += 1
        assert non_blocking, f"a copy from {source} to {target} waits for the device"
        is_pinned = getattr(host, "is_pinned_here", False)
        assert is_pinned, f"a copy from {source} to {target} waits, because of pageable memory"


class FakeStream:
    """Stands for torch.cuda.Stream."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device


class FakeEvent:
    """Stands for torch.cuda.Event. A step's result may be waited for."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class Dispatched(TorchDispatchMode):
    """Sees every operation of torch."""

    def __init__(self, gpu: FakeGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.gpu.watching:
            self.gpu.check(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """Replaces calls that need a torch with CUDA, or contents."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        x = args[0] if args else None
        on_gpu = isinstance(x, Tensor) and x.device == DEVICE
        if func is Tensor.__getitem__ and on_gpu:
            view, indices = basic_index(x, args[1])
            return aten.index.Tensor(view, indices) if indices else view
        if func is Tensor.__setitem__ and on_gpu:
            assign(*args)
            return None
        if func is Tensor.pin_memory:
            return pinned(x.clone())
        if func is Tensor.numpy and isinstance(x, FakeTensor):
            assert not on_gpu
            return np.zeros(tuple(x.shape), str(x.dtype).removeprefix("torch."))
        if kwargs.pop("pin_memory", False):
            return pinned(func(*args, **kwargs))
        if func is Tensor.copy_ and on_gpu:
            return aten.copy_(*args, **kwargs)
        return func(*args, **kwargs)


def pinned(x: Tensor) -> Tensor:
    x.is_pinned_here = True
    return x


def basic_index(x: Tensor, key: Any) -> tuple[Tensor, list[Tensor | None]]:
    """(the view that numbers and slices of `key` give, the tensors in `key` by dimension)."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in [each for each in keys if not isinstance(each, Tensor)]:
        at = next(i for i, each in enumerate(keys) if each is Ellipsis)
        count = x.dim() - sum(each is not None for each in keys) + 1
        keys[at : at + 1] = [slice(None)] * count
    indices: list[Tensor | None] = []
    for each in keys:
        dim = len(indices)
        if isinstance(each, Tensor):
            assert each.dtype not in (torch.bool, torch.uint8), "a mask as an index waits"
            indices.append(each)
        elif each is None:
            x = aten.unsqueeze(x, dim)
            indices.append(None)
        elif isinstance(each, slice):
            x = aten.slice(x, dim, each.start, each.stop, each.step or 1)
            indices.append(None)
        else:
            x = aten.select(x, dim, int(each))
    return x, indices if any(each is not None for each in indices) else []


def assign(x: Tensor, key: Any, value: Any) -> None:
    """x[key] = value."""
    view, indices = basic_index(x, key)
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=x.dtype, device=x.device)
    if indices:
        aten.index_put_(view, indices, value)
    else:
        aten.copy_(view, value)


def made_on_cpu(setup: Setup, tp: TensorParallel) -> LanguageModel:
    """A model that reads numbers while it is made: made of real tensors, which then become fake."""
    on_cpu = copy(setup)
    on_cpu.device = torch.device("cpu")
    with _disable_current_modes():
        model = load_model.make_model(on_cpu, tp)
    for module in model.modules():
        for name, x in module.named_parameters(recurse=False):
            fake = torch.empty(x.shape, dtype=x.dtype, device=DEVICE)
            setattr(module, name, torch.nn.Parameter(fake, requires_grad=False))
        for name, x in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(x.shape, dtype=x.dtype, device=DEVICE))
    return model


def make_model(setup: Setup, tp: TensorParallel) -> LanguageModel:
    make = made_on_cpu if setup.args.model_impl == "transformers" else load_model.make_model
    return make(setup, tp)


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    """Inside it `LLM(device="cuda")` makes an engine on the fake device, and runs it."""
    gpu = FakeGPU()
    launch = ModelRunner.launch
    properties = SimpleNamespace(
        name="a fake H100",
        major=9,
        minor=0,
        multi_processor_count=132,
        shared_memory_per_multiprocessor=228 * 1024,
        shared_memory_per_block_optin=227 * 1024,
        total_memory=80 << 30,
    )

    def watched_launch(self: ModelRunner, *args: Any) -> Any:
        with gpu.watch():
            return launch(self, *args)

    def capture(stream: object, pool: object, work: cuda_graphs.Work, largest: bool) -> Any:
        with gpu.watch():
            work()
        return work

    def run(self: JITFunction, *args: Any, **options: Any) -> None:
        gpu.launch(self, args, options)

    replaced: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "device", lambda index: nullcontext()),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.cuda, "get_device_properties", lambda device=None: properties),
        (torch.cuda, "synchronize", lambda device=None: None),
        (torch.cuda, "empty_cache", lambda: None),
        (torch.cuda, "mem_get_info", lambda device=None: (79 << 30, 80 << 30)),
        (torch.cuda, "Stream", FakeStream),
        (torch.cuda, "Event", FakeEvent),
        (torch.cuda, "graph_pool_handle", lambda: None),
        (cuda_graphs, "capture", capture),
        (load_model, "load_weights", lambda *args: None),
        (model_runner, "make_model", make_model),
        (cpu, "panel", lambda dtype: None),  # so that a model made on the CPU has a GPU's weights
        (kernels, "gpu", lambda: triton_ops),
        (moe, "gpu", lambda: moe_triton),
        (ModelRunner, "launch", watched_launch),
        (JITFunction, "run", run),
    ]
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        patch = stack.enter_context(monkeypatch.context())
        for owner, name, value in replaced:
            patch.setattr(owner, name, value)
        stack.enter_context(Dispatched(gpu))
        stack.enter_context(Called())
        yield gpu
