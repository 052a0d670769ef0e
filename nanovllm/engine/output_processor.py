"""Turns sampled tokens into what the user sees: text, stop strings, logprobs, `RequestOutput`s.

It knows requests and text, not how tokens were computed. A sequence whose tokens nobody wants to see on the way costs
nothing here until it ends: its text is then decoded at once.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from nanovllm.engine.batch import Batch
from nanovllm.engine.detokenizer import Detokenizer, IncrementalDetokenizer, TokenPieces
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams


@dataclass(eq=False)
class Request:
    """A request under way; it has one `Completion` for each of its n sequences."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    metrics: RequestMetrics | None
    queue: deque[RequestOutput] | None = None  # where its outputs go; None: to whoever calls LLMEngine.step
    completions: list[Completion] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def finished(self) -> bool:
        return all(c.seq.finish_reason for c in self.completions)


@dataclass(eq=False)
class Completion:
    """One sequence's output so far. `token_ids` is filled on the way only if the sequence is watched."""

    request: Request
    index: int
    seq: Sequence
    text: IncrementalDetokenizer | None  # where stop strings or streaming need text on the way
    pieces: TokenPieces | None = None  # where logprobs need each token's text
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    num_shown: int = 0  # tokens that earlier deltas have shown


class OutputProcessor:
    def __init__(self, scheduler: Scheduler, detokenizer: Detokenizer | None) -> None:
        self.scheduler, self.detokenizer = scheduler, detokenizer
        self.requests: dict[str, Request] = {}

    def add(self, request: Request, seqs: list[Sequence]) -> None:
        """Makes the output state of a new request and its sequences."""
        params = request.params
        on_the_way = params.detokenize and (params.stop or params.output_kind is not RequestOutputKind.FINAL_ONLY)
        for index, seq in enumerate(seqs):
            text = None
            if on_the_way and self.detokenizer is not None:
                text = IncrementalDetokenizer(self.detokenizer, params, request.prompt_token_ids)
            completion = Completion(request, index, seq, text)
            if params.logprobs is not None:
                completion.logprobs, completion.cumulative_logprob = [], 0.0
                completion.pieces = self._pieces(params, request.prompt_token_ids)
            seq.owner = completion
            seq.watched = bool(
                text
                or params.logprobs is not None
                or params.output_kind is not RequestOutputKind.FINAL_ONLY
                or request.metrics is not None
            )
            request.completions.append(completion)
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None] * len(request.prompt_token_ids)
        self.requests[request.request_id] = request

    def process(
        self, news: list[tuple[int, Sequence]], batch: Batch, asked: list[tuple[Sequence, int, int]], result: Any
    ) -> list[tuple[Request, RequestOutput]]:
        """What a step brought: `news` are (row of the result, sequence) of those finished or watched.

        What is raised for one completion goes to `scheduler.failures`, and the others go on.
        """
        if result.prompt_logprobs is not None:
            self._take_prompt_logprobs(asked, result.prompt_logprobs)
        place = {int(at): i for i, at in enumerate(batch.logprob_at)}
        touched: dict[Request, list[Completion]] = {}
        failed: set[Request] = set()
        for i, seq in news:
            completion = seq.owner
            if seq.watched:
                try:
                    self._take(completion, int(result.tokens[i]), place.get(i), result.logprobs)
                except Exception as err:
                    self.scheduler.failures.append((seq, err))
                    failed.add(completion.request)
            touched.setdefault(completion.request, []).append(completion)
        outputs = []
        for request, completions in touched.items():
            if request in failed:
                continue
            finished, kind = request.finished, request.params.output_kind
            if finished or kind is not RequestOutputKind.FINAL_ONLY:
                # A delta speaks of what is new, any other output of all completions.
                shown = completions if kind is RequestOutputKind.DELTA else request.completions
                try:
                    outputs.append((request, self._output(request, shown)))
                except Exception as err:
                    self.scheduler.failures.append((completions[0].seq, err))
                    continue
            if finished:
                del self.requests[request.request_id]
        return outputs

    def error_output(self, request: Request, message: str) -> RequestOutput:
        """The last output of a request that ends with an error: its tokens so far, without text that may be the cause."""
        completions = [
            CompletionOutput(
                index=c.index,
                text=c.text.text if c.text else "",
                token_ids=c.seq.token_ids[c.seq.prompt_len :].tolist(),
                cumulative_logprob=c.cumulative_logprob,
                logprobs=c.logprobs,
                finish_reason="error",
                stop_reason=message,
            )
            for c in request.completions
        ]
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            prompt_logprobs=request.prompt_logprobs,
            outputs=completions,
            finished=True,
            metrics=request.metrics,
            num_cached_tokens=max(request.completions[0].seq.num_cached_tokens, 0),
        )

    def _take(self, completion: Completion, token: int, row: int | None, logprobs: Any) -> None:
        seq, request = completion.seq, completion.request
        completion.token_ids.append(token)
        if row is not None and completion.logprobs is not None:
            last = seq.finish_reason is not None
            entry = self._entry(token, row, logprobs, request.params.logprobs or 0, completion.pieces, last)
            completion.logprobs.append(entry)
            completion.cumulative_logprob = (completion.cumulative_logprob or 0.0) + entry[token].logprob
        if completion.text is not None:
            match = completion.text.feed([token], hide_last=seq.finish_reason == "stop")
            if match is not None:
                if seq.finish_reason is None:
                    self.scheduler.finish(seq, "stop", match.string)
                seq.finish_reason, seq.stop_reason = "stop", match.string
            if seq.finish_reason:
                completion.text.finish()
        metrics = request.metrics
        if metrics is not None:
            metrics.last_token_time = time.monotonic()
            metrics.first_token_time = metrics.first_token_time or metrics.last_token_time
            metrics.num_generation_tokens += 1
            if request.finished:
                metrics.finished_time = metrics.last_token_time

    def _pieces(self, params: SamplingParams, before: list[int]) -> TokenPieces | None:
        """The state that decoded tokens after the tokens `before` need; None where nobody asks for text."""
        if self.detokenizer is None or not params.detokenize:
            return None
        return TokenPieces(self.detokenizer, params, before)

    def _entry(
        self, token: int, row: int, logprobs: Any, k: int, pieces: TokenPieces | None, last: bool = False
    ) -> dict[int, Logprob]:
        """The token itself first, then the k most likely, each with its rank.

        last: no more tokens follow.
        """
        entry = {token: Logprob(float(logprobs.token[row]), int(logprobs.rank[row]), None)}
        for rank, (top_id, value) in enumerate(zip(logprobs.top_ids[row, :k], logprobs.top[row, :k]), 1):
            if top_id != token:
                decoded = self._token_text(int(top_id), pieces)
                entry[int(top_id)] = Logprob(float(value), rank, decoded)
        # The token's own text comes last, because it moves `pieces` on.
        entry[token].decoded_token = pieces.take(token, last) if pieces else self._token_text(token, None)
        return entry

    def _token_text(self, token: int, pieces: TokenPieces | None) -> str | None:
        if pieces is not None:
            return pieces.other(token)
        return None if self.detokenizer is None else self.detokenizer.token_text(token)

    def _take_prompt_logprobs(self, asked: list[tuple[Sequence, int, int]], logprobs: Any) -> None:
        row = 0
        for seq, position, count in asked:
            try:
                self._take_prompt_chunk(seq, range(position, position + count), row, logprobs)
            except Exception as err:
                self.scheduler.failures.append((seq, err))
            row += count

    def _take_prompt_chunk(self, seq: Sequence, positions: range, row: int, logprobs: Any) -> None:
        """Logprobs of a chunk of a prompt, of which the first is in `row`."""
        request = seq.owner.request
        tokens = request.prompt_token_ids
        # A chunk may begin inside a character, so some tokens before it are taken too.
        start = max(positions.start - 4, 1)
        pieces = self._pieces(request.params, tokens[:start])
        for token in tokens[start : positions.start]:
            if pieces:
                pieces.take(token)
        for i, at in enumerate(positions):
            last = at + 1 == len(tokens)
            entry = self._entry(tokens[at], row + i, logprobs, seq.prompt_logprobs or 0, pieces, last)
            request.prompt_logprobs[at] = entry

    def _output(self, request: Request, completions: list[Completion]) -> RequestOutput:
        """The request as it stands, with these of its completions."""
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            prompt_logprobs=request.prompt_logprobs,
            outputs=[self._completion(c) for c in completions],
            finished=request.finished,
            metrics=request.metrics,
            num_cached_tokens=max(request.completions[0].seq.num_cached_tokens, 0),
        )

    def _completion(self, completion: Completion) -> CompletionOutput:
        seq, params, detokenizer = completion.seq, completion.request.params, self.detokenizer
        token_ids, logprobs = completion.token_ids, completion.logprobs
        if not seq.watched:
            token_ids = seq.token_ids[seq.prompt_len :].tolist()
        if params.output_kind is RequestOutputKind.DELTA:
            token_ids, logprobs = token_ids[completion.num_shown :], logprobs and logprobs[completion.num_shown :]
            completion.num_shown = len(completion.token_ids)
            text = completion.text.delta() if completion.text else ""
        elif completion.text is not None:
            text = completion.text.emitted()
        elif params.detokenize and detokenizer is not None:
            hide_last = seq.finish_reason == "stop"
            text = detokenizer.text(params, completion.request.prompt_token_ids, token_ids, hide_last)
        else:
            text = ""
        return CompletionOutput(
            index=completion.index,
            text=text,
            token_ids=list(token_ids),
            cumulative_logprob=completion.cumulative_logprob,
            logprobs=None if logprobs is None else list(logprobs),
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
        )
