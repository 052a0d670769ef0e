"""Linear and embedding layers, whole or sharded over tensor-parallel ranks.

A column-parallel layer holds a slice of the output features, and a row-parallel layer a
slice of the input features. A column layer followed by a row layer needs one all-reduce
(Shoeybi et al., Megatron-LM, 2019). Each layer lists which slice of which checkpoint
tensor fills it (`sources`), so a rank reads only its own shard. Nothing outside layers/
knows ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from nanovllm import kernels
from nanovllm.core.batch import ceil_div
from nanovllm.loader.source import Source
from nanovllm.parallel import TensorParallel
from nanovllm.weights.select import new_weight

EVERYTHING = slice(None)


def span(part: range) -> slice:
    """The slice of the same numbers."""
    return slice(part.start, part.stop)


class Matrix(nn.Module):
    """A layer around one matrix [out_features, in_features].

    `storage` knows how the matrix lies in memory. Its tensors are parameters of this
    module.
    """

    def __init__(
        self, out_features: int, in_features: int, bias: bool = False, num_groups: int = 1
    ) -> None:
        """num_groups: of matrices that lie one below the other, 1 for a plain matrix."""
        super().__init__()
        self.storage = new_weight(self, out_features, in_features, num_groups)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)

    def sources(self, prefix: str) -> list[Source]:
        """What fills the parameters from a checkpoint. prefix: the name of this module."""
        raise NotImplementedError

    def begin_loading(self) -> None:
        """Puts the weights into the form of checkpoints, so that they can be read or written."""
        self.storage.begin_loading(self)

    def finish_loading(self) -> None:
        """Puts the weights into the form that products read."""
        self.storage.finish_loading(self)


class ColumnParallelLinear(Matrix):
    """x [T, in] -> [T, out of this rank].

    The matrix has several checkpoint matrices side by side, so they take one product.
    `pieces` maps the checkpoint's names to numbers of units. A unit is `unit` rows, for
    example one head. A rank gets whole units.
    """

    def __init__(
        self,
        in_features: int,
        pieces: dict[str, int],
        bias: bool,
        tp: TensorParallel,
        unit: int = 1,
    ) -> None:
        # name -> (rows in the checkpoint, this rank's range of them)
        rows: dict[str, tuple[int, range]] = {}
        out_features = 0
        for name, count in pieces.items():
            part = tp.split(count)
            rows[name] = (count * unit, range(part.start * unit, part.stop * unit))
            out_features += len(part) * unit
        super().__init__(out_features, in_features, bias)
        self.in_features = in_features
        self.pieces = rows

    def sources(self, prefix: str) -> list[Source]:
        """The pieces fill the rows one after the other."""
        parent = prefix.rpartition(".")[0]
        found: list[Source] = []
        start = 0
        for piece, (total, part) in self.pieces.items():
            name = f"{parent}.{piece}"
            shape = (total, self.in_features)
            rows = slice(start, start + len(part))
            start = rows.stop
            found += self.storage.sources(self, name, shape, (span(part), EVERYTHING), rows)
            if self.bias is not None:
                source = Source(f"{name}.bias", (total,), (span(part),), self.bias[rows])
                found.append(source)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.storage.linear(self, x, self.bias)


# A layer with another `forward` computes something else.
PLAIN_PRODUCT = ColumnParallelLinear.forward


def swiglu(gate_up: nn.Module, x: Tensor) -> Tensor:
    """silu(gate) * up, where `gate_up` gives both: x [T, in] -> [T, I of this rank].

    On a GPU the weight may compute all of it in one kernel. This needs a layer whose result
    no hook reads.
    """
    if kernels.triton_for(x, "swiglu_linear") is not None and is_plain_product(gate_up):
        assert isinstance(gate_up, ColumnParallelLinear)
        return gate_up.storage.swiglu(gate_up, x, gate_up.bias)
    return kernels.silu_and_mul(gate_up(x))


def is_plain_product(layer: nn.Module) -> bool:
    """Whether a call of the layer computes its product and runs nothing else."""
    hooks = (
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
        layer._forward_hooks,
        layer._forward_pre_hooks,
    )
    is_plain = type(layer).forward is PLAIN_PRODUCT and "forward" not in vars(layer)
    return is_plain and not any(hooks)


class FusedColumnParallelLinear(ColumnParallelLinear):
    """The pieces are one matrix in the checkpoint too, one after the other (Phi-3)."""

    def sources(self, prefix: str) -> list[Source]:
        """A slice of each piece fills its rows."""
        shape = (sum(total for total, _ in self.pieces.values()), self.in_features)
        found: list[Source] = []
        start = 0  # row of the matrix
        first = 0  # row of the checkpoint matrix with which the piece begins
        for total, part in self.pieces.values():
            rows = slice(start, start + len(part))
            stored = slice(first + part.start, first + part.stop)
            start = rows.stop
            first += total
            found += self.storage.sources(self, prefix, shape, (stored, EVERYTHING), rows)
            if self.bias is not None:
                found.append(Source(f"{prefix}.bias", shape[:1], (stored,), self.bias[rows]))
        return found


class RowParallelLinear(Matrix):
    """x [T, in of this rank] -> [T, out], summed over the ranks. Rank 0 adds the bias."""

    def __init__(self, in_features: int, out_features: int, bias: bool, tp: TensorParallel) -> None:
        part = tp.split(in_features)
        super().__init__(out_features, len(part), bias)
        self.tp = tp
        self.part = part
        self.shape = (out_features, in_features)  # of the whole matrix

    def sources(self, prefix: str) -> list[Source]:
        """A slice of the columns fills all rows."""
        columns = (EVERYTHING, span(self.part))
        found = self.storage.sources(self, prefix, self.shape, columns, EVERYTHING)
        if self.bias is not None:
            shape = self.shape[:1]
            found.append(Source(f"{prefix}.bias", shape, (EVERYTHING,), self.bias))
        return found

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.tp.rank == 0 else None
        partial_sum = self.storage.linear(self, x, bias)
        return self.tp.all_reduce(partial_sum)


class VocabParallelEmbedding(Matrix):
    """Token embedding, and by `logits` the output head.

    Each rank holds ceil(vocab_size / ranks) consecutive rows. The last rank pads its
    rows.
    """

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel) -> None:
        rows = ceil_div(vocab_size, tp.size)
        super().__init__(rows, hidden_size)
        self.tp = tp
        self.rows = rows
        start = min(tp.rank * rows, vocab_size)
        stop = min((tp.rank + 1) * rows, vocab_size)
        self.part = range(start, stop)
        self.shape = (vocab_size, hidden_size)  # of the whole matrix
        for parameter in self.parameters():
            parameter.data[len(self.part) :] = 0  # the padding

    def sources(self, prefix: str) -> list[Source]:
        """A slice of the rows fills the rows before the padding."""
        rows = slice(0, len(self.part))
        part = (span(self.part), EVERYTHING)
        return self.storage.sources(self, prefix, self.shape, part, rows)

    def forward(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, hidden]."""
        if self.tp.size == 1:
            return self.storage.embedding(self, token_ids)
        local = token_ids - self.part.start
        mine = (local >= 0) & (local < len(self.part))
        rows = self.storage.embedding(self, local.clamp(0, self.rows - 1))
        return self.tp.all_reduce(rows * mine[:, None])

    def logits(self, x: Tensor) -> Tensor:
        """[K, hidden] -> [K, vocabulary], on every rank."""
        local = self.storage.linear(self, x, None)  # [K, rows]
        every = self.tp.gather(local)  # [K, rows * ranks]
        # Contiguous even with the padding cut off, because samplers read whole rows.
        return every[:, : self.shape[0]].contiguous()


class ScaledEmbedding(VocabParallelEmbedding):
    """An embedding whose rows are multiplied by a factor (Gemma). `logits` has no factor."""

    def __init__(
        self, vocab_size: int, hidden_size: int, tp: TensorParallel, *, factor: float
    ) -> None:
        super().__init__(vocab_size, hidden_size, tp)
        # Gemma was trained with a factor in the precision of the weights.
        rounded = torch.tensor(factor, dtype=torch.get_default_dtype(), device="cpu")
        self.factor: float = rounded.item()

    def forward(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, hidden]."""
        return kernels.scale(super().forward(token_ids), self.factor)
