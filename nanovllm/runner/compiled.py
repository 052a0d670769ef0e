"""Steps of transformers' own code, compiled by torch.compile.

A step runs compiled only while the model is as it was when it was compiled. Torch does not
look for new hooks by itself, nor for replaced methods. Any other step runs eagerly, and so
does a model that torch cannot compile. Does not know which models are compiled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor

from nanovllm.attention.base import AttentionBackend
from nanovllm.kernels.choice import Compilations, call_timed, compile_copy, mark_rows
from nanovllm.loader.fields import cause
from nanovllm.models.base import LanguageModel
from nanovllm.runner.cpu_program import Structure
from nanovllm.runner.cuda_graphs import CaptureError

logger = logging.getLogger("nanovllm")

# (token ids [T], positions [T]) -> hidden states [T, hidden]
Body = Callable[[Tensor, Tensor], Tensor]


class CompiledModel:
    """The body of one model, compiled once for steps of one token and once for all others.

    Parameters are inputs of the compiled code, so they may move or be replaced.
    """

    def __init__(
        self,
        model: LanguageModel,
        body: Body,
        attention: AttentionBackend,
        backend: str,
        done: Compilations,
    ) -> None:
        """backend: of torch.compile. done: counts the compilations."""
        self.model = model
        self.body = body
        self.attention = attention
        self.code = compile_copy(run_body, backend)
        self.done = done
        self.structure: Structure | None = None  # of the model that is compiled
        self.has_failed = False
        self.reported: set[str] = set()

    def forward(self, input_ids: Tensor, attention: AttentionBackend) -> Tensor:
        """input_ids [T] int64 -> hidden states [T, hidden]. For steps without LoRA adapters.

        attention: what the layers call, which is the backend or stands for it.
        """
        if self.has_failed or not self.is_current():
            return self.model(input_ids, attention)
        self.model.attend_by(attention)
        positions = self.attention.meta.positions.long()
        mark_rows(input_ids)
        mark_rows(positions)
        arguments = (self.body, input_ids, positions)
        try:
            return call_timed("the model", self.done, self.code, *arguments)
        except CaptureError:
            raise
        except Exception as err:  # torch's compilers may raise any type
            self.has_failed = True
            self.report(f"torch.compile failed ({cause(err)})")
        # An error of the step itself is raised here again.
        return self.model(input_ids, attention)

    def is_current(self) -> bool:
        """Whether the compiled code, or the code that will be compiled now, is the model's."""
        if self.structure is None:
            structure = Structure(self.model, self.attention)
            if structure.has_hooks:
                self.report("it has a forward hook")
                return False
            self.structure = structure
        if not self.structure.has_same_code():
            self.report("it was changed after it was compiled (a hook, a module, an attribute)")
            return False
        return True

    def report(self, reason: str) -> None:
        """Warns once of each reason."""
        if reason not in self.reported:
            self.reported.add(reason)
            logger.warning("the model runs without torch.compile, which is slower: %s", reason)


def run_body(body: Body, input_ids: Tensor, positions: Tensor) -> Tensor:
    """What is compiled."""
    return body(input_ids, positions)
