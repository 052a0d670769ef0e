"""Paged attention on the CPU by the C++ kernels of kernels/cpu.cpp, which lays out a page."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nanovllm.attention.base import AttentionBackend, AttentionSpec, zeroed
from nanovllm.core.batch import AttentionMetadata
from nanovllm.kernels import cpu
from nanovllm.kernels.rope import Rope


class _Layer(ctypes.Structure):
    """cpu.cpp's Layer."""

    _fields_ = (
        ("pages", ctypes.c_void_p),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
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
    """Pages of a layer are [num_blocks, Hkv, 2 (K, V), block_size * head_dim].

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
            if layer.head_dim % 16 or layer.head_dim > 256:
                return f"head_dim={layer.head_dim} is not a multiple of 16 up to 256"
        uncommon = spec.uncommon()
        if uncommon is not None:
            return f"it has no {uncommon}"
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
        attend = cpu.kernel("attend", spec.dtype)
        assert write is not None
        assert attend is not None
        self._write = write
        self._attend = attend
        self._layers = [
            _Layer(
                None,
                layer.num_heads,
                layer.num_kv_heads,
                layer.head_dim,
                spec.block_size,
                layer.window or 0,
                layer.score_scale,
            )
            for layer in spec.layers
        ]
        self._layer_addresses = [ctypes.addressof(layer) for layer in self._layers]
        self._step = _Step()
        self._step_address = ctypes.addressof(self._step)

    def allocate(self, num_blocks: int) -> None:
        spec = self.spec
        self.cache = [
            zeroed(
                (num_blocks, layer.num_kv_heads, 2, spec.block_size * layer.head_dim),
                spec.dtype,
                spec.device,
            )
            for layer in spec.layers
        ]
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
        spec = self.spec
        qkv = qkv.contiguous()
        q = cpu.empty((qkv.shape[0], rope.num_heads, rope.head_dim), spec.dtype)
        norms = (0, 0)
        if rope.q_norm is not None and rope.k_norm is not None:
            norms = (rope.q_norm.data_ptr(), rope.k_norm.data_ptr())
        arrays = (
            qkv.data_ptr(),
            rope.num_heads,
            rope.cos_sin.data_ptr(),
            *norms,
            cpu.float_bits(rope.eps),
            q.data_ptr(),
        )
        cpu.call(self._write, self._layer_addresses[layer], self._step_address, *arrays)
        return q

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        kv = torch.cat((k, v), 1)  # [T, 2 Hkv, D]
        nothing = (0, 0, 0, 0, 0, 0)  # no queries, no angles, no norms
        layer_address = self._layer_addresses[layer]
        cpu.call(self._write, layer_address, self._step_address, kv.data_ptr(), *nothing)

    def attend(self, layer: int, q: Tensor, sinks: Tensor | None = None) -> Tensor:
        assert sinks is None
        q = q.contiguous()
        out = cpu.empty((q.shape[0], q.shape[1] * q.shape[2]), q.dtype)
        layer_address = self._layer_addresses[layer]
        cpu.call(self._attend, layer_address, self._step_address, q.data_ptr(), out.data_ptr())
        return out
