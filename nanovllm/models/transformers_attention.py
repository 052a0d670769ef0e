"""Our attention in transformers' attention interface, and what a model's layers ask of it.

A model whose `_attn_implementation` is LEARN or PAGED calls `attend`, which finds what to
do at the calling module. So engines share nothing. Under LEARN transformers also makes
masks, and each mask is compared with a causal one. Under PAGED it makes none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from nanovllm.attention.base import AttentionBackend
from nanovllm.cache.spec import PagedKV

PAGED = "nanovllm"
LEARN = "nanovllm_learn"
ATTRIBUTE = "nanovllm_pages"  # of a module that attends: what `attend` calls
NUMBER = "nanovllm_number"  # of such a module: the number of its pages in PAGES

# Words of the interface that change no result: dropout is off, and nothing of it is returned.
WITHOUT_EFFECT = {
    "dropout",
    "scaling",
    "sliding_window",
    "softcap",
    "s_aux",
    "is_causal",
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "logits_to_keep",
    "num_items_in_batch",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
}
Words = dict[str, object]


class Unsupported(ValueError):
    """A model that cannot run over pages. The message is the end of a sentence."""


class Attends(Protocol):
    """What the attention of one module does."""

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, words: Words
    ) -> Tensor:
        """q [1, H, T, D], k [1, Hkv, T, D], v [1, Hkv, T, Dv] -> [1, T, H, Dv]."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **words: object,
) -> tuple[Tensor, None]:
    """A function of transformers' attention interface."""
    pages: Attends | None = getattr(module, ATTRIBUTE, None)
    if pages is None:
        raise RuntimeError(
            f"model: {type(module).__name__} attends in this step, and it did not when the model "
            "was made; use model_impl='vllm' or another model"
        )
    if torch.compiler.is_compiling():
        number = getattr(module, NUMBER)
        sinks = words.get("s_aux")
        assert attention_mask is None, "pages know no mask"
        return attend_pages(query, key, value, sinks, number), None
    return pages.attend(module, query, key, value, attention_mask, words), None


@torch.library.custom_op(
    "nanovllm::attend_pages",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? sinks, int number) -> Tensor",
)
def attend_pages(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, number: int) -> Tensor:
    """`LayerPages.run` of the module with this number, as one operation of compiled code."""
    return PAGES[number].run(q, k, v, sinks)


@attend_pages.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, number: int) -> Tensor:
    return q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])


def register() -> None:
    """Makes the two names known to transformers. Raises ValueError for an old transformers."""
    import transformers

    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as err:
        raise ValueError(
            f"model_impl='transformers' needs transformers 4.53 or newer; installed is "
            f"{transformers.__version__}"
        ) from err
    AttentionInterface.register(PAGED, attend)
    AttentionInterface.register(LEARN, attend)
    AttentionMaskInterface.register(LEARN, noted_mask)


# -- running -----------------------------------------------------------------------------


class Step:
    """The attention backend of the running step. One object for all modules of a model."""

    backend: AttentionBackend


@dataclass
class LayerPages:
    """The pages of one module.

    A module that attends several times in a step has several layers, in the order of its
    calls.
    """

    step: Step
    layers: list[int] = field(default_factory=list)  # indices among the layers that have pages
    calls: int = 0  # in this step
    meta: object = None  # the metadata of this step

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, words: Words
    ) -> Tensor:
        if mask is not None:
            raise RuntimeError("model: a layer has a mask in this step, and pages know none")
        sinks = words.get("s_aux")
        assert sinks is None or isinstance(sinks, Tensor)
        return self.run(q, k, v, sinks)

    def run(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        """`attend` without a mask. sinks: what the layer passes, used where it has sinks."""
        backend = self.step.backend
        if backend.meta is not self.meta:  # the step before may have ended with an error
            self.meta = backend.meta
            self.calls = 0
        layer = self.layers[self.calls % len(self.layers)]
        self.calls += 1
        dtype, spec = backend.spec.dtype, backend.spec.layers[layer]
        backend.store(layer, rows_of(k, dtype), rows_of(v, dtype))
        out = backend.attend(layer, rows_of(q, dtype), sinks if spec.has_sinks else None)
        return out.view(1, -1, spec.num_heads, spec.value_size).to(q.dtype)


def give_pages(modules: list[nn.Module], step: Step) -> None:
    """Layer i has the pages of the i-th call of a step. modules: the callers."""
    pages: dict[nn.Module, LayerPages] = {}
    for layer, module in enumerate(modules):
        pages.setdefault(module, LayerPages(step)).layers.append(layer)
    for module, each in pages.items():
        number = next(NUMBERS)
        PAGES[number] = each
        setattr(module, ATTRIBUTE, each)
        setattr(module, NUMBER, number)


# Compiled code names pages by a number. An entry lives as long as the model that attends.
PAGES: WeakValueDictionary[int, LayerPages] = WeakValueDictionary()
NUMBERS = count()


def rows_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[1, H, T, D] -> [T, H, D]."""
    return x[0].transpose(0, 1).to(dtype).contiguous()


# -- learning ----------------------------------------------------------------------------

NOTES: ContextVar[Notes | None] = ContextVar("NOTES", default=None)
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass
class Notes:
    """What one forward pass asked of attention.

    length: the longest sequence in tokens. A mask is compared up to it.
    """

    length: int
    specs: list[PagedKV] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)  # kept, because addresses name them
    # Address of a mask -> its window, or why it is refused where a layer uses it.
    windows: dict[int, int | Unsupported | None] = field(default_factory=dict)

    @contextmanager
    def learning(self, model: nn.Module) -> Iterator[None]:
        """Attention and masks of `model` are noted inside the `with`."""
        token = NOTES.set(self)
        try:
            with attending(model, self):
                yield
        finally:
            NOTES.reset(token)

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, words: Words
    ) -> Tensor:
        """Notes the call. The result is zeros."""
        name = type(module).__name__
        if q.shape[2] != k.shape[2]:
            raise Unsupported(f"{name} attends to more tokens than the step has")
        unknown = [word for word, value in words.items() if value is not None]
        unknown = [word for word in unknown if word not in WITHOUT_EFFECT]
        if unknown:
            raise Unsupported(f"{name} passes {', '.join(unknown)} to its attention")
        if k.shape[1] != v.shape[1] or q.shape[1] % k.shape[1]:
            raise Unsupported(
                f"{name} has {q.shape[1]} query heads, {k.shape[1]} key heads and {v.shape[1]} "
                "value heads"
            )
        spec = PagedKV(
            num_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            head_dim=q.shape[3],
            window=self.window(module, mask, words),
            value_dim=v.shape[3],
            scale=number(words.get("scaling")),
            softcap=number(words.get("softcap")),
            has_sinks=words.get("s_aux") is not None,
        )
        self.specs.append(spec)
        self.modules.append(module)
        return q.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])

    def window(self, module: nn.Module, mask: Tensor | None, words: Words) -> int | None:
        """The sliding window of a layer. Raises Unsupported for attention that is not causal."""
        name = type(module).__name__
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.data_ptr() not in self.windows:
                raise Unsupported(f"{name} has a mask that its own code makes or changes")
            window = self.windows[mask.data_ptr()]
            if isinstance(window, Unsupported):
                raise window
            return window
        is_causal = words.get("is_causal")
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        if not is_causal:
            raise Unsupported(f"{name} is not causal")
        size = words.get("sliding_window")
        if isinstance(size, int) and size < self.length:
            raise Unsupported(f"{name} has a sliding window and no mask")
        return None


def number(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        raise Unsupported("a tensor scales its scores")
    assert isinstance(value, (int, float))
    return float(value)


def noted_mask(**words: object) -> Tensor | None:
    """A function of transformers' mask interface: the mask of `sdpa`, and a note of it."""
    from transformers.masking_utils import sdpa_mask

    words["allow_is_causal_skip"] = False
    words["allow_is_bidirectional_skip"] = False
    mask: Tensor = sdpa_mask(**words)
    notes = NOTES.get()
    if notes is not None:
        function: MaskFunction = words["mask_function"]  # type: ignore[assignment]
        notes.masks.append(mask)
        try:
            notes.windows[mask.data_ptr()] = window_of(function, notes.length)
        except Unsupported as err:
            notes.windows[mask.data_ptr()] = err
    return mask


def window_of(mask_function: MaskFunction, length: int) -> int | None:
    """The window of a causal mask, None if it has none.

    Raises Unsupported for a mask that is no such one in some of the compared rows: the
    first and last ones, those around the window, and some between them.
    """
    last = row_of(mask_function, length - 1, length)
    window = int(last.sum())
    around = (0, 1, 2, 3, window - 2, window - 1, window, window + 1, 2 * window - 1, 2 * window)
    between = (length * part // 7 for part in range(8))
    for row in sorted({at for at in (*around, *between, length - 1) if 0 <= at < length}):
        keys = torch.arange(length, device="cpu")
        causal = (keys <= row) & (keys > row - window)
        if not torch.equal(row_of(mask_function, row, length), causal):
            raise Unsupported("its mask is neither causal nor a sliding window")
    return None if window >= length else window


def row_of(mask_function: MaskFunction, row: int, length: int) -> Tensor:
    """bool [length]: the keys that the query at position `row` sees."""
    with torch.device("cpu"):
        zero = torch.tensor(0)
        seen = mask_function(zero, zero, torch.tensor(row), torch.arange(length))
    return torch.as_tensor(seen).expand(length)


# -- checking ----------------------------------------------------------------------------


class OwnToken:
    """Attention of each token to itself alone, of a kind that depends on its q, k and v."""

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, words: Words
    ) -> Tensor:
        if mask is not None:
            raise Unsupported(f"{type(module).__name__} makes a mask of its own")
        group = q.shape[1] // v.shape[1]
        ramp = torch.linspace(-1, 1, q.shape[3], device=q.device)
        factor = q.float() @ ramp  # [1, H, T]
        factor = factor + (k.float() @ ramp).repeat_interleave(group, dim=1)
        factor = 1 + torch.tanh(factor / math.sqrt(q.shape[3]))
        values = v.float().repeat_interleave(group, dim=1) * factor[..., None]
        return values.transpose(1, 2).to(q.dtype).contiguous()  # [1, T, H, Dv]


@contextmanager
def attending(model: nn.Module, attention: Attends) -> Iterator[None]:
    """Every module of `model` attends by `attention` inside the `with`."""
    modules = list(model.modules())
    before = [vars(module).pop(ATTRIBUTE, None) for module in modules]
    for module in modules:
        setattr(module, ATTRIBUTE, attention)
    try:
        yield
    finally:
        for module, old in zip(modules, before):
            delattr(module, ATTRIBUTE)
            if old is not None:
                setattr(module, ATTRIBUTE, old)
