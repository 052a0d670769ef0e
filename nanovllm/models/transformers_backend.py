"""Any decoder of transformers: its own modelling code, with our pages and matrices below it.

`nn.Linear` and `nn.Embedding` are replaced by layers over `Weight` objects. A step is one
row of packed tokens with their positions. transformers' cache is off, and its masks are
not made. What each layer remembers is learnt from one forward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nanovllm.attention.base import AttentionBackend
from nanovllm.cache.spec import CacheSpec
from nanovllm.layers.foreign import TiedHead
from nanovllm.layers.linear import Matrix
from nanovllm.loader.fields import cause, is_integer
from nanovllm.loader.source import FLOATS, LazyTensor, Source, all_sources, fill
from nanovllm.models.base import LanguageModel
from nanovllm.models.config import ModelConfig
from nanovllm.models.transformers_attention import (
    LEARN,
    PAGED,
    Notes,
    OwnToken,
    Step,
    Unsupported,
    attending,
    give_pages,
    register,
)
from nanovllm.models.transformers_config import TransformersConfig
from nanovllm.models.transformers_modules import (
    DirectUse,
    head_of,
    make_on_meta,
    materialise,
    replace_matrices,
    set_attention,
    tied_names,
    unread,
)
from nanovllm.models.transformers_weights import renamed
from nanovllm.parallel import TensorParallel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 8


class TransformersForCausalLM(LanguageModel):
    """A `*ForCausalLM` of transformers.

    Its modules are children of this one, so they have the names of checkpoints. `hf` is
    transformers' model of the same modules. It is no child.
    """

    can_record = False

    def __init__(self, config: ModelConfig, max_model_len: int, tp: TensorParallel) -> None:
        super().__init__(config, max_model_len, tp)
        assert isinstance(config, TransformersConfig)
        self.name = config.hf_architecture
        register()
        self.is_checked = False
        left: set[str] = set()  # linear layers that must stay as they are
        try:
            while True:
                hf = make_on_meta(config)
                self.tied = tied_names(hf)
                replace_matrices(hf, tp, left)
                materialise(hf)
                self.outside = {"hf": hf}
                found = self.learn()
                if not found:
                    break
                left |= found
            self.adopt(hf)
        except Unsupported as err:
            raise ValueError(self.refusal(str(err))) from err

    def adopt(self, hf: nn.Module) -> None:
        """Makes the modules and tensors of transformers' model parts of this one."""
        for name, child in hf.named_children():
            if hasattr(self, name):
                raise Unsupported(f"it has a module called {name}, a name that is in use here")
            if not isinstance(child, TiedHead):
                self.add_module(name, child)
        for name, parameter in hf._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in hf._buffers.items():
            persistent = name not in hf._non_persistent_buffers_set
            self.register_buffer(name, buffer, persistent)

    @property
    def hf(self) -> PreTrainedModel:
        return self.outside["hf"]

    def refusal(self, reason: str) -> str:
        return (
            f"model: {self.name} cannot run as transformers' own code over pages: {reason}; "
            "accepted are decoders whose state is K and V of causal attention, and whose attention "
            "passes through transformers' attention interface"
        )

    # -- learning ------------------------------------------------------------------------

    def learn(self) -> set[str]:
        """Runs the model once, and notes what its layers ask of attention.

        Returns the linear layers that must stay as they are, because the model's code reads
        their weights by itself, or does not call them with all tokens of a step (experts).
        Raises Unsupported for a model that cannot run over pages.
        """
        hf = self.hf
        notes = Notes(self.max_model_len)
        ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.int64)
        positions = torch.arange(PROBE_TOKENS)[None]
        mask = None
        if has_packed_masks():
            mask = torch.ones(1, PROBE_TOKENS, dtype=torch.int64)
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
        calls = TopCalls(hf)
        set_attention(hf, LEARN)
        try:
            with notes.learning(hf), calls.noted(), unread(hf) as used, torch.inference_mode():
                out = hf(**inputs, use_cache=False)
        except DirectUse as err:
            return {err.name}
        except Unsupported:
            raise
        except Exception as err:  # the code of a model may raise any type
            raise Unsupported(f"its code fails in a step of packed tokens ({cause(err)})") from err
        set_attention(hf, PAGED)
        if not notes.modules:
            raise Unsupported("its attention does not pass through the attention interface")
        expected = (1, PROBE_TOKENS, self.config.vocab_size)
        if tuple(out.logits.shape) != expected:
            raise Unsupported(f"its logits are {list(out.logits.shape)}, not {list(expected)}")
        partly = {name for name, weight in used.items() if weight.rows != {PROBE_TOKENS}}
        if partly:
            return partly
        self.body = BodyCall(calls.body(notes.modules), inputs)
        self.specs = notes.specs
        check_windows(hf, notes)
        self.step = Step()
        give_pages(notes.modules, self.step)
        return set()

    def check_tokens(self) -> None:
        """Raises ValueError for a model that mixes tokens outside of attention.

        Then no batch and no cache of K and V gives its results. Two passes compare: with
        attention of each token to itself, a token's result depends on no other token.
        """
        generator = torch.Generator().manual_seed(0)
        vocab_size, longest = self.config.vocab_size, self.max_model_len
        ids = torch.randint(vocab_size, (PROBE_TOKENS,), generator=generator)
        positions = torch.tensor([0, 5, 1, 2, 4, 7, 3, longest - 1]).clamp(max=longest - 1)
        some = torch.tensor([5, 3, 6, 0])  # without the last position
        device = next(self.parameters()).device
        try:
            with torch.inference_mode(), attending(self.hf, OwnToken()):
                whole = self.body(ids.to(device), positions.to(device))
                part = self.body(ids[some].to(device), positions[some].to(device))
        except Exception as err:  # the code of a model may raise any type
            reason = str(err) if isinstance(err, Unsupported) else cause(err)
            raise ValueError(self.refusal(reason)) from err
        expected = whole[some.to(device)].float()
        error = (part.float() - expected).abs().max()
        tolerance = 1e-3 if whole.dtype == torch.float32 else 0.05
        if not error <= tolerance * expected.abs().max():
            raise ValueError(
                self.refusal(
                    "the result of a token depends on more than its own position and attention: "
                    "on other tokens, on its place in the step, or on the longest position (where "
                    f"a RoPE scaling does this, a smaller max_model_len than {longest} may help)"
                )
            )

    # -- running -------------------------------------------------------------------------

    @property
    def head(self) -> Matrix:
        return head_of(self.hf)

    def cache_specs(self) -> list[CacheSpec]:
        return list(self.specs)

    def forward(self, input_ids: Tensor, attention: AttentionBackend) -> Tensor:
        self.attend_by(attention)
        return self.body(input_ids, attention.meta.positions.long())

    def body_to_compile(self, attention: AttentionBackend) -> BodyCall:
        """The body, whose layers attend by `attention`."""
        self.attend_by(attention)
        return self.body

    def attend_by(self, attention: AttentionBackend) -> None:
        self.step.backend = attention

    def logits(self, hidden: Tensor) -> Tensor:
        """All that transformers' model does after its body: head, scaling, softcap."""
        with self.body.replaced(hidden[None]):
            ids = hidden.new_zeros(1, len(hidden), dtype=torch.int64)
            out = self.hf(input_ids=ids, position_ids=ids, use_cache=False)
        return out.logits[0].contiguous()

    # -- weights -------------------------------------------------------------------------

    def sources(self, prefix: str) -> list[Source]:
        """What fills the parameters that stand in no `Matrix`."""
        assert prefix == ""
        return [source_of(name, parameter) for name, parameter in self.plain_parameters()]

    def plain_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, tensor) of parameters, and of buffers that checkpoints have."""
        for prefix, module in self.named_modules():
            if isinstance(module, Matrix):
                continue
            dot = f"{prefix}." if prefix else ""
            for name, parameter in module.named_parameters(prefix, recurse=False):
                yield name, parameter
            for name, buffer in module.named_buffers(prefix, recurse=False):
                is_stored = name.removeprefix(dot) not in module._non_persistent_buffers_set
                if is_stored and buffer.dtype in FLOATS:
                    yield name, buffer

    def load_weights(self, weights: Iterable[tuple[str, LazyTensor]]) -> set[str]:
        """Writes new weights, under checkpoint names, into the running model.

        Names that the model does not have are logged and ignored, as transformers does.
        """
        wanted = self.targets()
        with self.unpacked():
            given = fill(self, renamed(self.hf, weights, wanted))
        if not self.is_checked:
            self.check_tokens()
            self.is_checked = True
        # A checkpoint may lack what the constructor computes.
        buffers = {name for name, _ in self.named_buffers()}
        return given | (buffers & wanted.keys())

    def targets(self) -> dict[str, list[str]]:
        """Name of a checkpoint tensor -> the names that it fills, of tied tensors all."""
        names = all_sources(self)
        found = {name: [name] for name in names}
        for tied in self.tied:
            filled = [name for name in tied if name in names]
            found.update(dict.fromkeys(tied, filled))
        return found


def has_packed_masks() -> bool:
    """Whether transformers without a mask of padding always makes masks for packed sequences.

    Version 4 does, and such masks cannot be compared beyond the tokens of the step.
    """
    import transformers

    return transformers.__version__.startswith("4.")


def check_windows(hf: Any, notes: Notes) -> None:
    """Raises Unsupported where masks lack a window that transformers' cache has.

    transformers then gives other results with its cache than without it.
    """
    config = hf.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if not is_integer(window) or window >= notes.length:
        return
    is_used = getattr(config, "use_sliding_window", True)
    types = getattr(config, "layer_types", None)
    for layer, spec in enumerate(notes.specs):
        is_sliding = is_used
        if types is not None:
            is_sliding = layer < len(types) and types[layer] == "sliding_attention"
        if is_sliding and spec.window is None:
            raise Unsupported("its config has a sliding window, and its masks have none")


def source_of(name: str, tensor: Tensor) -> Source:
    if tensor.dim() == 0:
        return Source(name, (), (), Scalar(tensor))
    return Source(name, tuple(tensor.shape), (slice(None),), tensor)


@dataclass
class Scalar:
    """Reads a checkpoint tensor without dimensions."""

    into: Tensor

    def expect(self, tensor: LazyTensor, part: tuple[slice, ...]) -> None:
        """Nothing to note."""

    def allocate(self) -> None:
        """Nothing to allocate."""

    def take(self, tensor: LazyTensor, part: tuple[slice, ...]) -> None:
        self.into.data.copy_(tensor[...])


# -- the body ----------------------------------------------------------------------------


class TopCalls:
    """The modules that a model's forward calls itself: its body, its head, and others."""

    def __init__(self, hf: nn.Module) -> None:
        self.hf = hf
        self.depth = 0
        self.calls: list[TopCall] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        handles = []
        for module in self.hf.modules():
            if module is not self.hf:
                handles.append(module.register_forward_pre_hook(self.enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self.leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.depth == 0:
            self.calls.append(TopCall(module, args, kwargs, None))
        self.depth += 1

    def leave(self, module: nn.Module, args: object, output: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.calls[-1].output = output

    def body(self, attending: list[nn.Module]) -> TopCall:
        """The one call in which all of these modules ran."""
        inside = {id(module) for module in attending}
        found = []
        for call in self.calls:
            if inside & {id(module) for module in call.module.modules()}:
                found.append(call)
        if len(found) != 1:
            raise Unsupported("its layers are not the part of one module")
        return found[0]


@dataclass
class TopCall:
    """A call of a module, and its result."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class BodyCall:
    """Calls the body of a model as the model's own forward calls it."""

    def __init__(self, call: TopCall, inputs: dict[str, Tensor | None]) -> None:
        """inputs: the tensors that the model's forward got in `call`."""
        self.module = call.module
        self.constants: dict[str, Any] = {}
        self.ids_name = self.positions_name = ""
        parameters = inspect.signature(self.module.forward).parameters
        positional = dict(zip(parameters, call.args))
        for name, value in {**positional, **call.kwargs}.items():
            if value is inputs["input_ids"]:
                self.ids_name = name
            elif value is inputs["position_ids"]:
                self.positions_name = name
            elif value is inputs["attention_mask"]:
                self.constants[name] = None
            elif isinstance(value, Tensor):
                raise Unsupported(f"it computes {name} before its body runs")
            else:
                self.constants[name] = value
        if not self.ids_name or not self.positions_name:
            raise Unsupported("its body takes no token ids with their positions")
        self.output_type = type(call.output)
        if not hasattr(call.output, "last_hidden_state"):
            raise Unsupported("its body returns no last_hidden_state")
        self.hidden: Tensor | None = None  # [1, K, hidden], what `forward` returns instead
        self.forward = self.module.forward
        self.module.forward = self.forward_or_hidden

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids and positions [T] -> hidden states [T, hidden]."""
        inputs = {self.ids_name: ids[None], self.positions_name: positions[None]}
        out = self.module(**inputs, **self.constants)
        return out.last_hidden_state[0]

    def forward_or_hidden(self, *args: Any, **kwargs: Any) -> Any:
        """What the body's module does when it is called."""
        if self.hidden is None:
            return self.forward(*args, **kwargs)
        return self.output_type(last_hidden_state=self.hidden)

    @contextmanager
    def replaced(self, hidden: Tensor) -> Iterator[None]:
        """Inside the `with` a call of the body returns these hidden states [1, K, hidden]."""
        self.hidden = hidden
        try:
            yield
        finally:
            self.hidden = None
