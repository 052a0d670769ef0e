"""Paged attention by an installed package: flash-attn 2, 3 or 4, or torch's own varlen attention.

The package computes attention. The pages, and the kernel that writes them, are our own
(`triton_ops.write_qkv`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from nanovllm import kernels
from nanovllm.attention.base import AttentionBackend, AttentionSpec, zeroed_pages
from nanovllm.cache.spec import PagedKV
from nanovllm.core.batch import AttentionMetadata
from nanovllm.kernels.rope import Rope

Capability = tuple[int, int]


@dataclass(frozen=True)
class LayerStep:
    """The attention of one layer in one step."""

    layer: PagedKV
    q: Tensor  # [T, Hq, D]
    k: Tensor  # pages [num_blocks, block_size, Hkv, D]
    v: Tensor
    sinks: Tensor | None  # [Hq]
    meta: AttentionMetadata[Tensor]
    key_start: Tensor | None  # [S + 1] int32: the sum of the context lengths before each sequence

    def words(self, sinks: str) -> dict[str, object]:
        """The arguments that are alike in all versions of flash-attn.

        sinks: the version's name of the argument for sinks.
        """
        layer = self.layer
        words: dict[str, object] = {"softmax_scale": layer.score_scale, "causal": True}
        if layer.window is not None:
            words["window_size"] = (layer.window - 1, 0)
        if layer.softcap is not None:
            words["softcap"] = layer.softcap
        if self.sinks is not None:
            words[sinks] = self.sinks.to(self.q.dtype)
        return words


@dataclass(frozen=True)
class Package:
    """A package with paged attention, and what it can run."""

    name: str
    module: str
    function: str  # of the module; its arguments tell what the installed version can
    needs: tuple[str, ...]  # arguments that the function must have
    softcap: str | None  # its argument for a softcap
    sinks: str | None  # its argument for sinks
    page: int  # block_size must be a multiple of this
    head_dims: tuple[int, ...]
    reads_key_start: bool
    runs_on: Callable[[Capability], bool]
    attend: Callable[[ModuleType, LayerStep], Tensor]  # -> [T, Hq, D], or [T, 1, Hq, D]


def attend_2(package: ModuleType, step: LayerStep) -> Tensor:
    """Its function for one query a sequence splits K/V. Its function for more queries does not."""
    meta = step.meta
    if meta.max_query_len == 1:
        return package.flash_attn_with_kvcache(
            step.q[:, None],
            step.k,
            step.v,
            cache_seqlens=meta.context_lens,
            block_table=meta.block_tables,
            **step.words("s_aux"),
        )
    return package.flash_attn_varlen_func(
        step.q,
        step.k,
        step.v,
        cu_seqlens_q=meta.query_start,
        cu_seqlens_k=step.key_start,
        max_seqlen_q=meta.max_query_len,
        max_seqlen_k=meta.max_context_len,
        block_table=meta.block_tables,
        **step.words("s_aux"),
    )


def attend_3(package: ModuleType, step: LayerStep) -> Tensor:
    meta = step.meta
    return package.flash_attn_with_kvcache(
        step.q,
        step.k,
        step.v,
        cache_seqlens=meta.context_lens,
        page_table=meta.block_tables,
        cu_seqlens_q=meta.query_start,
        max_seqlen_q=meta.max_query_len,
        **step.words("s_aux"),
    )


def attend_4(package: ModuleType, step: LayerStep) -> Tensor:
    meta = step.meta
    out, _ = package.flash_attn_varlen_func(
        step.q,
        step.k,
        step.v,
        cu_seqlens_q=meta.query_start,
        max_seqlen_q=meta.max_query_len,
        max_seqlen_k=meta.max_context_len,
        seqused_k=meta.context_lens,
        page_table=meta.block_tables,
        num_splits=0,  # chosen by the size of the step
        **step.words("learnable_sink"),
    )
    return out


def attend_varlen(package: ModuleType, step: LayerStep) -> Tensor:
    meta = step.meta
    window = step.layer.window
    left = -1 if window is None else window - 1
    return package.varlen_attn(
        step.q,
        step.k,
        step.v,
        meta.query_start,
        step.key_start,
        meta.max_query_len,
        meta.max_context_len,
        scale=step.layer.score_scale,
        window_size=(left, 0),  # a right side of 0 makes the attention causal
        enable_gqa=True,
        seqused_k=meta.context_lens,
        block_table=meta.block_tables,
        num_splits=1,  # more give wrong results with pages (pytorch issue 194167)
    )


HEAD_DIMS = tuple(range(8, 257, 8))
FLASH_2 = Package(
    name="flash-attn 2",
    module="flash_attn",
    function="flash_attn_with_kvcache",
    needs=("block_table",),
    softcap="softcap",
    sinks="s_aux",
    page=256,
    head_dims=HEAD_DIMS,
    reads_key_start=True,
    runs_on=lambda capability: capability >= (8, 0),
    attend=attend_2,
)
FLASH_3 = Package(
    name="flash-attn 3",
    module="flash_attn_interface",
    function="flash_attn_with_kvcache",
    needs=("page_table",),
    softcap="softcap",
    sinks="s_aux",
    page=1,
    head_dims=HEAD_DIMS,
    reads_key_start=False,
    runs_on=lambda capability: capability[0] == 9,
    attend=attend_3,
)
# On Hopper it cannot split K/V, so that decoding of few sequences would leave most of the
# GPU idle. On 12.x it has no pages.
FLASH_4 = Package(
    name="flash-attn 4",
    module="flash_attn.cute",
    function="flash_attn_varlen_func",
    needs=("page_table", "seqused_k", "num_splits"),
    softcap="softcap",
    sinks="learnable_sink",
    page=1,
    head_dims=(*range(8, 129, 8), 256),
    reads_key_start=False,
    runs_on=lambda capability: capability[0] in (10, 11),
    attend=attend_4,
)
VARLEN = Package(
    name="torch's varlen attention",
    module="torch.nn.attention.varlen",
    function="varlen_attn",
    needs=("block_table", "seqused_k", "num_splits"),
    softcap=None,
    sinks=None,
    page=256,
    head_dims=HEAD_DIMS,
    reads_key_start=True,
    runs_on=lambda capability: capability >= (8, 0),
    attend=attend_varlen,
)


def choose(packages: tuple[Package, ...], spec: AttentionSpec) -> tuple[Package | None, str]:
    """The first package that can run `spec`, and why. (None, why) where none can."""
    if spec.device.type != "cuda" or spec.dtype not in (torch.float16, torch.bfloat16):
        where = f"{spec.dtype} on {spec.device.type}"
        return None, f"it runs float16 and bfloat16 on CUDA, not {where}"
    capability = torch.cuda.get_device_capability(spec.device)
    reasons = []
    for package in packages:
        reason = refusal(package, spec, capability)
        if reason is None:
            return package, f"{package.module} is installed"
        reasons.append(reason)
    return None, "; ".join(reasons)


def refusal(package: Package, spec: AttentionSpec, capability: Capability) -> str | None:
    """Why `package` cannot run `spec` on a GPU of this capability, or None where it can."""
    name = package.name
    if not package.runs_on(capability):
        return f"{name} does not run here on compute capability {capability[0]}.{capability[1]}"
    if spec.block_size % package.page:
        multiple = f"a block_size that is a multiple of {package.page}"
        return f"{name} needs {multiple}, not {spec.block_size}"
    for layer in spec.layers:
        if layer.head_dim not in package.head_dims:
            return f"{name} has no kernel for heads of {layer.head_dim} numbers"
        if layer.value_size != layer.head_dim:
            sizes = f"{layer.value_size} and {layer.head_dim}"
            return f"{name} is called with values of the size of keys, not {sizes}"
    try:
        module = import_module(package.module)
        missing = missing_word(package, spec, module)
    except Exception as error:  # an installed package may fail in any way
        return f"{package.module} does not import ({type(error).__name__}: {error})"
    return None if missing is None else f"the installed {package.module} has no {missing}"


def missing_word(package: Package, spec: AttentionSpec, module: ModuleType) -> str | None:
    """What `spec` asks for and the installed version has no argument for, or None.

    flash-attn 2 has `softcap` since version 2.6. Some builds of version 3 have `s_aux`.
    """
    found = inspect.signature(getattr(module, package.function)).parameters
    for name in package.needs:
        if name not in found:
            return f"argument {name} of {package.function}"
    if package.softcap not in found and any(layer.softcap is not None for layer in spec.layers):
        return "softcap of the scores"
    if package.sinks not in found and any(layer.has_sinks for layer in spec.layers):
        return "sinks in the softmax"
    return None


class FlashAttention(AttentionBackend):
    """Pages are [num_blocks + 1, block_size, Hkv, D], K and V apart.

    The last page takes the tokens of slot -1 where no Triton kernel writes.
    """

    packages: tuple[Package, ...] = (FLASH_3, FLASH_4, FLASH_2)

    @classmethod
    def refuses(cls, spec: AttentionSpec) -> str | None:
        package, why = choose(cls.packages, spec)
        return why if package is None else None

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        package, why = choose(self.packages, spec)
        if package is None:
            raise ValueError(why)
        self.package = package
        self.module = import_module(package.module)

    def allocate(self, num_blocks: int) -> None:
        spec = self.spec
        shapes = []
        for layer in spec.layers:
            page = (num_blocks + 1, spec.block_size, layer.num_kv_heads, layer.head_dim)
            shapes.append((page, page))
        self.cache, self.pages = zeroed_pages(shapes, spec.dtype, spec.device)
        # [num_blocks + 1, Hkv, block_size, D], as the Triton kernel wants
        self.by_head = [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in self.pages]

    def begin(self, meta: AttentionMetadata[Tensor]) -> None:
        super().begin(meta)
        self.key_start: Tensor | None = None
        if self.package.reads_key_start:
            key_end = meta.context_lens.cumsum(0, dtype=torch.int32)  # [S]
            self.key_start = torch.nn.functional.pad(key_end, (1, 0))  # [S + 1]

    def write(self, layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        meta = self.meta
        triton = kernels.triton_for(qkv, "qk_norm_rope")
        if triton is None:
            return super().write(layer, qkv, rope)
        return triton.write_qkv(qkv, meta.positions, meta.slot_mapping, rope, *self.by_head[layer])

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        slots = self.meta.slot_mapping
        triton = kernels.triton_for(k, "qk_norm_rope")
        if triton is not None:
            triton.write_kv(k, v, slots, *self.by_head[layer])
            return
        for new, pages in zip((k, v), self.pages[layer]):
            pages.flatten(0, 1)[slots.long()] = new  # [slots, Hkv, D]

    def attend(self, layer: int, q: Tensor, sinks: Tensor | None = None) -> Tensor:
        spec = self.spec.layers[layer]
        step = LayerStep(spec, q, *self.pages[layer], sinks, self.meta, self.key_start)
        return self.package.attend(self.module, step).reshape(len(q), -1)


class VarlenAttention(FlashAttention):
    """FlashAttention-2 as torch brings it, since 2.12. It needs neither flash-attn nor Triton."""

    packages = (VARLEN,)
