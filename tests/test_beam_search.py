"""Beam search against a plain one over transformers' logits: whole forward passes, a list of
hypotheses, no cache.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
from tiny import (
    BOS,
    EOS,
    make_llm,
    next_logits,
    nothing_is_left,  # noqa: F401
    random_prompts,
    shared_llm,
    shared_model,
)

from nanovllm import BeamSearchParams, SamplingParams


class Hypothesis(NamedTuple):
    tokens: tuple[int, ...]  # generated, EOS not counted
    logprob: float
    ended: bool

    def score(self, penalty: float) -> float:
        return self.logprob / max(len(self.tokens), 1) ** penalty


def reference(
    prompt: list[int], width: int, length: int, penalty: float, eos: set[int]
) -> list[Hypothesis]:
    """As vLLM's: each live hypothesis proposes its 2 * width best tokens; those with EOS are kept
    aside until the end.
    """
    live, ended = [Hypothesis((), 0.0, False)], []
    for _ in range(length):
        grown = []
        for hypothesis in live:
            logprobs = (
                next_logits(shared_model()[1], [*prompt, *hypothesis.tokens])[-1]
                .double()
                .log_softmax(-1)
            )
            for token in logprobs.argsort(descending=True)[: 2 * width].tolist():
                logprob = hypothesis.logprob + logprobs[token].item()
                if token in eos:
                    ended.append(Hypothesis(hypothesis.tokens, logprob, True))
                else:
                    grown.append(Hypothesis((*hypothesis.tokens, token), logprob, False))
        live = sorted(grown, key=lambda h: h.score(penalty), reverse=True)[:width]
    return sorted(ended + live, key=lambda h: h.score(penalty), reverse=True)[:width]


@pytest.mark.parametrize(
    ("width", "length", "penalty"),
    [(1, 6, 1.0), (2, 8, 1.0), (4, 6, 0.0), (3, 8, 2.0), (5, 1, 1.0), (8, 4, -1.0)],
)
def test_equals_the_reference(width, length, penalty):
    prompts = random_prompts([3, 17, 40], seed=51)
    params = BeamSearchParams(beam_width=width, max_tokens=length, length_penalty=penalty)
    for llm in (shared_llm(), shared_llm(async_scheduling=True)):
        for prompt, out in zip(prompts, llm.beam_search(prompts, params)):
            expected = reference(prompt, width, length, penalty, {EOS})
            assert [tuple(beam.tokens[len(prompt) :]) for beam in out.sequences] == [
                h.tokens for h in expected
            ]
            for beam, hypothesis in zip(out.sequences, expected):
                assert beam.tokens[: len(prompt)] == prompt
                assert beam.cum_logprob == pytest.approx(hypothesis.logprob, abs=1e-3)
                assert beam.finish_reason == ("stop" if hypothesis.ended else "length")
                assert beam.text == llm.get_tokenizer().decode(
                    beam.tokens, skip_special_tokens=True
                )


def likely_eos(prompt: list[int]) -> int:
    """A token that beams come upon early: the test's EOS."""
    return next_logits(shared_model()[1], prompt)[-1].argsort(descending=True)[1].item()


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_beams_end_at_eos(penalty, tmp_path):
    (prompt,) = random_prompts([12], seed=52)
    eos = likely_eos(prompt)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    llm = make_llm(generation_config=str(tmp_path))
    assert llm.llm_engine.eos_token_ids == {eos, EOS}
    params = BeamSearchParams(beam_width=4, max_tokens=6, length_penalty=penalty)
    (out,) = llm.beam_search([prompt], params)
    expected = reference(prompt, 4, 6, penalty, {eos, EOS})
    assert any(h.ended for h in expected)
    assert [tuple(beam.tokens[12:]) for beam in out.sequences] == [h.tokens for h in expected]
    assert [beam.finish_reason == "stop" for beam in out.sequences] == [h.ended for h in expected]

    params.include_stop_str_in_output = True
    (kept,) = llm.beam_search([prompt], params)
    # The score does not count EOS, so the beams are the same.
    for beam, hypothesis in zip(kept.sequences, expected):
        assert tuple(beam.tokens[12 : 12 + len(hypothesis.tokens)]) == hypothesis.tokens
        assert {eos, EOS}.issuperset(beam.tokens[12 + len(hypothesis.tokens) :])
        assert len(beam.tokens) == 12 + len(hypothesis.tokens) + hypothesis.ended

    params.ignore_eos = True
    (ignored,) = llm.beam_search([prompt], params)
    expected = reference(prompt, 4, 6, penalty, set())
    assert [tuple(beam.tokens[12:]) for beam in ignored.sequences] == [h.tokens for h in expected]


def test_temperature_changes_nothing_and_one_beam_is_greedy():
    prompts = random_prompts([9], seed=53)
    llm = shared_llm()
    params = BeamSearchParams(beam_width=1, max_tokens=10, ignore_eos=True, temperature=0.7)
    greedy = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    assert (
        llm.beam_search(prompts, params)[0].sequences[0].tokens[9:]
        == llm.generate(prompts, greedy)[0]["token_ids"]
    )


def test_prompts_in_any_form_one_or_many_and_at_the_longest_length():
    llm = shared_llm()
    params = BeamSearchParams(beam_width=2, max_tokens=3, ignore_eos=True)
    text, one = (
        llm.beam_search(["hi", {"prompt_token_ids": [BOS, *b"hi"]}], params),
        llm.beam_search("hi", params),
    )
    assert [len(out.sequences) for out in text] == [2, 2]
    assert text[0] == text[1] == one[0]
    assert llm.beam_search([], params) == []
    (prompt,) = random_prompts([510], seed=54)
    params.max_tokens = 10
    (out,) = llm.beam_search([prompt], params)
    assert [(len(beam.tokens), beam.finish_reason) for beam in out.sequences] == [
        (512, "length")
    ] * 2


def test_more_beams_than_the_vocabulary_has_tokens_or_logprobs_allow():
    (prompt,) = random_prompts([5], seed=55)
    params = BeamSearchParams(beam_width=160, max_tokens=2, ignore_eos=True)
    (out,) = shared_llm().beam_search([prompt], params)
    expected = [h.tokens for h in reference(prompt, 160, 2, 1.0, set())]
    found = [tuple(beam.tokens[5:]) for beam in out.sequences]
    assert len(set(found)) == 160
    assert found[:100] == expected[:100]


@pytest.mark.parametrize(
    ("prompts", "params", "error", "message"),
    [
        (["hi"], SamplingParams(), TypeError, "must be BeamSearchParams, got SamplingParams"),
        ([[]], BeamSearchParams(2, 2), ValueError, "no tokens"),
        ([[1], [300]], BeamSearchParams(2, 2), ValueError, "outside the vocabulary"),
    ],
)
def test_refused(prompts, params, error, message):
    with pytest.raises(error, match=message):
        shared_llm().beam_search(prompts, params)


def test_changed_params_are_checked_again():
    params = BeamSearchParams(2, 2)
    params.beam_width = 0
    with pytest.raises(ValueError, match="beam_width must be an integer of at least 1"):
        shared_llm().beam_search(["hi"], params)
