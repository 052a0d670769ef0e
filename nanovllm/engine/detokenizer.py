"""Token ids to text: a finished sequence at once, or a running one as its tokens come, with stop strings.

Knows a tokenizer and what the request wants shown; no engine, no torch.

Text is what `tokenizer.decode` adds to the prompt's text, so a space between prompt and output is kept and a character
that the prompt began and the output completes belongs to the output.

Byte-fallback tokens are the one exception. A decoder turns a whole run of them into U+FFFD when any part of the run is no
UTF-8, so it would take back characters that a stream has shown. Here each character of a run is text as soon as its last
byte is there, and each byte that is no part of a character is one U+FFFD. A run that is valid UTF-8 reads the same in both.
"""

from __future__ import annotations

import codecs
import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from nanovllm.sampling_params import SamplingParams

_REPLACEMENT = "\ufffd"  # what decoders show for bytes that are no character, or not yet one
# What kinds of tokens there are. A byte-fallback token is _TEXT too.
_TEXT, _SPECIAL, _NOTHING = range(3)
# Decoding may start this many tokens back and still decode the next ones right: an unfinished character has at most
# three bytes, hence at most three tokens, and one more keeps what decoders do to the very first token away from these.
_ANCHOR = 4


class Detokenizer:
    """One tokenizer's decoding. Remembers what it learnt of each token, so an engine keeps one per tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._kinds: dict[int, int] = {}
        self._token_texts: dict[int, str] = {}

    def text(
        self, params: SamplingParams, prompt_token_ids: Sequence[int], token_ids: Sequence[int], hide_last: bool = False
    ) -> str:
        """The whole text of generated `token_ids`, as an IncrementalDetokenizer without stop strings ends up with.

        hide_last: as in `IncrementalDetokenizer.feed`.
        """
        context = self.context(params, prompt_token_ids)
        prompt_text = self.decode(params, context)
        text = self.decode(params, [*context, *visible_part(params, token_ids, hide_last)])
        return text[_num_common(prompt_text, text) :]

    def token_text(self, token_id: int) -> str:
        """One token by itself, special or not, with the space that decoders strip from a text's first token."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._decode([token_id])
            if self.kind(token_id) == _TEXT and _REPLACEMENT not in text:
                # The second of two equal tokens is not the first token of its text.
                text = self._decode([token_id, token_id])[len(text) :]
            self._token_texts[token_id] = text
        return text

    def decode(self, params: SamplingParams, token_ids: Sequence[int]) -> str:
        """The text of the tokens, with each unfinished character as U+FFFD."""
        whole, begun = self.whole_characters(params, token_ids)
        return self.decode_whole(params, [*whole, *self.broken(begun)])

    def decode_whole(self, params: SamplingParams, token_ids: list[int]) -> str:
        """The text of tokens whose byte runs are valid UTF-8, as `whole_characters` gives them."""
        # Only slow tokenizers know the third argument, and its default is True.
        spaces = {} if params.spaces_between_special_tokens else {"spaces_between_special_tokens": False}
        return self._decode(token_ids, skip_special_tokens=params.skip_special_tokens, **spaces)

    def whole_characters(self, params: SamplingParams, token_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """(tokens whose byte runs are valid UTF-8, the byte tokens at the end that may begin a character).

        A byte that is no part of a character becomes the tokens of U+FFFD. Hidden tokens go, because bytes on both sides of
        one belong together.
        """
        if self.byte_tokens.keys().isdisjoint(token_ids):
            return list(token_ids), []
        whole: list[int] = []
        begun: list[int] = []
        for token_id in token_ids:
            if self.is_hidden(params, token_id):
                continue
            if token_id not in self.byte_tokens:
                whole += [*self.broken(begun), token_id]
                begun = []
                continue
            begun.append(token_id)
            while begun:
                text = begin_of_utf8(bytes(self.byte_tokens[i] for i in begun))
                if text:
                    whole += begun
                    begun = []
                elif text is None:
                    whole += self.broken(begun[:1])
                    begun = begun[1:]
                else:
                    break
        return whole, begun

    def broken(self, tokens: Sequence[int]) -> list[int]:
        """The tokens that show one U+FFFD for each of some byte tokens."""
        return self._replacement * len(tokens)

    def context(self, params: SamplingParams, prompt_token_ids: Sequence[int]) -> list[int]:
        """The tokens at the end of a prompt that the decoding of what follows may depend on."""
        context: list[int] = []
        for token_id in reversed(prompt_token_ids):
            if not self.is_hidden(params, token_id):
                context.append(token_id)
                if len(context) >= _ANCHOR and not self.continues_character(token_id):
                    break
        context.reverse()
        return context

    def continues_character(self, token_id: int) -> bool:
        """Whether the token is a byte that can only stand inside a UTF-8 character."""
        return 0x80 <= self.byte_tokens.get(token_id, 0) < 0xC0

    @cached_property
    def byte_tokens(self) -> dict[int, int]:
        """The byte-fallback tokens of the vocabulary, and the byte that each stands for."""
        names = [pattern % byte for byte in range(256) for pattern in ("<0x%02X>", "<0x%02x>")]
        found = {}
        for name, token_id in zip(names, self.tokenizer.convert_tokens_to_ids(names)):
            # A name that the vocabulary lacks has no id, or the unknown token's.
            is_known = token_id is not None and self.tokenizer.convert_ids_to_tokens(token_id) == name
            # A decoder that knows no bytes shows the name.
            if is_known and self._decode([token_id]) != name:
                found[token_id] = int(name[3:5], 16)
        return found

    @cached_property
    def _replacement(self) -> list[int]:
        """The byte tokens of U+FFFD; none where the vocabulary lacks one, and broken bytes then show nothing."""
        ids = {byte: token_id for token_id, byte in self.byte_tokens.items()}
        wanted = _REPLACEMENT.encode()
        return [ids[byte] for byte in wanted] if ids.keys() >= set(wanted) else []

    def kind(self, token_id: int) -> int:
        """_TEXT, _SPECIAL (skipped when special tokens are) or _NOTHING (no such token)."""
        kind = self._kinds.get(token_id)
        if kind is None:
            if self.tokenizer.convert_ids_to_tokens(token_id) is None:
                kind = _NOTHING
            elif self._decode([token_id]) and not self._decode([token_id], skip_special_tokens=True):
                kind = _SPECIAL
            else:
                kind = _TEXT
            self._kinds[token_id] = kind
        return kind

    def is_hidden(self, params: SamplingParams, token_id: int) -> bool:
        kind = self.kind(token_id)
        return kind == _NOTHING or (kind == _SPECIAL and params.skip_special_tokens)

    def _decode(self, token_ids: list[int], **options: bool) -> str:
        # The "clean up" of spaces before punctuation is no function of the tokens one after the other, and it is wrong for BPE.
        return self.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False, **options)


class StopMatch(NamedTuple):
    """The stop string that ended a sequence, and the number of generated tokens up to the one that completed it."""

    string: str
    num_tokens: int


class IncrementalDetokenizer:
    """The text of one running sequence, in time linear in its tokens.

    Invariant: `text` only ever grows by whole characters, until `finish` adds what stayed unfinished or a stop string
    cuts it; what `emitted` has shown is never taken back.

    Stop strings count once they complete after the first `min_tokens` generated tokens. Of those that complete with the same
    token, the match that begins first in the text wins; of those that begin together, the one listed first in `params.stop`.
    """

    def __init__(self, detokenizer: Detokenizer, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        self.text = ""
        self.stop_match: StopMatch | None = None
        self._detokenizer, self._params = detokenizer, params
        self._stops = [params.stop] if isinstance(params.stop, str) else params.stop or []
        self._num_tokens = 0
        self._num_searched = 0  # characters that cannot end a stop string any more
        self._num_delivered = 0  # characters that `delta` has returned
        self._finished = False
        # The last tokens, of which the first _num_shown characters are text already. Byte tokens wait in _begun until they are
        # a character.
        context = detokenizer.context(params, prompt_token_ids)
        self._prompt_text = detokenizer.decode(params, context)
        self._num_shown = 0
        self._window, self._begun = detokenizer.whole_characters(params, context)

    def feed(self, token_ids: Sequence[int], hide_last: bool = False) -> StopMatch | None:
        """Takes the next generated tokens, any number of them; returns the match as soon as they complete a stop string.

        Tokens after that one are dropped, and no more may be fed.
        hide_last: the last is the EOS or stop token that ended the sequence, which is not shown, or only with
        `include_stop_str_in_output`.
        """
        assert not self._finished, "a finished text takes no more tokens"
        for token_id in visible_part(self._params, token_ids, hide_last):
            self._num_tokens += 1
            if self._detokenizer.is_hidden(self._params, token_id):
                continue
            whole, self._begun = self._detokenizer.whole_characters(self._params, [*self._begun, token_id])
            self._window += whole
            if self._stops and self._search():
                return self.stop_match
        if not self._stops:
            self._settle()
        return None

    def finish(self) -> None:
        """No more tokens come: adds to `text` what was held back as unfinished, as the tokenizer decodes it."""
        if not self._finished:
            self._window += self._detokenizer.broken(self._begun)
            self._settle(last=True)
            self._finished = True

    def emitted(self) -> str:
        """The text that may be shown so far: all but a suffix that a stop string may still take back."""
        return self.text[: self._num_emitted()]

    def preview(self, token_id: int) -> str:
        """What `text` would gain by the token; nothing changes."""
        ahead = copy.copy(self)
        ahead._window = list(self._window)
        ahead.feed([token_id])
        return ahead.text[len(self.text) :]

    def delta(self) -> str:
        """What `emitted` has gained since the last call."""
        start, self._num_delivered = self._num_delivered, self._num_emitted()
        return self.text[start : self._num_delivered]

    def _num_emitted(self) -> int:
        if not self._finished and not self._params.include_stop_str_in_output:
            longest = max((len(stop) - 1 for stop in self._stops), default=0)
            for start in range(max(len(self.text) - longest, 0), len(self.text)):
                suffix = self.text[start:]
                if any(len(stop) > len(suffix) and stop.startswith(suffix) for stop in self._stops):
                    return start
        return len(self.text)

    def _settle(self, last: bool = False) -> None:
        """Moves the window's new characters into `text`, all but a last U+FFFD that may be a character's first bytes."""
        window_text = self._detokenizer.decode_whole(self._params, self._window)
        end = len(window_text) - (window_text.endswith(_REPLACEMENT) and not last)
        if not self.text:
            self._num_shown = _num_common(self._prompt_text, window_text[:end])
        self.text += window_text[self._num_shown : end]
        self._num_shown = end
        if self.text and len(self._window) > 3 * _ANCHOR:
            start = len(self._window) - _ANCHOR
            while start and self._detokenizer.continues_character(self._window[start]):
                start -= 1
            # Counted from the end, as the first token may look different where it is the first. Below 0 the last U+FFFD begins
            # before `start`: possible where the tokenizer shows nothing at all of an unfinished character that follows it.
            kept = self._detokenizer.decode_whole(self._params, self._window[start:])
            num_shown = len(kept) - (len(window_text) - end)
            if num_shown >= 0:
                self._window, self._num_shown = self._window[start:], num_shown

    def _search(self) -> bool:
        """Whether the last token completed a stop string; if so, cuts the text and finishes it."""
        self._settle()
        text = self.text
        matches: list[tuple[int, str]] = []
        if self._num_tokens > self._params.min_tokens:
            found = ((text.find(stop, max(self._num_searched - len(stop) + 1, 0)), stop) for stop in self._stops)
            matches = [(start, stop) for start, stop in found if start >= 0]
        self._num_searched = len(text)
        if not matches:
            return False
        start, stop = min(matches, key=lambda match: match[0])
        end = start + len(stop) if self._params.include_stop_str_in_output else start
        self.text = text[:end]
        self.stop_match, self._finished = StopMatch(stop, self._num_tokens), True
        return True


class TokenPieces:
    """`Logprob.decoded_token`: what each token of one sequence adds to its text.

    Invariant: the pieces of the tokens taken, and of no other, join to their text. A token that holds a part of a character
    adds nothing, and the token that completes the character adds all of it. A special token shows its name even where the
    text skips it.
    """

    def __init__(self, detokenizer: Detokenizer, params: SamplingParams, before: Sequence[int]) -> None:
        """before: the tokens that stand before the first one taken."""
        self._detokenizer, self._params = detokenizer, copy.copy(params)
        self._params.stop = None
        self._text = IncrementalDetokenizer(detokenizer, self._params, before)

    def other(self, token_id: int) -> str:
        """The piece of a token that could come next."""
        text = self._detokenizer.token_text(token_id)
        if self._is_special(token_id) or (text and _REPLACEMENT not in text):
            return text
        return self._text.preview(token_id)

    def take(self, token_id: int, last: bool = False) -> str:
        """The piece of the token that does come next. The last one adds what is left of an unfinished character."""
        self._text.feed([token_id])
        if last:
            self._text.finish()
        name = self._detokenizer.token_text(token_id) if self._is_special(token_id) else ""
        return self._text.delta() + name

    def _is_special(self, token_id: int) -> bool:
        return self._detokenizer.is_hidden(self._params, token_id)


def begin_of_utf8(data: bytes) -> str | None:
    """The character that `data` is; "" if more bytes may make it one; None if its first byte begins no character."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return None


def visible_part(params: SamplingParams, token_ids: Sequence[int], hide_last: bool) -> Sequence[int]:
    """`token_ids` less the token that ended the sequence, which goes with the stop strings: cut unless they are included."""
    return token_ids[:-1] if hide_last and not params.include_stop_str_in_output else token_ids


def _num_common(a: str, b: str) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
