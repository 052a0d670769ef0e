"""Makes the records of a run and hands them, in order, to a trace file. Knows no engine."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from nanovllm.core.request import Request
from nanovllm.core.sequence import Sequence, SequenceTable
from nanovllm.core.step import Step
from nanovllm.engine.detokenizer import Detokenizer, IncrementalDetokenizer
from nanovllm.engine.output_processor import Completion
from nanovllm.outputs import Logprob
from nanovllm.sampling_params import SamplingParams
from nanovllm.trace.files import TraceFile
from nanovllm.trace.records import (
    EndRecord,
    Finish,
    Record,
    RequestRecord,
    Run,
    RunRecord,
    State,
    StepRecord,
    Token,
)
from nanovllm.trace.scheduler import SampledToken, TracedScheduler
from nanovllm.trace.timing import TimedStep

DROPPED = "dropped"  # the reason of a sequence that the engine lost because a step raised
NOT_OF_TOKENS = ("output_kind",)  # parameters that change no token


class Recorder:
    """Invariant: records reach the file in order, each as soon as it is complete.

    A step is complete when its tokens are known, so `queue` may begin with a step that is
    in `launched`.
    """

    def __init__(self, file: TraceFile) -> None:
        self.file = file
        self.start = time.perf_counter()
        self.start_time = time.time()
        self.queue: deque[Record] = deque()
        self.launched: deque[StepRecord] = deque()
        self.seqs: dict[int, RecordedSequence] = {}
        self.num_steps = 0
        self.has_records = False  # records since the last `end`
        self.was_reset = False
        self.dropped: list[Finish] = []

    def seconds(self, moment: float | None = None) -> float:
        """Seconds since the start. moment: a time of `time.perf_counter`; None is now."""
        moment = time.perf_counter() if moment is None else moment
        return round(moment - self.start, 6)

    # -- records -----------------------------------------------------------------------------------

    def begin(self, run: RunRecord) -> None:
        run["time"] = self.start_time
        self.was_reset = False
        self._add(run)
        self.has_records = False

    def add_request(
        self, request: Request, completions: list[Completion], detokenizer: Detokenizer | None
    ) -> None:
        """completions: of the request's sequences, in their order."""
        for completion in completions:
            self.seqs[completion.seq.seq_id] = RecordedSequence(completion, detokenizer)
        seqs = [completion.seq for completion in completions]
        pieces = [""] * len(request.prompt_token_ids)
        if detokenizer is not None:
            pieces = [detokenizer.token_text(token) for token in request.prompt_token_ids]
        record: RequestRecord = {
            "kind": "request",
            "time": self.seconds(),
            "request": request.request_id,
            "seqs": [seq.seq_id for seq in seqs],
            "prompt": list(map(int, request.prompt_token_ids)),
            "prompt_text": request.prompt,
            "prompt_pieces": pieces,
            "max_tokens": seqs[0].end - seqs[0].prompt_len,
            "params": changed_params(request.params),
        }
        self._add(record)

    def add_step(self, scheduler: TracedScheduler, plan: Step, timed: TimedStep | None) -> None:
        """A step was launched. timed: None if its launch raised."""
        record: StepRecord = {
            "kind": "step",
            "number": self.num_steps,
            "time": self.seconds(scheduler.began),
            "seqs": runs(scheduler.table, plan),
            **self._state(scheduler),
            "budget": {
                "used": int((plan.ends - plan.starts).sum()),
                "max": scheduler.max_num_batched_tokens,
            },
            "tokens": [],
            "us": {
                "schedule": microseconds(scheduler.began, scheduler.planned),
                "build": None,
                "launch": None,
                "collect": None,
                "output": None,
                "device": None,
            },
            "device_time": None,
            "collect_time": None,
        }
        if timed is not None:
            record["us"]["build"] = microseconds(scheduler.planned, timed.began)
            record["us"]["launch"] = microseconds(timed.began, timed.launched)
        self.num_steps += 1
        self.launched.append(record)
        self._add(record)

    def collect_step(self, scheduler: TracedScheduler, timed: TimedStep) -> None:
        """The tokens of the first launched step are known, and outputs were made of them."""
        ended = time.perf_counter()
        record = self.launched.popleft()
        record["tokens"] = [self._token(sampled) for sampled in scheduler.sampled]
        began, done = timed.device_times()
        record["us"]["collect"] = microseconds(timed.collecting, timed.collected)
        record["us"]["output"] = microseconds(timed.collected, ended)
        record["us"]["device"] = microseconds(began, done)
        record["device_time"] = self.seconds(began)
        record["collect_time"] = self.seconds(timed.collecting)
        self._flush()

    def end(
        self, scheduler: TracedScheduler, stats: dict[str, int], error: str | None = None
    ) -> None:
        """No request is left. error: of the step that raised."""
        self.launched.clear()  # their tokens belong to no sequence
        record: EndRecord = {
            "kind": "end",
            "time": self.seconds(),
            **self._state(scheduler),
            "stats": stats,
            "error": error,
        }
        self._add(record)
        self.has_records = False
        self.file.finish()

    def restart(self) -> None:
        """The engine has a new scheduler over an empty cache."""
        self.launched.clear()
        self.was_reset = True
        for seq_id, recorded in self.seqs.items():
            reason = recorded.seq.finish_reason or DROPPED
            self.dropped.append({"seq": seq_id, "reason": reason})
        self.seqs.clear()

    def close(self) -> None:
        """Writes what is left. No record follows."""
        self.launched.clear()
        self._flush()
        if self.has_records:
            self.file.finish()
        self.has_records = False
        self.file.close()

    # -- their parts -------------------------------------------------------------------------------

    def _add(self, record: Record) -> None:
        self.has_records = True
        self.queue.append(record)
        self._flush()

    def _flush(self) -> None:
        first_launched = self.launched[0] if self.launched else None
        while self.queue and self.queue[0] is not first_launched:
            record = self.queue.popleft()
            line = json.dumps(record, separators=(",", ":"), allow_nan=False)
            self.file.write(line)

    def _state(self, scheduler: TracedScheduler) -> State:
        changes, events = scheduler.take_changes()
        table = scheduler.table
        grown = {event["seq"] for event in events if event["event"] in ("allocate", "acquire")}
        state: State = {
            "running": table.seq_id[scheduler.running].tolist(),
            "waiting": [seq.seq_id for seq in scheduler.waiting],
            "admitted": changes.admitted,
            "preempted": changes.preempted,
            "finished": self.dropped + [self._finish(seq) for seq in changes.finished],
            "tables": {
                str(seq.seq_id): table.blocks_of(row)
                for row, seq in table.seqs.items()
                if seq.seq_id in grown
            },
            "blocks": events,
            "free": scheduler.blocks.num_free,
            "cached": len(scheduler.blocks.cached),
        }
        if self.was_reset:
            state["reset"] = True
        self.was_reset = False
        self.dropped = []
        return state

    def _finish(self, seq: Sequence) -> Finish:
        record: Finish = {"seq": seq.seq_id, "reason": str(seq.finish_reason)}
        recorded = self.seqs.pop(seq.seq_id, None)
        rest = "" if recorded is None else recorded.finish()
        if rest:
            record["text"] = rest
        return record

    def _token(self, sampled: SampledToken) -> Token:
        recorded = self.seqs[sampled.seq_id]
        text = recorded.take(sampled.token)
        token: Token = {
            "seq": sampled.seq_id,
            "position": sampled.position,
            "id": sampled.token,
            "text": text,
            "logprob": None,
            "top": None,
        }
        piece = recorded.piece(sampled.token)
        if piece != text:
            token["piece"] = piece
        entry = recorded.logprobs(sampled.position)
        if entry is not None:
            token["logprob"] = finite(entry[sampled.token].logprob)
            token["top"] = recorded.top(entry)
        return token


@dataclass
class RecordedSequence:
    """The text of a sequence, and where its logprobs are."""

    completion: Completion
    detokenizer: Detokenizer | None

    def __post_init__(self) -> None:
        request = self.completion.request
        self.seq = self.completion.seq
        self.text: IncrementalDetokenizer | None = None
        if self.detokenizer is not None and request.params.detokenize:
            prompt = request.prompt_token_ids
            self.text = IncrementalDetokenizer(self.detokenizer, request.params, prompt)

    def take(self, token: int) -> str:
        """The text that the token adds to the output."""
        if self.text is None:
            return ""
        seq = self.seq
        # A stop string that ended the sequence is no hidden token.
        hide_last = seq.finish_reason == "stop" and not isinstance(seq.stop_reason, str)
        try:
            self.text.feed([token], hide_last)
            if seq.finish_reason:
                self.text.finish()
        except Exception:  # the engine ends the request with this error
            self.text = None
            return ""
        return self.text.delta()

    def finish(self) -> str:
        """The text that the end of the sequence adds."""
        if self.text is None:
            return ""
        self.text.finish()
        return self.text.delta()

    def piece(self, token: int) -> str:
        """The text of the token alone."""
        return "" if self.detokenizer is None else self.detokenizer.token_text(token)

    def logprobs(self, position: int) -> dict[int, Logprob] | None:
        """The entry of the token at `position`, if the request asks for logprobs."""
        entries = self.completion.logprobs or []
        index = position - self.seq.prompt_len
        return entries[index] if index < len(entries) else None

    def top(self, entry: dict[int, Logprob]) -> list[tuple[str, float | None]]:
        """(text, logprob) of the most likely tokens."""
        count = self.completion.request.params.logprobs or 0
        likely = [(one.rank or 0, token, one) for token, one in entry.items()]
        likely = sorted(each for each in likely if count < 0 or each[0] <= count)
        return [
            (one.decoded_token or self.piece(token), finite(one.logprob))
            for _, token, one in likely
        ]


def runs(table: SequenceTable, plan: Step) -> list[Run]:
    """What the step computes of each sequence."""
    samples = np.zeros(len(plan.rows), np.bool_)
    samples[plan.sampled] = True
    found: list[Run] = []
    columns = (plan.rows, plan.starts, plan.ends, samples)
    for row, start, end, is_sampled in zip(*(column.tolist() for column in columns)):
        seq = table.seqs[row]
        is_decode = end == start + 1 and start >= seq.prompt_len
        found.append(
            {
                "seq": seq.seq_id,
                "start": start,
                "count": end - start,
                "kind": "decode" if is_decode else "prefill",
                "samples": is_sampled,
            }
        )
    return found


def changed_params(params: SamplingParams) -> dict[str, object]:
    """The fields that differ from their defaults."""
    plain = vars(SamplingParams())
    given = vars(params).items()
    return {
        name: json_value(value)
        for name, value in given
        if value != plain.get(name) and name not in NOT_OF_TOKENS
    }


def json_value(value: object) -> object:
    """The value, or its text if JSON has no such value: infinity, a function, an object."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return repr(value)
    return value


def microseconds(start: float, end: float) -> int:
    return round((end - start) * 1e6)


def finite(number: float) -> float | None:
    """None for infinity and NaN, which JSON has not."""
    return round(number, 5) if math.isfinite(number) else None
