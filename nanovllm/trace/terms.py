"""The words of a trace's page: one sentence for each, and the line of code where it happens.

`inspect` finds the lines when a page is written, so links lead into the installed code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nanovllm.core.sequence import Prefix, Sequence, SequenceTable
from nanovllm.engine.batch_builder import build_batch
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.scheduler import Scheduler
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.sampling.logprobs import logprobs
from nanovllm.sampling.sampler import process

PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Term:
    """A word, what it means, and the code that does it.

    `snippet` is the beginning of a line of `code`. A term links to this line, or to the first
    line of `code` if a reader of the code has changed the line.
    """

    key: str
    name: str
    sentence: str
    code: Callable[..., object]
    snippet: str = ""

    def place(self) -> tuple[str, int]:
        """(path from the folder that holds the package, number of the line)."""
        code = inspect.unwrap(self.code)
        lines, first = source_lines(code)
        path = Path(inspect.getfile(code)).relative_to(PACKAGE.parent).as_posix()
        found = (i for i, line in enumerate(lines) if line.strip().startswith(self.snippet))
        return path, first + next(found, 0)


@cache
def source_lines(code: Callable[..., object]) -> tuple[list[str], int]:
    """The lines of code, and the number of the first. Finding them takes longer than packing."""
    return inspect.getsourcelines(code)


TERMS = [
    Term(
        "step",
        "step",
        "One pass of the model over some tokens of some sequences; the engine plans every step "
        "from scratch.",
        LLMEngine._step,
    ),
    Term(
        "request",
        "request",
        "A prompt with its sampling parameters, checked before the engine accepts it.",
        InputProcessor.process,
    ),
    Term(
        "sequence",
        "sequence",
        "One prompt and one answer; a request for n answers is n sequences with the same prompt.",
        Sequence,
    ),
    Term(
        "budget",
        "token budget",
        "The largest number of tokens that one step computes, over all sequences "
        "(max_num_batched_tokens).",
        Scheduler.schedule,
        "budget = self.max_num_batched_tokens",
    ),
    Term(
        "batching",
        "continuous batching",
        "Every step decides again which sequences run, so a waiting one joins as soon as another "
        "has ended.",
        Scheduler.schedule,
        "while ",
    ),
    Term(
        "prefill",
        "prefill",
        "Computing K and V of the tokens of a prompt, many tokens at once.",
        Scheduler.schedule,
        "count = np.minimum(",
    ),
    Term(
        "chunk",
        "chunk",
        "A part of a prefill: the budget left no place for the whole prompt, and the next step "
        "goes on.",
        Scheduler._grant_running,
        "counts = np.clip(",
    ),
    Term(
        "decode",
        "decode",
        "Computing the newest token of a sequence, one token in a step, to sample the token after "
        "it.",
        Scheduler._advance,
        "table.num_tokens[rows[sampled]] += 1",
    ),
    Term(
        "sampling",
        "sampling",
        "Choosing the next token from the model's scores (logits) after the last token.",
        process,
    ),
    Term(
        "logprob",
        "logprob",
        "The natural logarithm of the probability that the model gave to a token; 0 would be "
        "certainty.",
        logprobs,
    ),
    Term(
        "waiting",
        "waiting queue",
        "Sequences that have no blocks yet, or no longer; the first of them is admitted first.",
        Scheduler._wait,
    ),
    Term(
        "running",
        "running",
        "Sequences with a row in the sequence table; each of them holds blocks.",
        SequenceTable.admit,
    ),
    Term(
        "admission",
        "admission",
        "A waiting sequence begins to run if a row, budget and blocks for all its tokens are free.",
        Scheduler._admit,
    ),
    Term(
        "cache",
        "KV cache",
        "The keys and values of computed tokens in all layers, kept so that later tokens can "
        "attend to them.",
        BlockManager,
    ),
    Term(
        "block",
        "block",
        "The place of K and V of block_size neighbouring tokens in all layers; also called a page.",
        BlockManager.allocate,
    ),
    Term(
        "table",
        "block table",
        "The list of a sequence's blocks in order of position; the blocks may lie anywhere in the "
        "cache.",
        SequenceTable.blocks_of,
    ),
    Term(
        "refs",
        "reference count",
        "The number of sequences that hold a block; at 0 the block is free.",
        BlockManager.acquire,
        "self.ref_counts[prefix.block_id] += 1",
    ),
    Term(
        "shared",
        "shared block",
        "A block that more than one sequence holds, because their tokens are equal up to its end.",
        BlockManager.acquire,
    ),
    Term(
        "registered",
        "registered block",
        "A full block that later sequences can find by the hash of its tokens and of all tokens "
        "before.",
        BlockManager.register,
    ),
    Term(
        "hash",
        "hash chain",
        "A block's hash starts from the hash of the block before it, so it stands for all tokens "
        "from the first one.",
        Prefix,
    ),
    Term(
        "hit",
        "prefix hit",
        "A sequence takes blocks whose tokens equal the beginning of its own, and does not compute "
        "them.",
        BlockManager.match,
    ),
    Term(
        "cached",
        "cached block",
        "A free block that keeps its contents: a later sequence may hit it until it is evicted.",
        BlockManager.release,
        "self.evictable[block_id] = None",
    ),
    Term(
        "eviction",
        "eviction",
        "The least recently used cached block loses its contents, because an empty block is needed "
        "and there is none.",
        BlockManager.allocate,
        "block_id, _ = self.evictable.popitem(",
    ),
    Term(
        "preemption",
        "preemption",
        "The last running sequence gives its blocks back, because the sequences before it need "
        "more blocks than are free.",
        Scheduler._preempt,
    ),
    Term(
        "finish",
        "finish",
        "A sequence ends at its end token, at a stop string or at max_tokens, and releases its "
        "blocks.",
        Scheduler.finish,
    ),
    Term(
        "host",
        "host",
        "The part of the engine in plain Python and numpy: it plans steps and turns tokens into "
        "text.",
        LLMEngine,
    ),
    Term(
        "device",
        "device",
        "The part that runs the model: a GPU, or a CPU with kernels in C++.",
        ModelRunner,
    ),
    Term(
        "overlap",
        "overlap",
        "The host plans and launches the next step while the device still computes this one.",
        LLMEngine._step,
        "self.in_flight = launched",
    ),
    Term(
        "schedule",
        "schedule",
        "The host decides which sequences run in the step and gives them blocks.",
        Scheduler.schedule,
    ),
    Term(
        "build",
        "build",
        "The host packs the tokens and block tables of the step into arrays for the device.",
        build_batch,
    ),
    Term(
        "launch",
        "launch",
        "The host queues the work of the step on the device; a CPU computes it here.",
        ModelRunner.launch,
    ),
    Term(
        "collect",
        "collect",
        "The host waits for the sampled tokens of the step.",
        LLMEngine._collect,
        "result = flight.pending.collect()",
    ),
    Term(
        "output",
        "output",
        "The host stores the sampled tokens, ends sequences and turns tokens into text.",
        OutputProcessor.take,
    ),
]
