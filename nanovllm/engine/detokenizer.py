"""Token ids -> text: of a finished sequence at once, or of a running one token by token.

It also finds stop strings. It knows a tokenizer and sampling parameters, and no engine.
"""

from __future__ import annotations

import codecs
import copy
from collections.abc import Sequence
from enum import Enum
from functools import cached_property
from typing import NamedTuple, Protocol

from nanovllm.sampling_params import SamplingParams

REPLACEMENT = "\ufffd"  # decoders show it for bytes that are no character, or not yet one
# A character has at most four bytes, hence at most three tokens before it is complete.
# One more token precedes these, because decoders treat the first token differently.
NUM_CONTEXT_TOKENS = 4


class Tokenizer(Protocol):
    """The methods of a Hugging Face tokenizer that the engine calls."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def decode(self, token_ids: list[int], **options: bool) -> str: ...
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int | None]: ...
    def convert_ids_to_tokens(self, ids: int) -> str | None: ...


class Kind(Enum):
    """Kinds of token ids."""

    TEXT = "text"  # byte-fallback tokens included
    SPECIAL = "special"  # `skip_special_tokens` hides it
    UNKNOWN = "unknown"  # the tokenizer has no such token


class Detokenizer:
    """Decodes with one tokenizer, and caches facts of its tokens.

    The text of generated tokens is the text that they add to the decoded prompt. It keeps
    the space between prompt and output. A character that the prompt begins and the output
    completes belongs to the output.

    Byte-fallback tokens differ from `tokenizer.decode`, which shows a whole run of them
    as U+FFFD if any part is no UTF-8. Here each complete character of a run is text at
    once, and each byte of no character is one U+FFFD, because a stream cannot take
    characters back. A run of valid UTF-8 is the same in both.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._kinds: dict[int, Kind] = {}
        self._token_texts: dict[int, str] = {}

    def text(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        token_ids: Sequence[int],
        hide_last: bool = False,
    ) -> str:
        """The text of generated `token_ids`, equal to that of IncrementalDetokenizer.

        Does not search stop strings. hide_last: as in `IncrementalDetokenizer.feed`.
        """
        context = self.context(params, prompt_token_ids)
        prompt_text = self.decode(params, context)
        text = self.decode(params, [*context, *visible_part(params, token_ids, hide_last)])
        return text[len_common_prefix(prompt_text, text) :]

    def token_text(self, token_id: int) -> str:
        """The text of one token alone, special tokens included.

        It keeps a leading space, which decoders strip from the first token of a text.
        """
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._decode([token_id])
            if self.kind(token_id) is Kind.TEXT and REPLACEMENT not in text:
                # The second of two equal tokens is not the first of its text.
                text = self._decode([token_id, token_id])[len(text) :]
            self._token_texts[token_id] = text
        return text

    def decode(self, params: SamplingParams, token_ids: Sequence[int]) -> str:
        """The text of the tokens, with each unfinished character as U+FFFD."""
        whole, unfinished = self.whole_characters(params, token_ids)
        return self.decode_whole(params, [*whole, *self.replacements(unfinished)])

    def decode_whole(self, params: SamplingParams, token_ids: list[int]) -> str:
        """The text of tokens from `whole_characters`, whose byte runs are valid UTF-8."""
        options = {"skip_special_tokens": params.skip_special_tokens}
        if not params.spaces_between_special_tokens:
            options["spaces_between_special_tokens"] = False  # only slow tokenizers accept this
        return self._decode(token_ids, **options)

    def whole_characters(
        self, params: SamplingParams, token_ids: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """(tokens with byte runs of valid UTF-8, byte tokens of an unfinished character).

        Bytes of no character become the byte tokens of U+FFFD. Hidden tokens are left
        out, because the bytes before and after a hidden token belong together.
        """
        if self.byte_tokens.keys().isdisjoint(token_ids):
            return list(token_ids), []
        whole: list[int] = []
        unfinished: list[int] = []
        for token_id in token_ids:
            if self.is_hidden(params, token_id):
                continue
            if token_id not in self.byte_tokens:
                whole += self.replacements(unfinished)
                whole.append(token_id)
                unfinished = []
                continue
            unfinished.append(token_id)
            while unfinished:
                text = decode_utf8(bytes(self.byte_tokens[i] for i in unfinished))
                if text:
                    whole += unfinished
                    unfinished = []
                elif text is None:
                    whole += self.replacements(unfinished[:1])
                    unfinished = unfinished[1:]
                else:
                    break
        return whole, unfinished

    def replacements(self, tokens: Sequence[int]) -> list[int]:
        """The byte tokens of one U+FFFD for each of `tokens`."""
        return self._replacement * len(tokens)

    def context(self, params: SamplingParams, prompt_token_ids: Sequence[int]) -> list[int]:
        """The last tokens of a prompt, on which the text of later tokens may depend."""
        context: list[int] = []
        for token_id in reversed(prompt_token_ids):
            if not self.is_hidden(params, token_id):
                context.append(token_id)
                if len(context) >= NUM_CONTEXT_TOKENS and not self.continues_character(token_id):
                    break
        context.reverse()
        return context

    def continues_character(self, token_id: int) -> bool:
        """Whether the token is a continuation byte of UTF-8."""
        return 0x80 <= self.byte_tokens.get(token_id, 0) < 0xC0

    @cached_property
    def byte_tokens(self) -> dict[int, int]:
        """The byte-fallback tokens of the vocabulary: token id -> byte."""
        names = [pattern % byte for byte in range(256) for pattern in ("<0x%02X>", "<0x%02x>")]
        found = {}
        for name, token_id in zip(names, self.tokenizer.convert_tokens_to_ids(names)):
            # A name outside the vocabulary has the id None, or the unknown token's.
            if token_id is None or self.tokenizer.convert_ids_to_tokens(token_id) != name:
                continue
            # A decoder without byte fallback shows the name.
            if self._decode([token_id]) != name:
                found[token_id] = int(name[3:5], 16)
        return found

    @cached_property
    def _replacement(self) -> list[int]:
        """The byte tokens of U+FFFD. Empty if the vocabulary lacks one of them."""
        ids = {byte: token_id for token_id, byte in self.byte_tokens.items()}
        encoded = REPLACEMENT.encode()
        if not ids.keys() >= set(encoded):
            return []
        return [ids[byte] for byte in encoded]

    def kind(self, token_id: int) -> Kind:
        kind = self._kinds.get(token_id)
        if kind is None:
            kind = self._find_kind(token_id)
            self._kinds[token_id] = kind
        return kind

    def _find_kind(self, token_id: int) -> Kind:
        if self.tokenizer.convert_ids_to_tokens(token_id) is None:
            return Kind.UNKNOWN
        shown = self._decode([token_id])
        if shown and not self._decode([token_id], skip_special_tokens=True):
            return Kind.SPECIAL
        return Kind.TEXT

    def is_hidden(self, params: SamplingParams, token_id: int) -> bool:
        """Whether the request's text leaves the token out."""
        kind = self.kind(token_id)
        return kind is Kind.UNKNOWN or (kind is Kind.SPECIAL and params.skip_special_tokens)

    def _decode(self, token_ids: list[int], **options: bool) -> str:
        # No clean up of spaces, because it changes characters that a stream has shown.
        return self.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False, **options)


class StopMatch(NamedTuple):
    """A completed stop string, and the number of generated tokens up to its last."""

    string: str
    num_tokens: int


class IncrementalDetokenizer:
    """The text of one running sequence, in time linear in its tokens.

    Invariant: `text` grows by whole characters. `emitted` never takes a character back.
    Only `finish` adds an unfinished character, and only a stop string shortens `text`.

    A stop string counts if it completes after the first `min_tokens` generated tokens. If
    several complete with the same token, the match that begins first wins, then the
    string that is listed first in `params.stop`.
    """

    def __init__(
        self, detokenizer: Detokenizer, params: SamplingParams, prompt_token_ids: Sequence[int]
    ) -> None:
        self.text = ""
        self.stop_match: StopMatch | None = None
        self._detokenizer = detokenizer
        self._params = params
        self._stops = [params.stop] if isinstance(params.stop, str) else params.stop or []
        self._num_tokens = 0
        self._num_searched = 0  # characters of `text` that `_search` has seen
        self._num_delivered = 0  # characters that `delta` has returned
        self._finished = False
        # The window holds the last tokens, and `text` has its first `_num_shown`
        # characters. The byte tokens of an unfinished character come after the window.
        context = detokenizer.context(params, prompt_token_ids)
        self._prompt_text = detokenizer.decode(params, context)
        self._num_shown = 0
        self._window, self._unfinished = detokenizer.whole_characters(params, context)

    def feed(self, token_ids: Sequence[int], hide_last: bool = False) -> StopMatch | None:
        """Adds generated tokens. Returns the match if they complete a stop string.

        Tokens after the stop string are dropped, and no further call is allowed.
        hide_last: the last token is the EOS or stop token that ended the sequence. It is
        shown only with `include_stop_str_in_output`.
        """
        assert not self._finished, "a finished text takes no more tokens"
        for token_id in visible_part(self._params, token_ids, hide_last):
            self._num_tokens += 1
            if self._detokenizer.is_hidden(self._params, token_id):
                continue
            whole, self._unfinished = self._detokenizer.whole_characters(
                self._params, [*self._unfinished, token_id]
            )
            self._window += whole
            if self._stops and self._search():
                return self.stop_match
        if not self._stops:
            self._decode_window()
        return None

    def finish(self) -> None:
        """Adds an unfinished character at the end, as the tokenizer decodes it."""
        if not self._finished:
            self._window += self._detokenizer.replacements(self._unfinished)
            self._decode_window(is_last=True)
            self._finished = True

    def emitted(self) -> str:
        """The text without a suffix that may begin a stop string."""
        return self.text[: self._num_emitted()]

    def preview(self, token_id: int) -> str:
        """The text that the token would add. Changes nothing."""
        clone = copy.copy(self)
        clone._window = list(self._window)
        clone.feed([token_id])
        return clone.text[len(self.text) :]

    def delta(self) -> str:
        """The part of `emitted()` that is new since the last call."""
        start = self._num_delivered
        self._num_delivered = self._num_emitted()
        return self.text[start : self._num_delivered]

    def _num_emitted(self) -> int:
        length = len(self.text)
        if self._finished or self._params.include_stop_str_in_output:
            return length
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for start in range(max(length - longest, 0), length):
            suffix = self.text[start:]
            if any(len(stop) > len(suffix) and stop.startswith(suffix) for stop in self._stops):
                return start
        return length

    def _decode_window(self, is_last: bool = False) -> None:
        """Adds the window's new characters to `text`.

        A U+FFFD at the end may be an unfinished character, so only the last call adds it.
        """
        window_text = self._detokenizer.decode_whole(self._params, self._window)
        end = len(window_text)
        if window_text.endswith(REPLACEMENT) and not is_last:
            end -= 1
        if not self.text:
            self._num_shown = len_common_prefix(self._prompt_text, window_text[:end])
        self.text += window_text[self._num_shown : end]
        self._num_shown = end
        if self.text and len(self._window) > 3 * NUM_CONTEXT_TOKENS:
            self._shorten_window(len(window_text) - end)

    def _shorten_window(self, num_not_shown: int) -> None:
        """Keeps the last tokens. num_not_shown: the window's characters not in `text`."""
        start = len(self._window) - NUM_CONTEXT_TOKENS
        while start and self._detokenizer.continues_character(self._window[start]):
            start -= 1
        window = self._window[start:]
        # Characters are counted from the end, because a first token may look different.
        num_shown = len(self._detokenizer.decode_whole(self._params, window)) - num_not_shown
        # Below 0 the unfinished U+FFFD begins before `start`. This happens if the
        # tokenizer shows nothing of an unfinished character after it.
        if num_shown >= 0:
            self._window = window
            self._num_shown = num_shown

    def _search(self) -> bool:
        """Whether the last token completed a stop string. If so, cuts the text."""
        self._decode_window()
        matches: list[tuple[int, str]] = []
        if self._num_tokens > self._params.min_tokens:
            for stop in self._stops:
                at = self.text.find(stop, max(self._num_searched - len(stop) + 1, 0))
                if at >= 0:
                    matches.append((at, stop))
        self._num_searched = len(self.text)
        if not matches:
            return False
        start, stop = min(matches, key=lambda match: match[0])
        end = start + len(stop) if self._params.include_stop_str_in_output else start
        self.text = self.text[:end]
        self.stop_match = StopMatch(stop, self._num_tokens)
        self._finished = True
        return True


class TokenPieces:
    """`Logprob.decoded_token`: the text that each token adds to its sequence.

    Invariant: the pieces of the taken tokens join to their text. A token that ends inside
    a character adds nothing of it, and the token that completes the character adds all of
    it. A special token's piece is its name, even if the text hides special tokens.
    """

    def __init__(
        self, detokenizer: Detokenizer, params: SamplingParams, before: Sequence[int]
    ) -> None:
        """before: the tokens before the first taken token."""
        self._detokenizer = detokenizer
        self._params = copy.copy(params)
        self._params.stop = None
        self._text = IncrementalDetokenizer(detokenizer, self._params, before)

    def other(self, token_id: int) -> str:
        """The piece of a candidate for the next token."""
        text = self._detokenizer.token_text(token_id)
        if self._is_hidden(token_id) or (text and REPLACEMENT not in text):
            return text
        return self._text.preview(token_id)

    def take(self, token_id: int, last: bool = False) -> str:
        """The piece of the next token. The last one adds an unfinished character too."""
        self._text.feed([token_id])
        if last:
            self._text.finish()
        name = self._detokenizer.token_text(token_id) if self._is_hidden(token_id) else ""
        return self._text.delta() + name

    def _is_hidden(self, token_id: int) -> bool:
        return self._detokenizer.is_hidden(self._params, token_id)


def decode_utf8(data: bytes) -> str | None:
    """One character; "" if `data` begins one; None if its first byte begins none."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return None


def visible_part(
    params: SamplingParams, token_ids: Sequence[int], hide_last: bool
) -> Sequence[int]:
    """The token ids without an EOS or stop token at the end.

    The token stays with `include_stop_str_in_output`, because it counts as a stop string.
    """
    if hide_last and not params.include_stop_str_in_output:
        return token_ids[:-1]
    return token_ids


def len_common_prefix(a: str, b: str) -> int:
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))
