"""Requests in, outputs out: ties tokenizer, scheduler, model runner and output processor together, one `step` at a time.

With overlap (`async_scheduling`) a step is scheduled and launched before the tokens of the one before are known: the
host finishes step N - 1 and prepares step N + 1 while the device runs step N. The results are the same without.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
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
from nanovllm.errors import ValidationError
from nanovllm.outputs import RequestMetrics, RequestOutput
from nanovllm.runner.executor import make_executor
from nanovllm.runner.setup import Setup
from nanovllm.sampling_params import SamplingParams


class LLMEngine:
    """Invariant: every unfinished request is in `processor.requests`, and each of its unfinished sequences in the scheduler."""

    def __init__(self, args: EngineArgs) -> None:
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

    def add_request(
        self, request_id: str, prompt: Any, params: SamplingParams, max_logprobs: int | None = None
    ) -> None:
        """Checks a request and queues it. Raises TypeError or ValueError, and then nothing has changed.

        prompt: text, token ids, or a dict with "prompt" (text) or "prompt_token_ids".
        max_logprobs: instead of the engine's own limit.
        """
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
        text, tokens = self.tokenize(prompt)
        params = params.clone()
        params.verify()
        limit = self.args.max_logprobs if max_logprobs is None else max_logprobs
        params.verify_for_model(self.vocab_size, limit, self.tokenizer is not None)
        room = self.max_model_len - len(tokens)
        end = len(tokens) + min(params.max_tokens or room, room)
        stops = frozenset(params.stop_token_ids or ())
        bad_words = tuple(self._bad_word_ids(params.bad_words or []))
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
                ban_until_min_tokens=tuple(stops | self.eos_token_ids) if params.min_tokens else (),
                bad_words=bad_words,
                prompt_logprobs=params.prompt_logprobs if index == 0 else None,
                reads_cache=params.reads_prefix_cache or index > 0,
            )
            for index in range(params.n)
        ]
        metrics = RequestMetrics(arrival_time=time.monotonic()) if self.log_stats else None
        self.processor.add(Request(request_id, text, tokens.tolist(), params, metrics), seqs)
        for seq in seqs:
            self.scheduler.add(seq)

    def tokenize(self, prompt: Any) -> tuple[str | None, np.ndarray]:
        """A prompt of any form -> (text to echo, token ids as int32). Raises TypeError or ValueError for a bad one."""
        text, token_ids = prompt, None
        if isinstance(prompt, Mapping):
            text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            if text is None and token_ids is None:
                raise TypeError(f"prompt: a dict needs 'prompt' or 'prompt_token_ids', got the keys {list(prompt)}")
            if more := [key for key in prompt if key not in ("prompt", "prompt_token_ids") and prompt[key]]:
                raise ValidationError(f"prompt: {more} are not supported; accepted are 'prompt' and 'prompt_token_ids'")
        elif not isinstance(prompt, str):
            text, token_ids = None, prompt
        if token_ids is None:
            if not isinstance(text, str):
                raise TypeError(f"prompt: text must be a str, got {type(text).__name__}")
            if self.tokenizer is None:
                raise ValidationError("prompt: skip_tokenizer_init=True leaves token ids as the only form; got text")
            token_ids = self.tokenizer.encode(text)
        return text, self._checked(token_ids)

    def _checked(self, token_ids: Any) -> np.ndarray:
        """Token ids as int32, once they are known to be ids and to fit."""
        try:
            tokens = np.asarray(token_ids)
        except ValueError:
            tokens = np.empty(0, object)
        if tokens.ndim != 1 or (len(tokens) and tokens.dtype.kind not in "iu"):
            raise TypeError(f"prompt: token ids must be a flat list of int, got {str(token_ids)[:80]}")
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
        """Each word as it is tokenised at the start of a text, and after a space."""
        forms = [form for word in words for form in (word.lstrip(), " " + word.lstrip())]
        tokenizer: Any = self.tokenizer  # without one, bad words were refused
        return sorted({tuple(tokenizer.encode(form, add_special_tokens=False)) for form in forms} - {()})

    def _seed(self, seed: int | None, number: int, index: int) -> int:
        """64 bits for one sequence: of the request's seed if it has one, else of the engine's and the request's number."""
        # As spawn keys the two never coincide: one is longer than the other.
        entropy, key = (self.args.seed, (number, index)) if seed is None else (seed, (index,))
        return int(np.random.SeedSequence(entropy % 2**64, spawn_key=key).generate_state(1, np.uint64)[0])

    def abort_request(self, request_ids: str | list[str]) -> None:
        """Ends requests at once and frees their pages; ids that are not (or no longer) there are ignored."""
        for request_id in [request_ids] if isinstance(request_ids, str) else list(request_ids):
            request = self.processor.requests.pop(request_id, None)
            for completion in request.completions if request else ():
                if completion.seq.finish_reason is None:
                    self.scheduler.finish(completion.seq, "abort")

    def has_unfinished_requests(self) -> bool:
        return bool(self.processor.requests)

    def get_num_unfinished_requests(self) -> int:
        return len(self.processor.requests)

    # -- running -----------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Runs one step and returns what it, or with overlap the step before, brought.

        If it raises, or is interrupted, all requests are dropped and the engine starts afresh with an empty cache.
        """
        try:
            return self._step()
        except BaseException:
            self.reset()
            raise

    def _step(self) -> list[RequestOutput]:
        outputs = []
        if self.in_flight and self.scheduler.needs_known_tokens():
            outputs = self._collect()
        launched = self._launch()
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
        batch = build_batch(scheduler.table, step, scheduler.block_size, self.vocab_size)
        asked = add_prompt_logprobs(batch, scheduler.table, step)
        return step, batch, asked, self.executor.launch(batch)

    def _collect(self) -> list[RequestOutput]:
        assert self.in_flight is not None
        (step, batch, asked, launch), self.in_flight = self.in_flight, None
        result = launch.collect()
        news = self.scheduler.update(step, result.tokens)
        return self.processor.process(news, batch, asked, result)

    def _note_first_schedule(self, step: Step) -> None:
        for row in step.rows[step.starts == self.scheduler.table.num_cached[step.rows]]:
            metrics = self.scheduler.table.seqs[row].owner.request.metrics
            metrics.first_scheduled_time = metrics.first_scheduled_time or time.monotonic()

    # -- for clients -------------------------------------------------------------------------------------------------

    def collective_rpc(
        self, method: str | Callable[..., Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> list[Any]:
        """Calls `method(worker, ...)`, or the method of that name of the worker's model runner, on each rank."""
        return self.executor.collective_rpc(method, args, kwargs or {})

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    def set_tokenizer(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.processor.detokenizer = Detokenizer(tokenizer)

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes; running requests go on."""
        self.scheduler.reset_prefix_cache()
        return True
