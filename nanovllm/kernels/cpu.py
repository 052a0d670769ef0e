"""The CPU's kernels in Python: calls the functions of cpu.cpp through ctypes.

An operation returns None where its kernel cannot run: without a compiler, or for another
dtype or layout. The caller then uses the plain definition. This file knows pointers and
shapes, not models.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nanovllm.kernels import library
from nanovllm.kernels.library import CALL_ARGS

SOURCE = Path(__file__).with_suffix(".cpp")
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# cpu.cpp's Arg: integers, addresses and the bits of float64 numbers.
Arguments = ctypes.c_int64 * CALL_ARGS
Kernel = Callable[[ctypes.Array[ctypes.c_int64]], None]


class Recorder(Protocol):
    """Notes the calls of kernels while a model runs, so that they can be repeated."""

    def call(self, kernel: Kernel, arguments: tuple[int, ...]) -> None:
        """Notes one call, after the kernel ran."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for a result. It keeps its address while the calls are repeated."""


RECORDER: ContextVar[Recorder | None] = ContextVar("RECORDER", default=None)


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library of cpu.cpp. None, with a warning, where it cannot be built or loaded."""
    return library.load(SOURCE)


@functools.cache
def kernel(name: str, dtype: torch.dtype) -> Kernel | None:
    """The C++ function `name` for this dtype; None where there is none."""
    built = load() if dtype in DTYPES else None
    if built is None:
        return None
    function = getattr(built, f"{name}_{DTYPES[dtype]}")
    function.argtypes = [ctypes.c_void_p]
    function.restype = None
    return function


def call(run: Kernel, *arguments: int) -> None:
    """Runs a kernel on integers and addresses, in the order of its C++ parameters.

    The active recorder, if there is one, notes the call.
    """
    run(Arguments(*arguments))
    recorder = RECORDER.get()
    if recorder is not None:
        recorder.call(run, arguments)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for the result of a kernel."""
    recorder = RECORDER.get()
    if recorder is not None:
        return recorder.empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device="cpu")


@functools.lru_cache(maxsize=64)
def float_bits(number: float) -> int:
    """A float64 as the integer of the same bits."""
    return struct.unpack("q", struct.pack("d", number))[0]


@functools.cache
def replay_function() -> Callable[[int, int], None]:
    """replay(address of Call structures, number of them): runs recorded calls in their order."""
    built = load()
    assert built is not None
    function = built.replay
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    return function


# -- panels: the order in which a product reads a weight ---------------------------------


@functools.cache
def panel(dtype: torch.dtype) -> tuple[int, int] | None:
    """(output features of a panel, neighbours in depth).

    None where there are no kernels for this dtype.
    """
    built = load() if dtype in DTYPES else None
    if built is None:
        return None
    return built.panel_columns(), getattr(built, f"panel_depth_{DTYPES[dtype]}")()


def fits_panels(depth: int, dtype: torch.dtype) -> bool:
    """Whether rows of `depth` numbers can lie in panels."""
    sizes = panel(dtype)
    return sizes is not None and depth % sizes[1] == 0


def to_panels(weight: Tensor) -> None:
    """Transposes each panel of contiguous rows [N, K] in place.

    The last rows, too few for a panel, stay as they are.
    """
    count, columns, units = panel_shape(weight)
    transpose(weight, count, columns, units)


def to_rows(weight: Tensor) -> None:
    """Undoes `to_panels`."""
    count, columns, units = panel_shape(weight)
    transpose(weight, count, units, columns)


def panel_shape(weight: Tensor) -> tuple[int, int, int]:
    """(number of panels, output features of a panel, groups of neighbours in depth)."""
    sizes = panel(weight.dtype)
    assert sizes is not None
    assert weight.is_contiguous()
    columns, neighbours = sizes
    return weight.shape[0] // columns, columns, weight.shape[1] // neighbours


def transpose(weight: Tensor, count: int, rows: int, columns: int) -> None:
    """Transposes the first `count` matrices [rows, columns] of a weight in place."""
    built = load()
    sizes = panel(weight.dtype)
    assert built is not None
    assert sizes is not None
    neighbours_bytes = weight.itemsize * sizes[1]
    function = built.transpose_16 if neighbours_bytes == 2 else built.transpose_32
    function(*map(ctypes.c_int64, (weight.data_ptr(), count, rows, columns)))


# -- the operations ----------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """x [T, K] @ weight [N, K].T + bias [N] -> [T, N], of a weight in rows."""
    return product("linear", x, weight, bias)


def linear_panels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The same product, of a weight that `to_panels` has transposed."""
    return product("linear_panels", x, weight, bias)


def product(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The product by the kernel `name`."""
    run = kernel(name, x.dtype)
    if run is None or weight.dtype is not x.dtype or not weight.is_contiguous():
        return None
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, depth = x.shape
    columns = weight.shape[0]
    out = empty((rows, columns), x.dtype)
    bias_address = 0 if bias is None else bias.data_ptr()
    call(
        run,
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        bias_address,
        out.data_ptr(),
        rows,
        columns,
        depth,
    )
    return out


def add_linear_panels(out: Tensor, x: Tensor, weight: Tensor) -> bool:
    """out [T, N] += x [T, K] @ weight [N, K].T, of a weight that `to_panels` has transposed.

    Returns False, and changes nothing, where the kernel cannot run.
    """
    run = kernel("add_linear_panels", x.dtype)
    if run is None or weight.dtype is not x.dtype or out.dtype is not x.dtype:
        return False
    if not (x.stride(1) == 1 and out.stride(1) == 1 and weight.is_contiguous()):
        return False
    rows, depth = x.shape
    places = (x.data_ptr(), x.stride(0), weight.data_ptr(), out.data_ptr(), out.stride(0))
    call(run, *places, rows, weight.shape[0], depth)
    return True


def grouped_panels(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None
) -> Tensor | None:
    """`moe.grouped_linear` of a weight whose groups `to_panels` has transposed one by one."""
    run = kernel("grouped_panels", x.dtype)
    if run is None or weight.dtype is not x.dtype or not weight.is_contiguous():
        return None
    assert offsets.dtype is torch.int32
    x = x.contiguous()
    rows, depth = x.shape
    num_groups = len(offsets) - 1
    columns = weight.shape[0] // num_groups
    out = empty((rows, columns), x.dtype)
    bias_address = 0 if bias is None else bias.data_ptr()
    addresses = (x.data_ptr(), weight.data_ptr(), bias_address, out.data_ptr(), offsets.data_ptr())
    call(run, *addresses, num_groups, rows, columns, depth)
    return out


def embedding(ids: Tensor, weight: Tensor) -> Tensor | None:
    """Rows ids [T] int64 of a weight [N, K] in rows -> [T, K].

    An id outside the weight gives zeros.
    """
    return rows_of("embed", ids, weight)


def embedding_panels(ids: Tensor, weight: Tensor) -> Tensor | None:
    """The same rows, of a weight that `to_panels` has transposed."""
    return rows_of("embed_panels", ids, weight)


def rows_of(name: str, ids: Tensor, weight: Tensor) -> Tensor | None:
    """Rows by the kernel `name`."""
    run = kernel(name, weight.dtype)
    if run is None or ids.dtype is not torch.int64:
        return None
    if not (ids.is_contiguous() and weight.is_contiguous()):
        return None
    out = empty((len(ids), weight.shape[1]), weight.dtype)
    call(run, ids.data_ptr(), weight.data_ptr(), out.data_ptr(), len(ids), *weight.shape)
    return out


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, round_once: bool = False
) -> Tensor | None:
    """x [T, size], weight [size] -> [T, size]. The offset is added to the weight."""
    run = kernel("rms_norm", x.dtype)
    if run is None or weight.dtype is not x.dtype or x.ndim != 2 or x.stride(1) != 1:
        return None
    out = empty((x.shape[0], x.shape[1]), x.dtype)
    factors = (weight.data_ptr(), float_bits(eps), float_bits(offset), int(round_once))
    call(run, x.data_ptr(), x.stride(0), *factors, out.data_ptr(), *x.shape)
    return out


def rms_norm_in_place(x: Tensor, weight: Tensor, eps: float, round_once: bool = False) -> bool:
    """Overwrites x [T, size] with its norm; weight [size].

    Returns False, and changes nothing, where the kernel cannot run.
    """
    run = kernel("rms_norm_in_place", x.dtype)
    if run is None or weight.dtype is not x.dtype or x.ndim != 2 or x.stride(1) != 1:
        return False
    factors = (weight.data_ptr(), float_bits(eps), int(round_once))
    call(run, x.data_ptr(), x.stride(0), *factors, *x.shape)
    return True


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    round_once: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """Norms residual + x, both [T, size]. Overwrites x with the norm and residual with the sum."""
    run = kernel("add_rms_norm", x.dtype)
    if run is None or weight.dtype is not x.dtype:
        return None
    if not (x.is_contiguous() and residual.is_contiguous()):
        return None
    factors = (weight.data_ptr(), float_bits(eps), float_bits(offset), int(round_once))
    call(run, x.data_ptr(), residual.data_ptr(), *factors, *x.shape)
    return x, residual


def silu_and_mul(x: Tensor) -> Tensor | None:
    """[T, 2I] -> [T, I]."""
    return gated("silu_and_mul", x)


def gelu_and_mul(x: Tensor) -> Tensor | None:
    """[T, 2I] -> [T, I]."""
    return gated("gelu_and_mul", x)


def gated(name: str, x: Tensor) -> Tensor | None:
    """Half of the columns by the kernel `name`."""
    run = kernel(name, x.dtype)
    if run is None or x.stride(1) != 1:
        return None
    rows, size = x.shape[0], x.shape[1] // 2
    out = empty((rows, size), x.dtype)
    call(run, x.data_ptr(), x.stride(0), out.data_ptr(), rows, size)
    return out


def add(x: Tensor, y: Tensor) -> Tensor | None:
    """x + y of equal shapes. Overwrites x with the sum."""
    run = kernel("add", x.dtype)
    if run is None or y.dtype is not x.dtype or y.shape != x.shape:
        return None
    if not (x.is_contiguous() and y.is_contiguous()):
        return None
    call(run, x.data_ptr(), y.data_ptr(), x.numel())
    return x


def scale(x: Tensor, factor: float) -> Tensor | None:
    """x * factor. Overwrites x with the product."""
    run = kernel("scale", x.dtype)
    if run is None or not x.is_contiguous():
        return None
    call(run, x.data_ptr(), float_bits(factor), x.numel())
    return x


def draw(logits: Tensor, temperature: Tensor, u: Tensor) -> Tensor | None:
    """logits [R, V], temperature and u [R] float32 -> ids [R] int64.

    A row of temperature 0 gets its most likely token. The lowest id wins a tie.
    """
    run = kernel("sample", logits.dtype)
    if run is None or logits.stride(1) != 1:
        return None
    if not (temperature.is_contiguous() and u.is_contiguous()):
        return None
    tokens = torch.empty(len(logits), dtype=torch.int64)
    pointers = (temperature.data_ptr(), u.data_ptr(), tokens.data_ptr())
    call(run, logits.data_ptr(), logits.stride(0), *pointers, *logits.shape)
    return tokens
