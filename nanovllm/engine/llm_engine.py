"""Requests in, outputs out: ties tokenizer, scheduler, model runner and output processor together, one `step` at a time.

With overlap (`async_scheduling`) a step is scheduled and launched before the tokens of the one before are known: the
host finishes step N - 1 and prepares step N + 1 while the device runs step N. The results are the same without.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from nanovllm.config import EngineArgs
from nanovllm.engine.batch import Batch, build_batch
from nanovllm.engine.control import TOTALS, describe, totals
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.edits import add_prompt_logprobs
from nanovllm.engine.output_processor import OutputProcessor, Request
from nanovllm.engine.scheduler import Scheduler, Step
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.turns import Turns
from nanovllm.errors import ValidationError
from nanovllm.inputs import Tokenization, check_unicode
from nanovllm.outputs import RequestMetrics, RequestOutput
from nanovllm.prompts import as_token_ids, asks
from nanovllm.runner.executor import make_executor
from nanovllm.runner.setup import Setup
from nanovllm.sampling_params import SamplingParams

logger = logging.getLogger("nanovllm")


class LLMEngine:
    """Invariant: every unfinished request is in `processor.requests`, and each of its unfinished sequences in the scheduler.

    Several threads may use one engine: each method waits for its turn.
    """

    first_pid: int | None = None  # the process of the first engine: its OpenMP threads do not exist in a forked child

    def __init__(self, args: EngineArgs) -> None:
        self.pid = os.getpid()
        LLMEngine.first_pid = LLMEngine.first_pid or self.pid
        check_process(LLMEngine.first_pid)
        self.turns = Turns()
        self.undelivered: list[RequestOutput] = []  # of requests without a queue, until `step` is called
        self.stepping = False
        self.to_abort: list[str] = []  # requests whose stream was collected in the middle of a step
        self.args = args
        self.setup = setup = Setup(args)
        self.executor = make_executor(setup)
        self.runner = self.executor.runner
        self.tokenizer = setup.tokenizer
        self.max_model_len, self.vocab_size = setup.max_model_len, setup.config.vocab_size
        self.eos_token_ids = setup.eos_token_ids
        self.overlap = setup.device.type == "cuda" if args.async_scheduling is None else args.async_scheduling
        self.log_stats = not args.disable_log_stats
        self.request_numbers, self.seq_ids = itertools.count(), itertools.count()
        self.totals = dict.fromkeys(TOTALS, 0)  # of schedulers that a reset has replaced
        self.model_config, self.scheduler_config, self.model_executor = describe(self)
        self.reset()

    @property
    def asleep(self) -> set[str]:
        """What `sleep` has freed and `wake_up` not yet brought back, of "weights" and "kv_cache"."""
        return self.runner.asleep.gone if self.runner.asleep else set()

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> LLMEngine:
        return cls(args)

    def reset(self) -> None:
        """An empty scheduler over an empty cache."""
        args, setup = self.args, self.setup
        if hasattr(self, "scheduler"):
            self.totals = totals(self)
        self.scheduler = Scheduler(
            num_blocks=self.executor.num_blocks,
            block_size=setup.block_size,
            max_model_len=self.max_model_len,
            max_num_seqs=setup.max_num_seqs,
            max_num_batched_tokens=setup.max_num_batched_tokens,
            eos_token_ids=self.eos_token_ids,
            enable_prefix_caching=args.enable_prefix_caching,
            enable_chunked_prefill=args.enable_chunked_prefill,
        )
        detokenizer = None if self.tokenizer is None else Detokenizer(self.tokenizer)
        self.processor = OutputProcessor(self.scheduler, detokenizer)
        self.in_flight: tuple[Step, Batch, list[tuple[Sequence, int, int]], Any] | None = None

    # -- requests ----------------------------------------------------------------------------------------------------

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The calling thread has the engine to itself meanwhile. Raises RuntimeError in a forked process."""
        check_process(self.pid)
        with self.turns:
            yield

    def add_request(
        self,
        request_id: str,
        prompt: Any,
        params: SamplingParams,
        max_logprobs: int | None = None,
        queue: deque[RequestOutput] | None = None,
    ) -> None:
        """Checks a request and queues it. Raises TypeError or ValueError, and then nothing has changed.

        prompt: text, token ids, or a dict with "prompt" (text) or "prompt_token_ids".
        max_logprobs: instead of the engine's own limit.
        queue: where the request's outputs go; None: `step` returns them.
        """
        with self.turn():
            self._add_request(request_id, prompt, params, max_logprobs, queue)

    def _add_request(
        self,
        request_id: str,
        prompt: Any,
        params: SamplingParams,
        max_logprobs: int | None,
        queue: deque[RequestOutput] | None,
    ) -> None:
        if self.asleep:
            raise ValidationError(
                f"the engine sleeps ({' and '.join(sorted(self.asleep))} are gone): call wake_up() first"
            )
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams, got {type(params).__name__}")
        if not isinstance(request_id, str):
            raise TypeError(f"request_id={request_id!r} must be a str")
        if request_id in self.processor.requests:
            raise ValidationError(f"request_id={request_id!r} is in use by an unfinished request")
        params = params.clone()
        params.verify()
        text, tokens = self.tokenize(prompt, Tokenization(truncate_prompt_tokens=params.truncate_prompt_tokens))
        limit = self.args.max_logprobs if max_logprobs is None else max_logprobs
        params.verify_for_model(self.vocab_size, limit, self.tokenizer is not None, self._tokenizer_knows)
        room = self.max_model_len - len(tokens)
        end = len(tokens) + min(params.max_tokens or room, room)
        stops = frozenset(params.stop_token_ids or ())
        ends = sorted(i for i in stops | self.eos_token_ids if i < self.vocab_size)
        ban_until_min_tokens = tuple(ends) if params.min_tokens else ()
        bad_words = tuple(self._bad_word_ids(params.bad_words or []))
        check_candidates(params, self.vocab_size, bad_words, ban_until_min_tokens)
        number = next(self.request_numbers)
        seqs = [
            Sequence(
                seq_id=next(self.seq_ids),
                params=params,
                token_ids=tokens,
                end=end,
                request_number=number,
                seed=self._seed(params.seed, number, index),
                stop_token_ids=stops,
                ban_until_min_tokens=ban_until_min_tokens,
                bad_words=bad_words,
                prompt_logprobs=params.prompt_logprobs if index == 0 else None,
                reads_cache=params.reads_prefix_cache or index > 0,
            )
            for index in range(params.n)
        ]
        metrics = RequestMetrics(arrival_time=time.monotonic()) if self.log_stats else None
        request = Request(request_id, text, tokens.tolist(), params, metrics, queue)
        self.processor.add(request, seqs)
        for seq in seqs:
            self.scheduler.add(seq)

    def tokenize(self, prompt: Any, how: Tokenization = Tokenization()) -> tuple[str | None, np.ndarray]:
        """A prompt of any form -> (text to echo, token ids as int32). Raises TypeError or ValueError for a bad one."""
        text, token_ids = prompt, None
        if isinstance(prompt, Mapping):
            text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            if text is None and token_ids is None:
                raise TypeError(f"prompt: a dict needs 'prompt' or 'prompt_token_ids', got the keys {list(prompt)}")
            if more := [key for key in prompt if key not in ("prompt", "prompt_token_ids") and asks(prompt[key])]:
                raise ValidationError(f"prompt: {more} are not supported; accepted are 'prompt' and 'prompt_token_ids'")
        elif not isinstance(prompt, str):
            text, token_ids = None, prompt
        if token_ids is None:
            if not isinstance(text, str):
                raise TypeError(f"prompt: text must be a str, got {type(text).__name__}")
            if self.tokenizer is None:
                raise ValidationError("prompt: skip_tokenizer_init=True leaves token ids as the only form; got text")
            check_unicode("prompt", text)
            token_ids = self.tokenizer.encode(how.text(text), add_special_tokens=how.add_special_tokens)
        tokens = as_token_ids(token_ids)
        return text, self._checked(tokens[how.kept(len(tokens), self.max_model_len)])

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        """Token ids as int32, once they are known to be the model's and to fit."""
        if not len(tokens):
            raise ValidationError("prompt: it has no tokens; at least one is needed")
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            bad = tokens[(tokens < 0) | (tokens >= self.vocab_size)][0]
            raise ValidationError(f"prompt: token id {bad} is outside the vocabulary, 0..{self.vocab_size - 1}")
        if len(tokens) >= self.max_model_len:
            raise ValidationError(
                f"prompt: it has {len(tokens)} tokens, and max_model_len={self.max_model_len} must hold it and at "
                "least one new token"
            )
        return tokens.astype(np.int32)

    def _bad_word_ids(self, words: list[str]) -> list[tuple[int, ...]]:
        """Each word as it is tokenised where it is written so, at the start of a text, and after a space.

        A form that holds an id without a row in the model can never be generated, and is left out.
        """
        tokenizer: Any = self.tokenizer  # without one, bad words were refused
        found: set[tuple[int, ...]] = set()
        for word in words:
            bare = word.lstrip()
            for form in {word, bare, " " + bare} if bare else {word}:
                ids = tuple(tokenizer.encode(form, add_special_tokens=False))
                if ids and max(ids) < self.vocab_size:
                    found.add(ids)
        return sorted(found)

    def _tokenizer_knows(self, token_id: int) -> bool:
        if self.tokenizer is None or token_id >= 2**31:
            return False
        try:
            return self.tokenizer.convert_ids_to_tokens(token_id) is not None
        except (IndexError, KeyError, ValueError, OverflowError):  # of slow tokenizers
            return False

    def _seed(self, seed: int | None, number: int, index: int) -> int:
        """64 bits for one sequence: of the request's seed if it has one, else of the engine's and the request's number."""
        # As spawn keys the two never coincide: one is longer than the other.
        entropy, key = (self.args.seed, (number, index)) if seed is None else (seed, (index,))
        return int(np.random.SeedSequence(entropy % 2**64, spawn_key=key).generate_state(1, np.uint64)[0])

    def abort_request(self, request_ids: str | list[str]) -> None:
        """Ends requests at once and frees their pages; ids that are not (or no longer) there are ignored."""
        wanted = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        if not wanted or os.getpid() != self.pid:  # a forked copy of the process has nothing to end
            return
        if self.turns.mine and self.stepping:  # a garbage collection in the middle of a step has found a stream
            self.to_abort += wanted
            return
        with self.turns:
            self._abort(wanted)

    def _abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            request = self.processor.requests.pop(request_id, None)
            if request is not None:
                self._end(request, "abort")

    def _end(self, request: Request, reason: str, message: str | None = None) -> None:
        """Ends what is unfinished of a request."""
        for completion in request.completions:
            if completion.seq.finish_reason is None:
                self.scheduler.finish(completion.seq, reason, message)

    def has_unfinished_requests(self) -> bool:
        return bool(self.processor.requests)

    def get_num_unfinished_requests(self) -> int:
        return len(self.processor.requests)

    # -- running -----------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Runs one step and returns what it, or with overlap the step before, brought.

        Outputs of requests that have a queue of their own go there instead. If it raises, or is interrupted, all requests
        are dropped and the engine starts afresh with an empty cache.
        """
        with self.turn():
            self.run_step()
            outputs, self.undelivered = self.undelivered, []
        return outputs

    def run_step(self) -> None:
        """Like `step`, and leaves outputs of requests without a queue to the next call of `step`."""
        with self.turn():
            aborted, self.to_abort = self.to_abort, []
            self._abort(aborted)
            self.stepping = True
            try:
                produced = self._step()
            except BaseException:
                self.reset()
                raise
            finally:
                self.stepping = False
            for request, output in produced:
                (self.undelivered if request.queue is None else request.queue).append(output)

    def _step(self) -> list[tuple[Request, RequestOutput]]:
        outputs = []
        if self.in_flight and self.scheduler.needs_known_tokens():
            outputs = self._collect()
        launched = self._launch()
        outputs += self._end_failed()
        if self.in_flight:
            outputs += self._collect()
        self.in_flight = launched
        if launched and not self.overlap:
            outputs += self._collect()
        if not self.scheduler.unfinished:
            self.in_flight = None  # it holds surplus tokens only
        return outputs

    def _launch(self) -> tuple[Step, Batch, list[tuple[Sequence, int, int]], Any] | None:
        scheduler = self.scheduler
        step = scheduler.schedule()
        if step is None:
            return None
        if self.log_stats:
            self._note_first_schedule(step)
        batch, failures = build_batch(scheduler.table, step, scheduler.block_size, self.vocab_size)
        scheduler.failures += [(scheduler.table.seqs[row], err) for row, err in failures]
        asked = add_prompt_logprobs(batch, scheduler.table, step)
        return step, batch, asked, self.executor.launch(batch)

    def _collect(self) -> list[tuple[Request, RequestOutput]]:
        assert self.in_flight is not None
        (step, batch, asked, launch), self.in_flight = self.in_flight, None
        result = launch.collect()
        news = self.scheduler.update(step, result.tokens)
        outputs = self.processor.process(news, batch, asked, result)
        return outputs + self._end_failed()

    def _end_failed(self) -> list[tuple[Request, RequestOutput]]:
        """Ends the requests in whose own part of a step something was raised; the others go on."""
        failures, self.scheduler.failures = self.scheduler.failures, []
        outputs = []
        for seq, err in failures:
            request = seq.owner.request
            if self.processor.requests.pop(request.request_id, None) is not None:
                message = f"{type(err).__name__}: {err}"
                logger.warning("request %s ends with an error: %s", request.request_id, message)
                self._end(request, "error", message)
                outputs.append((request, self.processor.error_output(request, message)))
        return outputs

    def _note_first_schedule(self, step: Step) -> None:
        for row in step.rows[step.starts == self.scheduler.table.num_cached[step.rows]]:
            metrics = self.scheduler.table.seqs[row].owner.request.metrics
            metrics.first_scheduled_time = metrics.first_scheduled_time or time.monotonic()

    # -- for clients -------------------------------------------------------------------------------------------------

    def collective_rpc(
        self, method: str | Callable[..., Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> list[Any]:
        """Calls `method(worker, ...)`, or the method of that name of the worker's model runner, on each rank."""
        with self.turn():
            return self.executor.collective_rpc(method, args, kwargs or {})

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    def set_tokenizer(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.processor.detokenizer = Detokenizer(tokenizer)

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes; running requests go on."""
        with self.turn():
            self.scheduler.reset_prefix_cache()
        return True


def check_process(pid: int) -> None:
    if os.getpid() != pid:
        raise RuntimeError(
            f"process {os.getpid()} was forked from process {pid}, in which an engine was made, and the engine's threads "
            "do not exist here: make the engine in the process that uses it, started with multiprocessing's 'spawn'"
        )


def check_candidates(
    params: SamplingParams, vocab_size: int, bad_words: tuple[tuple[int, ...], ...], ends: tuple[int, ...]
) -> None:
    """Raises ValidationError where the request's own bans leave no token to sample."""
    banned = {word[0] for word in bad_words if len(word) == 1} | set(ends)
    banned |= {token for token, bias in (params.logit_bias or {}).items() if bias == -np.inf}
    if params.allowed_token_ids is None:
        left = vocab_size - len(banned)
    else:
        left = len(set(params.allowed_token_ids) - banned)
    if not left:
        names = ("allowed_token_ids", "bad_words", "logit_bias", "min_tokens")
        given = ", ".join(f"{name}={str(value)[:60]}" for name in names if (value := getattr(params, name)))
        raise ValidationError(
            f"{given}: together they leave no token that may be sampled; at least one must stay allowed"
        )
