"""Paged attention on the CPU by the C++ kernels of `kernels/cpu.cpp`, which also says how a page is laid out."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nanovllm.attention import AttentionBackend, AttentionMetadata, AttentionSpec, zeroed
from nanovllm.kernels import cpu
from nanovllm.layers.rotary import QKNormRope


class _Layer(ctypes.Structure):
    _fields_ = (
        ("pages", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "head_dim", "block", "window")),
        ("scale", ctypes.c_float),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("positions", "slots", "query_start", "context_lens", "tables")),
        *((name, ctypes.c_int64) for name in ("table_stride", "tokens", "sequences")),
    )


class _Stack(ctypes.Structure):
    _fields_ = (
        ("cos_sin", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("layers", "hidden", "intermediate", "packed")),
        ("eps", ctypes.c_float),
    )


class CpuAttention(AttentionBackend):
    """Pages are [num_layers, num_blocks, Hkv, 2 (K, V), block_size * head_dim]."""

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
        self._owner: Callable[[], Any] = lambda: None  # the layers whose weights are known
        self._weights: list[Place] = []

    def allocate(self, num_blocks: int) -> None:
        spec = self.spec
        shape = (spec.num_layers, num_blocks, spec.num_kv_heads, 2, spec.block_size * spec.head_dim)
        self.cache = zeroed(shape, spec.dtype, spec.device)
        sizes = (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.block_size)
        layers = [
            _Layer(self.cache[i].data_ptr(), *sizes, window or 0, spec.scale)
            for i, window in enumerate(spec.sliding_windows)
        ]
        self._all_layers = (_Layer * spec.num_layers)(*layers)
        self._layers = [ctypes.byref(layer) for layer in self._all_layers]

    def begin(self, meta: AttentionMetadata) -> None:
        super().begin(meta)
        tables = meta.block_tables
        arrays = (meta.positions, meta.slot_mapping, meta.query_start, meta.context_lens, tables)
        sizes = (tables.stride(0), len(meta.positions), len(meta.context_lens))
        self._step = ctypes.byref(_Step(*(array.data_ptr() for array in arrays), *sizes))

    def write(self, layer: int, qkv: Tensor, rope: QKNormRope) -> Tensor:
        spec = self.spec
        q = torch.empty((qkv.shape[0], spec.num_heads, spec.head_dim), dtype=spec.dtype)
        weights: tuple[int | None, int | None, float] = (None, None, 0.0)
        if rope.q_norm is not None and rope.k_norm is not None:
            weights = (rope.q_norm.weight.data_ptr(), rope.k_norm.weight.data_ptr(), rope.q_norm.eps)
        qkv = qkv.contiguous()
        arrays = (qkv.data_ptr(), spec.num_heads, rope.cos_sin.data_ptr(), *weights, q.data_ptr())
        self._write(self._layers[layer], self._step, *arrays)
        return q

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        kv = torch.cat((k, v), 1)
        self._write(self._layers[layer], self._step, kv.data_ptr(), 0, None, None, None, 0.0, None)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        q = q.contiguous()
        out = torch.empty((q.shape[0], q.shape[1] * q.shape[2]), dtype=q.dtype)
        self._attend(self._layers[layer], self._step, q.data_ptr(), out.data_ptr())
        return out

    def run_layers(self, layers: nn.ModuleList, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """All layers in one call: Python's calls were a fifth of a step of one token, and 7 % of one of 64.

        With one rank only, as it does not all-reduce.
        """
        first: Any = layers[0]
        run = cpu.kernel("decode", x.dtype)
        attention, mlp = first.self_attn, first.mlp
        packed = [m.packed for m in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)]
        if run is None or attention.o_proj.tp.size > 1 or x.dtype is not self.spec.dtype:
            return None
        if any(packed) != all(packed) or (len(x) > cpu.FEW_ROWS and not all(packed)):
            return None
        if self._owner() is not layers:
            self._owner = weakref.ref(layers)
            self._weights = [place for layer in layers for place in _weights(layer)]
        # Where the weights lie is read anew each time: sleep frees them, and trainers may replace them.
        pointers = [None if (w := found[name]) is None else w.data_ptr() for found, name in self._weights]
        weights = (ctypes.c_void_p * len(pointers))(*pointers)
        inner = first.mlp.down_proj.weight.shape[1]
        cos_sin = first.self_attn.rope.cos_sin.data_ptr()
        stack = _Stack(cos_sin, len(layers), x.shape[1], inner, all(packed), first.input_layernorm.eps)
        residual = torch.empty_like(x)
        arrays = (weights, self._all_layers, self._step, x.data_ptr(), residual.data_ptr())
        run(ctypes.byref(stack), *arrays)
        return x, residual


Place = tuple[dict[str, Any], str]
NOWHERE: Place = ({"": None}, "")


def _weights(layer: Any) -> list[Place]:
    """Where the pointers of cpu.cpp's `Weights` are found, in its order."""
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = attention.rope.q_norm, attention.rope.k_norm
    linears = [_linear(m) for m in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)]
    qkv, o, gate_up, down = linears
    norms = [_place(m, "weight") for m in (layer.input_layernorm, q_norm, k_norm, layer.post_attention_layernorm)]
    return [norms[0], *qkv, *norms[1:3], *o, norms[3], *gate_up, *down]


def _linear(module: nn.Module) -> tuple[Place, Place]:
    return _place(module, "weight"), _place(module, "bias")


def _place(module: nn.Module | None, name: str) -> Place:
    return NOWHERE if module is None or name not in module._parameters else (module._parameters, name)
