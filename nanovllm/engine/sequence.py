"""What is known of a sequence: `Sequence` is its identity and its text's tokens, `SequenceTable` the state of those admitted.

The table keeps one row a sequence and one numpy column a quantity, so that a step over hundreds of sequences is a few
vector operations instead of a Python loop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanovllm.engine.block_manager import Prefix
from nanovllm.sampling_params import SamplingParams

PENDING = -1  # stands in token_ids for a token that the device has yet to sample


@dataclass(eq=False)
class Sequence:
    """A prompt and what follows it. A request with n > 1 is n sequences with equal prompts.

    `token_ids` is authoritative while the sequence waits; while it has a row, the row is.
    """

    seq_id: int  # counts up in order of arrival
    params: SamplingParams
    token_ids: np.ndarray  # int32, prompt first
    end: int  # it is finished when it has this many tokens
    request_number: int = 0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()  # end it; EOS is apart, see `ignore_eos`
    ban_until_min_tokens: tuple[int, ...] = ()  # EOS and stop tokens, where params.min_tokens > 0
    bad_words: tuple[tuple[int, ...], ...] = ()  # as token ids
    watched: bool = False  # each of its tokens is looked at on the host as it comes (stop strings, streaming, logprobs)
    prompt_logprobs: int | None = None
    reads_cache: bool = True  # False: it needs logits for its whole prompt
    owner: Any = None  # its output state; the scheduler does not look inside

    prompt_len: int = field(init=False)
    row: int = field(default=-1, init=False)  # in the SequenceTable while it runs
    prefix: Prefix | None = field(default=None, init=False)  # the last of its blocks that is registered
    num_cached_tokens: int = field(default=-1, init=False)  # prefix hit at first admission
    finish_reason: str | None = field(default=None, init=False)
    stop_reason: int | str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.prompt_len = len(self.token_ids)


class SequenceTable:
    """Columns of the running sequences; `seqs[row]` is who has the row."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        def column(dtype: type) -> np.ndarray:
            return np.zeros(max_num_seqs, dtype)

        self.seqs: dict[int, Sequence] = {}
        self.free_rows = list(range(max_num_seqs - 1, -1, -1))
        self.token_ids = np.zeros((max_num_seqs, max_model_len), np.int32)
        self.block_table = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self.seq_id = np.full(max_num_seqs, -1, np.int64)
        self.num_tokens = column(np.int32)  # known tokens, and the pending one if there is one
        self.num_computed = column(np.int32)  # tokens whose K/V is in the cache, or scheduled to be
        self.num_cached = column(np.int32)  # of these, how many came from the prefix cache
        self.num_blocks = column(np.int32)
        self.num_registered = column(np.int32)  # how many of its blocks can be hit by others
        self.end = column(np.int32)
        self.ignore_eos = column(np.bool_)
        self.looked_at = column(np.bool_)  # the host looks at each of its tokens: it is watched, or has stop tokens
        self.waits = column(np.bool_)  # sampling needs its previous token on the host: no overlap while it runs
        self.seed = column(np.uint64)
        self.temperature = column(np.float32)
        self.top_k, self.top_p, self.min_p = column(np.int32), column(np.float32), column(np.float32)
        self.filters = column(np.bool_)  # uses top_k, top_p or min_p; greedy ones never do
        self.edits = column(np.bool_)  # uses anything that changes logits before the temperature
        self.num_logprobs = column(np.int32)  # -1: none
        self.num_prompt_logprobs = column(np.int32)  # -1: none

    def admit(self, seq: Sequence) -> int:
        """Gives a sequence a row; what it has computed and which blocks it holds is for the scheduler to fill in."""
        seq.row = row = self.free_rows.pop()
        params, length = seq.params, len(seq.token_ids)
        self.seqs[row] = seq
        self.token_ids[row, :length] = seq.token_ids
        self.seq_id[row], self.num_tokens[row], self.end[row] = seq.seq_id, length, seq.end
        self.ignore_eos[row] = params.ignore_eos
        self.looked_at[row] = seq.watched or bool(seq.stop_token_ids)
        self.waits[row] = any(len(word) > 1 for word in seq.bad_words)
        self.seed[row] = seq.seed
        self.temperature[row] = params.temperature
        self.top_k[row], self.top_p[row], self.min_p[row] = params.top_k, params.top_p, params.min_p
        self.filters[row] = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        self.edits[row] = bool(
            params.presence_penalty
            or params.frequency_penalty
            or params.repetition_penalty != 1
            or params.logit_bias
            or params.allowed_token_ids
            or params.bad_words
            or params.min_tokens
        )
        self.num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self.num_prompt_logprobs[row] = -1 if seq.prompt_logprobs is None else seq.prompt_logprobs
        return row

    def remove(self, seq: Sequence) -> None:
        """Takes the row back; the sequence keeps its tokens (a pending one included)."""
        row = seq.row
        seq.token_ids = self.token_ids[row, : self.num_tokens[row]].copy()
        del self.seqs[row]
        self.seq_id[row], seq.row = -1, -1
        self.free_rows.append(row)

    def blocks_of(self, row: int) -> list[int]:
        return self.block_table[row, : self.num_blocks[row]].tolist()
