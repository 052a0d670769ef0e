"""vLLM's offline API over an `LLMEngine`: prompts of any form in, `RequestOutput`s out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nanovllm.config import EngineArgs
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams


class LLM:
    """A model ready to generate. `model` is a folder, a .gguf file or a Hugging Face hub name; see `EngineArgs` for the rest."""

    def __init__(self, model: str, **kwargs: Any) -> None:
        self.llm_engine = LLMEngine(EngineArgs.from_kwargs(model, kwargs))
        self.num_added = 0  # request ids count on across calls

    def generate(
        self,
        prompts: Any = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        priority: Sequence[int] | None = None,
        *,
        prompt_token_ids: Any = None,
    ) -> list[RequestOutput]:
        """Completes every prompt and returns the outputs in the order of the prompts.

        A prompt is text, a list of token ids, or a dict with "prompt" or "prompt_token_ids"; `prompts` is one or a list
        of them. `sampling_params` is for all, or one each; None means the model's generation_config.json.
        Raises ValueError or TypeError for a prompt or parameter that is refused, and then nothing has been run.
        """
        requests = self._pair(prompts, prompt_token_ids, sampling_params, lora_request, priority)
        requests = [(prompt, final_only(params)) for prompt, params in requests]
        ids = self._add(requests)
        return self._run(ids, use_tqdm)
