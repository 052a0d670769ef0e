"""When and why a sequence ends, on a model that writes a known text and on one whose greedy text is
transformers'.
"""

from __future__ import annotations

from typing import Any

import pytest
from tiny import (
    BOS,
    EOS,
    assert_idle,
    greedy,
    make_llm,
    nothing_is_left,  # noqa: F401
    random_prompts,
    scripted_model,
    shared_llm,
    shared_model,
    tiny_tokenizer,
)

from nanovllm import LLM, RequestOutputKind, SamplingParams

THE, IN = (tiny_tokenizer().convert_tokens_to_ids(word) for word in ("the", "in"))
# After "a" the model writes TEXT and ends: one byte a token, but for two words. No byte comes
# twice.
SCRIPT = (*b"abcdef", *"日".encode(), *b"g", THE, *"é𝄞".encode(), *b"kl", IN, *b"mop", EOS)
TEXT = "bcdef日gtheé𝄞klinmop"
NUM_TOKENS = len(SCRIPT) - 1


def scripted(overlap: bool) -> LLM:
    if overlap not in LLMS:
        LLMS[overlap] = make_llm(scripted_model(SCRIPT), async_scheduling=overlap)
    return LLMS[overlap]


LLMS: dict[bool, LLM] = {}


def run(overlap: bool, stream: bool, prompt: Any = "a", **given: Any) -> Any:
    """The completion, from `generate` or put together from a stream of deltas, which must say the
    same.
    """
    params = SamplingParams(**{"temperature": 0, "max_tokens": 64, **given})
    if not stream:
        return scripted(overlap).generate(prompt, params, use_tqdm=False)[0].outputs[0]
    params.output_kind = RequestOutputKind.DELTA
    parts = [out.outputs[0] for out in scripted(overlap).stream(prompt, params)]
    whole = parts[-1]
    whole.text = "".join(part.text for part in parts)
    whole.token_ids = [token for part in parts for token in part.token_ids]
    assert all(part.finish_reason is None for part in parts[:-1])
    return whole


def ended(completion: Any) -> tuple[Any, ...]:
    return (
        completion.text,
        len(completion.token_ids),
        completion.finish_reason,
        completion.stop_reason,
    )


both_ways = pytest.mark.parametrize(
    ("overlap", "stream"), [(False, False), (False, True), (True, False), (True, True)]
)


def tokens_up_to(char: str) -> int:
    """How many tokens are generated when the last byte of this character of TEXT is."""
    if char in "the":
        return SCRIPT.index(THE)
    if char in "in":
        return SCRIPT.index(IN)
    return SCRIPT.index(char.encode()[-1])


@both_ways
@pytest.mark.parametrize(
    ("stop", "text", "last", "reason"),
    [
        (["b"], "", "b", "b"),  # the very first token
        (["bcd"], "", "d", "bcd"),
        (["def"], "bc", "f", "def"),  # over several tokens
        (["日"], "bcdef", "日", "日"),  # one character of several tokens
        (["f日g"], "bcde", "g", "f日g"),
        (["é𝄞"], "bcdef日gthe", "𝄞", "é𝄞"),
        (["h"], "bcdef日gt", "h", "h"),  # within a token, whose rest is cut
        (["gt"], "bcdef日", "t", "gt"),  # ends within a token
        (["eé"], "bcdef日gth", "é", "eé"),  # begins within one
        (["klin"], "bcdef日gtheé𝄞", "n", "klin"),
        (["p", "cd"], "b", "d", "cd"),  # the one that completes first
        # Two complete at the same token: the one that begins first wins.
        (["ef", "def"], "bc", "f", "def"),
        (["he", "the"], "bcdef日g", "e", "the"),
        (["the", "th"], "bcdef日g", "e", "the"),  # begin together: the order of the list
        (["th", "the"], "bcdef日g", "e", "th"),
        (["defx", "efg", "日"], "bcdef", "日", "日"),  # beginnings that come to nothing
        ("def", "bc", "f", "def"),
    ],
)
def test_stop_strings(stop, text, last, reason, overlap, stream):
    assert ended(run(overlap, stream, stop=stop)) == (text, tokens_up_to(last), "stop", reason)
    included = run(overlap, stream, stop=stop, include_stop_str_in_output=True)
    assert ended(included) == (text + reason, tokens_up_to(last), "stop", reason)


@both_ways
@pytest.mark.parametrize("stop", [["xyz"], ["bd"], ["opq"], ["日日"]])
def test_a_stop_string_that_never_comes_changes_nothing(stop, overlap, stream):
    assert ended(run(overlap, stream, stop=stop)) == (TEXT, NUM_TOKENS, "stop", None)
    assert ended(run(overlap, stream, stop=stop, max_tokens=NUM_TOKENS - 3)) == (
        TEXT[:-2],
        NUM_TOKENS - 3,
        "length",
        None,
    )


@both_ways
def test_a_stop_string_that_only_the_prompt_completes_does_not_count(overlap, stream):
    assert ended(run(overlap, stream, prompt="xya", stop=["ab", "ya"])) == (
        TEXT,
        NUM_TOKENS,
        "stop",
        None,
    )


@both_ways
@pytest.mark.parametrize(
    ("min_tokens", "text"), [(0, "b"), (2, "b"), (3, "bcdef日g"), (9, "bcdef日g"), (10, TEXT)]
)
def test_stop_strings_count_only_after_min_tokens(min_tokens, text, overlap, stream):
    completion = run(overlap, stream, stop=["cd", "the"], min_tokens=min_tokens)
    assert completion.text == text
    assert len(completion.token_ids) > min_tokens


@both_ways
@pytest.mark.parametrize("include", [False, True])
def test_eos_stays_in_the_tokens(include, overlap, stream):
    completion = run(overlap, stream, include_stop_str_in_output=include)
    assert ended(completion) == (TEXT, NUM_TOKENS, "stop", None)  # a special token is not shown
    assert completion.token_ids == list(SCRIPT[1:])
    shown = run(overlap, stream, include_stop_str_in_output=include, skip_special_tokens=False)
    assert ended(shown) == (TEXT + "</s>" * include, NUM_TOKENS, "stop", None)


@both_ways
@pytest.mark.parametrize("include", [False, True])
def test_stop_tokens_stay_in_the_tokens(include, overlap, stream):
    completion = run(
        overlap, stream, stop_token_ids=[THE, ord("p")], include_stop_str_in_output=include
    )
    assert ended(completion) == ("bcdef日g" + "the" * include, tokens_up_to("t"), "stop", THE)
    assert completion.token_ids[-1] == THE
    first = run(overlap, stream, stop_token_ids=[ord("b")], include_stop_str_in_output=include)
    assert ended(first) == ("b" * include, 1, "stop", ord("b"))
    inside = run(overlap, stream, stop_token_ids=["日".encode()[1]])
    assert ended(inside) == ("bcdef�", 7, "stop", "日".encode()[1]), (
        "a character cut in the middle is shown as such"
    )


@both_ways
def test_eos_then_stop_tokens_then_length_then_stop_strings(overlap, stream):
    assert ended(run(overlap, stream, stop_token_ids=[EOS]))[2:] == ("stop", None)
    assert ended(run(overlap, stream, stop_token_ids=[EOS], max_tokens=NUM_TOKENS))[2:] == (
        "stop",
        None,
    )
    assert ended(run(overlap, stream, stop_token_ids=[ord("d")], max_tokens=3)) == (
        "bc",
        3,
        "stop",
        ord("d"),
    )
    assert ended(run(overlap, stream, max_tokens=3)) == ("bcd", 3, "length", None)
    assert ended(run(overlap, stream, stop=["cd"], max_tokens=3)) == ("b", 3, "stop", "cd")
    assert ended(run(overlap, stream, max_tokens=1)) == ("b", 1, "length", None)


@both_ways
def test_min_tokens_forbids_the_end(overlap, stream):
    # The script forbidden, the model has no preference, and the lowest id is as good as any.
    completion = run(overlap, stream, min_tokens=12, stop_token_ids=[THE], max_tokens=14)
    assert completion.token_ids[:9] == [*SCRIPT[1:10]]
    assert THE not in completion.token_ids[:12]
    assert len(completion.token_ids) >= 12
    longer = run(overlap, stream, min_tokens=NUM_TOKENS + 2, max_tokens=40)
    assert EOS not in longer.token_ids[: NUM_TOKENS + 2]
    assert longer.token_ids[: NUM_TOKENS - 1] == [*SCRIPT[1:-1]]


@both_ways
def test_ignore_eos(overlap, stream):
    completion = run(overlap, stream, ignore_eos=True, max_tokens=NUM_TOKENS + 5)
    assert completion.token_ids[:NUM_TOKENS] == list(SCRIPT[1:])
    assert (len(completion.token_ids), completion.finish_reason) == (NUM_TOKENS + 5, "length")
    stopped = run(overlap, stream, ignore_eos=True, stop_token_ids=[EOS])
    assert ended(stopped) == (TEXT, NUM_TOKENS, "stop", EOS)


@both_ways
def test_max_tokens_none_runs_to_max_model_len(overlap, stream):
    prompt = random_prompts([500], vocab_size=97)[0]
    completion = run(overlap, stream, prompt=prompt, max_tokens=None, ignore_eos=True)
    assert (len(completion.token_ids), completion.finish_reason) == (12, "length")
    more = run(overlap, stream, prompt=prompt, max_tokens=400, ignore_eos=True)
    assert (len(more.token_ids), more.finish_reason) == (12, "length")


@both_ways
def test_detokenize_off_and_special_tokens_shown(overlap, stream):
    assert ended(run(overlap, stream, detokenize=False)) == ("", NUM_TOKENS, "stop", None)
    start = {"logit_bias": {BOS: 100.0}, "max_tokens": 2}
    assert run(overlap, stream, **start).text == ""
    assert run(overlap, stream, skip_special_tokens=False, **start).text == "<s><s>"


def test_further_eos_ids_of_the_generation_config_count_as_eos(tmp_path):
    import json
    import shutil

    folder = shutil.copytree(scripted_model(SCRIPT), tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [THE, EOS]}))
    llm = make_llm(str(folder))
    params = SamplingParams(temperature=0, max_tokens=64)
    assert ended(llm.generate("a", params, use_tqdm=False)[0].outputs[0]) == (
        "bcdef日g",
        tokens_up_to("t"),
        "stop",
        None,
    )
    params.ignore_eos = True
    params.max_tokens = 12
    assert llm.generate("a", params, use_tqdm=False)[0]["token_ids"] == list(SCRIPT[1:13])


@pytest.mark.parametrize("overlap", [False, True])
def test_each_completion_of_a_request_ends_for_itself(overlap):
    llm = shared_llm(async_scheduling=overlap)
    (prompt,) = random_prompts([10], seed=31)
    params = SamplingParams(
        n=8, max_tokens=30, seed=5, stop_token_ids=[40, 41, 42, 43, 44, 45], stop=["a", "Z", "!"]
    )
    (out,) = llm.generate([prompt], params, use_tqdm=False)
    free = params.clone()
    free.stop, free.stop_token_ids, free.ignore_eos = [], [], True
    (whole,) = llm.generate([prompt], free, use_tqdm=False)
    reasons = set()
    for completion, unstopped in zip(out.outputs, whole.outputs):
        tokens = unstopped.token_ids
        # These are tokens of one letter.
        ends = [EOS, *params.stop_token_ids, *(ord(stop) for stop in params.stop)]
        stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
        assert completion.token_ids == tokens[: stop + 1]
        reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length"}
    assert [completion.index for completion in out.outputs] == list(range(8))


@pytest.mark.parametrize("overlap", [False, True])
def test_stop_strings_of_real_text_cut_where_the_whole_text_has_them_first(overlap):
    """Brute force: decode one more token at a time until a stop string is in the text."""
    llm, tokenizer = shared_llm(async_scheduling=overlap), shared_llm().get_tokenizer()
    for prompt in random_prompts([6, 18, 33], seed=32):
        tokens = greedy(shared_model()[1], prompt, 40)
        tokens = tokens[: tokens.index(EOS)] if EOS in tokens else tokens
        ascii_runs = tokenizer.decode(tokens, skip_special_tokens=True).split("�")
        stops = sorted(
            {
                run[i : i + n]
                for run in ascii_runs
                for n in (1, 2, 3)
                for i in range(1, len(run) - n)
            }
        )[::3]
        if not stops:
            continue
        params = SamplingParams(temperature=0, max_tokens=len(tokens), stop=stops)
        completion = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0]
        for end in range(1, len(tokens) + 1):
            text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
            found = [(text.find(stop), stops.index(stop), stop) for stop in stops if stop in text]
            if found:
                start, _, stop = min(found)
                assert ended(completion) == (text[:start], end, "stop", stop)
                break
        else:
            assert completion.finish_reason == "length"
        assert_idle(llm)
