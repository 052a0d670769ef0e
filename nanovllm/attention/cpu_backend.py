"""Paged attention on the CPU by the C++ kernels of `kernels/cpu.cpp`, which also says how a page is laid out."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nanovllm.attention.base import AttentionBackend, AttentionMetadata, AttentionSpec, zeroed
from nanovllm.kernels import cpu
from nanovllm.kernels.rope import Rope


class _Layer(ctypes.Structure):
    """cpu.cpp's Layer."""

    _fields_ = (
        ("pages", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "head_dim", "block", "window")),
        ("scale", ctypes.c_float),
    )


class _Step(ctypes.Structure):
    """cpu.cpp's Step."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("positions", "slots", "query_start", "context_lens", "tables")),
        *((name, ctypes.c_int64) for name in ("table_stride", "tokens", "sequences")),
    )


class CpuAttention(AttentionBackend):
    """Pages are [num_layers, num_blocks, Hkv, 2 (K, V), block_size * head_dim].

    Invariant: the structures that kernels read stay at their addresses, so recorded calls see new pages and new steps.
    """

    @staticmethod
    def refuses(spec: AttentionSpec) -> str | None:
        """Why this backend cannot run `spec`, or None where it can."""
        if spec.device.type != "cpu":
            return f"device={spec.device} is not the CPU"
        if cpu.kernel("attend", spec.dtype) is None:
            return f"there is no C++ kernel for {spec.dtype} here"
        if spec.head_dim % 16 or spec.head_dim > 256:
            return f"head_dim={spec.head_dim} is not a multiple of 16 up to 256"
        if spec.block_size % 2:
            return f"block_size={spec.block_size} is odd"
        return None

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        if reason := self.refuses(spec):
            raise ValueError(f"the CPU's attention kernel cannot be used: {reason}; the torch backend can")
        write, attend = cpu.kernel("write", spec.dtype), cpu.kernel("attend", spec.dtype)
        assert write is not None
        assert attend is not None
        self._write, self._attend = write, attend
        sizes = (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.block_size)
        self._layers = [_Layer(None, *sizes, window or 0, spec.scale) for window in spec.sliding_windows]
        self._layer_addresses = [ctypes.addressof(layer) for layer in self._layers]
        self._step = _Step()
        self._step_address = ctypes.addressof(self._step)

    def allocate(self, num_blocks: int) -> None:
        spec = self.spec
        shape = (spec.num_layers, num_blocks, spec.num_kv_heads, 2, spec.block_size * spec.head_dim)
        self.cache = zeroed(shape, spec.dtype, spec.device)
        for layer, pages in zip(self._layers, self.cache):
            layer.pages = pages.data_ptr()

    def begin(self, meta: AttentionMetadata) -> None:
        super().begin(meta)
        step, tables = self._step, meta.block_tables
        step.positions = meta.positions.data_ptr()
        step.slots = meta.slot_mapping.data_ptr()
        step.query_start = meta.query_start.data_ptr()
        step.context_lens = meta.context_lens.data_ptr()
        step.tables = tables.data_ptr()
        step.table_stride = tables.stride(0)
        step.tokens = len(meta.positions)
        step.sequences = len(meta.context_lens)

    def write(self, layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        spec = self.spec
        qkv = qkv.contiguous()
        q = cpu.empty((qkv.shape[0], spec.num_heads, spec.head_dim), spec.dtype)
        norms = (0, 0)
        if rope.q_norm is not None and rope.k_norm is not None:
            norms = rope.q_norm.data_ptr(), rope.k_norm.data_ptr()
        arrays = (
            qkv.data_ptr(),
            spec.num_heads,
            rope.cos_sin.data_ptr(),
            *norms,
            cpu.float_bits(rope.eps),
            q.data_ptr(),
        )
        cpu.call(self._write, self._layer_addresses[layer], self._step_address, *arrays)
        return q

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        kv = torch.cat((k, v), 1)
        nothing = (0, 0, 0, 0, 0, 0)  # no queries, no angles, no norms
        cpu.call(self._write, self._layer_addresses[layer], self._step_address, kv.data_ptr(), *nothing)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        q = q.contiguous()
        out = cpu.empty((q.shape[0], q.shape[1] * q.shape[2]), q.dtype)
        cpu.call(self._attend, self._layer_addresses[layer], self._step_address, q.data_ptr(), out.data_ptr())
        return out
