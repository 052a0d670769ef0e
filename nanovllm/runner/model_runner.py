"""The device's half: model, KV cache and sampler. It runs packed batches and knows no Sequence.

`launch` queues a step and waits for nothing; `Launch.collect` brings its tokens to the host.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.attention import AttentionMetadata, AttentionSpec
from nanovllm.attention.select import select_backend
from nanovllm.attention.torch_backend import TorchAttention
from nanovllm.config import EngineArgs
from nanovllm.engine.batch import FLOAT_FIELDS, Batch
from nanovllm.layers.sampler import Logprobs, logprobs, sample
from nanovllm.layers.source import all_sources, listing
from nanovllm.models.config import ModelConfig, rope_table
from nanovllm.models.decoder import CausalLM
from nanovllm.parallel import TensorParallel
from nanovllm.runner.cuda_graphs import DecodeGraphs, is_decode, is_plain

logger = logging.getLogger("nanovllm")
PROMPT_LOGPROB_ROWS = 256  # so many rows of logits at a time: those of a whole chunk would take gigabytes
CPU_CACHE_BYTES = 4 << 30
GPU_RESERVE_BYTES = 256 << 20  # for kernels loaded and buffers made later, where others leave less than our share


@dataclass
class StepResult:
    """What a step sampled, on the host; logprobs are of the rows that asked for them, as numpy arrays."""

    tokens: np.ndarray  # [K] int64
    logprobs: Logprobs | None
    prompt_logprobs: Logprobs | None


class Launch:
    """A step under way. Its results are being copied to the host; `collect` waits for them."""

    def __init__(self, tokens: Tensor, sampled: Logprobs | None, prompt: Logprobs | None) -> None:
        self.tokens = to_host(tokens)
        self.logprobs = sampled and Logprobs(*map(to_host, sampled))
        self.prompt_logprobs = prompt and Logprobs(*map(to_host, prompt))
        self.done = torch.cuda.Event() if tokens.is_cuda else None
        if self.done is not None:
            self.done.record()

    def collect(self) -> StepResult:
        if self.done is not None:
            self.done.synchronize()
        pieces = [lp and Logprobs(*(x.numpy() for x in lp)) for lp in (self.logprobs, self.prompt_logprobs)]
        return StepResult(self.tokens.numpy(), *pieces)


def to_host(x: Tensor) -> Tensor:
    """A copy into pinned memory that does not wait for the device."""
    if not x.is_cuda:
        return x.cpu()
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)


class ModelRunner:
    """Owns everything that lives on one device."""

    def __init__(
        self,
        args: EngineArgs,
        config: ModelConfig,
        weights: Callable[[], Iterable[tuple[str, Any]]] | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        tp: TensorParallel = TensorParallel(),
    ) -> None:
        self.args, self.config, self.dtype, self.device, self.tp = args, config, dtype, device, tp
        self.max_model_len, self.max_num_batched_tokens = max_model_len, max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.weights = weights  # opens the checkpoint; None (load_format="dummy"): random ones
        self.free_at_start = self._free_memory()
        self.model = self._make_model()
        spec = AttentionSpec(
            num_layers=config.num_layers,
            num_heads=len(tp.split(config.num_heads)),
            num_kv_heads=len(tp.split(config.num_kv_heads)),
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            sliding_windows=config.sliding_windows,
            block_size=args.block_size,
            dtype=dtype,
            device=device,
        )
        self.attention = select_backend(spec, args.attention_backend, args.kv_cache_dtype)
        self.last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)  # the last: of padding
        # The torch backend reads on the host what a graph would have to read on the device.
        can_record = device.type == "cuda" and not isinstance(self.attention, TorchAttention)
        self.capture_stream = torch.cuda.Stream(device) if can_record and not args.enforce_eager else None
        self.graphs: DecodeGraphs | None = None
        self.num_blocks = tp.minimum(self._num_blocks(), device)
        self.attention.allocate(self.num_blocks)
        self.graphs = self._record_graphs()

    # -- setting up --------------------------------------------------------------------------------------------------

    def _make_model(self) -> CausalLM:
        cos_sin = rope_table(self.config, self.max_model_len)
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                model = CausalLM(self.config, cos_sin.to(self.device), self.tp).eval()
        finally:
            torch.set_default_dtype(default)
        self._load(model)
        return model

    def _load(self, model: CausalLM) -> None:
        if self.weights is None:
            generator = torch.Generator(self.device).manual_seed(self.args.seed + self.tp.rank)
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.data.normal_(0, 0.02, generator=generator)
                else:
                    parameter.data.fill_(1)
            return
        missing = set(all_sources(model)) - model.load_weights(self.weights())
        if missing:
            raise ValueError(f"checkpoint: {self.args.model} has no tensor for {listing(missing)}")

    def _num_blocks(self) -> int:
        """How many pages there are. Raises ValueError where they cannot hold one sequence of max_model_len."""
        args, page = self.args, self.attention.page_bytes()
        needed = -(-self.max_model_len // args.block_size)
        if args.num_gpu_blocks_override is not None:
            available, source = args.num_gpu_blocks_override, "num_gpu_blocks_override"
        elif args.kv_cache_memory_bytes is not None:
            available, source = args.kv_cache_memory_bytes // page, "kv_cache_memory_bytes"
        elif self.device.type == "cuda":
            available, source = self._free_gpu_bytes() // page, "gpu_memory_utilization"
        else:
            half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // self.tp.size
            available, source = min(max(CPU_CACHE_BYTES, needed * page), half) // page, "kv_cache_memory_bytes"
        if available < needed:
            raise ValueError(
                f"max_model_len={self.max_model_len} needs {needed} KV cache blocks of {args.block_size} tokens "
                f"({needed * page / 2**20:.0f} MiB), and there is room for {max(available, 0)} "
                f"({max(available, 0) * args.block_size} tokens): raise {source} or lower max_model_len"
            )
        return available

    def _free_memory(self) -> int:
        """Bytes that nobody uses on the GPU."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def _free_gpu_bytes(self) -> int:
        """What our share of the card leaves for pages, beside weights, the largest step there can be, and decode graphs.

        The share is gpu_memory_utilization of the whole card, or all that others leave of it. All is measured as the
        driver sees it, so kernels, library workspaces and fragmentation are in it.
        """
        total = torch.cuda.mem_get_info(self.device)[1]
        share = min(total * self.args.gpu_memory_utilization, self.free_at_start - GPU_RESERVE_BYTES)
        self._free_memory()  # what loading has left behind
        pages = self._profile_step()
        torch.cuda.synchronize(self.device)
        used = self.free_at_start - torch.cuda.mem_get_info(self.device)[0] - pages * self.attention.page_bytes()
        graphs = self._graph_bytes()
        self.attention.allocate(0)
        self._free_memory()
        return int(share - used - graphs)

    def _graph_bytes(self) -> int:
        """What decode graphs will take: the largest one's memory, and for each other as much as a second one adds."""
        before = self._free_memory()
        self._record_graphs(1)  # libraries take what they then keep
        free = []
        for count in (1, 2):
            graphs = self._record_graphs(count)
            free.append(self._free_memory())
            others = len(graphs.sizes) - 1 if graphs else 0
            del graphs
        return before - free[0] + others * max(free[0] - free[1], 0)

    @torch.inference_mode()
    def _record_graphs(self, count: int | None = None) -> DecodeGraphs | None:
        """Decode graphs of the `count` largest sizes (None: of all); None where there are none or one cannot be recorded."""
        if self.capture_stream is None:
            return None
        max_blocks = -(-self.max_model_len // self.args.block_size)
        graphs = DecodeGraphs(
            self.max_num_seqs, max_blocks, self.config.hidden_size, self.dtype, self.device, self.capture_stream
        )
        for size in graphs.sizes[::-1][:count]:
            failure = ""
            try:
                with self._on_device():
                    graphs.record(
                        size,
                        lambda batch: self._forward(batch, 1, self.max_model_len),
                        lambda hidden, batch: self._sample(self.model.logits(hidden), batch),
                    )
            except RuntimeError as err:
                failure = str(err) or type(err).__name__
            # All ranks replay or none does: padding makes their collectives differ.
            if not self.tp.minimum(not failure, self.device):
                reason = failure or "another rank failed"
                logger.warning("decoding goes on without CUDA graphs, as one of %d sequences failed: %s", size, reason)
                self.capture_stream = None
                return None
        return graphs

    @torch.inference_mode()
    def _profile_step(self) -> int:
        """Runs the largest batch there can be, on pages of its own, for its peak of memory; returns how many pages."""
        size, block_size = self.max_num_batched_tokens, self.args.block_size
        count = min(self.max_num_seqs, size)
        length = min(-(-size // count), self.max_model_len)
        blocks = -(-length // block_size)
        positions = np.tile(np.arange(length, dtype=np.int32), count)
        zeros = np.zeros(count * length, np.int32)
        batch = Batch(
            sizes=np.array([length, length, -1, -1], np.int32),
            token_ids=zeros,
            positions=positions,
            slot_mapping=positions,
            token_rows=zeros,
            query_start=np.arange(count + 1, dtype=np.int32) * length,
            context_lens=np.full(count, length, np.int32),
            block_tables=np.tile(np.arange(blocks, dtype=np.int32), (count, 1)),
            sample_at=np.arange(1, count + 1, dtype=np.int32) * length - 1,
            sample_rows=np.arange(count, dtype=np.int32),
            random_at=np.arange(count, dtype=np.int32),
            temperature=np.ones(count, np.float32),
            uniform=np.zeros(count, np.float32),
            filter_at=np.arange(count, dtype=np.int32),
            top_k=np.full(count, self.config.vocab_size, np.int32),
            top_p=np.full(count, 0.9, np.float32),
            min_p=np.zeros(count, np.float32),
        )
        self.attention.allocate(blocks)
        self.launch(batch).collect()
        return blocks

    # -- sleeping ----------------------------------------------------------------------------------------------------

    def sleep(self, level: int) -> None:
        """Frees the KV cache and the weights; level 1 keeps a copy of these in the host's memory."""
        self.asleep = {"weights", "kv_cache"}
        self.graphs = None  # they hold the addresses of both
        self.attention.allocate(0)
        parameters = list(self.model.parameters())
        self.shapes = [parameter.shape for parameter in parameters]
        self.backup = [to_host(parameter.data) for parameter in parameters] if level == 1 else None
        for parameter in parameters:
            parameter.data = parameter.data.new_empty(0)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def wake_up(self, tag: str) -> None:
        """Brings "weights" or "kv_cache" back; weights that were dropped are read from the checkpoint again."""
        if tag == "kv_cache":
            self.attention.allocate(self.num_blocks)
        elif self.backup is not None:
            for parameter, data in zip(self.model.parameters(), self.backup):
                parameter.data = data.to(self.device)
            self.backup = None
        else:
            for parameter, shape in zip(self.model.parameters(), self.shapes):
                parameter.data = parameter.data.new_zeros(shape)
            self._load(self.model)
        self.asleep.discard(tag)
        if not self.asleep:
            self.graphs = self._record_graphs()

    # -- running -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, host_batch: Batch) -> Launch:
        """Queues one step: model, logits of the rows that sample, their tokens. Does not wait for the device."""
        with self._on_device():
            prompt = None
            if self.graphs is not None and is_decode(host_batch):
                if is_plain(host_batch):
                    return Launch(self.graphs.next_tokens(host_batch), None, None)
                hidden, batch = self.graphs.hidden_states(host_batch), self._to_device(host_batch)
            else:
                batch = self._to_device(host_batch)
                hidden = self._forward(batch, int(host_batch.sizes[0]), int(host_batch.sizes[1]))
                if len(batch.prompt_at):
                    prompt = self._prompt_logprobs(hidden, batch, int(host_batch.sizes[3]))
                hidden = hidden[batch.sample_at]
            logits = self.model.logits(hidden)
            raw = logits[batch.logprob_at] if len(batch.logprob_at) else None
            tokens = self._sample(logits, batch)
            sampled = None if raw is None else logprobs(raw, tokens[batch.logprob_at], int(host_batch.sizes[2]))
            return Launch(tokens, sampled, prompt)

    def _on_device(self) -> torch.cuda.device:
        """Triton launches on the current device, which is the user's to choose; -1 leaves it alone."""
        return torch.cuda.device(self.device.index if self.device.type == "cuda" else -1)

    def _forward(self, batch: Batch, max_query_len: int, max_context_len: int) -> Tensor:
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
                max_context_len=max_context_len,
            )
        )
        return self.model(token_ids, self.attention)

    def _sample(self, logits: Tensor, batch: Batch) -> Tensor:
        """Tokens [K] int64, which the next step finds in `last_tokens`. Rank 0 alone samples, and tells the others."""
        tokens = sample(logits, batch, self.last_tokens) if self.tp.rank == 0 else batch.sample_at.long()
        self.tp.broadcast(tokens)
        self.last_tokens[batch.sample_rows] = tokens
        return tokens

    def _to_device(self, batch: Batch) -> Batch:
        """The same batch as tensors: one buffer, one copy. Fields begin at multiples of 16 bytes, or kernels compile anew."""
        arrays = {f.name: getattr(batch, f.name) for f in fields(batch)}
        ends = np.cumsum([-(-array.size // 4) * 4 for array in arrays.values()]).tolist()
        # Pinned blocks are kept by torch and used again once the copies out of them are done.
        staging = torch.empty(ends[-1], dtype=torch.int32, pin_memory=self.device.type == "cuda")
        packed, starts = staging.numpy(), [0, *ends]
        for start, array in zip(starts, arrays.values()):
            packed[start : start + array.size] = array.reshape(-1).view(np.int32)
        buffer = staging.to(self.device, non_blocking=True)
        tensors = {}
        for start, (name, array) in zip(starts, arrays.items()):
            piece = buffer[start : start + array.size].view(array.shape)
            tensors[name] = piece.view(torch.float32) if name in FLOAT_FIELDS else piece
        return Batch(**tensors)

    def _prompt_logprobs(self, hidden: Tensor, batch: Batch, k: int) -> Logprobs:
        parts = [
            logprobs(self.model.logits(hidden[at]), targets, k)
            for at, targets in zip(
                batch.prompt_at.split(PROMPT_LOGPROB_ROWS), batch.prompt_targets.split(PROMPT_LOGPROB_ROWS)
            )
        ]
        return Logprobs(*(torch.cat(column) for column in zip(*parts)))
