"""An engine that records what it does. Its outputs are an LLMEngine's."""

from __future__ import annotations

import weakref
from dataclasses import asdict
from pathlib import Path

from nanovllm.config import EngineArgs
from nanovllm.core.request import Request
from nanovllm.engine.llm_engine import LLMEngine, NewOutputs, StepInFlight
from nanovllm.outputs import RequestOutput
from nanovllm.trace.files import open_trace
from nanovllm.trace.recorder import Recorder
from nanovllm.trace.records import VERSION, RunRecord
from nanovllm.trace.scheduler import TracedScheduler
from nanovllm.trace.timing import TimedExecutor, TimedStep


class TracedEngine(LLMEngine):
    """Invariant: whenever no request is left, the trace file is complete."""

    scheduler_class = TracedScheduler
    scheduler: TracedScheduler

    def __init__(self, args: EngineArgs) -> None:
        """Raises OSError where the trace file cannot be written."""
        assert args.trace is not None
        path = Path(args.trace).expanduser()
        self.recorder = Recorder(open_trace(path))
        super().__init__(args)
        self.recorder.begin(self._run_record())
        weakref.finalize(self, self.recorder.close)

    def load(self) -> None:
        super().load()
        self.executor = TimedExecutor(self.executor)

    def reset(self) -> None:
        super().reset()
        self.recorder.restart()

    def _run_record(self) -> RunRecord:
        setup = self.setup
        return {
            "kind": "run",
            "version": VERSION,
            "model": self.args.model,
            "architecture": setup.config.architecture,
            "device": str(setup.device),
            "dtype": str(setup.dtype).removeprefix("torch."),
            "attention": type(self.executor.runner.attention).__name__,
            "num_blocks": self.executor.num_blocks,
            "block_size": setup.block_size,
            "max_num_seqs": setup.max_num_seqs,
            "max_num_batched_tokens": setup.max_num_batched_tokens,
            "prefix_caching": self.args.enable_prefix_caching,
            "time": 0.0,  # the recorder knows
        }

    # -- requests ----------------------------------------------------------------------------------

    def enqueue(self, request: Request) -> None:
        super().enqueue(request)
        processor = self.output_processor
        completions = [processor.completions[seq.seq_id] for seq in request.seqs]
        self.recorder.add_request(request, completions, processor.detokenizer)

    def _abort(self, request_ids: list[str]) -> None:
        super()._abort(request_ids)
        self._end_if_idle()

    def end_request(self, request_id: str) -> RequestOutput | None:
        with self.exclusive():
            output = super().end_request(request_id)
            self._end_if_idle()
        return output

    def _end_if_idle(self) -> None:
        if self.recorder.has_records and not self.scheduler.unfinished:
            self._drop_in_flight()  # it holds surplus tokens only
            self.recorder.end(self.scheduler, asdict(self.stats))

    # -- running -----------------------------------------------------------------------------------

    def run_step(self) -> None:
        with self.exclusive():
            try:
                super().run_step()
            except BaseException as error:
                message = f"{type(error).__name__}: {error}"
                self.recorder.end(self.scheduler, asdict(self.stats), message)
                raise
            self._end_if_idle()

    def _launch(self) -> StepInFlight | None:
        flight = None
        try:
            flight = super()._launch()
        finally:
            plan = self.scheduler.step
            if plan is not None:
                timed = None if flight is None else timed_step(flight)
                self.recorder.add_step(self.scheduler, plan, timed)
        return flight

    def _collect(self) -> NewOutputs:
        assert self.in_flight is not None
        timed = timed_step(self.in_flight)
        outputs = super()._collect()
        self.recorder.collect_step(self.scheduler, timed)
        return outputs

    def close(self) -> None:
        super().close()
        self.recorder.close()


def timed_step(flight: StepInFlight) -> TimedStep:
    assert isinstance(flight.pending, TimedStep), "launch of a TimedExecutor"
    return flight.pending
