"""The sampler against distributions worked out here in float64 from the rules, and the engine
against transformers.

Drawing is inverse-CDF, so the sampler is tested exactly: a uniform number from the middle of a
token's share of the exact distribution must give that token. End to end the numbers are hashes of
seeds, and tests of goodness of fit take over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import (
    EOS,
    greedy,
    make_llm,
    next_logits,
    nothing_is_left,  # noqa: F401
    random_prompts,
    shared_llm,
    shared_model,
)

from nanovllm import SamplingParams
from nanovllm.core.ability import ModelFacts
from nanovllm.core.batch import pack, unpack
from nanovllm.core.sequence import Sequence, SequenceTable
from nanovllm.core.step import Step
from nanovllm.engine.batch_builder import build_batch, uniform
from nanovllm.sampling.filters import NUCLEUS_CANDIDATES
from nanovllm.sampling.sampler import process, sampling_abilities

# -- the rules, one function each: logits in float64, -inf for what cannot be drawn ----------------


@dataclass(frozen=True)
class Context:
    """What the rules look at besides the logits."""

    params: SamplingParams
    prompt: tuple[int, ...] = (0,)
    output: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()  # as token ids


def allow(x: np.ndarray, c: Context) -> np.ndarray:
    ids = c.params.allowed_token_ids
    return x if ids is None else np.where(np.isin(np.arange(len(x)), ids), x, -np.inf)


def ban_bad_words(x: np.ndarray, c: Context) -> np.ndarray:
    x = x.copy()
    for word in c.bad_words:
        if (
            len(c.output) >= len(word) - 1
            and c.output[len(c.output) - len(word) + 1 :] == word[:-1]
        ):
            x[word[-1]] = -np.inf
    return x


def ban_end_until_min_tokens(x: np.ndarray, c: Context) -> np.ndarray:
    x = x.copy()
    if len(c.output) < c.params.min_tokens:
        x[[EOS, *c.params.stop_token_ids]] = -np.inf
    return x


def add_bias(x: np.ndarray, c: Context) -> np.ndarray:
    x = x.copy()
    for token, value in (c.params.logit_bias or {}).items():
        x[token] += value
    return x


def penalise(x: np.ndarray, c: Context) -> np.ndarray:
    x, p = x.copy(), c.params
    for token in set(c.prompt) | set(c.output):
        x[token] = (
            x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
        )
    for token, count in Counter(c.output).items():
        x[token] -= p.frequency_penalty * count + p.presence_penalty
    return x


def heat(x: np.ndarray, c: Context) -> np.ndarray:
    return x / c.params.temperature


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x - x.max())
    return p / p.sum()


def cut_min_p(x: np.ndarray, c: Context) -> np.ndarray:
    p = softmax(x)
    return np.where(p < c.params.min_p * p.max(), -np.inf, x)


def cut_top_k(x: np.ndarray, c: Context) -> np.ndarray:
    k = c.params.top_k
    return np.where(x < np.sort(x)[-k], -np.inf, x) if 0 < k < len(x) else x


def cut_top_p(x: np.ndarray, c: Context) -> np.ndarray:
    """Keeps the smallest set of most likely tokens whose probability reaches top_p, and what ties
    with its last one.
    """
    p, total = np.sort(softmax(x))[::-1], 0.0
    for value in p:
        total += value
        if total >= c.params.top_p:
            return np.where(softmax(x) < value * (1 - 1e-12), -np.inf, x)
    return x


RULES = [
    allow,
    ban_bad_words,
    ban_end_until_min_tokens,
    add_bias,
    penalise,
    heat,
    cut_min_p,
    cut_top_k,
    cut_top_p,
]


def exact(
    logits: np.ndarray, context: Context, rules: list[Callable[..., np.ndarray]] = RULES
) -> np.ndarray:
    """The distribution that a token is drawn from."""
    x = logits.astype(np.float64)
    for rule in rules:
        x = rule(x, context)
    return softmax(x)


# -- the sampler by itself -------------------------------------------------------------------------


BLOCK_SIZE = 16


def ids_of(text: str) -> list[int]:
    """A tokenizer's `encode` for texts that are numbers: "20 21" -> [20, 21]."""
    return [int(number) for number in text.split()]


def draw(logits: np.ndarray, c: Context, u: np.ndarray) -> np.ndarray:
    """The sampler's token for each uniform number, all from one row of logits.

    The request is prepared and packed as an engine does it, so both halves are tested.
    """
    abilities = sampling_abilities()
    facts = ModelFacts(len(logits), frozenset({EOS}), ids_of)
    states = [ability.prepare(c.params, facts) for ability in abilities]
    columns = {name: kind for ability in abilities for name, kind in ability.columns.items()}
    seq = Sequence(
        seq_id=0,
        params=c.params,
        token_ids=np.array([*c.prompt, *c.output], np.int32),
        end=64,
        abilities=sum(1 << bit for bit, state in enumerate(states) if state is not None),
        prepared={a.name: state for a, state in zip(abilities, states) if state is not None},
    )
    seq.prompt_len = len(c.prompt)
    table = SequenceTable(1, 64, BLOCK_SIZE, columns)
    rows = np.full(len(u), table.admit(seq))
    ends = np.full(len(u), len(seq.token_ids), np.int32)
    step = Step(rows, ends - 1, ends, sampled=np.arange(len(u)), seq_ids=table.seq_id[rows])
    batch, failures = build_batch(table, step, BLOCK_SIZE, abilities)
    assert not failures
    batch.sample.uniform = u.astype(np.float32)
    packed, layout = pack(batch)
    tensors = unpack(layout, torch.from_numpy(packed), torch.float32)
    repeated = torch.from_numpy(logits.astype(np.float32)).repeat(len(u), 1)
    processed = process(repeated, tensors, torch.zeros(1, dtype=torch.int64))
    return processed.draw(tensors.sample.uniform).numpy()


def assert_inverse_cdf(
    logits: np.ndarray, context: Context, rules: list[Callable[..., np.ndarray]] = RULES
) -> None:
    p = exact(logits, context, rules)
    likely = np.flatnonzero(p > 2e-5)
    middles = p.cumsum()[likely] - p[likely] / 2
    assert draw(logits, context, middles).tolist() == likely.tolist()
    ends = draw(logits, context, np.array([0, 2**-24, 1 - 2**-24]))
    assert (p[ends] > 0).all(), "a number at the end of its range draws nothing impossible"


def some_logits(vocab_size: int = 300, scale: float = 2.0, seed: int = 0) -> np.ndarray:
    # As float32 has them: else a tie or a border may fall differently here and there.
    logits = np.random.default_rng(seed).normal(0, scale, vocab_size).astype(np.float32)
    logits[[5, 9, 17]] = 2 * scale  # likely ones, as penalties and bans are for
    return logits


PROMPT, OUTPUT = (5, 6, 7, 5, 8), (9, 7, 9, 10, 9)
FEATURES: dict[str, dict[str, Any]] = {
    "temperature_low": {"temperature": 0.3},
    "temperature_high": {"temperature": 2.5},
    "top_k": {"top_k": 7},
    "top_k_one": {"top_k": 1},
    "top_p": {"top_p": 0.6},
    "top_p_small": {"top_p": 1e-6},
    "min_p": {"min_p": 0.1},
    "min_p_one": {"min_p": 1.0},
    "presence_penalty": {"presence_penalty": 1.7},
    "presence_penalty_negative": {"presence_penalty": -2.0},
    "frequency_penalty": {"frequency_penalty": 1.1},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "repetition_penalty_below_one": {"repetition_penalty": 0.4},
    "logit_bias": {"logit_bias": {3: 5.0, 9: -4.0, 11: float("-inf")}},
    "allowed_token_ids": {"allowed_token_ids": [2, 3, 9, 250]},
    "min_tokens": {"min_tokens": 6, "stop_token_ids": [17, 18]},
    "top_k_top_p": {"top_k": 12, "top_p": 0.7},
    "min_p_top_k": {"min_p": 0.05, "top_k": 4},
    "all": {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.02,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.3,
        "logit_bias": {3: 2.0, 9: 3.0},
        "min_tokens": 6,
        "allowed_token_ids": list(range(0, 290)),
    },
}


@pytest.mark.parametrize("name", FEATURES)
def test_each_feature_draws_from_the_exact_distribution(name):
    context = Context(SamplingParams(**FEATURES[name]), PROMPT, OUTPUT)
    for seed in range(3):
        assert_inverse_cdf(some_logits(seed=seed), context)


@pytest.mark.parametrize("name", FEATURES)
def test_without_the_feature_the_distribution_is_another(name):
    """So the test above can fail."""
    context = Context(SamplingParams(**FEATURES[name]), PROMPT, OUTPUT)
    plain = exact(some_logits(), replace(context, params=SamplingParams()))
    assert np.abs(exact(some_logits(), context) - plain).sum() > 0.01


ORDER = SamplingParams(
    temperature=1.7,
    top_k=30,
    top_p=0.8,
    min_p=0.03,
    presence_penalty=-1.0,
    repetition_penalty=2.0,
    logit_bias=dict.fromkeys(range(0, 300, 7), 3.0),
    allowed_token_ids=list(range(0, 300, 3)),
)


def test_the_order_of_the_rules():
    assert_inverse_cdf(some_logits(), Context(ORDER, PROMPT, (9, 21, 9, 42)))


@pytest.mark.parametrize(
    "swap",
    [
        (add_bias, penalise),
        (penalise, heat),
        (heat, cut_min_p),
        (cut_min_p, cut_top_p),
        (cut_top_k, cut_top_p),
    ],
)
def test_any_other_order_is_noticed(swap):
    first, second = swap
    other = [second if rule is first else first if rule is second else rule for rule in RULES]
    with pytest.raises(AssertionError):
        assert_inverse_cdf(some_logits(), Context(ORDER, PROMPT, (9, 21, 9, 42)), other)


@pytest.mark.parametrize(
    ("vocab_size", "scale", "params"),
    [
        (3000, 0.3, {"top_p": 0.9}),  # a nucleus of some 2600
        (3000, 0.3, {"top_p": 0.9, "top_k": 2000}),
        (3000, 0.3, {"top_p": 0.999, "min_p": 0.3}),
        (3000, 2.0, {"top_p": 0.9}),  # small enough for the short way
        (3000, 0.3, {"top_k": NUCLEUS_CANDIDATES + 100}),
        (NUCLEUS_CANDIDATES, 0.3, {"top_p": 0.99}),
    ],
)
def test_nucleus_larger_than_the_candidates(vocab_size, scale, params):
    context = Context(SamplingParams(**params))
    if scale < 1:
        assert (
            exact(some_logits(vocab_size, scale), context) > 0
        ).sum() > 0.75 * NUCLEUS_CANDIDATES
    assert_inverse_cdf(some_logits(vocab_size, scale), context)


@pytest.mark.parametrize(
    "params", [{"top_k": 3}, {"top_p": 0.5}, {"top_k": 5, "top_p": 0.7}, {"min_p": 0.9}]
)
def test_ties_at_the_border_are_all_kept(params):
    logits = np.repeat(np.array([1, 3, 2, 0], np.float32), 4)
    assert_inverse_cdf(logits, Context(SamplingParams(**params)))
    flat = np.zeros(50, np.float32)
    assert (exact(flat, Context(SamplingParams(**params))) > 0).all()
    assert_inverse_cdf(flat, Context(SamplingParams(**params)))


@pytest.mark.parametrize(
    "output", [(), (20,), (20, 21), (21, 20), (1, 20, 21), (20, 21, 22), (22, 20)]
)
def test_bad_words_of_one_and_of_several_tokens(output):
    words = ((4,), (20, 21), (20, 21, 22))
    params = SamplingParams(bad_words=[" ".join(map(str, word)) for word in words])
    context = Context(params, (20, 21), output, words)
    assert_inverse_cdf(some_logits(), context)


@pytest.mark.parametrize("num_output", range(5))
def test_min_tokens_bans_the_end_tokens_until_then(num_output):
    context = Context(SamplingParams(min_tokens=3, stop_token_ids=[7]), PROMPT, OUTPUT[:num_output])
    logits = some_logits()
    logits[[EOS, 7]] = 4
    assert_inverse_cdf(logits, context)
    assert (exact(logits, context)[[EOS, 7]] > 0).all() == (num_output >= 3)


def test_one_batch_may_mix_rows_that_use_different_features():
    """A row's token does not depend on what its neighbours use."""
    llm = shared_llm()
    prompts = random_prompts([4] * len(FEATURES), seed=1)
    params = [
        SamplingParams(seed=i, max_tokens=8, **feature)
        for i, feature in enumerate(FEATURES.values())
    ]
    params += [SamplingParams(temperature=0, max_tokens=8)]
    prompts += [prompts[0]]
    together = [out["token_ids"] for out in llm.generate(prompts, params, use_tqdm=False)]
    alone = [
        llm.generate([prompt], p, use_tqdm=False)[0]["token_ids"]
        for prompt, p in zip(prompts, params)
    ]
    assert together == alone


def test_uniform_numbers_are_uniform_over_seeds_and_over_positions():
    seeds = np.array(
        [np.random.SeedSequence(i).generate_state(1, np.uint64)[0] for i in range(200)]
    )
    for numbers in (
        uniform(np.repeat(seeds, 200), np.tile(np.arange(200), 200)),
        uniform(seeds, np.full(200, 3)),
    ):
        assert numbers.dtype == np.float32
        assert ((numbers >= 0) & (numbers < 1)).all()
        assert abs(fit(np.histogram(numbers, 20, (0, 1))[0], np.full(20, 0.05))) < 4
    grid = uniform(np.repeat(seeds, 200), np.tile(np.arange(200), 200)).reshape(200, 200)
    pairs = np.histogram2d(grid[:, :-1].ravel(), grid[:, 1:].ravel(), 8, ((0, 1), (0, 1)))[0]
    assert abs(fit(pairs.ravel(), np.full(64, 1 / 64))) < 4, (
        "neighbouring positions are independent"
    )


# -- end to end ------------------------------------------------------------------------------------


def fit(counts: np.ndarray, p: np.ndarray) -> float:
    """How far counts are from probabilities: Pearson's chi-square in its standard deviations, rare
    ones pooled.
    """
    expected = counts.sum() * p
    rare = expected < 5
    observed, expected = (
        np.append(counts[~rare], counts[rare].sum()),
        np.append(expected[~rare], expected[rare].sum()),
    )
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = max(len(expected) - 1, 1)
    return float((((observed - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


END_TO_END = {
    name: FEATURES[name]
    for name in ("temperature_low", "temperature_high", "top_k", "top_p", "min_p")
}
END_TO_END |= {
    "repetition_penalty": {"repetition_penalty": 3.0},
    "logit_bias": {"logit_bias": {3: 5.0, 9: -4.0, 33: 5.5}},
    "allowed_token_ids": {"allowed_token_ids": [2, 3, 9, 11, 50, 250]},
    "top_k_top_p": {"top_k": 12, "top_p": 0.7},
    "all_filters": {
        "temperature": 0.8,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.5,
    },
}


@pytest.mark.parametrize("name", END_TO_END)
def test_first_tokens_of_many_seeds_fit_transformers_distribution(name):
    (prompt,) = random_prompts([60], seed=5)
    params = SamplingParams(max_tokens=1, n=2000, ignore_eos=True, **END_TO_END[name])
    (out,) = shared_llm().generate([prompt], params, use_tqdm=False)
    counts = np.bincount([completion.token_ids[0] for completion in out.outputs], minlength=300)
    logits = next_logits(shared_model()[1], prompt)[-1].numpy()
    p = exact(logits, Context(params, tuple(prompt)))
    assert counts[p == 0].sum() == 0
    assert fit(counts, p) < 4
    without = exact(logits, Context(SamplingParams(), tuple(prompt)))
    assert counts[without == 0].sum() > 0 or fit(counts, without) > 10, (
        "the feature does something here"
    )


def conditional_fit(
    outs: list[Any], params: SamplingParams, words: tuple[tuple[int, ...], ...] = ()
) -> tuple[int, float]:
    """(tokens drawn that are impossible, goodness of fit) of whole outputs, each token given those
    before it.

    Where a token falls within its exact cumulative distribution is uniform, whatever the
    distribution (Rosenblatt, 1952). Ids are in vocabulary order, but for those seen before and the
    ends, which come first: there mistakes would show.
    """
    rng, model = np.random.default_rng(0), shared_model()[1]
    impossible, places = 0, []
    for out in outs:
        prompt = tuple(out.prompt_token_ids)
        for completion in out.outputs:
            tokens = completion.token_ids
            logits = next_logits(model, [*prompt, *tokens[:-1]]).numpy()[len(prompt) - 1 :]
            for i, token in enumerate(tokens):
                p = exact(logits[i], Context(params, prompt, tuple(tokens[:i]), words))
                impossible += p[token] == 0
                first = np.isin(
                    np.arange(len(p)), [*prompt, *tokens[:i], EOS, *params.stop_token_ids]
                )
                before = (
                    first & (np.arange(len(p)) < token)
                    if first[token]
                    else first | (np.arange(len(p)) < token)
                )
                places.append(p[before].sum() + rng.random() * p[token])
    return impossible, fit(np.histogram(places, 20, (0, 1))[0], np.full(20, 0.05))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "given",
    [
        {"frequency_penalty": 1.5, "top_k": 20},
        {"presence_penalty": 2.0, "temperature": 0.6},
        {"presence_penalty": -2.0, "frequency_penalty": -0.5},
        {"repetition_penalty": 1.8, "top_p": 0.8},
        {"min_tokens": 5, "stop_token_ids": [7], "logit_bias": {EOS: 4.0, 7: 4.0}},
    ],
    ids=lambda given: "-".join(given),
)
def test_later_tokens_fit_given_all_that_came_before(given, overlap):
    """Penalties count every token, the one that is still in flight under overlap too."""
    prompts = random_prompts([3, 9, 17, 6] * 10, seed=6)
    params = SamplingParams(max_tokens=16, n=2, **given)
    outs = shared_llm(async_scheduling=overlap, num_gpu_blocks_override=64).generate(
        prompts, params, use_tqdm=False
    )
    impossible, z = conditional_fit(outs, params)
    assert (impossible, z < 4) == (0, True)
    plain = SamplingParams(
        **{
            **given,
            "min_tokens": 0,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "repetition_penalty": 1,
        }
    )
    impossible, z = conditional_fit(outs, plain)
    assert impossible or z > 5, "without the rule the same tokens do not fit"


@pytest.mark.parametrize("overlap", [False, True])
def test_bad_words_never_appear(overlap):
    """Of one token and of several; as text, so both after a space and not."""
    llm = shared_llm(async_scheduling=overlap)
    tokenizer = llm.get_tokenizer()
    prompts = random_prompts([3, 5] * 8, seed=7)
    free = SamplingParams(max_tokens=20, temperature=0.7, ignore_eos=True)
    letters = {ord(letter): 5.0 for letter in "the in"}
    free.logit_bias = letters | {tokenizer.convert_tokens_to_ids("the"): 4.0}
    banned = free.clone()
    banned.bad_words = ["the", "in", "ei", "nnn"]
    words = {
        tuple(tokenizer.encode(f, add_special_tokens=False))
        for w in banned.bad_words
        for f in (w, " " + w)
    }
    assert {len(word) for word in words} == {1, 2, 3, 4}

    def found(outs: list[Any]) -> int:
        runs = (
            out["token_ids"][i : i + n] for out in outs for n in (1, 2, 3, 4) for i in range(20)
        )
        return sum(tuple(run) in words for run in runs)

    assert found(llm.generate(prompts, free, use_tqdm=False)) > 20
    outs = llm.generate(prompts, banned, use_tqdm=False)
    assert found(outs) == 0
    impossible, z = conditional_fit(outs, banned, tuple(words))
    assert (impossible, z < 4) == (0, True)


@pytest.mark.parametrize("overlap", [False, True])
def test_greedy_with_edits_equals_transformers_processors(overlap):
    model = shared_model()[1]
    llm = shared_llm(async_scheduling=overlap)
    for prompt in random_prompts([4, 11, 30], seed=8):
        ids = torch.tensor([prompt])
        plain = greedy(model, prompt, 20)
        seven, eight = plain[6], plain[7]
        cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
            ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
            ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
            (
                {"logit_bias": {seven: -5.0, 3: 4.0}},
                {"sequence_bias": [[[seven], -5.0], [[3], 4.0]]},
            ),
            ({"logit_bias": {seven: float("-inf")}}, {"suppress_tokens": [seven]}),
            ({"allowed_token_ids": list(range(100))}, {"suppress_tokens": list(range(100, 300))}),
            (
                {"stop_token_ids": [seven], "min_tokens": 9},
                {"eos_token_id": [EOS, seven], "min_new_tokens": 9},
            ),
            ({"stop_token_ids": [eight]}, {"eos_token_id": [EOS, eight]}),
        ]
        for ours, theirs in cases:
            params = SamplingParams(temperature=0, max_tokens=20, **ours)
            expected = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=20,
                do_sample=False,
                **{"eos_token_id": EOS, "pad_token_id": 0, **theirs},
            )
            assert (
                llm.generate([prompt], params, use_tqdm=False)[0]["token_ids"]
                == expected[0, len(prompt) :].tolist()
            )


# -- seeds -----------------------------------------------------------------------------------------

SEEDED_PROMPTS = random_prompts([3, 40, 17, 64, 100, 33], seed=9)
SEEDED = [
    SamplingParams(seed=7, max_tokens=24, n=2),
    SamplingParams(seed=7, max_tokens=24, temperature=0.7, top_p=0.8),
    SamplingParams(seed=0, max_tokens=24, frequency_penalty=1.0, ignore_eos=True),
    SamplingParams(seed=2**63, max_tokens=24, top_k=20),
    SamplingParams(seed=-2, max_tokens=24, min_p=0.02, bad_words=["the", "zz"], ignore_eos=True),
    SamplingParams(seed=3, max_tokens=24, repetition_penalty=1.3, logprobs=1, stop=["zzz"]),
]


def tokens_of(outs: list[Any]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in out.outputs] for out in outs]


@pytest.fixture(scope="module")
def seeded_alone():
    return [
        tokens_of(shared_llm().generate([prompt], params, use_tqdm=False))[0]
        for prompt, params in zip(SEEDED_PROMPTS, SEEDED)
    ]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"max_num_batched_tokens": 16, "max_num_seqs": 16},
        {"num_gpu_blocks_override": 12, "max_model_len": 150},
        {
            "num_gpu_blocks_override": 12,
            "max_model_len": 150,
            "max_num_batched_tokens": 24,
            "max_num_seqs": 8,
        },
        {"enable_prefix_caching": False},
        {"max_num_seqs": 3},
        {"seed": 1234},
        {"block_size": 1, "num_gpu_blocks_override": 700},
    ],
    ids=str,
)
def test_a_seeded_request_gives_the_same_tokens_whatever_runs_beside_it(
    seeded_alone, kwargs, overlap
):
    llm = make_llm(async_scheduling=overlap, **kwargs)
    others = random_prompts([20, 50, 7, 90] * 3, seed=10)
    random = SamplingParams(max_tokens=30, ignore_eos=True)
    # Company comes before, between and after.
    prompts = [*others[:4], *SEEDED_PROMPTS[:3], *others[4:8], *SEEDED_PROMPTS[3:], *others[8:]]
    params = [*[random] * 4, *SEEDED[:3], *[random] * 4, *SEEDED[3:], *[random] * 4]
    outs = llm.generate(prompts, params, use_tqdm=False)
    assert tokens_of(outs[4:7] + outs[11:14]) == seeded_alone
    if "num_gpu_blocks_override" in kwargs and kwargs["num_gpu_blocks_override"] < 20:
        assert llm.llm_engine.stats.num_preemptions > 3


def test_a_run_without_seeds_repeats_in_a_fresh_engine_and_differs_between_requests():
    prompts = [random_prompts([9])[0]] * 5
    params = SamplingParams(max_tokens=12, n=2, ignore_eos=True)
    runs = []
    for overlap, seed in ((False, 0), (True, 0), (False, 1)):
        llm = make_llm(async_scheduling=overlap, seed=seed)
        runs.append([tokens_of(llm.generate(prompts, params, use_tqdm=False)) for _ in range(2)])
    assert runs[0] == runs[1]
    everything = [
        tuple(tokens)
        for run in (runs[0], runs[2])
        for call in run
        for out in call
        for tokens in out
    ]
    assert len(everything) == len(set(everything)) == 40, (
        "no two requests, calls, completions or engine seeds alike"
    )


def test_seeds_of_requests_and_of_the_engine_never_coincide():
    seed_of = shared_llm().llm_engine.input_processor._sequence_seed
    seeds = [
        seed_of(seed, number, index)
        for seed in (None, 0, 1, 2**32, -1)
        for number in range(4)
        for index in (0, 1)
    ]
    # With a seed of its own the request's number does not matter.
    assert len(set(seeds)) == 4 * 2 + 4 * 2
    assert seed_of(2**64 - 1, 0, 0) == seed_of(-1, 9, 0), "64 bits, signed or not"
