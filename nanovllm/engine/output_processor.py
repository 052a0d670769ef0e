"""Turns sampled tokens into what the user sees: text, stop strings, logprobs,
`RequestOutput`s.

It knows requests and text, not how tokens were computed. A sequence that streams no
tokens costs nothing here until it ends: its text is then decoded at once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from nanovllm.core.request import Request
from nanovllm.core.sequence import Failure, Sequence
from nanovllm.core.step import Logprobs, StepResult
from nanovllm.engine.detokenizer import Detokenizer, IncrementalDetokenizer, TokenPieces
from nanovllm.engine.logprob_entries import (
    add_prompt_logprobs,
    logprob_entry,
    token_pieces,
)
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput
from nanovllm.sampling_params import RequestOutputKind

NewToken = tuple[int, Sequence]  # (index into a step's sampled tokens, the sequence that got it)


@dataclass(eq=False)
class Completion:
    """One sequence's output so far. `token_ids` is filled only if the sequence streams tokens."""

    request: Request
    index: int
    seq: Sequence
    text: IncrementalDetokenizer | None  # where stop strings or streaming need text early
    pieces: TokenPieces | None = None  # where logprobs need each token's text
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    num_shown: int = 0  # tokens that earlier deltas have shown


class OutputProcessor:
    """Invariant: `requests` are the unfinished requests, `completions` their outputs so far."""

    def __init__(self, detokenizer: Detokenizer | None = None) -> None:
        self.detokenizer = detokenizer
        self.requests: dict[str, Request] = {}
        self.completions: dict[int, Completion] = {}  # by the id of the sequence
        self.failures: list[Failure] = []  # errors in one sequence's output

    def add(self, request: Request) -> None:
        params = request.params
        is_final_only = params.output_kind is RequestOutputKind.FINAL_ONLY
        needs_text = params.detokenize and bool(params.stop or not is_final_only)
        made = []
        for index, seq in enumerate(request.seqs):
            text = None
            if needs_text and self.detokenizer is not None:
                text = IncrementalDetokenizer(self.detokenizer, params, request.prompt_token_ids)
            completion = Completion(request, index, seq, text)
            if params.logprobs is not None:
                completion.logprobs = []
                completion.cumulative_logprob = 0.0
                completion.pieces = token_pieces(self.detokenizer, params, request.prompt_token_ids)
            seq.streams_tokens = bool(
                text or params.logprobs is not None or not is_final_only or request.metrics
            )
            made.append(completion)
        self.completions.update((completion.seq.seq_id, completion) for completion in made)
        self.requests[request.request_id] = request

    def remove(self, request_id: str) -> Request | None:
        """Takes a request out; None where it is not (or no longer) there."""
        request = self.requests.pop(request_id, None)
        for seq in request.seqs if request else ():
            del self.completions[seq.seq_id]
        return request

    def find(self, seq: Sequence) -> Request | None:
        """The unfinished request that a sequence belongs to."""
        completion = self.completions.get(seq.seq_id)
        return completion.request if completion else None

    def clear(self) -> None:
        self.requests.clear()
        self.completions.clear()
        self.failures.clear()

    # -- a step's results --------------------------------------------------------------------------

    def take(self, new_tokens: list[NewToken], result: StepResult) -> list[tuple[Sequence, str]]:
        """Adds a step's tokens, logprobs and text. Returns the stop strings that were completed."""
        row_of = {int(at): row for row, at in enumerate(result.logprob_rows)}
        matches = []
        for i, seq in new_tokens:
            if not seq.streams_tokens:
                continue
            try:
                completion = self.completions[seq.seq_id]
                token = int(result.tokens[i])
                if i in row_of and result.logprobs is not None:
                    self._take_logprobs(completion, token, row_of[i], result.logprobs)
                match = self._take_token(completion, token)
                if match is not None:
                    matches.append((seq, match))
            except Exception as error:
                self.failures.append(Failure(seq, error))
        return matches

    def _take_token(self, completion: Completion, token: int) -> str | None:
        """Adds a token; returns the stop string that it completed."""
        seq, metrics = completion.seq, completion.request.metrics
        completion.token_ids.append(token)
        if metrics is not None:
            metrics.last_token_time = time.monotonic()
            metrics.first_token_time = metrics.first_token_time or metrics.last_token_time
            metrics.num_generation_tokens += 1
        if completion.text is None:
            return None
        match = completion.text.feed([token], hide_last=seq.finish_reason == "stop")
        if match is not None:
            return match.string
        if seq.finish_reason:
            completion.text.finish()
        return None

    def _take_logprobs(
        self, completion: Completion, token: int, row: int, logprobs: Logprobs[np.ndarray]
    ) -> None:
        k = completion.request.params.logprobs or 0
        is_last = completion.seq.finish_reason is not None
        entry = logprob_entry(token, row, logprobs, k, self.detokenizer, completion.pieces, is_last)
        assert completion.logprobs is not None
        completion.logprobs.append(entry)
        total = completion.cumulative_logprob or 0.0
        completion.cumulative_logprob = total + entry[token].logprob

    def take_prompt_logprobs(
        self, seq: Sequence, position: int, count: int, row: int, logprobs: Logprobs[np.ndarray]
    ) -> None:
        """Rows `row:row + count` are of the prompt tokens from `position` on."""
        request = self.find(seq)
        if request is None:  # it was aborted
            return
        try:
            add_prompt_logprobs(request, self.detokenizer, position, count, row, logprobs)
        except Exception as error:
            self.failures.append(Failure(seq, error))

    # -- outputs -----------------------------------------------------------------------------------

    def outputs(self, new_tokens: list[NewToken]) -> list[tuple[Request, RequestOutput]]:
        """The outputs of the requests that got new tokens. Finished requests are removed."""
        failed = {failure.seq.seq_id for failure in self.failures}
        touched: dict[Request, list[Completion]] = {}
        for _, seq in new_tokens:
            completion = self.completions[seq.seq_id]
            touched.setdefault(completion.request, []).append(completion)
        outputs = []
        for request, completions in touched.items():
            if any(seq.seq_id in failed for seq in request.seqs):
                continue
            kind = request.params.output_kind
            if kind is RequestOutputKind.FINAL_ONLY and not request.finished:
                continue
            if kind is not RequestOutputKind.DELTA:  # a delta shows only what is new
                completions = [self.completions[seq.seq_id] for seq in request.seqs]
            try:
                shown = [self._completion_output(completion) for completion in completions]
                outputs.append((request, request_output(request, shown)))
            except Exception as error:
                self.failures.append(Failure(completions[0].seq, error))
                continue
            if request.finished:
                self.remove(request.request_id)
        return outputs

    def _completion_output(self, completion: Completion) -> CompletionOutput:
        seq, params = completion.seq, completion.request.params
        token_ids = completion.token_ids
        logprobs = completion.logprobs
        if not seq.streams_tokens:
            token_ids = seq.token_ids[seq.prompt_len :].tolist()
        if params.output_kind is RequestOutputKind.DELTA:
            start = completion.num_shown
            completion.num_shown = len(token_ids)
            token_ids = token_ids[start:]
            logprobs = None if logprobs is None else logprobs[start:]
        return CompletionOutput(
            index=completion.index,
            text=self._text(completion, token_ids),
            token_ids=list(token_ids),
            cumulative_logprob=completion.cumulative_logprob,
            logprobs=None if logprobs is None else list(logprobs),
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
        )

    def _text(self, completion: Completion, token_ids: list[int]) -> str:
        params, prompt = completion.request.params, completion.request.prompt_token_ids
        if completion.text is not None:
            is_delta = params.output_kind is RequestOutputKind.DELTA
            return completion.text.delta() if is_delta else completion.text.emitted()
        if self.detokenizer is None or not params.detokenize:
            return ""
        hide_last = completion.seq.finish_reason == "stop"
        return self.detokenizer.text(params, prompt, token_ids, hide_last)

    def last_output(self, request: Request) -> RequestOutput:
        """The output of a request that was ended from outside."""
        shown = []
        for seq in request.seqs:
            completion = self.completions[seq.seq_id]
            if completion.text is not None:
                completion.text.finish()
            shown.append(self._completion_output(completion))
        return request_output(request, shown)

    def error_output(self, request: Request, message: str) -> RequestOutput:
        """The last output of a request that ends with an error: its tokens and earlier text."""
        shown = []
        for seq in request.seqs:
            completion = self.completions[seq.seq_id]
            shown.append(
                CompletionOutput(
                    index=completion.index,
                    text=completion.text.text if completion.text else "",
                    token_ids=seq.token_ids[seq.prompt_len :].tolist(),
                    cumulative_logprob=completion.cumulative_logprob,
                    logprobs=completion.logprobs,
                    finish_reason="error",
                    stop_reason=message,
                )
            )
        return request_output(request, shown, finished=True)


def request_output(
    request: Request, completions: list[CompletionOutput], finished: bool | None = None
) -> RequestOutput:
    metrics = request.metrics
    finished = request.finished if finished is None else finished
    if metrics is not None and finished:
        metrics.finished_time = metrics.last_token_time
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        prompt_logprobs=request.prompt_logprobs,
        outputs=completions,
        finished=finished,
        metrics=metrics,
        lora_request=request.lora_request,
        num_cached_tokens=max(request.seqs[0].num_cached_tokens, 0),
    )
