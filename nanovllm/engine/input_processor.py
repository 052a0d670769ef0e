"""A prompt of any form and its parameters -> a checked `Request`. Knows no model.

Every check of a request runs here, because a refused request must change nothing.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceABC
from collections.abc import Set as SetABC
from hashlib import blake2b
from typing import cast

import numpy as np

from nanovllm.core.ability import Ability, ModelFacts
from nanovllm.core.adapter import Adapter
from nanovllm.core.lora import COLUMN, LoRA
from nanovllm.core.request import OutputQueue, Request
from nanovllm.core.sequence import Columns, Sequence
from nanovllm.engine.detokenizer import Tokenizer
from nanovllm.errors import ValidationError
from nanovllm.inputs import Tokenization, check_unicode
from nanovllm.lora.request import LoRARequest
from nanovllm.outputs import RequestMetrics
from nanovllm.sampling_params import RequestOutputKind, SamplingParams

BYTES = (bytes, bytearray, memoryview)  # iterables of integers that are no token ids


class InputProcessor:
    """Checks requests and makes their sequences.

    Invariant: bit i of a sequence's `abilities` stands for `self.abilities[i]`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        max_model_len: int,
        seed: int,
        abilities: SequenceABC[Ability],
        logits_processors: object | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.seed = seed
        self.abilities = abilities
        self.facts = ModelFacts(vocab_size, eos_token_ids, self._encode, logits_processors)
        self._request_numbers = itertools.count()
        self._seq_ids = itertools.count()

    def process(
        self,
        request_id: str,
        prompt: object,
        params: SamplingParams,
        *,
        max_logprobs: int,
        output_kind: RequestOutputKind | None = None,
        log_stats: bool = False,
        queue: OutputQueue | None = None,
        priority: int = 0,
        lora_request: LoRARequest | None = None,
        adapter: Adapter | None = None,
    ) -> Request:
        """The checked request. Raises TypeError or ValueError.

        `params` are cloned, because the caller may change or reuse them.
        max_logprobs: the largest accepted number of logprobs; -1 is no limit.
        output_kind: replaces the one of `params`.
        log_stats: whether the request has `RequestMetrics`.
        priority: lower runs first, with scheduling_policy="priority".
        adapter: the adapter of `lora_request`, in the form that the engine knows.
        """
        if not isinstance(request_id, str):
            raise TypeError(f"request_id={request_id!r} must be a str")
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams, got {type(params).__name__}")
        params = params.clone()
        params.output_kind = output_kind or params.output_kind
        params.verify()
        seed_of_hashes = hash_seed(cache_salt_of(prompt), adapter)
        how = Tokenization(truncate_prompt_tokens=params.truncate_prompt_tokens)
        text, tokens = self.tokenize(prompt, how)
        params.verify_for_model(
            self.vocab_size, max_logprobs, self.tokenizer is not None, self._tokenizer_knows
        )
        seqs = self._sequences(params, tokens, self._prepared(params, adapter), adapter)
        for seq in seqs:
            seq.hash_seed = seed_of_hashes
            seq.priority = priority
        return Request(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=tokens.tolist(),
            params=params,
            seqs=seqs,
            lora_request=lora_request,
            metrics=RequestMetrics(arrival_time=time.monotonic()) if log_stats else None,
            queue=queue,
        )

    def _prepared(self, params: SamplingParams, adapter: Adapter | None) -> dict[str, object]:
        """What the abilities that a request uses keep of it, by their names."""
        prepared = {} if adapter is None else adapter_columns(adapter)
        for ability in self.abilities:
            state = ability.prepare(params, self.facts)
            if state is not None:
                prepared[ability.name] = state
        check_candidates(params, self.vocab_size, prepared)
        return prepared

    def _sequences(
        self,
        params: SamplingParams,
        tokens: np.ndarray,
        prepared: Mapping[str, object],
        adapter: Adapter | None,
    ) -> list[Sequence]:
        number = next(self._request_numbers)
        longest = self.max_model_len - len(tokens)
        seqs = []
        for index in range(params.n):
            used = {}
            abilities = 0
            needs_previous_token = False
            for bit, ability in enumerate(self.abilities):
                is_used = index == 0 or not ability.first_completion_only
                if is_used and ability.name in prepared:
                    state = prepared[ability.name]
                    used[ability.name] = state
                    abilities |= 1 << bit
                    needs_previous_token |= ability.needs_previous_token(state)
            seq = Sequence(
                seq_id=next(self._seq_ids),
                params=params,
                token_ids=tokens,
                end=len(tokens) + min(params.max_tokens or longest, longest),
                request_number=number,
                seed=self._sequence_seed(params.seed, number, index),
                stop_token_ids=frozenset(params.stop_token_ids or ()),
                needs_previous_token=needs_previous_token,
                reads_cache=params.reads_prefix_cache or index > 0,
                abilities=abilities,
                prepared=used,
                adapter=adapter,
            )
            seqs.append(seq)
        return seqs

    def _sequence_seed(self, seed: int | None, number: int, index: int) -> int:
        """64 random bits for one sequence, from the request's seed or else the engine's.

        The two kinds of spawn keys differ in length, so their results are independent.
        """
        if seed is None:
            sequence = np.random.SeedSequence(self.seed % 2**64, spawn_key=(number, index))
        else:
            sequence = np.random.SeedSequence(seed % 2**64, spawn_key=(index,))
        return int(sequence.generate_state(1, np.uint64)[0])

    # -- text and token ids ------------------------------------------------------------------------

    def tokenize(
        self, prompt: object, how: Tokenization = Tokenization()
    ) -> tuple[str | None, np.ndarray]:
        """A prompt of any form -> (text to echo or None, token ids [num_tokens] int32).

        Raises TypeError or ValueError.
        """
        text: object = None
        token_ids: object = None
        if isinstance(prompt, str):
            text = prompt
        elif isinstance(prompt, Mapping):
            text, token_ids = read_dict(prompt)
        else:
            token_ids = prompt
        if token_ids is None:
            token_ids = self._encode_prompt(text, how)
        tokens = as_token_ids(token_ids)
        kept = tokens[how.kept(len(tokens), self.max_model_len)]
        echoed = text if isinstance(text, str) else None
        return echoed, self._checked(kept)

    def _encode_prompt(self, text: object, how: Tokenization) -> list[int]:
        if not isinstance(text, str):
            raise TypeError(f"prompt: text must be a str, got {type(text).__name__}")
        if self.tokenizer is None:
            raise ValidationError(
                "prompt: text needs a tokenizer, and skip_tokenizer_init=True leaves none; "
                "accepted are token ids"
            )
        check_unicode("prompt", text)
        return self.tokenizer.encode(how.text(text), add_special_tokens=how.add_special_tokens)

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        """Token ids as int32. Raises ValidationError for a bad id or a bad length."""
        if not len(tokens):
            raise ValidationError("prompt: it has no tokens; at least one is needed")
        outside = (tokens < 0) | (tokens >= self.vocab_size)
        if outside.any():
            raise ValidationError(
                f"prompt: token id {tokens[outside][0]} is outside the vocabulary, "
                f"0..{self.vocab_size - 1}"
            )
        if len(tokens) >= self.max_model_len:
            raise ValidationError(
                f"prompt: it has {len(tokens)} tokens, and max_model_len={self.max_model_len} must "
                "hold it and at least one new token"
            )
        return tokens.astype(np.int32)

    def _encode(self, text: str) -> list[int]:
        assert self.tokenizer is not None, "verify_for_model refuses text without a tokenizer"
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _tokenizer_knows(self, token_id: int) -> bool:
        """Whether the tokenizer has a token of that id."""
        if self.tokenizer is None or token_id >= 2**31:
            return False
        try:
            return self.tokenizer.convert_ids_to_tokens(token_id) is not None
        except (IndexError, KeyError, ValueError, OverflowError):  # from slow tokenizers
            return False


def adapter_columns(adapter: Adapter) -> dict[str, object]:
    """What a sequence keeps for its LoRA adapter."""
    return {LoRA.name: Columns({COLUMN: adapter.number})}


def check_candidates(
    params: SamplingParams, vocab_size: int, prepared: Mapping[str, object]
) -> None:
    """Raises ValidationError if the request's parameters forbid every token."""
    bad_words = cast(list[tuple[int, ...]], prepared.get("bad_words", []))
    banned = {word[0] for word in bad_words if len(word) == 1}
    banned.update(cast(list[int], prepared.get("min_tokens", [])))
    biases = (params.logit_bias or {}).items()
    banned.update(token for token, bias in biases if bias == -np.inf)
    if params.allowed_token_ids is None:
        num_left = vocab_size - len(banned)
    else:
        num_left = len(set(params.allowed_token_ids) - banned)
    if num_left:
        return
    names = ("allowed_token_ids", "bad_words", "logit_bias", "min_tokens")
    given = [f"{name}={str(getattr(params, name))[:60]}" for name in names if getattr(params, name)]
    raise ValidationError(
        f"{', '.join(given)}: together they leave no token that may be sampled; "
        "at least one must stay allowed"
    )


# -- the forms of prompts --------------------------------------------------------------------------


def read_dict(prompt: Mapping[str, object]) -> tuple[object, object]:
    """The text and the token ids of a dict. One of them may be None."""
    text = prompt.get("prompt")
    token_ids = prompt.get("prompt_token_ids")
    if is_given(prompt.get("prompt_embeds")):
        raise ValidationError(
            "prompt: prompt_embeds are not supported, because prompts are token ids in the cache "
            "and in the model; accepted are 'prompt' and 'prompt_token_ids'"
        )
    if text is None and token_ids is None:
        raise TypeError(
            f"prompt: a dict needs 'prompt' or 'prompt_token_ids', got the keys {list(prompt)}"
        )
    known = ("prompt", "prompt_token_ids", "cache_salt")
    unknown = [key for key in prompt if key not in known and is_given(prompt[key])]
    if unknown:
        raise ValidationError(
            f"prompt: {unknown} are not supported; accepted are 'prompt', 'prompt_token_ids' and "
            "'cache_salt'"
        )
    return text, token_ids


def cache_salt_of(prompt: object) -> str | None:
    """The `cache_salt` of a prompt. Raises TypeError or ValidationError for a bad one."""
    salt = prompt.get("cache_salt") if isinstance(prompt, Mapping) else None
    if salt is None:
        return None
    if not isinstance(salt, str):
        raise TypeError(f"prompt: cache_salt must be a str, got {type(salt).__name__}")
    if not salt:
        raise ValidationError("prompt: cache_salt must have at least one character; got ''")
    check_unicode("cache_salt", salt)
    return salt


def hash_seed(salt: str | None, adapter: Adapter | None) -> int:
    """Where the hash chain of a prompt's blocks starts.

    64 bits of the salt and the adapter. Without a salt it is the number of the adapter, and
    without both it is 0.
    """
    number = 0 if adapter is None else adapter.number
    if salt is None:
        return number
    contents = f"{number} {salt}".encode()
    return int.from_bytes(blake2b(contents, digest_size=8).digest(), "little")


def as_prompts(prompts: object, prompt_token_ids: object) -> list[object]:
    """One prompt or many -> a list of prompts. Raises TypeError or ValueError.

    prompt_token_ids: the token ids of the prompts, a former argument of vLLM.
    """
    texts = None if prompts is None else as_list(prompts)
    if prompt_token_ids is None:
        if texts is None:
            raise TypeError(
                "prompts is missing: give a str, a list of token ids, a dict, or a list of these"
            )
        return texts
    ids = as_list(prompt_token_ids)
    if texts is None:
        return ids
    if len(texts) != len(ids):
        raise ValidationError(
            f"prompts has {len(texts)} items and prompt_token_ids {len(ids)}; "
            "the lengths must be equal"
        )
    return [{"prompt": text, "prompt_token_ids": tokens} for text, tokens in zip(texts, ids)]


def as_list(prompts: object) -> list[object]:
    """One prompt or many -> a list of prompts. Raises TypeError for another type."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if isinstance(prompts, (*BYTES, SetABC)) or not isinstance(prompts, Iterable):
        raise TypeError(
            "prompts must be a str, a list of token ids, a dict or a list of these; "
            f"got {prompts!r}"
        )
    num_dims = array_dims(prompts)
    if num_dims == 0:
        return [prompts]  # `tokenize` refuses a number
    items = list(prompts)
    if num_dims == 1:
        return [prompts] if items else []
    # Token ids have __index__, numpy's and torch's too. Arrays have it as well.
    is_flat = bool(items) and hasattr(items[0], "__index__") and getattr(items[0], "ndim", 0) == 0
    return [items] if is_flat else items


def array_dims(value: object) -> int | None:
    """The number of dimensions of an array or tensor of numbers, else None."""
    if not (hasattr(value, "ndim") and hasattr(value, "dtype")):
        return None
    is_number = getattr(value.dtype, "kind", "i") not in "OUST"
    return value.ndim if is_number else None


def as_token_ids(token_ids: object) -> np.ndarray:
    """Token ids of any integer type -> an array [num_tokens]. Raises TypeError."""
    tokens = token_ids
    if hasattr(token_ids, "tolist") and not isinstance(token_ids, (np.ndarray, memoryview)):
        tokens = token_ids.tolist()  # a torch tensor, maybe on a GPU
    try:
        array = np.asarray(tokens)
    except ValueError:  # nested lists of different lengths
        array = np.empty(0, object)
    is_flat = array.ndim == 1 and (len(array) == 0 or array.dtype.kind in "iu")
    if array.dtype == object or not is_flat or isinstance(token_ids, BYTES):
        kind = getattr(token_ids, "dtype", type(token_ids).__name__)
        raise TypeError(
            f"prompt: token ids must be a flat list of int, got {str(token_ids)[:80]} ({kind})"
        )
    return array


def is_given(value: object) -> bool:
    """Whether an optional part of a prompt is neither None nor False nor empty."""
    try:
        return bool(value)
    except (ValueError, RuntimeError):  # an array of several numbers has no truth value
        return True


def check_priority(priority: object) -> None:
    """Raises TypeError unless `priority` is an int."""
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise TypeError(f"priority must be an int or a list of int; got {priority!r}")


def as_priorities(priority: object, count: int, policy: str) -> list[int]:
    """One priority or one for each prompt -> a list of `count`.

    None stands for 0. Raises ValidationError or TypeError, also for another value than 0
    without the policy "priority".
    """
    if priority is None:
        return [0] * count
    if isinstance(priority, SequenceABC) and not isinstance(priority, str):
        if len(priority) != count:
            raise ValidationError(
                f"priority has {len(priority)} items for {count} prompts; the numbers must be equal"
            )
        found = list(priority)
    else:
        found = [priority] * count
    for value in found:
        check_priority(value)
    if any(found) and policy != "priority":
        raise ValidationError(
            f"priority={priority!r} needs LLM(scheduling_policy='priority'); "
            f"scheduling_policy={policy!r} runs requests in order of arrival, and accepts 0"
        )
    return found


def pair(
    prompts: list[object], params: object, default: Callable[[], SamplingParams]
) -> list[tuple[object, SamplingParams]]:
    """Each prompt with its sampling parameters. Raises TypeError or ValueError.

    params: one SamplingParams for all, a list with one for each, or None for `default()`.
    """
    if params is None:
        params = default()
    if isinstance(params, SamplingParams):
        return [(prompt, params) for prompt in prompts]
    if not isinstance(params, SequenceABC):
        raise TypeError(
            f"sampling_params must be SamplingParams or a list of them, got {type(params).__name__}"
        )
    if len(params) != len(prompts):
        raise ValidationError(
            f"sampling_params has {len(params)} items for {len(prompts)} prompts; "
            "the numbers must be equal"
        )
    return list(zip(prompts, params))
