"""The device half: model, KV cache and sampler. It runs packed batches and knows no
Sequence.

`launch` queues a step and waits for nothing. `PendingStep.collect` waits for the step's
results.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm.attention.base import AttentionBackend, AttentionSpec
from nanovllm.attention.select import select_backend
from nanovllm.core.batch import Batch
from nanovllm.core.step import Logprobs, StepResult
from nanovllm.kernels.choice import kernel_choice
from nanovllm.parallel import TensorParallel
from nanovllm.runner.compiled import CompiledModel
from nanovllm.runner.cpu_program import CpuPrograms
from nanovllm.runner.cuda_graphs import DecodeGraphs
from nanovllm.runner.device import current, free_gpu_memory, to_device, to_host
from nanovllm.runner.load_model import load_weights, make_model
from nanovllm.runner.lora import ModelAdapters
from nanovllm.runner.pieces import Pieces
from nanovllm.runner.readouts.base import Readout
from nanovllm.runner.readouts.next_tokens import NextTokens, Sampled
from nanovllm.runner.readouts.registry import READOUTS
from nanovllm.runner.setup import Setup
from nanovllm.sampling.logprobs import LogprobsPart

logger = logging.getLogger("nanovllm")

NO_ROWS = np.empty(0, np.int32)


class PendingStep:
    """A step that was launched. Its results are on their way to the host."""

    def __init__(
        self, sampled: Sampled, readouts: dict[str, Logprobs[Tensor]], logprob_rows: np.ndarray
    ) -> None:
        self.result = StepResult(
            tokens=to_host(sampled.tokens).numpy(),
            logprobs=None if sampled.logprobs is None else logprobs_to_host(sampled.logprobs),
            logprob_rows=logprob_rows,
            readouts={name: logprobs_to_host(result) for name, result in readouts.items()},
            errors=sampled.errors,
        )
        self.done = torch.cuda.Event() if sampled.tokens.is_cuda else None
        if self.done is not None:
            self.done.record()

    def collect(self) -> StepResult:
        if self.done is not None:
            self.done.synchronize()
        return self.result


def logprobs_to_host(logprobs: Logprobs[Tensor]) -> Logprobs[np.ndarray]:
    return Logprobs(*(to_host(column).numpy() for column in vars(logprobs).values()))


@dataclass
class SleepingWeights:
    """What brings freed weights back: their shapes, and a copy on the host or the checkpoint."""

    shapes: list[torch.Size]
    copies: list[list[Tensor]] | None  # the pieces of each parameter (sleep.pieces_on_host)


class ModelRunner:
    """Owns everything that lives on one device. `start.py` completes it: pages, then graphs."""

    def __init__(self, setup: Setup, tp: TensorParallel = TensorParallel()) -> None:
        self.setup = setup
        self.tp = tp
        self.device = setup.device
        self.free_at_start = free_gpu_memory(setup.device)
        self.model = make_model(setup, tp)
        self.lora = ModelAdapters(self.model, setup, tp) if setup.args.enable_lora else None
        spec = AttentionSpec.of(
            self.model.cache_specs(),
            block_size=setup.block_size,
            dtype=setup.dtype,
            device=setup.device,
        )
        self.attention = select_backend(spec, setup.args.attention_backend, setup.kv_cache_dtype)
        # One entry more than rows, for the padding of decode graphs.
        last_tokens = torch.zeros(setup.max_num_seqs + 1, dtype=torch.int64, device=self.device)
        self.last_tokens = last_tokens
        self.next_tokens = NextTokens(tp, last_tokens, setup.args.logprobs_mode)
        self.readouts: dict[str, Readout[Logprobs[Tensor]]] = {
            name: make() for name, make in READOUTS.items()
        }
        self.num_blocks = 0
        self.kernel_choice = setup.kernel_choice()
        can_record = self.attention.can_capture and not setup.args.enforce_eager
        is_gpu = self.device.type == "cuda"
        self.programs: CpuPrograms | None = None
        if can_record and not is_gpu and tp.size == 1 and self.model.can_record:
            self.programs = CpuPrograms(self.model, self.attention)
        self.compiled: CompiledModel | None = None
        if setup.compiles_models and tp.size == 1:
            self.compile_model(setup.compilation.backend)
        can_capture = can_record and is_gpu and setup.compilation.cudagraphs is not False
        self.capture_stream = torch.cuda.Stream(self.device) if can_capture else None
        self.graphs: DecodeGraphs | None = None
        self.records_pieces = can_capture and setup.compilation.prefill_graphs
        self.pieces: Pieces | None = None
        self.freed: set[str] = set()  # by `sleep`: "weights", "kv_cache"
        self.sleeping_weights: SleepingWeights | None = None

    def compile_model(self, backend: str = "inductor") -> None:
        """Makes steps without adapters run compiled, for models that torch.compile suits."""
        body = self.model.body_to_compile(self.attention)
        if body is not None:
            done = self.kernel_choice.done
            self.compiled = CompiledModel(self.model, body, self.attention, backend, done)
        elif self.device.type == "cpu":
            logger.info(
                "compilation_config: mode=%s compiles nothing, because this model runs on the "
                "CPU's own kernels",
                self.setup.compilation.mode,
            )

    @torch.inference_mode()
    def launch(self, host_batch: Batch[np.ndarray]) -> PendingStep:
        """Queues one step: model, logits of the rows that sample, their tokens."""
        with current(self.device), kernel_choice(self.kernel_choice):
            if self.lora is None:
                return self.run(host_batch)
            with self.lora.rows_of(host_batch):
                return self.run(host_batch)

    def run(self, host_batch: Batch[np.ndarray]) -> PendingStep:
        if self.graphs is not None and self.graphs.has_graph(host_batch):
            if self.graphs.can_sample(host_batch):
                return PendingStep(Sampled(self.graphs.next_tokens(host_batch)), {}, NO_ROWS)
            hidden = self.graphs.hidden_states(host_batch)
            batch = to_device(host_batch, self.device)
        else:
            batch = to_device(host_batch, self.device)
            if self.pieces is not None and self.pieces.can_run(host_batch):
                hidden = self.pieces.forward(host_batch, batch)
            else:
                hidden = self.forward(batch)
        readouts = {
            name: readout.read(self.model, hidden, batch)
            for name, readout in self.readouts.items()
            if name in batch.parts
        }
        sampled = self.next_tokens.read(self.model, hidden, batch)
        logprobs = host_batch.parts.get("logprobs")
        rows = logprobs.at if isinstance(logprobs, LogprobsPart) else NO_ROWS
        return PendingStep(sampled, readouts, rows)

    def forward(self, batch: Batch[Tensor], attention: AttentionBackend | None = None) -> Tensor:
        """The last layer's output [T, hidden_size].

        attention: stands for the backend while pieces of a step are recorded.
        """
        newest = self.last_tokens[batch.tokens.rows]
        token_ids = torch.where(batch.tokens.ids < 0, newest, batch.tokens.ids)
        attention = self.attention if attention is None else attention
        attention.begin(batch.attention)
        adapter = 0 if self.lora is None else self.lora.rows.only
        if self.programs is not None and adapter is not None:
            return self.programs.forward(token_ids, adapter)
        if self.compiled is not None and adapter == 0:
            return self.compiled.forward(token_ids, attention)
        return self.model(token_ids, attention)

    def drop_recordings(self) -> None:
        """Frees all that was recorded: graphs on a GPU, programs on a CPU.

        Recordings hold the addresses of pages and weights, and the collectives of the group.
        """
        if self.graphs is not None:
            self.graphs.clear()
            self.graphs = None
        if self.pieces is not None:
            self.pieces.clear()
            self.pieces = None
        if self.programs is not None:
            self.programs.clear()

    def close(self) -> None:
        """Ends this rank's part: recordings first, because NCCL waits for graphs."""
        self.drop_recordings()
        self.tp.close()

    def load_adapter(self, number: int, folder: str) -> None:
        """Reads a LoRA adapter, which batches then call `number`."""
        assert self.lora is not None, "the engine has enable_lora=True"
        self.lora.load(number, folder)

    def unload_adapter(self, number: int) -> None:
        """Frees a LoRA adapter. No batch names it any more."""
        assert self.lora is not None, "the engine has enable_lora=True"
        self.lora.unload(number)
        if self.programs is not None:
            self.programs.drop(number)

    def load(self) -> None:
        """Reads the checkpoint into the running model."""
        load_weights(self.model, self.setup, self.tp)
