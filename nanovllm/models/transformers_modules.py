"""Our layers in the place of transformers' linear layers and tables, and memory for the rest."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nanovllm.layers.foreign import ColumnLinear, OutputHead, RowLinear, TiedHead, TokenEmbedding
from nanovllm.layers.linear import Matrix
from nanovllm.loader.fields import cause
from nanovllm.loader.source import Source
from nanovllm.models.transformers_attention import PAGED, Unsupported
from nanovllm.models.transformers_config import TransformersConfig, model_class
from nanovllm.parallel import TensorParallel
from nanovllm.weights.base import Weight
from nanovllm.weights.dense import matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Unread(Weight):
    """A matrix that is not loaded yet. Its products are zeros."""

    def __init__(self, out_features: int, in_features: int) -> None:
        self.out_features = out_features
        self.in_features = in_features
        self.rows: set[int] = set()  # of the inputs so far

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
        self.rows.add(len(x))
        return x.new_zeros(len(x), self.out_features)

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        return torch.zeros(len(ids), self.in_features)

    def begin_loading(self, layer: nn.Module) -> None:
        """Nothing to do: there is no tensor."""

    def finish_loading(self, layer: nn.Module) -> None:
        """Nothing to do: there is no tensor."""


class DirectUse(Unsupported):
    """A model computes with the weight of a linear layer by itself."""

    def __init__(self, name: str) -> None:
        super().__init__(f"its code computes with the weight of {name} by itself")
        self.name = name


class NoDirectUse(TorchFunctionMode):
    """Raises DirectUse where a model computes with a matrix, not through its layer.

    Our layers may store the numbers of a matrix in another order.
    """

    def __init__(self, matrices: dict[str, Matrix]) -> None:
        super().__init__()
        self.names = {
            id(parameter): name
            for name, layer in matrices.items()
            for parameter in layer.parameters()
        }

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        is_property = getattr(func, "__name__", "") == "__get__"
        for each in () if is_property else (*args, *kwargs.values()):
            if id(each) in self.names:
                raise DirectUse(self.names[id(each)])
        return func(*args, **kwargs)


@contextmanager
def unread(hf: nn.Module) -> Iterator[dict[str, Unread]]:
    """Inside the `with` no matrix is read. Gives what stands for each linear layer."""
    matrices = {name: each for name, each in hf.named_modules() if isinstance(each, Matrix)}
    before = [layer.storage for layer in matrices.values()]
    linear: dict[str, Unread] = {}
    for name, layer in matrices.items():
        out_features, in_features = matrix(layer).shape
        layer.storage = stand_in = Unread(out_features, in_features)
        if isinstance(layer, (ColumnLinear, RowLinear)):
            linear[name] = stand_in
    try:
        with NoDirectUse(matrices):
            yield linear
    finally:
        for layer, storage in zip(matrices.values(), before):
            layer.storage = storage


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
    cls = model_class(config)
    try:
        with torch.device("cpu"), EmptyOnMeta():
            hf = cls._from_config(hf_config, attn_implementation=PAGED)
    except Exception as err:  # the code of a model may raise any type
        if isinstance(err, KeyError) and err.args == (PAGED,):
            reason = "its attention does not pass through the attention interface"
            raise Unsupported(reason) from err
        raise Unsupported(f"its code fails while the model is made ({cause(err)})") from err
    return hf.eval().requires_grad_(False)


def tied_names(hf: nn.Module) -> list[list[str]]:
    """The names of each tensor that has several names."""
    names: dict[int, list[str]] = {}
    for name, parameter in hf.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [each for each in names.values() if len(each) > 1]


def set_attention(hf: Any, name: str) -> None:
    """Makes all parts of a model attend by this name of the attention interface."""
    for module in hf.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = name


def replace_matrices(hf: Any, tp: TensorParallel, left: set[str]) -> None:
    """Puts our layers in the place of linear layers, token embedding and output head.

    Subclasses of these, layers that stay in float32, and the layers `left` are left as
    they are.
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
            if full_name in left:
                if style != "replicated":
                    raise Unsupported(f"its code computes with the shards of {full_name}")
                continue
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
    try:
        embedding, head = hf.get_input_embeddings(), hf.get_output_embeddings()
    except (AttributeError, NotImplementedError) as err:
        raise Unsupported("its class has no get_input_embeddings that works") from err
    if not isinstance(embedding, nn.Embedding):
        raise Unsupported("it has no single token embedding")
    is_tied = isinstance(head, nn.Linear) and head.weight is embedding.weight
    ours: TokenEmbedding | None = None
    if type(embedding) is nn.Embedding:
        ours = TokenEmbedding(embedding.num_embeddings, embedding.embedding_dim, tp)
        put(hf, name_of(hf, embedding), ours)
    if type(head) is not nn.Linear:
        raise Unsupported("its output head is no linear layer")
    sizes = (head.in_features, head.out_features)
    if is_tied and ours is not None and head.bias is None:
        put(hf, name_of(hf, head), TiedHead(ours))
        return
    has_bias = head.bias is not None
    put(hf, name_of(hf, head), OutputHead(*sizes, has_bias, tp))


def head_of(hf: Any) -> Matrix:
    """The output head, or the embedding that is the head too."""
    for module in hf.modules():
        if isinstance(module, TiedHead):
            return module.embedding[0]
        if isinstance(module, OutputHead):
            return module
    raise AssertionError("replace_ends made a head")


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
