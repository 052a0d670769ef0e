"""Beam search by one-token requests with logprobs. It uses the engine as any client does.

Each round extends every beam by one token. Prefix caching makes a round cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field

from nanovllm.engine.input_processor import cache_salt_of
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.lora.request import LoRARequest
from nanovllm.outputs import BeamSearchOutput, BeamSearchSequence, Logprob
from nanovllm.progress import Progress, progress
from nanovllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from nanovllm.stream import Stream


def beam_search(
    engine: LLMEngine,
    prompts: Sequence[object],
    params: BeamSearchParams,
    use_tqdm: Progress,
    lora_requests: Sequence[LoRARequest | None],
) -> list[BeamSearchOutput]:
    """The `beam_width` sequences of highest score for each prompt, best first.

    score = cumulative logprob / generated tokens ** length_penalty. EOS ends a beam and
    does not count as generated. `temperature` has no effect on the model's logprobs.
    Raises TypeError or ValueError for a refused value.
    """
    if not isinstance(params, BeamSearchParams):
        raise TypeError(f"params must be BeamSearchParams, got {type(params).__name__}")
    params.verify()
    eos_token_ids = frozenset() if params.ignore_eos else engine.eos_token_ids
    searches = []
    for prompt, adapter in zip(prompts, lora_requests):
        tokens = engine.tokenize(prompt)[1].tolist()
        first = BeamSearchSequence(tokens, lora_request=adapter)
        salt = cache_salt_of(prompt)
        searches.append(Search(params, eos_token_ids, len(tokens), salt, [first]))
    for _ in progress(range(params.max_tokens), use_tqdm, "Beam search"):
        for search in searches:
            search.end_at_length(engine.max_model_len)
        beams = [(search, beam) for search in searches for beam in search.running]
        if not beams:
            break
        extended = [search.prompt(beam) for search, beam in beams]
        adapters = [beam.lora_request for _, beam in beams]
        candidates = iter(next_tokens(engine, extended, adapters, 2 * params.beam_width))
        for search in searches:
            search.extend([next(candidates) for _ in search.running])
    outputs = []
    for search in searches:
        best = search.best()
        for beam in best:
            if engine.tokenizer is not None:
                skip = params.skip_special_tokens
                beam.text = engine.tokenizer.decode(beam.tokens, skip_special_tokens=skip)
        outputs.append(BeamSearchOutput(best))
    return outputs


@dataclass
class Search:
    """The beams of one prompt. Invariant: all running beams have equally many tokens."""

    params: BeamSearchParams
    eos_token_ids: frozenset[int]
    prompt_len: int
    cache_salt: str | None
    running: list[BeamSearchSequence]
    finished: list[BeamSearchSequence] = field(default_factory=list)

    def prompt(self, beam: BeamSearchSequence) -> dict[str, object]:
        """The beam as a prompt."""
        return {"prompt_token_ids": beam.tokens, "cache_salt": self.cache_salt}

    def end_at_length(self, max_model_len: int) -> None:
        """Finishes the running beams if they have max_model_len tokens."""
        if self.running and len(self.running[0].tokens) >= max_model_len:
            self._end_running()

    def extend(self, candidates: Sequence[dict[int, Logprob]]) -> None:
        """Extends each running beam by its candidate tokens, and keeps the best beams."""
        extended = []
        for beam, logprobs in zip(self.running, candidates):
            for token in logprobs:
                child = self._child(beam, token, logprobs)
                if child.finish_reason:
                    self.finished.append(child)
                else:
                    extended.append(child)
        self.running = self._best(extended)

    def best(self) -> list[BeamSearchSequence]:
        """The best beams, finished by max_tokens at the latest."""
        self._end_running()
        return self._best(self.finished)

    def _end_running(self) -> None:
        for beam in self.running:
            beam.finish_reason = "length"
        self.finished += self.running
        self.running = []

    def _child(
        self, beam: BeamSearchSequence, token: int, logprobs: dict[int, Logprob]
    ) -> BeamSearchSequence:
        is_end = token in self.eos_token_ids
        tokens = list(beam.tokens)
        if not is_end or self.params.include_stop_str_in_output:
            tokens.append(token)
        return BeamSearchSequence(
            tokens,
            [*beam.logprobs, logprobs],
            beam.cum_logprob + logprobs[token].logprob,
            finish_reason="stop" if is_end else None,
            lora_request=beam.lora_request,
        )

    def _best(self, beams: list[BeamSearchSequence]) -> list[BeamSearchSequence]:
        return sorted(beams, key=self._score, reverse=True)[: self.params.beam_width]

    def _score(self, beam: BeamSearchSequence) -> float:
        generated = len(beam.tokens) - self.prompt_len
        if beam.finish_reason == "stop" and self.params.include_stop_str_in_output:
            generated -= 1  # EOS
        return beam.cum_logprob / max(generated, 1) ** self.params.length_penalty


def next_tokens(
    engine: LLMEngine,
    prompts: Sequence[object],
    lora_requests: Sequence[LoRARequest | None],
    k: int,
) -> list[dict[int, Logprob]]:
    """The k most likely next tokens of each prompt, with their logprobs."""
    params = SamplingParams(
        temperature=0,
        max_tokens=1,
        logprobs=min(k, engine.vocab_size),
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    requests = [(prompt, params) for prompt in prompts]
    found: dict[str, list[dict[int, Logprob]]] = {}
    with closing(Stream(engine, requests, max_logprobs=-1, lora_requests=lora_requests)) as stream:
        for output in stream:
            found[output.request_id] = output.outputs[0].logprobs or []
    return [found[request_id][0] for request_id in stream.request_ids]
