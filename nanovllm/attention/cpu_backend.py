"""Paged attention on the CPU by the C++ kernels of kernels/cpu.cpp, which lays out a page."""

from __future__ import annotations

import ctypes

from torch import Tensor

from nanovllm.attention.base import AttentionBackend, AttentionSpec, zeroed
from nanovllm.cache.spec import PagedKV
from nanovllm.core.batch import AttentionMetadata, ceil_div
from nanovllm.kernels import cpu
from nanovllm.kernels.rope import Rope

MAX_DIM = 512  # cpu.cpp's largest head
WIDEST_VECTOR = 16  # float32 numbers


class _Layer(ctypes.Structure):
    """cpu.cpp's Layer."""

    _fields_ = (
        ("pages", ctypes.c_void_p),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("padded_value_dim", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class _Step(ctypes.Structure):
    """cpu.cpp's Step."""

    _fields_ = (
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("query_start", ctypes.c_void_p),
        ("context_lens", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("sequences", ctypes.c_int64),
    )


class CpuAttention(AttentionBackend):
    """Pages of a layer are [num_blocks, Hkv, block_size * (head_dim + padded value size)].

    Invariant: the structures that kernels read keep their addresses. So recorded calls
    see new pages and new steps.
    """

    @staticmethod
    def refuses(spec: AttentionSpec) -> str | None:
        """Why this backend cannot run `spec`, or None where it can."""
        if spec.device.type != "cpu":
            return f"device={spec.device} is not the CPU"
        if cpu.kernel("attend", spec.dtype) is None:
            return f"there is no C++ kernel for {spec.dtype} here"
        for layer in spec.layers:
            if layer.head_dim % 2 or layer.head_dim > MAX_DIM:
                return f"head_dim={layer.head_dim} is not an even number up to {MAX_DIM}"
            if layer.value_size > MAX_DIM:
                return f"value_dim={layer.value_size} is more than {MAX_DIM}"
        if spec.block_size % 2:
            return f"block_size={spec.block_size} is odd"
        return None

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        reason = self.refuses(spec)
        if reason:
            raise ValueError(
                f"the CPU's attention kernel cannot be used: {reason}; the torch backend can"
            )
        write = cpu.kernel("write", spec.dtype)
        store = cpu.kernel("store", spec.dtype)
        attend = cpu.kernel("attend", spec.dtype)
        assert write is not None
        assert store is not None
        assert attend is not None
        self._write = write
        self._store = store
        self._attend = attend
        self._layers = [structure_of(layer, spec.block_size) for layer in spec.layers]
        self._layer_addresses = [ctypes.addressof(layer) for layer in self._layers]
        self._step = _Step()
        self._step_address = ctypes.addressof(self._step)

    def page_bytes(self) -> int:
        numbers = sum(layer.num_kv_heads * numbers_per_token(layer) for layer in self.spec.layers)
        return self.spec.block_size * numbers * self.spec.dtype.itemsize

    def allocate(self, num_blocks: int) -> None:
        spec = self.spec
        self.cache = []
        for kv in spec.layers:
            shape = (num_blocks, kv.num_kv_heads, spec.block_size * numbers_per_token(kv))
            self.cache.append(zeroed(shape, spec.dtype, spec.device))
        for layer, pages in zip(self._layers, self.cache):
            layer.pages = pages.data_ptr()

    def begin(self, meta: AttentionMetadata[Tensor]) -> None:
        super().begin(meta)
        step = self._step
        step.positions = meta.positions.data_ptr()
        step.slots = meta.slot_mapping.data_ptr()
        step.query_start = meta.query_start.data_ptr()
        step.context_lens = meta.context_lens.data_ptr()
        step.tables = meta.block_tables.data_ptr()
        step.table_stride = meta.block_tables.stride(0)
        step.tokens = len(meta.positions)
        step.sequences = len(meta.context_lens)

    def write(self, layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        qkv = qkv.contiguous()
        q = cpu.empty((qkv.shape[0], rope.num_heads, rope.head_dim), self.spec.dtype)
        norms = (0, 0)
        if rope.q_norm is not None and rope.k_norm is not None:
            norms = (rope.q_norm.data_ptr(), rope.k_norm.data_ptr())
        arrays = (
            qkv.data_ptr(),
            rope.num_heads,
            rope.cos_sin.data_ptr(),
            rope.cos_sin.shape[1],
            *norms,
            cpu.float_bits(rope.eps),
            cpu.float_bits(rope.norm_offset),
            int(rope.norm_round_once),
            q.data_ptr(),
        )
        cpu.call(self._write, self._layer_addresses[layer], self._step_address, *arrays)
        return q

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        k = k if k.stride(2) == 1 else k.contiguous()
        v = v if v.stride(2) == 1 else v.contiguous()
        k_place = (k.data_ptr(), k.stride(0), k.stride(1))
        v_place = (v.data_ptr(), v.stride(0), v.stride(1))
        layer_address = self._layer_addresses[layer]
        cpu.call(self._store, layer_address, self._step_address, *k_place, *v_place)

    def attend(self, layer: int, q: Tensor, sinks: Tensor | None = None) -> Tensor:
        q = q.contiguous()
        out = cpu.empty((q.shape[0], q.shape[1] * self.spec.layers[layer].value_size), q.dtype)
        sinks_address = 0
        if sinks is not None:
            sinks = sinks.to(q.dtype).contiguous()
            sinks_address = sinks.data_ptr()
        arrays = (q.data_ptr(), out.data_ptr(), sinks_address)
        cpu.call(self._attend, self._layer_addresses[layer], self._step_address, *arrays)
        return out


def structure_of(layer: PagedKV, block_size: int) -> _Layer:
    """What the kernels know of a layer, without pages."""
    return _Layer(
        None,
        layer.num_heads,
        layer.num_kv_heads,
        layer.head_dim,
        layer.value_size,
        padded(layer.value_size),
        block_size,
        layer.window or 0,
        layer.score_scale,
        layer.softcap or 0.0,
    )


def padded(value_size: int) -> int:
    """The numbers that a value head takes in a page."""
    return ceil_div(value_size, WIDEST_VECTOR) * WIDEST_VECTOR


def numbers_per_token(layer: PagedKV) -> int:
    """The numbers that one token takes in the pages of one KV head."""
    return layer.head_dim + padded(layer.value_size)
