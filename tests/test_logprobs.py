"""logprobs and prompt_logprobs against transformers' log-softmax, whatever the cache and the
schedule did.
"""

from __future__ import annotations

from os.path import commonprefix
from typing import Any

import pytest
import torch
from test_sampling import RULES, Context
from tiny import (
    greedy,
    make_llm,
    next_logits,
    nothing_is_left,  # noqa: F401
    random_prompts,
    shared_llm,
    shared_model,
)

from nanovllm import BeamSearchParams, RequestOutputKind, SamplingParams

PROMPTS = random_prompts([1, 2, 16, 17, 48, 90], seed=21)


def expected_logprobs(tokens: list[int]) -> torch.Tensor:
    """[len(tokens), vocabulary]: row i is of the token after tokens[i]."""
    return next_logits(shared_model()[1], tokens).log_softmax(-1)


def check_entry(entry: dict[int, Any], token: int, expected: torch.Tensor, k: int) -> None:
    """The token itself first, then the k most likely in order, itself not twice; ranks count from
    1.
    """
    assert next(iter(entry)) == token
    own, *others = [logprob.rank for logprob in entry.values()]
    assert others == [rank for rank in range(1, k + 1) if rank != own]
    for i, logprob in entry.items():
        assert logprob.logprob == pytest.approx(expected[i].item(), abs=1e-4)
        # Neighbours that are closer than rounding may change places.
        above, not_below = (
            (expected > expected[i] + 1e-4).sum(),
            (expected > expected[i] - 1e-4).sum(),
        )
        assert above < logprob.rank <= not_below
        text = shared_llm().get_tokenizer().decode([i])
        # It holds whole characters; the token itself may end a broken one before them.
        if "\ufffd" not in text:
            assert logprob.decoded_token == text or (
                i == token and logprob.decoded_token == "\ufffd" + text
            )


def check_pieces(entries: list[dict[int, Any]], before: list[int], tokens: list[int]) -> None:
    """The decoded tokens join to what `tokens` add to the text of `before`; special tokens show
    their names beside it.
    """
    tokenizer = shared_llm().get_tokenizer()
    pieces = [entry[token].decoded_token for entry, token in zip(entries, tokens)]
    names = [tokenizer.decode([i]) if i in tokenizer.all_special_ids else "" for i in tokens]
    assert all(piece.endswith(name) for piece, name in zip(pieces, names))
    joined = "".join(piece.removesuffix(name) for piece, name in zip(pieces, names))
    texts = [
        tokenizer.decode(ids, skip_special_tokens=True) for ids in (before, [*before, *tokens])
    ]
    assert joined == texts[1][len(commonprefix(texts)) :]  # noqa: RUF071


def check_prompt(out: Any, prompt_k: int | None) -> None:
    prompt = out.prompt_token_ids
    if prompt_k is None:
        assert out.prompt_logprobs is None
    else:
        assert len(out.prompt_logprobs) == len(prompt)
        assert out.prompt_logprobs[0] is None
        expected = expected_logprobs(prompt)
        for i, entry in enumerate(out.prompt_logprobs[1:], 1):
            check_entry(entry, prompt[i], expected[i - 1], prompt_k)
        check_pieces(out.prompt_logprobs[1:], prompt[:1], prompt[1:])


def check(out: Any, k: int | None, prompt_k: int | None) -> None:
    """All logprobs of an output, of its prompt and of its completions."""
    prompt = out.prompt_token_ids
    check_prompt(out, prompt_k)
    for completion in out.outputs:
        tokens = completion.token_ids
        if k is None:
            assert (completion.logprobs, completion.cumulative_logprob) == (None, None)
            continue
        assert len(completion.logprobs) == len(tokens)
        expected = expected_logprobs([*prompt, *tokens])[len(prompt) - 1 :]
        for i, (token, entry) in enumerate(zip(tokens, completion.logprobs)):
            check_entry(entry, token, expected[i], k)
        check_pieces(completion.logprobs, prompt, tokens)
        total = sum(expected[i, token].item() for i, token in enumerate(tokens))
        assert completion.cumulative_logprob == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize(
    ("k", "prompt_k"), [(0, None), (1, 0), (5, 3), (None, 5), (20, 20), (None, None)]
)
def test_number_of_entries(k, prompt_k):
    params = SamplingParams(max_tokens=6, logprobs=k, prompt_logprobs=prompt_k, ignore_eos=True)
    for out in shared_llm().generate(PROMPTS, params, use_tqdm=False):
        check(out, k, prompt_k)


def expected_scores(mode: str, context: Context, rules: list[Any]) -> Any:
    """[vocabulary] float64: what a mode shows for the token after the context."""
    tokens = [*context.prompt, *context.output]
    x = next_logits(shared_model()[1], tokens)[-1].double().numpy()
    if mode.startswith("processed"):
        for rule in rules:
            x = rule(x, context)
    return torch.from_numpy(x).log_softmax(-1) if mode.endswith("logprobs") else torch.tensor(x)


PENALISED = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "logit_bias": {9: 3.0, 7: -2.0}}
FILTERED = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.01}


@pytest.mark.parametrize(
    "mode", ["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"]
)
def test_modes_against_the_rules_of_sampling_in_float64(mode):
    """Greedy requests have no temperature and no filters, so that theirs are as at 1."""
    llm = shared_llm(logprobs_mode=mode)
    settings = [
        {"temperature": 0, **PENALISED},
        {**FILTERED, **PENALISED},
        {"temperature": 1.7},
        {"temperature": 1.0},
        {"temperature": 0},
        FILTERED,
    ]
    params = [
        SamplingParams(**given, max_tokens=6, logprobs=4, prompt_logprobs=2, ignore_eos=True)
        for given in settings
    ]
    for out, p in zip(llm.generate(PROMPTS, params, use_tqdm=False), params):
        rules = RULES[:5] if p.temperature == 0 else RULES
        check_prompt(out, 2)  # prompt logprobs are the model's own in each mode
        prompt, tokens = tuple(out.prompt_token_ids), out.outputs[0].token_ids
        total = 0.0
        for i, (token, entry) in enumerate(zip(tokens, out.outputs[0].logprobs)):
            scores = expected_scores(mode, Context(p, prompt, tuple(tokens[:i])), rules)
            assert len(entry) in (4, 5)
            for shown, logprob in entry.items():
                assert logprob.logprob == pytest.approx(scores[shown].item(), abs=1e-3)
            assert entry[token].rank == pytest.approx(
                (scores > scores[token]).sum().item() + 1, abs=1
            )
            top = sorted((logprob.logprob for logprob in entry.values()), reverse=True)[:4]
            assert top == pytest.approx(scores.topk(4).values.tolist(), abs=1e-3)
            total += scores[token].item()
        assert out.outputs[0].cumulative_logprob == pytest.approx(total, abs=1e-2)


def test_processed_logprobs_are_of_what_a_logits_processor_leaves():
    def two(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        kept = torch.full_like(logits, float("-inf"))
        kept[[10, 20]] = logits[[10, 20]]
        return kept

    llm = shared_llm(logprobs_mode="processed_logprobs")
    params = SamplingParams(max_tokens=1, logprobs=3, temperature=0.5, logits_processors=[two])
    (out,) = llm.generate(PROMPTS[:1], params, use_tqdm=False)
    (entry,) = out.outputs[0].logprobs
    logits = next_logits(shared_model()[1], PROMPTS[0])[-1, [10, 20]].double()
    expected = (logits / 0.5).log_softmax(-1).tolist()
    assert [entry[token].logprob for token in (10, 20)] == pytest.approx(expected, abs=1e-4)
    assert sorted(logprob.logprob for logprob in entry.values())[0] == float("-inf")


def test_beam_search_needs_logprobs():
    llm = shared_llm(logprobs_mode="raw_logits")
    with pytest.raises(ValueError, match="beam_search needs logprobs"):
        llm.beam_search(PROMPTS, BeamSearchParams(2, 2))


def test_minus_one_is_the_whole_vocabulary():
    llm = shared_llm(max_logprobs=-1)
    params = SamplingParams(max_tokens=2, logprobs=-1, prompt_logprobs=-1, ignore_eos=True)
    for out in llm.generate(PROMPTS[:3], params, use_tqdm=False):
        assert len(out.outputs[0].logprobs[0]) == 300
        check(out, 300, 300)
    with pytest.raises(ValueError, match=r"logprobs must be at most max_logprobs=20"):
        shared_llm().generate(PROMPTS, params, use_tqdm=False)


def test_they_are_of_the_model_not_of_what_filters_leave():
    params = SamplingParams(
        max_tokens=6,
        logprobs=4,
        temperature=0.5,
        top_k=3,
        repetition_penalty=1.5,
        logit_bias={9: 3.0},
        allowed_token_ids=list(range(0, 300, 2)),
        ignore_eos=True,
    )
    for out in shared_llm().generate(PROMPTS, params, use_tqdm=False):
        check(out, 4, None)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"max_num_batched_tokens": 16, "max_num_seqs": 16},
        {"num_gpu_blocks_override": 9, "max_model_len": 130},
        {
            "num_gpu_blocks_override": 9,
            "max_model_len": 130,
            "max_num_batched_tokens": 20,
            "max_num_seqs": 5,
        },
        {"enable_prefix_caching": False},
    ],
    ids=str,
)
def test_chunks_preemption_prefix_hits_and_several_completions(kwargs, overlap):
    llm = make_llm(async_scheduling=overlap, **kwargs)
    prompts = [*PROMPTS, *PROMPTS[2:]]
    ks = [(2, None), (None, 3), (0, 0), (5, 1), (None, None), (3, 5)]
    params = [
        SamplingParams(
            max_tokens=20, n=1 + i % 3, logprobs=k, prompt_logprobs=prompt_k, ignore_eos=True
        )
        for i, (k, prompt_k) in enumerate((ks * 2)[: len(prompts)])
    ]
    for _ in range(2):
        outs = llm.generate(prompts, params, use_tqdm=False)
        for out, p in zip(outs, params):
            check(out, p.logprobs, p.prompt_logprobs)
    if "num_gpu_blocks_override" in kwargs:
        assert llm.llm_engine.stats.num_preemptions > 3


def test_prompt_logprobs_do_not_read_the_prefix_cache_but_others_do():
    llm = make_llm()
    (prompt,) = random_prompts([64], seed=22)
    plain = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    asking = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0, ignore_eos=True)
    outs = [
        llm.generate([prompt], params, use_tqdm=False)[0]
        for params in (plain, plain, asking, plain)
    ]
    assert [out.num_cached_tokens for out in outs] == [0, 63, 0, 63]
    check(outs[2], None, 0)
    assert {tuple(out["token_ids"]) for out in outs} == {
        tuple(greedy(shared_model()[1], prompt, 4))
    }


def test_of_a_prompt_longer_than_one_piece_of_logits():
    """The runner makes prompt logits some rows at a time."""
    (prompt,) = random_prompts([400], seed=23)
    params = SamplingParams(max_tokens=1, prompt_logprobs=2, ignore_eos=True)
    llm = shared_llm(max_num_batched_tokens=512, max_model_len=512)
    check(llm.generate([prompt], params, use_tqdm=False)[0], None, 2)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_stop_string_and_eos_end_logprobs_with_the_tokens(overlap):
    llm = shared_llm(async_scheduling=overlap)
    tokens = greedy(shared_model()[1], PROMPTS[3], 12)
    third = next(i for i, token in enumerate(tokens) if i >= 3 and token not in tokens[:i])
    params = SamplingParams(
        temperature=0, max_tokens=12, logprobs=2, stop_token_ids=[tokens[third]]
    )
    (out,) = llm.generate([PROMPTS[3]], params, use_tqdm=False)
    assert out["token_ids"] == tokens[: third + 1]
    check(out, 2, None)


def test_a_stream_of_deltas_brings_each_entry_once():
    params = SamplingParams(
        max_tokens=8,
        n=2,
        logprobs=3,
        prompt_logprobs=1,
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA,
        seed=1,
    )
    llm = shared_llm()
    logprobs: dict[tuple[str, int], list[Any]] = {}
    for out in llm.stream(PROMPTS, params):
        for completion in out.outputs:
            assert len(completion.logprobs) == len(completion.token_ids)
            logprobs.setdefault((out.request_id, completion.index), []).extend(completion.logprobs)
    whole = llm.generate(PROMPTS, params, use_tqdm=False)
    for out in whole:
        check(out, 3, 1)
    assert [logprobs[key] for key in sorted(logprobs, key=lambda key: (int(key[0]), key[1]))] == [
        completion.logprobs for out in whole for completion in out.outputs
    ]
