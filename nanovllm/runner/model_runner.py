"""The device's half: model, KV cache and sampler. It runs packed batches and knows no Sequence.

`launch` queues a step and waits for nothing; `Launch.collect` brings its tokens to the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm import loader
from nanovllm.attention.base import AttentionMetadata, AttentionSpec
from nanovllm.attention.select import select_backend
from nanovllm.engine.batch import Batch
from nanovllm.layers.sampler import Logprobs, logprobs, sample
from nanovllm.loader.source import all_sources, listing
from nanovllm.models import registry
from nanovllm.models.decoder import CausalLM
from nanovllm.parallel import TensorParallel
from nanovllm.runner import memory
from nanovllm.runner.cpu_program import CpuPrograms
from nanovllm.runner.cuda_graphs import DecodeGraphs, is_decode, is_plain
from nanovllm.runner.memory import to_host
from nanovllm.runner.setup import Setup

PROMPT_LOGPROB_ROWS = 256  # so many rows of logits at a time: those of a whole chunk would take gigabytes


@dataclass
class StepResult:
    """What a step sampled, on the host; logprobs are of the rows that asked for them, as numpy arrays."""

    tokens: np.ndarray  # [K] int64
    logprobs: Logprobs | None
    prompt_logprobs: Logprobs | None


class Launch:
    """A step under way. Its results are being copied to the host; `collect` waits for them."""

    def __init__(self, tokens: Tensor, sampled: Logprobs | None, prompt: Logprobs | None) -> None:
        pieces = [lp and Logprobs(*(to_host(x).numpy() for x in lp)) for lp in (sampled, prompt)]
        self.result = StepResult(to_host(tokens).numpy(), *pieces)
        self.done = torch.cuda.Event() if tokens.is_cuda else None
        if self.done is not None:
            self.done.record()

    def collect(self) -> StepResult:
        if self.done is not None:
            self.done.synchronize()
        return self.result


class ModelRunner:
    """Owns everything that lives on one device."""

    def __init__(self, setup: Setup, tp: TensorParallel = TensorParallel()) -> None:
        args, config, device = setup.args, setup.config, setup.device
        self.args, self.config, self.files, self.tp = args, config, setup.files, tp
        self.dtype, self.device = setup.dtype, device
        self.max_model_len, self.max_num_seqs = setup.max_model_len, setup.max_num_seqs
        self.max_num_batched_tokens = setup.max_num_batched_tokens
        self.free_at_start = memory.free_memory(self)
        self.model = self._make_model()
        spec = AttentionSpec.of(
            self.model.cache_specs(),
            num_heads=len(tp.split(config.num_heads)),
            block_size=setup.block_size,
            dtype=self.dtype,
            device=device,
        )
        self.attention = select_backend(spec, args.attention_backend, args.kv_cache_dtype)
        can_record = device.type == "cpu" and tp.size == 1 and self.attention.can_capture and not args.enforce_eager
        self.programs = CpuPrograms(self.model, self.attention) if can_record else None
        self.last_tokens = torch.zeros(self.max_num_seqs + 1, dtype=torch.int64, device=device)  # the last: of padding
        can_capture = device.type == "cuda" and self.attention.can_capture and not args.enforce_eager
        self.capture_stream = torch.cuda.Stream(device) if can_capture else None
        self.graphs: DecodeGraphs | None = None
        self.asleep: memory.Asleep | None = None
        self.num_blocks = tp.minimum(memory.num_blocks(self), device)
        self.attention.allocate(self.num_blocks)
        self.graphs = memory.record_graphs(self)

    # -- setting up --------------------------------------------------------------------------------------------------

    def _make_model(self) -> CausalLM:
        name = self.config.architecture
        make: type[CausalLM] = getattr(registry.family(name), name)
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                model = make(self.config, self.max_model_len, self.tp).eval()
        finally:
            torch.set_default_dtype(default)
        if self.device.type == "cpu":
            memory.lay_out(model)
        self.load(model)
        return model

    def load(self, model: CausalLM) -> None:
        if self.args.load_format == "dummy":
            generator = torch.Generator(self.device).manual_seed(self.args.seed + self.tp.rank)
            with model.unpacked():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.data.normal_(0, 0.02, generator=generator)
                    else:
                        parameter.data.fill_(1)
            return
        missing = set(all_sources(model)) - model.load_weights(loader.iter_weights(self.files))
        if missing:
            raise ValueError(f"checkpoint: {self.args.model} has no tensor for {listing(missing)}")

    # -- running -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, host_batch: Batch) -> Launch:
        """Queues one step: model, logits of the rows that sample, their tokens. Does not wait for the device."""
        with self.on_device():
            prompt = None
            if self.graphs is not None and is_decode(host_batch):
                if is_plain(host_batch):
                    return Launch(self.graphs.next_tokens(host_batch), None, None)
                hidden, batch = self.graphs.hidden_states(host_batch), self._to_device(host_batch)
            else:
                batch = self._to_device(host_batch)
                hidden = self.forward(batch, *map(int, host_batch.sizes[:3]))
                if len(batch.prompt_at):
                    prompt = self._prompt_logprobs(hidden, batch, int(host_batch.sizes[4]))
                hidden = hidden[batch.sample_at]
            logits = self.model.logits(hidden)
            raw = logits[batch.logprob_at] if len(batch.logprob_at) else None
            tokens = self.next_tokens(logits, batch)
            sampled = None if raw is None else logprobs(raw, tokens[batch.logprob_at], int(host_batch.sizes[3]))
            return Launch(tokens, sampled, prompt)

    def on_device(self) -> torch.cuda.device:
        """Triton launches on the current device, which is the user's to choose; -1 leaves it alone."""
        return torch.cuda.device(self.device.index if self.device.type == "cuda" else -1)

    def forward(self, batch: Batch, max_query_len: int, num_prefills: int, max_context_len: int) -> Tensor:
        """The last layer's output [T, hidden_size]."""
        token_ids = torch.where(batch.token_ids < 0, self.last_tokens[batch.token_rows], batch.token_ids)
        self.attention.begin(
            AttentionMetadata(
                positions=batch.positions,
                slot_mapping=batch.slot_mapping,
                query_start=batch.query_start,
                context_lens=batch.context_lens,
                block_tables=batch.block_tables,
                max_query_len=max_query_len,
                num_prefills=num_prefills,
                max_context_len=max_context_len,
            )
        )
        if self.programs is not None:
            return self.programs.forward(token_ids)
        return self.model(token_ids, self.attention)

    def next_tokens(self, logits: Tensor, batch: Batch) -> Tensor:
        """Tokens [K] int64, which the next step finds in `last_tokens`. Rank 0 alone samples, and tells the others."""
        tokens = sample(logits, batch, self.last_tokens) if self.tp.rank == 0 else batch.sample_at.long()
        self.tp.broadcast(tokens)
        self.last_tokens[batch.sample_rows] = tokens
        return tokens

    def _to_device(self, batch: Batch) -> Batch:
        """The same batch as tensors: one buffer, one copy."""
        packed, lengths = batch.pack()
        buffer = torch.from_numpy(packed)
        if self.device.type == "cuda":  # torch uses a pinned block again once the copies out of it are done
            buffer = buffer.pin_memory().to(self.device, non_blocking=True)
        return Batch.unpack(lengths, buffer, torch.float32)

    def _prompt_logprobs(self, hidden: Tensor, batch: Batch, k: int) -> Logprobs:
        parts = [
            logprobs(self.model.logits(hidden[at]), targets, k)
            for at, targets in zip(
                batch.prompt_at.split(PROMPT_LOGPROB_ROWS), batch.prompt_targets.split(PROMPT_LOGPROB_ROWS)
            )
        ]
        return Logprobs(*(torch.cat(column) for column in zip(*parts)))
