"""The packages that compute attention for us: are they called as they are documented?

None of them is needed here. A stand-in has the signature of the package and computes what its documentation says. The
oracle of the result is attention in float32 (tests/attention_reference.py).
"""

from __future__ import annotations

import inspect
import types
from typing import Any

import pytest
import torch
from attention_reference import make_case
from torch import Tensor
from torch.nn.attention import varlen

from nanovllm.attention import flash_backend
from nanovllm.attention.flash_backend import (
    FLASH_2,
    FLASH_3,
    FLASH_4,
    VARLEN,
    FlashAttention,
    Package,
    VarlenAttention,
    choose,
    missing_word,
)
from nanovllm.core.batch import ceil_div
from nanovllm.kernels.rope import Rope

HAS_PAGES = "block_table" in inspect.signature(varlen.varlen_attn).parameters  # since torch 2.12

# -- stand-ins -----------------------------------------------------------------------------------


def documented(
    q: Tensor,  # [T, Hq, D]
    pages: tuple[Tensor, Tensor],  # [num_blocks, block_size, Hkv, D]
    starts: Tensor,
    lens: Tensor,
    table: Tensor,
    scale: float,
    left: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention with pages as all four packages document it.

    Causal and window are aligned to the last key: query i of n at the position context - n + i.
    left: how many keys before its own a query sees.
    """
    assert starts.dtype == lens.dtype == table.dtype == torch.int32
    outs = []
    for i, context in enumerate(lens.tolist()):
        rows = q[starts[i] : starts[i + 1]].float()
        group = rows.shape[1] // pages[0].shape[2]
        used = table[i, : ceil_div(context, pages[0].shape[1])].long()
        k, v = (x[used].flatten(0, 1)[:context].float() for x in pages)
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        distance = torch.arange(context - len(rows), context)[:, None] - torch.arange(context)
        visible = distance >= 0
        if left is not None and left >= 0:
            visible &= distance <= left
        scores = torch.einsum("qhd,khd->hqk", rows, k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            assert sinks.dtype == q.dtype
            column = sinks.float()[:, None, None].expand(-1, len(rows), 1)
            scores = torch.cat((scores, column), -1)
        weights = scores.softmax(-1)[..., :context]
        outs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outs).to(q.dtype)


class FlashAttn2:
    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert causal
        assert k.shape[1] % 256 == 0
        lens = cu_seqlens_k.diff()
        assert max_seqlen_q == cu_seqlens_q.diff().max()
        assert max_seqlen_k == lens.max()
        left, right = window_size
        assert right in (-1, 0)
        return documented(q, (k, v), cu_seqlens_q, lens, block_table, softmax_scale, left, softcap)

    @staticmethod
    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0,
    ):  # fmt: skip
        assert causal
        assert k_cache.shape[1] % 256 == 0
        batch, one, _, _ = q.shape
        starts = torch.arange(batch + 1, dtype=torch.int32) * one
        pages = (k_cache, v_cache)
        flat = q.flatten(0, 1)
        left, _ = window_size
        out = documented(
            flat, pages, starts, cache_seqlens, block_table, softmax_scale, left, softcap
        )
        return out.view(q.shape)


class FlashAttn3:
    @staticmethod
    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, qv=None, cache_seqlens=None, page_table=None,
        cu_seqlens_q=None, max_seqlen_q=None, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, s_aux=None, num_splits=0,
    ):  # fmt: skip
        assert causal
        assert max_seqlen_q == cu_seqlens_q.diff().max()
        pages = (k_cache, v_cache)
        where = (cu_seqlens_q, cache_seqlens, page_table)
        return documented(q, pages, *where, softmax_scale, window_size[0], softcap, s_aux)


class FlashAttn4:
    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        seqused_q=None, seqused_k=None, page_table=None, softmax_scale=None, causal=False,
        window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
        return_lse=False,
    ):  # fmt: skip
        assert causal
        assert cu_seqlens_k is None, "not supported together with page_table"
        assert num_splits == 0, "0 lets the package choose, and the default of 1 never splits"
        assert max_seqlen_q == cu_seqlens_q.diff().max()
        assert max_seqlen_k == seqused_k.max()
        where = (cu_seqlens_q, seqused_k, page_table)
        left, _ = window_size
        sink = learnable_sink
        return documented(q, (k, v), *where, softmax_scale, left, softcap, sink), None


class Varlen:
    @staticmethod
    def varlen_attn(*args: Any, **kwargs: Any) -> Tensor:
        """Binds the arguments to the signature of the installed torch."""
        bound = inspect.signature(varlen.varlen_attn).bind(*args, **kwargs)
        given = types.SimpleNamespace(**bound.arguments)
        assert given.num_splits == 1
        assert given.enable_gqa
        assert given.key.shape[1] % 256 == 0
        assert torch.equal(given.cu_seq_k.diff(), given.seqused_k)
        assert given.max_q == given.cu_seq_q.diff().max()
        assert given.max_k == given.seqused_k.max()
        left, right = given.window_size
        assert right == 0, "causal"
        pages = (given.key, given.value)
        where = (given.cu_seq_q, given.seqused_k, given.block_table)
        return documented(given.query, pages, *where, given.scale, left)


CLASSES = [
    (FLASH_2, FlashAttn2, {}),
    (FLASH_2, FlashAttn2, {"softcap": 2.0}),
    (FLASH_3, FlashAttn3, {}),
    (FLASH_3, FlashAttn3, {"sinks": True}),
    (FLASH_4, FlashAttn4, {}),
    (FLASH_4, FlashAttn4, {"sinks": True, "softcap": 2.0}),
    pytest.param(VARLEN, Varlen, {}, marks=pytest.mark.skipif(not HAS_PAGES, reason="torch 2.12")),
]


def backend_of(monkeypatch, spec, package: Package, module: object) -> FlashAttention:
    """The backend that runs `package`, whose module is a stand-in, on the CPU."""
    monkeypatch.setattr(flash_backend, "choose", lambda packages, spec: (package, "installed"))
    monkeypatch.setattr(flash_backend, "import_module", lambda name: module)
    return VarlenAttention(spec) if package is VARLEN else FlashAttention(spec)


# -- what is called ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query_lens", "context_lens", "window"),
    [
        ([1, 1], [258, 4], None),
        ([1, 1], [30, 4], 9),
        ([1, 7], [20, 30], 9),
        ([5, 1], [5, 300], None),
    ],
)
@pytest.mark.parametrize(("package", "module", "words"), CLASSES)
def test_a_package_is_called_as_documented(
    monkeypatch, query_lens, context_lens, window, package, module, words
):
    case = make_case(
        query_lens,
        context_lens,
        block_size=256,
        head_dim=32,
        windows=(window,),
        dtype=torch.float16,
        **words,
    )
    backend = backend_of(monkeypatch, case.spec, package, module)
    out = case.run(backend, 0)
    torch.testing.assert_close(out.float(), case.expected(0), atol=2e-3, rtol=1e-3)


def test_without_a_kernel_torch_writes_the_pages(monkeypatch):
    """The token of slot -1 goes to a page that no block table names."""
    case = make_case([3], [20], block_size=16, head_dim=8, dtype=torch.float16)
    backend = backend_of(monkeypatch, case.spec, FLASH_3, FlashAttn3)
    backend.allocate(case.num_blocks)
    backend.begin(case.metadata([17], [20]))
    backend.meta.slot_mapping[1] = -1
    angles = torch.rand(64, 4)
    rope = Rope(4, 2, 8, torch.cat((angles.cos(), angles.sin()), 1))
    q = backend.write(0, torch.randn(3, 64).half(), rope)
    assert q.shape == (3, 4, 8)
    for pages in backend.pages[0]:
        slots = pages[: case.num_blocks].flatten(0, 1)  # [slots, Hkv, D]
        written = slots.flatten(1).any(-1).nonzero().flatten()
        assert set(written.tolist()) == set(backend.meta.slot_mapping[[0, 2]].tolist())


# -- which package is chosen ---------------------------------------------------------------------


def installed(monkeypatch, capability: tuple[int, int], **modules: object) -> None:
    """Makes `import_module` know these modules only. A module may be an exception."""
    names = {"flash_attn_cute": "flash_attn.cute", "varlen": "torch.nn.attention.varlen"}
    known = {names.get(name, name): module for name, module in modules.items()}

    def find(name: str) -> object:
        module = known.get(name, ImportError(f"No module named {name!r}"))
        if isinstance(module, Exception):
            raise module
        return module

    monkeypatch.setattr(flash_backend, "import_module", find)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


ALL = {
    "flash_attn": FlashAttn2,
    "flash_attn_interface": FlashAttn3,
    "flash_attn_cute": FlashAttn4,
    "varlen": Varlen,
}


def spec_of(**options: Any):
    defaults = {"block_size": 256, "dtype": torch.bfloat16, "device": "meta"}
    spec = make_case([1], [1], **{**defaults, **options}).spec
    return spec.__class__(spec.layers, spec.block_size, spec.dtype, torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("capability", "package"),
    [
        ((7, 5), None),
        ((8, 0), FLASH_2),
        ((8, 9), FLASH_2),
        ((9, 0), FLASH_3),
        ((10, 0), FLASH_4),
        ((10, 3), FLASH_4),
        ((12, 0), FLASH_2),
    ],
)
def test_each_gpu_has_its_package(monkeypatch, capability, package):
    installed(monkeypatch, capability, **ALL)
    found, why = choose(FlashAttention.packages, spec_of())
    assert found is package, why


def test_a_package_that_does_not_import_is_passed_over_with_the_reason(monkeypatch):
    broken = RuntimeError("Only a single TORCH_LIBRARY can be used")
    installed(monkeypatch, (9, 0), flash_attn_interface=broken, flash_attn=FlashAttn2)
    assert choose(FlashAttention.packages, spec_of())[0] is FLASH_2
    # flash-attn 4 alone makes `flash_attn` a package without functions.
    installed(monkeypatch, (9, 0), flash_attn_interface=broken, flash_attn=types.ModuleType("x"))
    reason = FlashAttention.refuses(spec_of())
    assert reason is not None
    assert "flash_attn_interface does not import (RuntimeError: Only a single" in reason
    assert "flash-attn 4 does not run here on compute capability 9.0" in reason
    assert "flash_attn does not import (AttributeError: " in reason


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float32}, "it runs float16 and bfloat16 on CUDA, not torch.float32"),
        ({"block_size": 64}, "flash-attn 2 needs a block_size that is a multiple of 256, not 64"),
        ({"head_dim": 512}, "flash-attn 2 has no kernel for heads of 512 numbers"),
        ({"value_dim": 32}, "is called with values of the size of keys, not 32 and 64"),
        ({"sinks": True}, "the installed flash_attn has no sinks in the softmax"),
    ],
)
def test_a_model_that_no_package_can_run_is_refused_by_name(monkeypatch, options, reason):
    installed(monkeypatch, (8, 0), **ALL)
    assert reason in FlashAttention.refuses(spec_of(**options))


def test_varlen_attention_says_what_it_lacks(monkeypatch):
    installed(monkeypatch, (8, 0), varlen=varlen)
    if HAS_PAGES:
        assert VarlenAttention.refuses(spec_of()) is None
    else:
        assert "has no argument block_table" in VarlenAttention.refuses(spec_of())
    assert "has no softcap of the scores" in VarlenAttention.refuses(spec_of(softcap=2.0))


def test_old_versions_lack_words():
    def old(q, k_cache, v_cache, block_table, softmax_scale): ...

    def new(q, k_cache, v_cache, block_table, softmax_scale, softcap=0.0): ...

    def newest(q, k_cache, v_cache, block_table, softmax_scale, softcap=0.0, s_aux=None): ...

    def missing(words, function):
        package = types.SimpleNamespace(flash_attn_with_kvcache=function)
        return missing_word(FLASH_2, spec_of(**words), package)

    assert missing({}, old) is None
    assert missing({"softcap": 2.0}, old) == "softcap of the scores"
    assert missing({"softcap": 2.0}, new) is None
    assert missing({"sinks": True}, new) == "sinks in the softmax"
    assert missing({"softcap": 2.0, "sinks": True}, newest) is None
    assert missing({}, lambda q: q) == "argument block_table of flash_attn_with_kvcache"
