"""Any decoder of transformers: its own modelling code, with our pages and matrices below it.

`nn.Linear` and `nn.Embedding` are replaced by layers over `Weight` objects. A step is one
row of packed tokens with their positions. transformers' cache is off, and its masks are
not made. What each layer remembers is learnt from one forward pass.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nanovllm.attention.base import AttentionBackend
from nanovllm.cache.spec import CacheSpec
from nanovllm.layers.foreign import ColumnLinear, OutputHead, RowLinear, TiedHead, TokenEmbedding
from nanovllm.layers.linear import Matrix
from nanovllm.loader.fields import cause
from nanovllm.loader.source import FLOATS, LazyTensor, Source, all_sources, fill
from nanovllm.models.base import LanguageModel
from nanovllm.models.config import ModelConfig
from nanovllm.models.transformers_attention import (
    ATTRIBUTE,
    LEARN,
    PAGED,
    LayerPages,
    Notes,
    OwnToken,
    Step,
    Unsupported,
    attending,
    register,
)
from nanovllm.models.transformers_config import TransformersConfig, model_class
from nanovllm.models.transformers_weights import renamed
from nanovllm.parallel import TensorParallel
from nanovllm.weights.base import Weight

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
        super().__init__(config, tp)
        assert isinstance(config, TransformersConfig)
        self.name = config.hf_architecture
        self.max_model_len = max_model_len
        register()
        try:
            hf = make_on_meta(config)
            replace_matrices(hf, tp)
            materialise(hf)
            self.outside = {"hf": hf}
            for name, child in hf.named_children():
                if not isinstance(child, TiedHead):
                    self.add_module(name, child)
            self.lm_head = head_of(hf)
            self.learn()
        except Unsupported as err:
            raise ValueError(self.refusal(str(err))) from err
        self.is_checked = False

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

    def learn(self) -> None:
        """Runs the model once, and notes what its layers ask of attention.

        Raises Unsupported for a model that cannot run over pages.
        """
        hf = self.hf
        notes = Notes(self.max_model_len)
        device = torch.get_default_device()
        ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.int64)
        positions = torch.arange(PROBE_TOKENS)[None]
        calls = TopCalls(hf)
        set_attention(hf, LEARN)
        try:
            with torch.inference_mode(), device, notes.learning(hf), calls.noted(), unread(hf):
                out = hf(input_ids=ids, position_ids=positions, use_cache=False)
        except Unsupported:
            raise
        except Exception as err:  # the code of a model may raise any type
            raise Unsupported(f"its code fails without a cache ({cause(err)})") from err
        set_attention(hf, PAGED)
        if not notes.modules:
            raise Unsupported("its attention does not pass through the attention interface")
        vocab_size = out.logits.shape[-1]
        if vocab_size != self.config.vocab_size:
            raise Unsupported(
                f"it has {vocab_size} logits, and vocab_size is {self.config.vocab_size}"
            )
        self.body = BodyCall(calls.body(notes.modules), ids, positions)
        self.specs = notes.specs
        self.step = Step()
        for layer, (module, spec) in enumerate(zip(notes.modules, notes.specs)):
            setattr(module, ATTRIBUTE, LayerPages(self.step, layer, spec))

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
        except Unsupported as err:
            raise ValueError(self.refusal(str(err))) from err
        expected = whole[some.to(device)].float()
        error = (part.float() - expected).abs().max()
        tolerance = 1e-3 if whole.dtype == torch.float32 else 0.05
        if not error <= tolerance * expected.abs().max():
            raise ValueError(
                self.refusal(
                    "the result of a token depends on other tokens outside of attention, or on the "
                    f"longest position of the step (a smaller max_model_len than {longest} may "
                    "help where a RoPE scaling does this)"
                )
            )

    # -- running -------------------------------------------------------------------------

    def cache_specs(self) -> list[CacheSpec]:
        return list(self.specs)

    def forward(self, input_ids: Tensor, attention: AttentionBackend) -> Tensor:
        self.step.backend = attention
        return self.body(input_ids, attention.meta.positions.long())

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
        wanted = {name: name for name in all_sources(self)}
        for name, target in tied_names(self.hf):
            if target in wanted:
                wanted.setdefault(name, target)
        with self.unpacked():
            given = fill(self, first_of_each(renamed(self.hf, weights, wanted)))
        if not self.is_checked:
            self.check_tokens()
            self.is_checked = True
        # A checkpoint may lack what the constructor computes.
        buffers = {name for name, _ in self.named_buffers()}
        return given | (buffers & wanted.keys())


def first_of_each(
    weights: Iterable[tuple[str, LazyTensor]],
) -> Iterator[tuple[str, LazyTensor]]:
    """Without the second copy of a tied tensor."""
    seen: set[str] = set()
    for name, tensor in weights:
        if name not in seen:
            seen.add(name)
            yield name, tensor


def tied_names(hf: nn.Module) -> Iterator[tuple[str, str]]:
    """(other name, first name) of each tensor that has several names."""
    first: dict[int, str] = {}
    for name, parameter in hf.named_parameters(remove_duplicate=False):
        target = first.setdefault(id(parameter), name)
        if target != name:
            yield name, target
    for name, module in hf.named_modules():
        if isinstance(module, TiedHead):
            yield f"{name}.weight", first[id(module.weight)]
        elif isinstance(module, OutputHead) and module.tied_to is not None:
            yield f"{name}.weight", f"{module.tied_to}.weight"


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


# -- making ------------------------------------------------------------------------------


class Unread(Weight):
    """A matrix that is not loaded yet. Its products are zeros."""

    def __init__(self, out_features: int, in_features: int) -> None:
        self.out_features = out_features
        self.in_features = in_features

    def sources(
        self,
        layer: nn.Module,
        name: str,
        shape: tuple[int, int],
        part: tuple[slice, slice],
        rows: slice,
    ) -> list[Source]:
        return []

    def linear(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_zeros(len(x), self.out_features)

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        return torch.zeros(len(ids), self.in_features)

    def begin_loading(self, layer: nn.Module) -> None:
        """Nothing to do: there is no tensor."""

    def finish_loading(self, layer: nn.Module) -> None:
        """Nothing to do: there is no tensor."""


class NoDirectUse(TorchFunctionMode):
    """Raises Unsupported where a model computes with a matrix, not through its layer.

    Our layers may store the numbers of a matrix in another order.
    """

    def __init__(self, matrices: list[Matrix]) -> None:
        super().__init__()
        self.ids = {id(parameter) for matrix in matrices for parameter in matrix.parameters()}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        is_property = getattr(func, "__name__", "") == "__get__"
        if not is_property and any(id(each) in self.ids for each in (*args, *kwargs.values())):
            raise Unsupported("its code computes with the weight of a linear layer by itself")
        return func(*args, **kwargs)


@contextmanager
def unread(hf: nn.Module) -> Iterator[None]:
    """Inside the `with` no matrix is read."""
    matrices = [module for module in hf.modules() if isinstance(module, Matrix)]
    before = [matrix.storage for matrix in matrices]
    for matrix in matrices:
        out_features, in_features = matrix.weight.shape
        matrix.storage = Unread(out_features, in_features)
    try:
        with NoDirectUse(matrices):
            yield
    finally:
        for matrix, storage in zip(matrices, before):
            matrix.storage = storage


class EmptyOnMeta(TorchFunctionMode):
    """`torch.empty` gives tensors on the meta device, which take no memory."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def make_on_meta(config: TransformersConfig) -> PreTrainedModel:
    """transformers' model. Large parameters lie on the meta device; buffers are computed."""
    hf_config = copy.deepcopy(config.hf)
    hf_config.tie_word_embeddings = config.tie_embeddings
    dtype = torch.get_default_dtype()
    for name in ("dtype", "torch_dtype"):
        if name in vars(hf_config):
            setattr(hf_config, name, dtype)
    try:
        cls = model_class(config)
        with torch.device("cpu"), EmptyOnMeta():
            hf = cls._from_config(hf_config, attn_implementation=PAGED)
    except Unsupported:
        raise
    except Exception as err:  # the code of a model may raise any type
        raise Unsupported(f"its code fails while the model is made ({cause(err)})") from err
    return hf.eval().requires_grad_(False)


def set_attention(hf: Any, name: str) -> None:
    """Makes all parts of a model attend by this name of the attention interface."""
    for module in hf.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = name


def replace_matrices(hf: Any, tp: TensorParallel) -> None:
    """Puts our layers in the place of linear layers, token embedding and output head.

    Subclasses of these, and layers that stay in float32, are left as they are.
    """
    plan = tensor_parallel_plan(hf) if tp.size > 1 else {}
    replace_ends(hf, tp)
    single = TensorParallel()
    for parent_name, parent in list(hf.named_modules()):
        if isinstance(parent, Matrix):
            continue
        for name, child in list(parent.named_children()):
            full_name = f"{parent_name}.{name}".lstrip(".")
            if type(child) is not nn.Linear or keeps_float32(hf, full_name):
                continue
            style = plan.get(re.sub(r"\.\d+(?=\.)", ".*", full_name), "replicated")
            shard = single if style == "replicated" else tp
            setattr(parent, name, linear_of(child, style, shard))


def linear_of(linear: nn.Linear, style: str, tp: TensorParallel) -> Matrix:
    """Our layer for a linear one. style: of transformers' plan for tensor parallelism."""
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    if style in ("rowwise", "rowwise_rep", "rowwise_split_input"):
        check_divides(linear.in_features, tp)
        return RowLinear(*sizes, tp, split_input=style != "rowwise")
    chunks = 2 if style == "packed_colwise" else 1
    check_divides(linear.out_features // chunks, tp)
    gather = style in ("colwise_rep", "colwise_gather_output")
    return ColumnLinear(*sizes, tp, chunks=chunks, gather=gather)


def check_divides(size: int, tp: TensorParallel) -> None:
    if size % tp.size:
        raise Unsupported(
            f"tensor_parallel_size={tp.size} does not divide a layer of {size} features"
        )


STYLES = (
    "colwise",
    "rowwise",
    "packed_colwise",
    "colwise_rep",
    "colwise_gather_output",
    "rowwise_rep",
    "rowwise_split_input",
)
REPLICATED = ("replicated", "replicated_with_grad_allreduce")


def tensor_parallel_plan(hf: Any) -> dict[str, str]:
    """Module name with * for numbers -> its style. Raises Unsupported for other styles."""
    plan = getattr(hf.config.get_text_config(), "base_model_tp_plan", None)
    if not plan:
        raise Unsupported(
            "it has no plan for tensor parallelism, so tensor_parallel_size must be 1"
        )
    prefix = hf.base_model_prefix
    found = {f"{prefix}.{name}": style for name, style in plan.items() if style not in REPLICATED}
    others = sorted(set(found.values()) - set(STYLES))
    if others:
        raise Unsupported(
            f"its plan for tensor parallelism asks for {', '.join(others)}, so "
            "tensor_parallel_size must be 1"
        )
    return found


def replace_ends(hf: Any, tp: TensorParallel) -> None:
    """Puts our layers in the place of the token embedding and the output head."""
    embedding, head = hf.get_input_embeddings(), hf.get_output_embeddings()
    if embedding is None:
        raise Unsupported("it has no token embedding")
    is_tied = head is not None and head.weight is embedding.weight
    at = name_of(hf, embedding)
    ours: TokenEmbedding | None = None
    if type(embedding) is nn.Embedding:
        ours = TokenEmbedding(embedding.num_embeddings, embedding.embedding_dim, tp)
        put(hf, at, ours)
    if type(head) is not nn.Linear:
        return
    sizes = (head.in_features, head.out_features)
    if is_tied and ours is not None and head.bias is None:
        put(hf, name_of(hf, head), TiedHead(ours))
        return
    has_bias = head.bias is not None
    new = OutputHead(*sizes, has_bias, tp, tied_to=at if is_tied else None)
    put(hf, name_of(hf, head), new)


def head_of(hf: Any) -> Matrix:
    """The output head, or the embedding that is the head too."""
    for module in hf.modules():
        if isinstance(module, TiedHead):
            return module.embedding[0]
        if isinstance(module, OutputHead):
            return module
    raise Unsupported("its output head is no linear layer")


def name_of(hf: nn.Module, module: nn.Module) -> str:
    return next(name for name, each in hf.named_modules() if each is module)


def put(hf: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(hf.get_submodule(parent), child, module)


def keeps_float32(hf: Any, name: str) -> bool:
    """Whether transformers keeps the tensors of this module in float32."""
    dtype = torch.get_default_dtype()
    kept = list(getattr(hf, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept += getattr(hf, "_keep_in_fp32_modules", None) or ()
    return dtype != torch.float32 and any(re.search(rf"(^|\.){each}($|\.)", name) for each in kept)


def materialise(hf: nn.Module) -> None:
    """Gives every parameter and buffer memory on torch's default device."""
    device = torch.get_default_device()
    made: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for prefix, module in hf.named_modules():
        if isinstance(module, Matrix):
            continue
        for name, old in list(module._parameters.items()):
            if old is None:
                continue
            if id(old) not in made:
                full_name = f"{prefix}.{name}"
                dtype = torch.float32 if keeps_float32(hf, full_name) else old.dtype
                new = torch.zeros_like(old, device=device, dtype=dtype)
                if not old.is_meta:
                    new.copy_(old)
                made[id(old)] = nn.Parameter(new, requires_grad=False)
            module._parameters[name] = made[id(old)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                if buffer.is_meta:
                    raise Unsupported(f"its buffer {prefix}.{name} is not computed when it is made")
                module._buffers[name] = buffer.to(device)


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

    def __init__(self, call: TopCall, ids: Tensor, positions: Tensor) -> None:
        """ids and positions: those that the model's forward got in `call`."""
        self.module = call.module
        self.constants: dict[str, Any] = {}
        self.ids_name = self.positions_name = ""
        parameters = inspect.signature(self.module.forward).parameters
        positional = dict(zip(parameters, call.args))
        for name, value in {**positional, **call.kwargs}.items():
            if value is ids:
                self.ids_name = name
            elif value is positions:
                self.positions_name = name
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
