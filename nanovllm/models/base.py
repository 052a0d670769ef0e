"""What the runner knows of a model, of ours or of transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from nanovllm.attention.base import AttentionBackend
from nanovllm.cache.spec import CacheSpec
from nanovllm.layers.linear import Matrix
from nanovllm.loader.source import LazyTensor, fill
from nanovllm.models.config import ModelConfig
from nanovllm.parallel import TensorParallel


class LanguageModel(nn.Module, ABC):
    """A decoder with its output head, or one rank's shard of it."""

    can_record = True  # as a program on a CPU: the model may call nothing but our kernels

    def __init__(self, config: ModelConfig, max_model_len: int, tp: TensorParallel) -> None:
        super().__init__()
        self.config = config
        self.max_model_len = max_model_len
        self.tp = tp

    @abstractmethod
    def cache_specs(self) -> list[CacheSpec]:
        """What each layer remembers of a sequence."""

    @property
    @abstractmethod
    def head(self) -> Matrix:
        """The output head, or the embedding that is the head too."""

    @abstractmethod
    def forward(self, input_ids: Tensor, attention: AttentionBackend) -> Tensor:
        """input_ids [T] -> hidden states [T, hidden]. Positions are in the backend's metadata."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """[K, hidden] -> [K, vocabulary]."""

    def body_to_compile(
        self, attention: AttentionBackend
    ) -> Callable[[Tensor, Tensor], Tensor] | None:
        """(token ids [T], positions [T]) -> hidden states [T, hidden], for torch.compile.

        None for a model that runs kernels of ours, which fuse what torch.compile would.
        """
        return None

    def attend_by(self, attention: AttentionBackend) -> None:
        """Compiled code calls this backend, because the backend is no argument of it."""

    def load_weights(self, weights: Iterable[tuple[str, LazyTensor]]) -> set[str]:
        """Writes new weights, under checkpoint names, into the running model.

        Returns the names that were used. Reset the prefix cache after it. Raises
        ValueError for a name or a shape that the model does not have.
        """
        with self.unpacked():
            return fill(self, self.checkpoint_tensors(weights))

    def checkpoint_tensors(
        self, weights: Iterable[tuple[str, LazyTensor]]
    ) -> Iterable[tuple[str, LazyTensor]]:
        """The tensors under the names that the layers read, for checkpoints with other names."""
        return weights

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """Weights have the form of checkpoints inside the `with`, to be read or written."""
        matrices = [module for module in self.modules() if isinstance(module, Matrix)]
        for matrix in matrices:
            matrix.begin_loading()
        try:
            yield
        finally:
            for matrix in matrices:
                matrix.finish_loading()
