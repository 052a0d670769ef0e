"""Makes a Hugging Face tokenizer from the metadata of a GGUF file.

The file holds the vocabulary and the merges. It only names the rule by which text is cut
into pieces before the merges (`tokenizer.ggml.pre`). SPLITS has the rule of each name:
the pre-tokenizer in the tokenizer.json of the original model, made of parts of the
package tokenizers. transformers can read a GGUF tokenizer too, but ignores that name. Its
ids then differ from the ids that the model was trained on.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from nanovllm.loader.fields import cause

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.decoders import Decoder
    from tokenizers.pre_tokenizers import PreTokenizer
    from tokenizers.processors import PostProcessor
    from transformers import PreTrainedTokenizerFast

    from nanovllm.loader.gguf import GGUF

logger = logging.getLogger("nanovllm")
CONTROL, USER_DEFINED = 3, 4  # kinds of tokens

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_SEED = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = _CASED % ("", "") + r"\p{N}" + _CASED_REST
_GPT4O = _CASED % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?") + r"\p{N}{1,3}" + _CASED_REST
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")
# llama.cpp's rule for a file without a rule: punctuation, words, then three digits.
_DEFAULT = (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9]{3}")
# Name of the rule -> patterns. Each pattern cuts the pieces that the pattern before it
# left. Text that no pattern matches is a piece too.
SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
        (_LLAMA3,),
    ),
    **dict.fromkeys(("smaug-bpe", "dbrx"), (_LLAMA3,)),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "hunyuan", "stablelm2"), (_QWEN2,)
    ),
    "tekken": (_TEKKEN,),
    "seed-coder": (_SEED,),
    **dict.fromkeys(("llama4", "gpt-4o", "kanana2"), (_GPT4O,)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK3),
    "deepseek-coder": _DEEPSEEK_CODER,
    **dict.fromkeys(("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4"), (_GPT2,)),
    **dict.fromkeys(("mpt", "olmo", "jais", "trillion"), (_GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", _GPT2)
    ),
    "minerva-7b": (r"\p{N}", _GPT2),
    "default": _DEFAULT,
}
# These tokenizers take a piece that is in the vocabulary as one token, without merges.
# They also put BOS before a text, unless the file says otherwise.
WHOLE_PIECES = (
    "llama-bpe",
    "llama3",
    "llama-v3",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "tekken",
)
# These tokenizers compose characters (Unicode NFC) before they cut a text.
COMPOSED = ("qwen2", "deepseek-r1-qwen")
# Name of a special token in transformers -> its name in the metadata.
SPECIAL_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


class GGUFTokenizer:
    """The four methods of a tokenizer that the engine calls. They do what transformers does.

    The import of transformers takes longer than the start of a small model, so it waits
    until a client asks for the whole tokenizer (docs/experiments.md).
    """

    def __init__(
        self, tokenizer: Tokenizer, special_tokens: dict[str, str], chat_template: str | None
    ) -> None:
        """special_tokens: the name of a special token in transformers ("bos", ...) -> its text."""
        self.tokenizer = tokenizer
        self.special_tokens = special_tokens
        self.chat_template = chat_template

    @property
    def eos_token_id(self) -> int | None:
        eos = self.special_tokens.get("eos")
        return None if eos is None else self.tokenizer.token_to_id(eos)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool = False, **options: bool
    ) -> str:
        """options: no effect, because BPE has no spaces to clean up or to add."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int | None]:
        return [self.tokenizer.token_to_id(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        return self.tokenizer.id_to_token(ids)

    def to_transformers(self) -> PreTrainedTokenizerFast:
        """The tokenizer of transformers. It takes over `tokenizer`: use only the result."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=_HandOver(self.tokenizer),
            chat_template=self.chat_template,
            clean_up_tokenization_spaces=False,
            **{f"{name}_token": text for name, text in self.special_tokens.items()},
        )


class _HandOver:
    """Gives a tokenizer to transformers without a copy.

    transformers deep-copies the tokenizer that it is given, which is slow, and nothing
    else uses this tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __deepcopy__(self, memo: dict[int, object]) -> Tokenizer:
        return self.tokenizer


def load_tokenizer(file: GGUF) -> GGUFTokenizer:
    """Raises ValueError for an unknown type of tokenizer, or an unknown rule of cutting."""
    model = required(file, "tokenizer.ggml.model")
    tokens = required(file, "tokenizer.ggml.tokens")
    if model == "gpt2":
        tokenizer = byte_level_bpe(file, tokens)
        adds_bos = file.get("tokenizer.ggml.pre") in WHOLE_PIECES
    elif model == "llama":
        tokenizer = sentencepiece_bpe(file, tokens)
        adds_bos = True
    else:
        raise ValueError(
            f"{file.path} has a tokenizer of type {model!r}, not 'gpt2' or 'llama': pass tokenizer="
        )
    special = special_ids(file, tokens)
    add_special_tokens(file, tokens, set(special.values()), tokenizer)
    tokenizer.post_processor = bos_and_eos(file, tokens, special, adds_bos)
    return GGUFTokenizer(
        tokenizer,
        special_tokens={name: tokens[token_id] for name, token_id in special.items()},
        chat_template=file.get("tokenizer.chat_template"),
    )


def required(file: GGUF, key: str) -> Any:
    """A field of the metadata. Raises ValueError if the file lacks it, or if it is empty."""
    value = file.get(key)
    if not value:
        raise ValueError(
            f"{file.path} has no {key!r} in its metadata; pass tokenizer= the name or folder of "
            "the original model, or skip_tokenizer_init=True and token ids as prompts"
        )
    return value


def add_special_tokens(
    file: GGUF, tokens: list[str], special: set[int], tokenizer: Tokenizer
) -> None:
    """Tells the tokenizer which tokens are never cut: control and user-defined tokens.

    special: ids of further tokens that transformers takes for control tokens.
    """
    from tokenizers import AddedToken

    control, user_defined = [], []
    for token_id, (token, kind) in enumerate(zip(tokens, file.token_kinds)):
        if kind == CONTROL or (kind != USER_DEFINED and token_id in special):
            control.append(AddedToken(token, special=True, normalized=False))
        elif kind == USER_DEFINED:
            user_defined.append(AddedToken(token, special=False, normalized=False))
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(user_defined)


def special_ids(file: GGUF, tokens: list[str]) -> dict[str, int]:
    """Name of a special token in transformers ("bos", ...) -> its id in the file."""
    found = {}
    for name, key in SPECIAL_NAMES.items():
        token_id = file.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and token_id < len(tokens):
            found[name] = token_id
    return found


def bos_and_eos(
    file: GGUF, tokens: list[str], special: dict[str, int], adds_bos: bool
) -> PostProcessor:
    """Puts BOS before a text and EOS after it, as the file says.

    adds_bos: whether BOS is added if the file does not say.
    """
    from tokenizers import processors

    parts = ["$A"]
    used = []
    if "bos" in special and file.get("tokenizer.ggml.add_bos_token", adds_bos):
        parts.insert(0, tokens[special["bos"]])
        used.append("bos")
    if "eos" in special and file.get("tokenizer.ggml.add_eos_token", False):
        parts.append(tokens[special["eos"]])
        used.append("eos")
    return processors.TemplateProcessing(
        single=parts, special_tokens=[(tokens[special[name]], special[name]) for name in used]
    )


def byte_level_bpe(file: GGUF, tokens: list[str]) -> Tokenizer:
    """The tokenizers of GPT-2, Llama 3, Qwen and others: BPE over the bytes of UTF-8."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = file.get("tokenizer.ggml.pre") or "default"
    if pre not in SPLITS:
        raise ValueError(
            f"{file.path} cuts text as {pre!r} does (tokenizer.ggml.pre), known are "
            f"{', '.join(SPLITS)}; pass tokenizer= the name or folder of the original model"
        )
    if pre == "default":
        logger.warning(
            "%s does not say how its tokenizer cuts text (tokenizer.ggml.pre): it is cut by "
            "llama.cpp's default, which may differ from the model's own; pass tokenizer= the name "
            "or folder of the original model",
            file.path,
        )
    merges = [tuple(merge.split(" ")) for merge in required(file, "tokenizer.ggml.merges")]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=pre in WHOLE_PIECES)
    except Exception as err:  # tokenizers raises no narrower type
        raise ValueError(
            f"{file.path}: tokenizer.ggml.merges cannot be used ({cause(err)}); pass tokenizer= "
            "the name or folder of the original model"
        ) from err
    tokenizer = Tokenizer(model)
    steps: list[PreTokenizer] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in SPLITS[pre]
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_bpe(file: GGUF, tokens: list[str]) -> Tokenizer:
    """The tokenizers of Llama 2 and Mistral: BPE over characters, with "▁" for spaces."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    unknown = tokens[special_ids(file, tokens).get("unk", 0)]
    required(file, "tokenizer.ggml.scores")
    model = models.BPE(
        vocabulary,
        merges_by_score(vocabulary, file.per_token("tokenizer.ggml.scores")),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", "▁")
    steps: list[Decoder] = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if file.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def merges_by_score(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges of a vocabulary that comes without them, in the order of BPE.

    Every way to cut a token into two other tokens is a merge. The merge whose result has
    the highest score comes first; then the ids of the result and of the two parts decide.
    """
    merges = []
    for token, token_id in vocabulary.items():
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in vocabulary and right in vocabulary:
                key = (-scores[token_id], token_id, vocabulary[left], vocabulary[right])
                merges.append((key, (left, right)))
    merges.sort()
    return [pair for _, pair in merges]
