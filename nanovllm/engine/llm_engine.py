"""Requests in, outputs out, one step at a time: wires scheduler, model runner and
processors.

With overlap (`async_scheduling`) a step is scheduled and launched before the tokens of
the step before are known: the host finishes step N - 1 and prepares step N + 1 while the
device runs step N. Results are the same without.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace

import numpy as np

from nanovllm.config import EngineArgs
from nanovllm.core.ability import Ability
from nanovllm.core.adapter import Adapter
from nanovllm.core.batch import Batch, ceil_div
from nanovllm.core.lora import LoRA
from nanovllm.core.request import OutputQueue, Request
from nanovllm.core.sequence import Failure
from nanovllm.core.step import Step
from nanovllm.engine.adapters import Adapters
from nanovllm.engine.batch_builder import build_batch
from nanovllm.engine.detokenizer import Detokenizer, Tokenizer
from nanovllm.engine.fair_lock import FairLock
from nanovllm.engine.input_processor import InputProcessor, as_priorities, cache_salt_of
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.stats import EngineStats, Metric, metrics
from nanovllm.errors import ValidationError
from nanovllm.inputs import Tokenization
from nanovllm.loader.gguf_tokenizer import GGUFTokenizer
from nanovllm.lora.request import LoRARequest
from nanovllm.outputs import RequestOutput
from nanovllm.runner import client_views
from nanovllm.runner.adapter_memory import RankMemory
from nanovllm.runner.executor import PendingStep
from nanovllm.runner.executors import make_executor
from nanovllm.runner.readouts.registry import READOUTS
from nanovllm.runner.setup import Setup
from nanovllm.sampling.engine_processors import UserObjects, make_objects
from nanovllm.sampling.sampler import sampling_abilities
from nanovllm.sampling_params import RequestOutputKind, SamplingParams

logger = logging.getLogger("nanovllm")

# A group of waiting sequences takes this part of the rows (docs/experiments.md).
ADMISSION_GROUPS = 16

NewOutputs = list[tuple[Request, RequestOutput]]


@dataclass
class StepInFlight:
    """A step that was launched, and whose tokens are not on the host yet."""

    step: Step
    batch: Batch[np.ndarray]
    pending: PendingStep


class LLMEngine:
    """Invariant: an unfinished request is in the output processor, its sequences in the scheduler.

    Several threads may use one engine: each method waits for its turn.
    """

    scheduler_class = Scheduler  # trace/ has another
    first_pid: int | None = None  # of the first engine: OpenMP's threads do not survive a fork

    def __init__(self, args: EngineArgs) -> None:
        self.pid = os.getpid()
        LLMEngine.first_pid = LLMEngine.first_pid or self.pid
        check_process(LLMEngine.first_pid)
        self.args = args
        self.setup = setup = Setup(args)
        self.max_model_len = setup.max_model_len
        self.vocab_size = setup.config.vocab_size
        self.eos_token_ids = setup.eos_token_ids
        is_gpu = setup.device.type == "cuda"
        self.overlap = is_gpu if args.async_scheduling is None else args.async_scheduling
        self.readouts = [make() for make in READOUTS.values()]
        self.abilities: list[Ability] = [*sampling_abilities(), *self.readouts]
        self.adapters: Adapters | None = None
        if args.enable_lora:
            self.abilities.append(LoRA())
        self.scheduler_config = client_views.scheduler_config(setup, self.overlap)
        self.stats = EngineStats()
        self.request_ids = map(str, itertools.count())
        self.lock = FairLock()
        self.stepping = False
        self.undelivered: list[RequestOutput] = []  # of requests without a queue, for `step`
        self.in_flight: StepInFlight | None = None
        self.to_abort: list[str] = []  # requests whose stream was collected during a step
        self.input_processor = InputProcessor(
            setup.tokenizer,
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
            max_model_len=self.max_model_len,
            seed=args.seed,
            abilities=self.abilities,
            logits_processors=self._logits_processors(),
        )
        self.output_processor = OutputProcessor()
        self.set_tokenizer(setup.tokenizer)
        self.load()

    def load(self) -> None:
        """Starts the ranks and loads the model.

        Raises ValueError for several engines, and for a trace.
        """
        if self.args.data_parallel_size > 1:
            raise ValueError(
                f"data_parallel_size={self.args.data_parallel_size}: an LLMEngine is one engine; "
                "use LLM or AsyncLLM"
            )
        if self.args.trace is not None and self.scheduler_class is Scheduler:
            raise ValueError(
                f"trace={self.args.trace!r}: an LLMEngine records nothing; use LLM or AsyncLLM"
            )
        self.executor = make_executor(self.setup)
        self.model_executor = client_views.model_executor(self.executor.runner)
        if self.args.enable_lora:
            self.adapters = Adapters(
                RankMemory(self.executor, self.args),
                self._adapters_in_use,
                max_loras=self.args.max_loras,
                max_cpu_loras=self.args.num_adapters,
            )
        self.reset()

    def _logits_processors(self) -> UserObjects | None:
        """The objects of the user's classes; None without LLM(logits_processors=...)."""
        given = self.args.logits_processors
        if not given:
            return None
        config = SimpleNamespace(
            model_config=self.model_config, scheduler_config=self.scheduler_config
        )
        return make_objects(given, config, self.setup.device)

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> LLMEngine:
        return cls(args)

    def reset(self) -> None:
        """Drops all requests: an empty scheduler over an empty cache."""
        columns: dict[str, type] = {}
        for ability in self.abilities:
            columns.update(ability.columns)
        self.scheduler = self.scheduler_class(
            num_blocks=self.executor.num_blocks,
            block_size=self.setup.block_size,
            max_model_len=self.max_model_len,
            max_num_seqs=self.setup.max_num_seqs,
            max_num_batched_tokens=self.setup.max_num_batched_tokens,
            eos_token_ids=self.eos_token_ids,
            enable_prefix_caching=self.args.enable_prefix_caching,
            enable_chunked_prefill=self.args.enable_chunked_prefill,
            columns=columns,
            stats=self.stats,
            policy=self.args.scheduling_policy,
            adapters=self.adapters,
            admission_group=self._admission_group(),
        )
        self.output_processor.clear()
        self._drop_in_flight()

    def _admission_group(self) -> int:
        """How many waiting sequences enter together when rows or blocks are scarce.

        More than one where steps of decodes replay CUDA graphs. An urgent sequence does not
        wait for others, and steps with adapters replay nothing.
        """
        args = self.args
        replays = self.executor.runner.graphs is not None and not args.enable_lora
        if not replays or args.scheduling_policy == "priority":
            return 1
        return ceil_div(self.setup.max_num_seqs, ADMISSION_GROUPS)

    # -- requests ----------------------------------------------------------------------------------

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """The calling thread has the engine to itself. Raises RuntimeError in a forked process."""
        check_process(self.pid)
        with self.lock:
            yield

    def add_request(
        self,
        request_id: str,
        prompt: object,
        params: SamplingParams,
        arrival_time: float | None = None,
        lora_request: LoRARequest | None = None,
        tokenization_kwargs: Mapping[str, object] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        *,
        max_logprobs: int | None = None,
        output_kind: RequestOutputKind | None = None,
        queue: OutputQueue | None = None,
    ) -> None:
        """Checks a request and queues it.

        Raises TypeError or ValueError for a refused request; nothing has changed then.
        prompt: text, token ids, or a dict with "prompt" (text) or "prompt_token_ids".
        max_logprobs: replaces the engine's limit. output_kind: replaces the params' kind.
        queue: gets the request's outputs. Without a queue `step` returns them.
        priority: lower runs first. Not 0 only with scheduling_policy="priority".
        arrival_time, trace_headers: no effect.
        """
        with self.exclusive():
            if tokenization_kwargs:
                prompt = self.tokenized(prompt, Tokenization.of(tokenization_kwargs))
            self._check_awake()
            if request_id in self.output_processor.requests:
                raise ValidationError(f"request_id={request_id!r} is in use by another request")
            as_priorities(priority, 1, self.args.scheduling_policy)
            adapter = None
            if lora_request is not None:
                adapter = self._need_adapters("lora_request").find(lora_request)
            request = self.input_processor.process(
                request_id,
                prompt,
                params,
                max_logprobs=self.args.max_logprobs if max_logprobs is None else max_logprobs,
                output_kind=output_kind,
                log_stats=not self.args.disable_log_stats,
                queue=queue,
                priority=priority,
                lora_request=lora_request,
                adapter=adapter,
            )
            # First, because a request that cannot be queued must not replace an adapter.
            self.enqueue(request)
            if adapter is not None:
                self._need_adapters("lora_request").keep(adapter)

    def _check_awake(self) -> None:
        if self.freed:
            freed = " and ".join(sorted(self.freed))
            raise ValidationError(f"the engine sleeps ({freed} are freed): call wake_up() first")

    def enqueue(self, request: Request) -> None:
        """Queues a checked request."""
        self.output_processor.add(request)
        for seq in request.seqs:
            self.scheduler.add(seq)

    def sort_waiting_longest_first(self) -> None:
        self.scheduler.sort_waiting_longest_first()

    def new_request_id(self) -> str:
        requests = self.output_processor.requests
        return next(i for i in self.request_ids if i not in requests)

    def abort_request(self, request_ids: str | list[str], internal: bool = False) -> None:
        """Ends requests and frees their blocks. Ids of no unfinished request are ignored.

        internal: no effect, because a request has one id.
        """
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        if not ids or os.getpid() != self.pid:  # a forked copy of the process has nothing to end
            return
        if self.lock.mine and self.stepping:  # a garbage collection during a step found a stream
            self.to_abort += ids
            return
        with self.lock:
            self._abort(ids)

    def _abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            request = self.output_processor.remove(request_id)
            if request is not None:
                self._finish(request, "abort")

    def end_request(self, request_id: str) -> RequestOutput | None:
        """Ends a request. Returns its last output, with finish_reason "abort".

        Returns None if no unfinished request has the id.
        """
        with self.exclusive():
            request = self.output_processor.requests.get(request_id)
            if request is None:
                return None
            self._finish(request, "abort")
            output = self.output_processor.last_output(request)
            self.output_processor.remove(request_id)
            return output

    def _finish(self, request: Request, reason: str, message: str | None = None) -> None:
        for seq in request.seqs:
            if seq.finish_reason is None:
                self.scheduler.finish(seq, reason, message)

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has work to do, or outputs to return that other steps have made."""
        return bool(self.output_processor.requests or self.undelivered)

    def has_request(self, request_id: str) -> bool:
        """Whether an unfinished request has the id."""
        return request_id in self.output_processor.requests

    def get_num_unfinished_requests(self) -> int:
        return len(self.output_processor.requests)

    def close(self) -> None:
        """Ends the ranks. The engine cannot compute after that."""
        self.executor.close()

    # -- running -----------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Runs one step and returns new outputs. With overlap they come from the step before.

        Outputs of requests with a queue go there instead. If a step raises or is
        interrupted, all requests are dropped and the engine goes on with an empty cache.
        """
        with self.exclusive():
            self.run_step()
            outputs = self.undelivered
            self.undelivered = []
        return outputs

    def run_step(self) -> None:
        """Like `step`, and keeps the outputs of requests without a queue for the next `step`."""
        with self.exclusive():
            self._abort(self.to_abort)
            self.to_abort.clear()
            self.stepping = True
            try:
                produced = self._step()
            except BaseException:
                self.reset()
                raise
            finally:
                self.stepping = False
            for request, output in produced:
                if request.queue is None:
                    self.undelivered.append(output)
                else:
                    request.queue.append(output)

    def _step(self) -> NewOutputs:
        outputs: NewOutputs = []
        if self.in_flight and self.scheduler.needs_previous_tokens():
            outputs += self._collect()
        launched = self._launch()
        outputs += self._end_failed(self.scheduler.failures)
        if self.in_flight:
            outputs += self._collect()
        self.in_flight = launched
        if launched and not self.overlap:
            outputs += self._collect()
        if not self.scheduler.unfinished:
            self._drop_in_flight()  # it holds surplus tokens only
        return outputs

    def _drop_in_flight(self) -> None:
        self.in_flight = None
        for readout in self.readouts:
            readout.clear()

    def _launch(self) -> StepInFlight | None:
        scheduler = self.scheduler
        step = scheduler.schedule()
        if step is None:
            return None
        if not self.args.disable_log_stats:
            self._note_first_schedule(step)
        batch, failures = build_batch(scheduler.table, step, scheduler.block_size, self.abilities)
        scheduler.failures += failures
        return StepInFlight(step, batch, self.executor.launch(batch))

    def _collect(self) -> NewOutputs:
        assert self.in_flight is not None
        flight = self.in_flight
        self.in_flight = None
        result = flight.pending.collect()
        processor = self.output_processor
        outputs = self._end_failed(self._failures(flight.step, result.errors))
        new_tokens = self.scheduler.update(flight.step, result.tokens)
        for readout in self.readouts:
            if readout.name in flight.batch.parts:
                readout.deliver(result.readouts[readout.name], processor)
        for seq, stop_string in processor.take(new_tokens, result):
            if seq.finish_reason is None:
                self.scheduler.finish(seq, "stop")
            seq.finish_reason = "stop"
            seq.stop_reason = stop_string
        outputs += processor.outputs(new_tokens)
        return outputs + self._end_failed(processor.failures)

    def _failures(self, step: Step, errors: dict[int, Exception]) -> list[Failure]:
        """errors: index into the step's sampled tokens -> error. Ended sequences are left out."""
        unfinished = self.scheduler.unfinished
        ids = ((int(step.seq_ids[i]), error) for i, error in errors.items())
        return [Failure(unfinished[i], error) for i, error in ids if i in unfinished]

    def _end_failed(self, failures: list[Failure]) -> NewOutputs:
        """Ends the requests in whose own part of a step an error was raised. Others go on."""
        outputs = []
        for failure in failures:
            request = self.output_processor.find(failure.seq)
            if request is not None:
                message = f"{type(failure.error).__name__}: {failure.error}"
                logger.warning("request %s ends with an error: %s", request.request_id, message)
                self._finish(request, "error", message)
                outputs.append((request, self.output_processor.error_output(request, message)))
                self.output_processor.remove(request.request_id)
        failures.clear()
        return outputs

    def _note_first_schedule(self, step: Step) -> None:
        table = self.scheduler.table
        for row in step.rows[step.starts == table.num_cached[step.rows]]:
            request = self.output_processor.find(table.seqs[row])
            if request and request.metrics and request.metrics.first_scheduled_time is None:
                request.metrics.first_scheduled_time = time.monotonic()

    # -- adapters ----------------------------------------------------------------------------------

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Loads an adapter before a request needs it. Returns True.

        Raises ValueError for files that do not suit the model, or if max_cpu_loras
        adapters are pinned or running.
        """
        with self.exclusive():
            adapters = self._need_adapters("add_lora")
            adapters.load(adapters.get(lora_request), self.running_adapters())
        return True

    def remove_lora(self, lora_id: int) -> bool:
        """Forgets an adapter. Returns whether it was known.

        Raises ValueError while an unfinished request uses the adapter.
        """
        with self.exclusive():
            return self._need_adapters("remove_lora").remove(lora_id)

    def list_loras(self) -> set[int]:
        """The lora_int_id of every adapter in memory."""
        with self.exclusive():
            loaded = self._need_adapters("list_loras").loaded()
            return {adapter.request.lora_int_id for adapter in loaded}

    def pin_lora(self, lora_id: int) -> bool:
        """Keeps an adapter in memory until `remove_lora`. Returns True."""
        with self.exclusive():
            self._need_adapters("pin_lora").pin(lora_id, self.running_adapters())
        return True

    def _need_adapters(self, name: str) -> Adapters:
        if self.adapters is None:
            raise ValidationError(f"{name} needs an engine with enable_lora=True")
        return self.adapters

    def running_adapters(self) -> set[Adapter | None]:
        return {seq.adapter for seq in self.scheduler.table.seqs.values()}

    def _adapters_in_use(self) -> set[Adapter | None]:
        return {seq.adapter for seq in self.scheduler.unfinished.values()}

    # -- for clients -------------------------------------------------------------------------------

    @cached_property
    def model_config(self) -> SimpleNamespace:
        """Made when a client asks, because it may import transformers."""
        return client_views.model_config(self.setup)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of transformers.

        That of a GGUF file is made when a client first asks. The engine then uses it too,
        because the client may change it.
        """
        tokenizer = self.input_processor.tokenizer
        if isinstance(tokenizer, GGUFTokenizer):
            tokenizer = tokenizer.to_transformers()
            self.set_tokenizer(tokenizer)
        return tokenizer

    def get_tokenizer(self) -> Tokenizer | None:
        return self.tokenizer

    def set_tokenizer(self, tokenizer: Tokenizer | None) -> None:
        with self.exclusive():
            self.input_processor.tokenizer = tokenizer
            detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
            self.output_processor.detokenizer = detokenizer

    def tokenize(
        self, prompt: object, how: Tokenization = Tokenization()
    ) -> tuple[str | None, np.ndarray]:
        """A prompt of any form -> (text to echo, token ids as int32)."""
        return self.input_processor.tokenize(prompt, how)

    def tokenized(self, prompt: object, how: Tokenization) -> dict[str, object]:
        """A prompt of any form -> a prompt of token ids. Outputs echo the text."""
        text, token_ids = self.tokenize(prompt, how)
        salt = cache_salt_of(prompt)
        return {"prompt": text, "prompt_token_ids": token_ids, "cache_salt": salt}

    @property
    def freed(self) -> set[str]:
        """What `sleep` has freed and `wake_up` not brought back, of "weights" and "kv_cache"."""
        return self.executor.runner.freed

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Makes all cached prefixes unfindable. Running requests go on.

        reset_connector: no effect, because all KV cache is inside the engine.
        Raises ValueError for reset_running_requests while requests are unfinished.
        """
        with self.exclusive():
            self._check_reset(reset_running_requests)
            self.scheduler.reset_prefix_cache()
        return True

    def _check_reset(self, reset_running_requests: bool) -> None:
        if reset_running_requests and self.get_num_unfinished_requests():
            raise ValidationError(
                "reset_running_requests=True is not supported while requests are unfinished"
            )

    def collective_rpc(
        self,
        method: str | Callable[..., object],
        timeout: float | None = None,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> list[object]:
        """`method(worker, ...)`, or the worker's method of that name, on each rank.

        timeout: no effect.
        """
        with self.exclusive():
            return self.executor.collective_rpc(method, args, kwargs or {})

    def get_metrics(self) -> list[Metric]:
        scheduler = self.scheduler
        blocks = scheduler.blocks
        gauges = {
            "num_requests_running": float(len(scheduler.running)),
            "num_requests_waiting": float(len(scheduler.waiting)),
            "kv_cache_usage_perc": 1 - blocks.num_free / blocks.num_blocks,
        }
        return metrics(self.stats, gauges)


def check_process(pid: int) -> None:
    if os.getpid() != pid:
        raise RuntimeError(
            f"process {os.getpid()} was forked from process {pid}, in which an engine was made, "
            "and the engine's threads do not exist here: make the engine in the process that uses "
            "it, started with multiprocessing's 'spawn'"
        )
