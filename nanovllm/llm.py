"""vLLM's offline API over an `LLMEngine`: prompts of any form in, `RequestOutput`s out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanovllm.beam_search import beam_search
from nanovllm.config import EngineArgs
from nanovllm.engine.llm_engine import LLMEngine, Metric
from nanovllm.errors import ValidationError
from nanovllm.outputs import BeamSearchOutput, RequestOutput
from nanovllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

Progress = bool | Callable[..., Any]


class LLM:
    """A model ready to generate: `model` is a folder, a .gguf file or a Hugging Face hub name; see `EngineArgs` for the rest."""

    def __init__(self, model: str, **kwargs: Any) -> None:
        self.llm_engine = LLMEngine(EngineArgs(model, **kwargs))
        self._num_requests = 0  # request ids count on across calls
        self._mail: dict[str, deque[RequestOutput]] = {}  # of requests that a call or a stream waits for

    # -- generating --------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Any = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: Progress = True,
        lora_request: None = None,
        priority: Sequence[int] | None = None,
        *,
        prompt_token_ids: Any = None,
    ) -> list[RequestOutput]:
        """Completes every prompt and returns the outputs in the order of the prompts.

        A prompt is text, a list of token ids, or a dict with "prompt" or "prompt_token_ids"; `prompts` is one of them or
        a list. `sampling_params` is for all, or one each; None is what the model's generation_config.json says.
        `use_tqdm` may be a callable that is used like tqdm. Raises ValueError or TypeError for what is refused; then
        nothing was run.
        """
        refuse_lora(lora_request)
        if priority is not None and any(priority):
            raise ValidationError(f"priority={priority!r} is not supported; accepted is None: first come, first served")
        batch = pair(as_prompts(prompts, prompt_token_ids), sampling_params, self.get_default_sampling_params)
        outputs: dict[str, RequestOutput] = {}
        stream = Stream(self, [(p, final_only(params)) for p, params in batch], use_tqdm)
        with ProgressBar(len(batch), use_tqdm) as bar:
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
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation (a list of {"role", "content"} messages) or a list of them, by the model's template."""
        if chat_template_content_format not in ("auto", "string"):
            raise ValidationError(
                f"chat_template_content_format={chat_template_content_format!r} is not supported; accepted: 'auto', 'string'"
            )
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        tokenizer = self._need_tokenizer("chat")
        template = chat_template or self.llm_engine.args.chat_template
        if template and "{" not in template and Path(template).is_file():
            template = Path(template).read_text()
        if template is None and tokenizer.chat_template is None:
            raise ValidationError("chat: this model's tokenizer has no chat template; pass chat_template=")
        prompts = []
        for conversation in conversations:
            text = tokenizer.apply_chat_template(
                conversation,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                tokenize=False,
                **(chat_template_kwargs or {}),
            )
            # The template has written BOS and its kin already.
            prompts.append({"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)})
        return self.generate(prompts, sampling_params, use_tqdm, lora_request)

    def beam_search(
        self, prompts: Any, params: BeamSearchParams, lora_request: None = None, use_tqdm: Progress = False
    ) -> list[BeamSearchOutput]:
        """The `beam_width` best continuations of each prompt, best first; see `nanovllm.beam_search`."""
        refuse_lora(lora_request)
        return beam_search(self, as_prompts(prompts, None), params, use_tqdm)

    # -- the engine's state ------------------------------------------------------------------------------------------

    def get_tokenizer(self) -> Any:
        """The live Hugging Face tokenizer, or None with skip_tokenizer_init."""
        return self.llm_engine.tokenizer

    def set_tokenizer(self, tokenizer: Any) -> None:
        """Uses another tokenizer from now on."""
        self.llm_engine.set_tokenizer(tokenizer)

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends."""
        return SamplingParams.from_optional(**self.llm_engine.default_sampling())

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes: needed after new weights. Running requests go on."""
        return self.llm_engine.reset_prefix_cache()

    def sleep(self, level: int = 1) -> None:
        """Frees the KV cache and moves the weights to the host's memory (level 1) or drops them (level 2)."""
        self.llm_engine.sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Undoes `sleep`: all, or of "weights" and "kv_cache" what `tags` name. Dropped weights are loaded again."""
        self.llm_engine.wake_up(tags)

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
        return self.llm_engine.apply_model(func)

    def get_metrics(self) -> list[Metric]:
        """Counters and gauges of the engine since it was made."""
        return self.llm_engine.get_metrics()

    def _need_tokenizer(self, what: str) -> Any:
        if self.llm_engine.tokenizer is None:
            raise ValidationError(f"{what} needs a tokenizer, and skip_tokenizer_init=True was given")
        return self.llm_engine.tokenizer


class Stream:
    """Iterator over the outputs of some requests. Invariant: once it ends, for whatever reason, none of them is left."""

    def __init__(
        self,
        llm: LLM,
        requests: list[tuple[Any, SamplingParams]],
        use_tqdm: Progress = False,
        max_logprobs: int | None = None,
    ) -> None:
        self._llm = llm
        self.request_ids: list[str] = []
        try:
            for prompt, params in progress(requests, use_tqdm, "Adding requests"):
                request_id = str(llm._num_requests)
                llm.llm_engine.add_request(request_id, prompt, params, max_logprobs)
                llm._num_requests += 1
                llm._mail[request_id] = deque()
                self.request_ids.append(request_id)
        except BaseException:
            self.close()
            raise
        self._open = dict.fromkeys(self.request_ids)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> RequestOutput:
        mail, engine = self._llm._mail, self._llm.llm_engine
        try:
            while self._open:
                for request_id in self._open:
                    if mail[request_id]:
                        output = mail[request_id].popleft()
                        if output.finished:
                            del self._open[request_id], mail[request_id]
                        return output
                for output in engine.step():
                    if output.request_id in mail:
                        mail[output.request_id].append(output)
        except BaseException:
            self.close()
            raise
        raise StopIteration

    def close(self) -> None:
        """Aborts what is unfinished and frees its pages."""
        left = [request_id for request_id in self.request_ids if request_id in self._llm._mail]
        self._llm.llm_engine.abort_request(left)
        for request_id in left:
            del self._llm._mail[request_id]
        self._open = {}

    def __del__(self) -> None:
        self.close()


class ProgressBar:
    """tqdm with input and output tokens per second, or whatever callable stands in for it."""

    def __init__(self, total: int, use_tqdm: Progress) -> None:
        self.bar, self.start, self.tokens_in, self.tokens_out = None, time.perf_counter(), 0, 0
        if use_tqdm:
            self.bar = tqdm_like(use_tqdm)(
                total=total, desc="Processed prompts", dynamic_ncols=True, postfix=self._speed()
            )

    def _speed(self) -> str:
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        per_second = (self.tokens_in / elapsed, self.tokens_out / elapsed)
        return "est. speed input: {:.2f} toks/s, output: {:.2f} toks/s".format(*per_second)

    def add(self, output: RequestOutput) -> None:
        self.tokens_in += len(output.prompt_token_ids)
        self.tokens_out += sum(len(completion.token_ids) for completion in output.outputs)
        if self.bar is not None:
            self.bar.postfix = self._speed()
            self.bar.update(1)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def tqdm_like(use_tqdm: Progress) -> Callable[..., Any]:
    if callable(use_tqdm):
        return use_tqdm
    from tqdm.auto import tqdm

    return tqdm


def progress(items: Iterable[Any], use_tqdm: Progress, desc: str) -> Iterable[Any]:
    return tqdm_like(use_tqdm)(items, desc=desc) if use_tqdm else items


def refuse_lora(lora_request: Any) -> None:
    if lora_request is not None and lora_request != []:
        raise ValidationError("lora_request is not supported; accepted is None (merge the adapter into the weights)")


def final_only(params: SamplingParams) -> SamplingParams:
    """`generate` shows nothing on the way, so nothing need be made on the way."""
    if isinstance(params, SamplingParams) and params.output_kind is not RequestOutputKind.FINAL_ONLY:
        params = params.clone()
        params.output_kind = RequestOutputKind.FINAL_ONLY
    return params


def as_prompts(prompts: Any, prompt_token_ids: Any) -> list[Any]:
    """One prompt or many, and vLLM's former `prompt_token_ids=`, as a list of prompts."""
    texts = None if prompts is None else as_list(prompts)
    if prompt_token_ids is None:
        if texts is None:
            raise TypeError("prompts is missing: give a str, a list of token ids, a dict, or a list of these")
        return texts
    ids = as_list(prompt_token_ids)
    if texts is None:
        return ids
    if len(texts) != len(ids):
        raise ValidationError(f"prompts has {len(texts)} items and prompt_token_ids {len(ids)}; they must be as many")
    return [{"prompt": text, "prompt_token_ids": tokens} for text, tokens in zip(texts, ids)]


def as_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise TypeError(f"prompts must be a str, a list of token ids, a dict or a list of these; got {prompts!r}")
    prompts = list(prompts)
    # A flat list of ids is one prompt; numpy's integers are ids too.
    return [prompts] if prompts and hasattr(prompts[0], "__index__") else prompts


def pair(prompts: list[Any], params: Any, default: Callable[[], SamplingParams]) -> list[tuple[Any, SamplingParams]]:
    """Each prompt with its sampling parameters."""
    if params is None:
        params = default()
    if isinstance(params, SamplingParams):
        return [(prompt, params) for prompt in prompts]
    if not isinstance(params, Sequence):
        raise TypeError(f"sampling_params must be SamplingParams or a list of them, got {type(params).__name__}")
    if len(params) != len(prompts):
        raise ValidationError(
            f"sampling_params has {len(params)} items for {len(prompts)} prompts; they must be as many"
        )
    return list(zip(prompts, params))
