"""Token ids to text: a finished sequence at once, or a running one as its tokens come, with stop strings.

Knows a tokenizer and what the request wants shown; no engine, no torch.

Text is what `tokenizer.decode` adds to the prompt's text, so a space between prompt and output is kept and a character
that the prompt began and the output completes belongs to the output.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from nanovllm.sampling_params import SamplingParams

_REPLACEMENT = "\ufffd"  # what decoders show for bytes that are no character, or not yet one
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# What kinds of tokens there are; 0 to 255 is the byte that a byte-fallback token stands for.
_TEXT, _SPECIAL, _NOTHING = 256, 257, 258
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
        """One token by itself, special or not: `Logprob.decoded_token`."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self._decode([token_id])
        return text

    def decode(self, params: SamplingParams, token_ids: list[int]) -> str:
        # Only slow tokenizers know the third argument, and its default is True.
        spaces = {} if params.spaces_between_special_tokens else {"spaces_between_special_tokens": False}
        return self._decode(token_ids, skip_special_tokens=params.skip_special_tokens, **spaces)

    def context(self, params: SamplingParams, prompt_token_ids: Sequence[int]) -> list[int]:
        """The tokens at the end of a prompt that the decoding of what follows may depend on."""
        context: list[int] = []
        for token_id in reversed(prompt_token_ids):
            if not self.is_hidden(params, token_id):
                context.append(token_id)
                if len(context) >= _ANCHOR and self.kind(token_id) == _TEXT:
                    break
        context.reverse()
        # Whole characters of a byte run at the end are done with; kept, they would turn into U+FFFD with an unfinished output.
        start = len(context)
        while start and self.kind(context[start - 1]) < _TEXT:
            start -= 1
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        utf8.decode(bytes(self.kind(i) for i in context[start:]))
        unfinished = len(utf8.getstate()[0])
        return context[:start] + context[len(context) - unfinished :]

    def kind(self, token_id: int) -> int:
        """The byte of a byte-fallback token, or _TEXT, _SPECIAL (skipped when special tokens are), _NOTHING (no such token)."""
        kind = self._kinds.get(token_id)
        if kind is None:
            token, text = self.tokenizer.convert_ids_to_tokens(token_id), self.token_text(token_id)
            byte = _BYTE_TOKEN.fullmatch(token) if isinstance(token, str) else None
            if token is None:
                kind = _NOTHING
            elif byte and text != token:
                kind = int(byte[1], 16)
            else:
                kind = _SPECIAL if text and not self._decode([token_id], skip_special_tokens=True) else _TEXT
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
        # The last tokens, of which the first _num_shown characters are text already. A byte run waits beside them until it ends:
        # decoders turn the whole run into U+FFFD when any part of it is no UTF-8.
        self._window = detokenizer.context(params, prompt_token_ids)
        self._prompt_text = detokenizer.decode(params, self._window)
        self._num_shown = 0
        self._run: list[int] = []
        while self._window and detokenizer.kind(self._window[-1]) < _TEXT:
            self._run.insert(0, self._window.pop())

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
            if self._detokenizer.kind(token_id) < _TEXT:
                self._run.append(token_id)
            else:
                self._window += [*self._run, token_id]
                self._run.clear()
            if self._stops and self._search():
                return self.stop_match
        if not self._stops:
            self._settle()
        return None

    def finish(self) -> None:
        """No more tokens come: adds to `text` what was held back as unfinished, as the tokenizer decodes it."""
        if not self._finished:
            self._window += self._run
            self._settle(last=True)
            self._finished = True

    def emitted(self) -> str:
        """The text that may be shown so far: all but a suffix that a stop string may still take back."""
        return self.text[: self._num_emitted()]

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
        window_text = self._detokenizer.decode(self._params, self._window)
        end = len(window_text) - (window_text.endswith(_REPLACEMENT) and not last)
        if not self.text:
            self._num_shown = _num_common(self._prompt_text, window_text[:end])
        self.text += window_text[self._num_shown : end]
        self._num_shown = end
        if self.text and len(self._window) > 3 * _ANCHOR:
            start = len(self._window) - _ANCHOR
            while start and self._detokenizer.kind(self._window[start]) < _TEXT:
                start -= 1
            # Counted from the end, as the first token may look different where it is the first. Below 0 the last U+FFFD begins
            # before `start`: possible where the tokenizer shows nothing at all of an unfinished character that follows it.
            num_shown = len(self._detokenizer.decode(self._params, self._window[start:])) - (len(window_text) - end)
            if num_shown >= 0:
                self._window, self._num_shown = self._window[start:], num_shown

    def _search(self) -> bool:
        """Whether the last token completed a stop string; if so, cuts the text and finishes it."""
        if not self._run:
            self._settle()
        try:
            text = self.text + bytes(self._detokenizer.kind(i) for i in self._run).decode()
        except UnicodeDecodeError:
            return False
        matches = []
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


def visible_part(params: SamplingParams, token_ids: Sequence[int], hide_last: bool) -> Sequence[int]:
    """`token_ids` less the token that ended the sequence, which goes with the stop strings: cut unless they are included."""
    return token_ids[:-1] if hide_last and not params.include_stop_str_in_output else token_ids


def _num_common(a: str, b: str) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
