"""Beam search on top of an engine: each round extends every beam by one token, and prefix caching keeps rounds cheap.

It uses the engine like any client does: one-token requests with logprobs.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

from nanovllm.outputs import BeamSearchOutput, BeamSearchSequence
from nanovllm.progress import Progress, progress
from nanovllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from nanovllm.llm import LLM


def beam_search(llm: LLM, prompts: list[Any], params: BeamSearchParams, use_tqdm: Progress) -> list[BeamSearchOutput]:
    """The `beam_width` sequences of highest score = cumulative logprob / generated tokens ** length_penalty.

    A beam ends at EOS (not counted as generated, and kept in `tokens` only with include_stop_str_in_output) or at
    max_tokens. Logprobs are the model's own, so `temperature` has no effect, as in vLLM.
    """
    if not isinstance(params, BeamSearchParams):
        raise TypeError(f"params must be BeamSearchParams, got {type(params).__name__}")
    params.verify()
    engine = llm.llm_engine
    width, eos = params.beam_width, frozenset() if params.ignore_eos else engine.eos_token_ids
    starts = [engine.tokenize(prompt)[1].tolist() for prompt in prompts]
    lengths = [len(tokens) for tokens in starts]
    beams = [[BeamSearchSequence(tokens)] for tokens in starts]
    ended: list[list[BeamSearchSequence]] = [[] for _ in starts]

    def score(beam: BeamSearchSequence, prompt_len: int) -> float:
        generated = len(beam.tokens) - prompt_len - (beam.finish_reason == "stop" and params.include_stop_str_in_output)
        return beam.cum_logprob / max(generated, 1) ** params.length_penalty

    for _ in progress(range(params.max_tokens), use_tqdm, "Beam search"):
        for i, own in enumerate(beams):
            if own and len(own[0].tokens) >= engine.max_model_len:
                ended[i], beams[i] = ended[i] + own, []
                for beam in own:
                    beam.finish_reason = "length"
        candidates = next_tokens(llm, [beam.tokens for own in beams for beam in own], 2 * width)
        if not candidates:
            break
        for i, own in enumerate(beams):
            grown: list[BeamSearchSequence] = []
            for beam in own:
                entry = candidates.pop(0)
                for token, logprob in entry.items():
                    stops = token in eos
                    keep = [] if stops and not params.include_stop_str_in_output else [token]
                    child = BeamSearchSequence(
                        [*beam.tokens, *keep],
                        [*beam.logprobs, entry],
                        beam.cum_logprob + logprob.logprob,
                        finish_reason="stop" if stops else None,
                    )
                    (ended[i] if stops else grown).append(child)
            grown.sort(key=lambda beam: score(beam, lengths[i]), reverse=True)
            beams[i] = grown[:width]
    outputs = []
    for own, done, prompt_len in zip(beams, ended, lengths):
        for beam in own:
            beam.finish_reason = "length"
        best = sorted(done + own, key=lambda beam: score(beam, prompt_len), reverse=True)[:width]
        for beam in best:
            if engine.tokenizer is not None:
                beam.text = engine.tokenizer.decode(beam.tokens, skip_special_tokens=params.skip_special_tokens)
        outputs.append(BeamSearchOutput(best))
    return outputs


def next_tokens(llm: LLM, sequences: list[list[int]], k: int) -> list[dict[int, Any]]:
    """The k most likely next tokens of each sequence, with their logprobs."""
    from nanovllm.llm import Stream

    params = SamplingParams(
        temperature=0,
        max_tokens=1,
        logprobs=min(k, llm.llm_engine.vocab_size),
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    with closing(Stream(llm, [(tokens, params) for tokens in sequences], max_logprobs=-1)) as stream:
        found = {output.request_id: output.outputs[0].logprobs or [] for output in stream}
    return [found[request_id][0] for request_id in stream.request_ids]
