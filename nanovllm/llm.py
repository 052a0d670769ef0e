"""vLLM's offline API: prompts of any form -> `RequestOutput`s. Knows no scheduling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeVar, cast

from nanovllm import control
from nanovllm.beam_search import beam_search
from nanovllm.chat import render
from nanovllm.compat import REFUSED_METHODS, refused
from nanovllm.config import EngineArgs, one_of, positive
from nanovllm.engine.input_processor import as_priorities, as_prompts, pair
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.stats import Metric
from nanovllm.errors import ValidationError
from nanovllm.inputs import Tokenization
from nanovllm.lora.request import LoRARequest, as_lora_requests
from nanovllm.messages import as_conversations
from nanovllm.outputs import BeamSearchOutput, RequestOutput
from nanovllm.progress import Progress, ProgressBar
from nanovllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from nanovllm.stream import Stream

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from nanovllm.models.base import LanguageModel

Result = TypeVar("Result")
AdapterChoice = LoRARequest | Sequence[LoRARequest | None] | None
NO_OPTIONS = ("self", "model", "others")  # locals of LLM.__init__


class LLM:
    """A loaded model that generates."""

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        download_dir: str | None = None,
        hf_token: str | bool | None = None,
        hf_overrides: dict[str, object] | Callable[[PretrainedConfig], object] | None = None,
        generation_config: str = "auto",
        override_generation_config: dict[str, object] | None = None,
        chat_template: str | None = None,
        load_format: str = "auto",
        model_impl: str = "auto",
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        attention_backend: str | None = None,
        seed: int = 0,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        block_size: int | None = None,
        kv_cache_dtype: str = "auto",
        gpu_memory_utilization: float = 0.92,
        num_gpu_blocks_override: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        async_scheduling: bool | None = None,
        enforce_eager: bool = False,
        compilation_config: dict[str, object] | int | str | None = None,
        max_logprobs: int = 20,
        logprobs_mode: str = "raw_logprobs",
        logits_processors: Sequence[object] | None = None,
        scheduling_policy: str = "fcfs",
        disable_log_stats: bool = True,
        enable_sleep_mode: bool = False,
        enable_lora: bool = False,
        max_loras: int = 1,
        max_lora_rank: int = 16,
        max_cpu_loras: int | None = None,
        lora_dtype: str | torch.dtype = "auto",
        tensor_parallel_size: int = 1,
        data_parallel_size: int = 1,
        distributed_executor_backend: str | None = None,
        step_timeout: float | None = None,
        trace: str | None = None,
        **others: object,
    ) -> None:
        """model: a folder in Hugging Face's layout, a .gguf file, or a name on their hub.

        `EngineArgs` describes each argument. None stands for the engine's own choice.
        others: further arguments of vLLM, without effect or neutral (compat.py).
        Raises TypeError for an unknown name and ValueError for a refused value.
        """
        # The arguments, because no other local exists yet.
        given = {name: value for name, value in locals().items() if name not in NO_OPTIONS}
        self.llm_engine = make_engine(EngineArgs(model, **given, **others))
        self._enqueued: list[Stream] = []  # what `wait_for_completion` runs

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLM:
        """`LLM(...)` with the arguments in `engine_args`."""
        return cls(**vars(engine_args))

    # -- generating --------------------------------------------------------------------------------

    def generate(
        self,
        prompts: object = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: Progress = True,
        lora_request: AdapterChoice = None,
        priority: int | Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, object] | None = None,
        mm_processor_kwargs: Mapping[str, object] | None = None,
        *,
        prompt_token_ids: object = None,
    ) -> list[RequestOutput]:
        """Completes every prompt. Returns one output for each prompt, in the same order.

        prompts: one prompt or a list. A prompt is text, a list of token ids, or a dict
        with "prompt" or "prompt_token_ids".
        sampling_params: one for all prompts, or a list with one for each prompt. None
        stands for `get_default_sampling_params()`.
        use_tqdm: whether to show a progress bar, or a callable that replaces tqdm.
        priority: one for all prompts, or a list with one for each. Lower values run
        first. Other values than 0 need LLM(scheduling_policy="priority").
        lora_request: one adapter for all prompts, or a list with one or None for each.
        tokenization_kwargs: fields of `nanovllm.inputs.Tokenization`.

        Raises ValueError or TypeError for a refused value. No request runs then.
        """
        refuse_options(None, mm_processor_kwargs)
        inputs = as_prompts(prompts, prompt_token_ids)
        if tokenization_kwargs:
            inputs = self._tokenized(inputs, Tokenization.of(tokenization_kwargs))
        stream = self._add(inputs, sampling_params, use_tqdm, priority, lora_request)
        return run([stream], use_tqdm)

    def _add(
        self,
        prompts: list[object],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: Progress,
        priority: int | Sequence[int] | None,
        lora_request: AdapterChoice,
    ) -> Stream:
        """Adds the requests of one call, which arrive together."""
        adapters = as_lora_requests(lora_request, len(prompts)) if lora_request else []
        engine = self.llm_engine
        requests = pair(prompts, sampling_params, self.get_default_sampling_params)
        priorities = as_priorities(priority, len(requests), engine.args.scheduling_policy)
        with engine.exclusive():
            # Only requests that arrived together are sorted.
            is_alone = not engine.get_num_unfinished_requests()
            stream = Stream(
                engine,
                requests,
                use_tqdm,
                output_kind=RequestOutputKind.FINAL_ONLY,
                priorities=priorities,
                lora_requests=adapters,
            )
            if is_alone:
                engine.sort_waiting_longest_first()
        return stream

    def enqueue(
        self,
        prompts: object,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora_request: AdapterChoice = None,
        priority: int | Sequence[int] | None = None,
        use_tqdm: Progress = True,
        tokenization_kwargs: Mapping[str, object] | None = None,
        mm_processor_kwargs: Mapping[str, object] | None = None,
    ) -> list[str]:
        """Adds requests as `generate` does, and runs none. Returns their request ids."""
        refuse_options(None, mm_processor_kwargs)
        inputs = as_prompts(prompts, None)
        if tokenization_kwargs:
            inputs = self._tokenized(inputs, Tokenization.of(tokenization_kwargs))
        stream = self._add(inputs, sampling_params, use_tqdm, priority, lora_request)
        with self.llm_engine.exclusive():
            self._enqueued.append(stream)
        return list(stream.request_ids)

    def wait_for_completion(
        self,
        output_type: type[RequestOutput] | tuple[type[RequestOutput], ...] | None = None,
        *,
        use_tqdm: Progress = True,
    ) -> list[RequestOutput]:
        """Runs all enqueued requests. Returns their outputs in the order of the request ids.

        output_type: RequestOutput or None, because requests give no other outputs.
        """
        types = output_type if isinstance(output_type, tuple) else (output_type or RequestOutput,)
        if RequestOutput not in types:
            raise ValidationError(
                f"output_type={output_type!r} is not supported; accepted are RequestOutput and None"
            )
        with self.llm_engine.exclusive():
            streams = self._enqueued
            self._enqueued = []
        return run(streams, use_tqdm)

    def stream(
        self,
        prompts: object,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora_request: AdapterChoice = None,
    ) -> Stream:
        """Yields a `RequestOutput` whenever a request has new tokens.

        `output_kind` of the params says what an output holds: all text so far
        (CUMULATIVE), the new text (DELTA), or the final text only (FINAL_ONLY). Closing
        the iterator aborts the unfinished requests.
        """
        inputs = as_prompts(prompts, None)
        requests = pair(inputs, sampling_params, self.get_default_sampling_params)
        adapters = as_lora_requests(lora_request, len(inputs))
        return Stream(self.llm_engine, requests, lora_requests=adapters)

    def chat(
        self,
        messages: Iterable[object],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: Progress = True,
        lora_request: AdapterChoice = None,
        priority: int | Sequence[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
        tokenization_kwargs: Mapping[str, object] | None = None,
        mm_processor_kwargs: Mapping[str, object] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or a list of them.

        messages: a conversation is a list of messages, which are dicts with "role" and
        "content". The model's chat template turns the messages into a prompt.
        chat_template_kwargs: variables of the template. They replace equal names.
        Raises ValueError or TypeError for a refused value. No request runs then.
        """
        refuse_options(None, mm_processor_kwargs)
        prompts = self._chat_prompts(
            messages,
            chat_template,
            chat_template_content_format,
            {
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": continue_final_message,
                "tools": tools,
            },
            chat_template_kwargs,
            tokenization_kwargs,
        )
        return self.generate(prompts, sampling_params, use_tqdm, lora_request, priority=priority)

    def enqueue_chat(
        self,
        messages: Iterable[object],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: Progress = True,
        lora_request: AdapterChoice = None,
        priority: int | Sequence[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
        tokenization_kwargs: Mapping[str, object] | None = None,
        mm_processor_kwargs: Mapping[str, object] | None = None,
    ) -> list[str]:
        """Adds requests as `chat` does, and runs none. Returns their request ids."""
        refuse_options(None, mm_processor_kwargs)
        prompts = self._chat_prompts(
            messages,
            chat_template,
            chat_template_content_format,
            {
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": continue_final_message,
                "tools": tools,
            },
            chat_template_kwargs,
            tokenization_kwargs,
        )
        return self.enqueue(
            prompts,
            sampling_params,
            lora_request=lora_request,
            priority=priority,
            use_tqdm=use_tqdm,
        )

    def _chat_prompts(
        self,
        messages: Iterable[object],
        chat_template: str | None,
        content_format: str,
        arguments: dict[str, object],
        chat_template_kwargs: Mapping[str, object] | None,
        tokenization_kwargs: Mapping[str, object] | None,
    ) -> list[object]:
        """The conversations as prompts."""
        if self.llm_engine.tokenizer is None:
            raise ValidationError("chat needs a tokenizer; skip_tokenizer_init=True leaves none")
        texts = render(
            self.llm_engine.tokenizer,
            as_conversations(messages),
            chat_template=chat_template or self.llm_engine.args.chat_template,
            content_format=content_format,
            arguments=arguments,
            chat_template_kwargs=chat_template_kwargs,
        )
        # The template writes the special tokens.
        how = Tokenization.of(tokenization_kwargs, add_special_tokens=False)
        return self._tokenized(texts, how)

    def beam_search(
        self,
        prompts: object,
        params: BeamSearchParams,
        lora_request: AdapterChoice = None,
        use_tqdm: Progress = False,
        concurrency_limit: int | None = None,
        priority: int | Sequence[int] | None = None,
    ) -> list[BeamSearchOutput]:
        """The `beam_width` best continuations of each prompt, best first.

        concurrency_limit: no effect, because the scheduler limits the running requests.
        Raises ValueError or TypeError for a refused value.
        """
        refuse_options(priority)
        positive("concurrency_limit", concurrency_limit, optional=True)
        mode = self.llm_engine.args.logprobs_mode
        if mode.endswith("logits"):
            raise ValidationError(
                f"beam_search needs logprobs; logprobs_mode={mode!r} gives logits, and accepted "
                "are 'raw_logprobs' and 'processed_logprobs'"
            )
        inputs = as_prompts(prompts, None)
        adapters = as_lora_requests(lora_request, len(inputs))
        return beam_search(self.llm_engine, inputs, params, use_tqdm, adapters)

    def _tokenized(self, prompts: Sequence[object], how: Tokenization) -> list[object]:
        with self.llm_engine.exclusive():
            return [self.llm_engine.tokenized(prompt, how) for prompt in prompts]

    # -- the engine's state ------------------------------------------------------------------------

    def get_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The engine's Hugging Face tokenizer. None with skip_tokenizer_init."""
        return self.llm_engine.tokenizer

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Replaces the tokenizer for new requests."""
        self.llm_engine.set_tokenizer(tokenizer)

    def get_default_sampling_params(self) -> SamplingParams:
        """The defaults of the model's generation_config.json."""
        return control.default_sampling_params(self.llm_engine)

    @property
    def model_config(self) -> SimpleNamespace:
        """Facts that clients of vLLM read, such as max_model_len and hf_config."""
        return self.llm_engine.model_config

    def get_world_size(self, include_dp: bool = True) -> int:
        """The number of ranks.

        include_dp: whether to count the ranks of all engines of data parallelism, or of one.
        """
        args = self.llm_engine.args
        return args.tensor_parallel_size * (args.data_parallel_size if include_dp else 1)

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Unregisters all cached prefixes. New weights need this. Running requests go on.

        reset_connector: no effect, because all KV cache is inside the engine.
        Raises ValueError for reset_running_requests while requests are unfinished.
        """
        return self.llm_engine.reset_prefix_cache(reset_running_requests)

    def reset_mm_cache(self) -> None:
        """No effect, because the engine takes text only."""

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Frees the KV cache and the weights' device memory.

        level: 1 moves the weights to host memory, 2 drops them.
        mode: no effect, because vLLM's modes treat unfinished requests.
        Raises ValueError while requests are unfinished.
        """
        one_of("mode", mode, ("abort", "wait", "keep"))
        control.sleep(self.llm_engine, level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Undoes `sleep`. Dropped weights are loaded from the checkpoint.

        tags: "weights", "kv_cache" or both. None stands for both.
        """
        control.wake_up(self.llm_engine, tags)

    def collective_rpc(
        self,
        method: str | Callable[..., object],
        timeout: float | None = None,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> list[object]:
        """Calls `method(worker, ...)`, or the worker's method of that name, on each rank.

        Returns one result for each rank. timeout: no effect.
        """
        return self.llm_engine.collective_rpc(method, timeout, args, dict(kwargs or {}))

    def apply_model(self, func: Callable[[LanguageModel], Result]) -> list[Result]:
        """Calls `func(model)` on each rank. Returns one result for each rank."""
        return cast(list[Result], self.collective_rpc(control.apply_to_model, args=(func,)))

    def get_metrics(self) -> list[Metric]:
        """Counters and gauges since the start of the engine."""
        return self.llm_engine.get_metrics()


for _name, _reason in REFUSED_METHODS.items():
    setattr(LLM, _name, refused(_name, _reason))


def run(streams: Sequence[Stream], use_tqdm: Progress) -> list[RequestOutput]:
    """The final outputs of the streams' requests, in the order of the requests."""
    outputs: dict[str, RequestOutput] = {}
    request_ids = [request_id for stream in streams for request_id in stream.request_ids]
    with ExitStack() as opened:
        for stream in streams:
            opened.enter_context(closing(stream))
        bar = opened.enter_context(ProgressBar(len(request_ids), use_tqdm))
        for output in chain.from_iterable(streams):
            outputs[output.request_id] = output
            bar.add(output)
    return [outputs[request_id] for request_id in request_ids]


def make_engine(args: EngineArgs) -> LLMEngine:
    """One engine in this process, or several behind one queue."""
    if args.trace is not None:
        from nanovllm.trace.engine import TracedEngine  # nothing of it runs without a trace

        return TracedEngine(args)
    if args.data_parallel_size == 1:
        return LLMEngine(args)
    from nanovllm.data_parallel import DataParallelEngine  # one engine needs nothing of it

    return DataParallelEngine(args)


def refuse_options(priority: object, mm_processor_kwargs: object = None) -> None:
    """Raises ValueError unless each option is None, 0, or a list of these."""
    priorities = priority if isinstance(priority, Iterable) else [priority]
    if any(priorities):
        raise ValidationError(
            f"priority={priority!r} is not supported in beam_search; accepted is None, because "
            "all beams of a round run together"
        )
    if mm_processor_kwargs:
        raise ValidationError(
            f"mm_processor_kwargs={mm_processor_kwargs!r} is not supported; accepted is None, "
            "because the model takes text only"
        )
