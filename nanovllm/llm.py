"""vLLM's offline API over an `LLMEngine`: prompts of any form in, `RequestOutput`s out."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import fields
from typing import Any

from nanovllm.beam_search import beam_search
from nanovllm.chat import render
from nanovllm.config import EngineArgs, one_of, positive
from nanovllm.engine import control
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import ValidationError
from nanovllm.inputs import Tokenization
from nanovllm.messages import as_conversations
from nanovllm.outputs import BeamSearchOutput, RequestOutput
from nanovllm.progress import Progress, ProgressBar, progress
from nanovllm.prompts import as_prompts, pair
from nanovllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

NO_WEIGHT_TRANSFER = "weight transfer is not supported; load_weights of apply_model's model takes (name, tensor) pairs"


def refused(reason: str) -> Callable[..., Any]:
    """A method of vLLM's LLM that this engine lacks; calling it raises ValueError."""

    def method(self: LLM, *args: Any, **kwargs: Any) -> Any:
        raise ValidationError(reason)

    return method


class LLM:
    """A model ready to generate: `model` is a folder, a .gguf file or a Hugging Face hub name; see `EngineArgs` for the rest."""

    def __init__(self, model: str, **kwargs: Any) -> None:
        self.llm_engine = LLMEngine(EngineArgs(model, **kwargs))
        self._request_ids = map(str, itertools.count())  # they count on across calls

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLM:
        return cls(**{field.name: getattr(engine_args, field.name) for field in fields(engine_args)})

    # -- generating --------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Any = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: Progress = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
        *,
        prompt_token_ids: Any = None,
    ) -> list[RequestOutput]:
        """Completes every prompt and returns the outputs in the order of the prompts.

        A prompt is text, a list of token ids, or a dict with "prompt" or "prompt_token_ids"; `prompts` is one of them or
        a list. `sampling_params` is for all, or one each; None is what the model's generation_config.json says.
        `use_tqdm` may be a callable that is used like tqdm. `tokenization_kwargs` are the fields of
        `nanovllm.inputs.Tokenization`. Raises ValueError or TypeError for what is refused; then nothing was run.
        """
        refuse_options(lora_request, priority, mm_processor_kwargs)
        inputs = as_prompts(prompts, prompt_token_ids)
        if tokenization_kwargs:
            inputs = self._tokenized(inputs, Tokenization.of(tokenization_kwargs))
        batch = pair(inputs, sampling_params, self.get_default_sampling_params)
        outputs: dict[str, RequestOutput] = {}
        with self.llm_engine.turn():
            alone = not self.llm_engine.has_unfinished_requests()
            stream = Stream(self, [(p, final_only(params)) for p, params in batch], use_tqdm)
            if alone:
                self.llm_engine.scheduler.longest_first()
        with closing(stream), ProgressBar(len(batch), use_tqdm) as bar:
            for output in stream:
                outputs[output.request_id] = output
                bar.add(output)
        return [outputs[request_id] for request_id in stream.request_ids]

    def stream(self, prompts: Any, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None) -> Stream:
        """Like `generate`, but yields a `RequestOutput` whenever a request has something new, requests interleaved.

        `output_kind` says whether an output holds all text so far (CUMULATIVE), the new text (DELTA), or comes once
        (FINAL_ONLY). Leaving the iterator early, or closing it, aborts what is left.
        """
        return Stream(self, pair(as_prompts(prompts, None), sampling_params, self.get_default_sampling_params))

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: Progress = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation (a list of {"role", "content"} messages) or a list of them, by the model's template.

        `chat_template_kwargs` reach the template, and replace the arguments of the same name.
        """
        refuse_options(lora_request, priority, mm_processor_kwargs)
        if self.llm_engine.tokenizer is None:
            raise ValidationError("chat needs a tokenizer, and skip_tokenizer_init=True was given")
        texts = render(
            self.llm_engine.tokenizer,
            as_conversations(messages),
            chat_template=chat_template or self.llm_engine.args.chat_template,
            content_format=chat_template_content_format,
            arguments={
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": continue_final_message,
                "tools": tools,
            },
            chat_template_kwargs=chat_template_kwargs,
        )
        # The template has written BOS and its like already.
        how = Tokenization.of(tokenization_kwargs, add_special_tokens=False)
        return self.generate(self._tokenized(texts, how), sampling_params, use_tqdm)

    def beam_search(
        self,
        prompts: Any,
        params: BeamSearchParams,
        lora_request: None = None,
        use_tqdm: Progress = False,
        concurrency_limit: int | None = None,
        priority: int | Sequence[int] | None = None,
    ) -> list[BeamSearchOutput]:
        """The `beam_width` best continuations of each prompt, best first; see `nanovllm.beam_search`.

        `concurrency_limit` changes nothing: the scheduler runs what fits, and lets the rest wait.
        """
        refuse_options(lora_request, priority)
        positive("concurrency_limit", concurrency_limit, optional=True)
        return beam_search(self, as_prompts(prompts, None), params, use_tqdm)

    def _tokenized(self, prompts: Sequence[Any], how: Tokenization) -> list[dict[str, Any]]:
        """The prompts as token ids, which keep their text to be echoed."""
        with self.llm_engine.turn():
            pairs = [self.llm_engine.tokenize(prompt, how) for prompt in prompts]
        return [{"prompt": text, "prompt_token_ids": token_ids} for text, token_ids in pairs]

    encode = embed = classify = score = reward = refused("encode, embed, classify and score need a pooling model")
    enqueue = enqueue_chat = wait_for_completion = refused(
        "enqueue and wait_for_completion have no queue here; use LLM.stream, or LLMEngine.add_request and step"
    )

    # -- the engine's state ------------------------------------------------------------------------------------------

    def get_tokenizer(self) -> Any:
        """The live Hugging Face tokenizer, or None with skip_tokenizer_init."""
        return self.llm_engine.tokenizer

    def set_tokenizer(self, tokenizer: Any) -> None:
        """Uses another tokenizer from now on."""
        self.llm_engine.set_tokenizer(tokenizer)

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends."""
        return SamplingParams.from_optional(**control.default_sampling(self.llm_engine))

    @property
    def model_config(self) -> Any:
        """What clients of vLLM read of the model, such as max_model_len and hf_config."""
        return self.llm_engine.model_config

    def get_world_size(self, include_dp: bool = True) -> int:
        """The number of ranks. Data parallelism adds none."""
        return self.llm_engine.args.tensor_parallel_size

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forgets all cached prefixes: needed after new weights. Running requests go on.

        `reset_connector` changes nothing, because no KV cache lies outside the engine.
        """
        if reset_running_requests and self.llm_engine.has_unfinished_requests():
            raise ValidationError("reset_running_requests=True is not supported while requests are unfinished")
        return self.llm_engine.reset_prefix_cache()

    def reset_mm_cache(self) -> None:
        """Does nothing, because no media are cached."""

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Frees the KV cache and moves the weights to the host's memory (level 1) or drops them (level 2).

        `mode` changes nothing, because it is about unfinished requests, and `sleep` raises ValueError while there are any.
        """
        one_of("mode", mode, ("abort", "wait", "keep"))
        control.sleep(self.llm_engine, level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Undoes `sleep`: all, or of "weights" and "kv_cache" what `tags` name. Dropped weights are loaded again."""
        control.wake_up(self.llm_engine, tags)

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Calls a method of each rank's worker, by name or as a function of the worker; one result a rank."""
        return self.llm_engine.collective_rpc(method, args, kwargs or {})

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        """`func(model)` on each rank."""
        return self.collective_rpc(control.apply_to_model, args=(func,))

    def get_metrics(self) -> list[control.Metric]:
        """Counters and gauges of the engine since it was made."""
        return control.metrics(self.llm_engine)

    start_profile = stop_profile = refused("this engine has no profiler of its own; use torch.profiler around generate")
    release_kv_cache_memory = refused("release_kv_cache_memory is not supported; sleep(level=1) frees the KV cache")
    init_weight_transfer_engine = shutdown_weight_transfer_engine = refused(NO_WEIGHT_TRANSFER)
    start_weight_update = start_draft_weight_update = update_weights = finish_weight_update = refused(
        NO_WEIGHT_TRANSFER
    )
    update_weight_version = get_weight_version = refused(NO_WEIGHT_TRANSFER)


class Stream:
    """Iterator over the outputs of some requests. Invariant: once it ends, for whatever reason, none of them is left."""

    def __init__(
        self,
        llm: LLM,
        requests: list[tuple[Any, SamplingParams]],
        use_tqdm: Progress = False,
        max_logprobs: int | None = None,
    ) -> None:
        self._engine = engine = llm.llm_engine
        self.request_ids: list[str] = []
        self._open: set[str] = set()
        self._queue: deque[RequestOutput] = deque()
        try:
            for prompt, params in progress(requests, use_tqdm, "Adding requests"):
                with engine.turn():
                    request_id = next(i for i in llm._request_ids if i not in engine.processor.requests)
                    self._open.add(request_id)  # before it is added: an interrupt may come any time
                    engine.add_request(request_id, prompt, params, max_logprobs, self._queue)
                self.request_ids.append(request_id)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> RequestOutput:
        try:
            while self._open:
                if self._queue:
                    output = self._queue.popleft()
                    if output.finished:
                        self._open.remove(output.request_id)
                    return output
                with self._engine.turn():
                    # Another thread's step may have brought something while this one waited for its turn.
                    if not self._queue:
                        self._check_none_lost()
                        self._engine.run_step()
        except BaseException:
            self.close()
            raise
        raise StopIteration

    def _check_none_lost(self) -> None:
        lost = self._open - self._engine.processor.requests.keys()
        if lost:
            raise RuntimeError(f"requests {', '.join(sorted(lost))} were aborted, or dropped by a failed step")

    def close(self) -> None:
        """Aborts what is unfinished and frees its pages."""
        self._engine.abort_request(list(self._open))
        self._open.clear()

    def __del__(self) -> None:
        self.close()


def refuse_options(lora_request: Any, priority: Any, mm_processor_kwargs: Any = None) -> None:
    """Raises ValueError unless each of these options of a request is neutral."""
    if any(lora_request) if isinstance(lora_request, (list, tuple)) else lora_request is not None:
        raise ValidationError("lora_request is not supported; accepted is None (merge the adapter into the weights)")
    if any(priority) if isinstance(priority, Iterable) else priority:
        raise ValidationError(f"priority={priority!r} is not supported; accepted is None: first come, first served")
    if mm_processor_kwargs:
        raise ValidationError(
            f"mm_processor_kwargs={mm_processor_kwargs!r} is not supported: the model takes text only"
        )


def final_only(params: SamplingParams) -> SamplingParams:
    """`generate` shows nothing on the way, so nothing need be made on the way."""
    if isinstance(params, SamplingParams) and params.output_kind is not RequestOutputKind.FINAL_ONLY:
        params = params.clone()
        params.output_kind = RequestOutputKind.FINAL_ONLY
    return params
