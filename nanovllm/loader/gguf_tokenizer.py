"""The tokenizer inside a GGUF file, as a live Hugging Face one.

Vocabulary and merges are in the file; how text is cut before the merges is only named there (`tokenizer.ggml.pre`),
so this file holds the rule for each name: the pre-tokenizers of the models' own tokenizer.json, put together from the
parts of the tokenizers library. transformers reads GGUF tokenizers too, but not that name ("smollm" among others): it
cuts otherwise, and gives other ids than the model was trained on.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from nanovllm.loader.gguf import GGUF

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger("nanovllm")
CONTROL, USER_DEFINED = 3, 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_SEED = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
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
# What llama.cpp falls back on: punctuation, words, then digits by threes.
_DEFAULT = (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9]{3}")
# Each pattern cuts the pieces that the one before left; what no pattern matches is a piece too.
SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0"), (_LLAMA3,)),
    **dict.fromkeys(("smaug-bpe", "dbrx"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "hunyuan", "stablelm2"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
    "seed-coder": (_SEED,),
    **dict.fromkeys(("llama4", "gpt-4o", "kanana2"), (_GPT4O,)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK3),
    "deepseek-coder": _DEEPSEEK_CODER,
    **dict.fromkeys(("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4"), (_GPT2,)),
    **dict.fromkeys(("mpt", "olmo", "jais", "trillion"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", _GPT2)),
    "minerva-7b": (r"\p{N}", _GPT2),
    "default": _DEFAULT,
}
# These take a piece that is in the vocabulary whole, without merging up to it, and begin a text with BOS unless told.
WHOLE_PIECES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "tekken")
COMPOSED = ("qwen2", "deepseek-r1-qwen")  # their own tokenizers compose characters (NFC) first


class _HandOver:
    """transformers deep-copies the tokenizer that it is given (0.15 s and more); ours has no other owner."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Tokenizer:
        return self.tokenizer


def load_tokenizer(file: GGUF) -> PreTrainedTokenizerFast:
    """Raises ValueError for a vocabulary or a pre-tokenizer that is not known here."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    model = file["tokenizer.ggml.model"]
    tokens = file.tokens or file["tokenizer.ggml.tokens"]

    def get(key: str, default: Any = None) -> Any:
        return file.get(f"tokenizer.ggml.{key}", default)

    if model == "gpt2":
        tokenizer, adds_bos = byte_level_bpe(file, tokens), get("pre") in WHOLE_PIECES
    elif model == "llama":
        tokenizer, adds_bos = sentencepiece_bpe(file, tokens), True
    else:
        raise ValueError(f"{file.path} has a tokenizer of type {model!r}, not 'gpt2' or 'llama': pass tokenizer=")
    kinds = file.token_kinds
    for kind, add in ((CONTROL, tokenizer.add_special_tokens), (USER_DEFINED, tokenizer.add_tokens)):
        add([AddedToken(t, special=kind == CONTROL, normalized=False) for t, k in zip(tokens, kinds) if k == kind])

    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: get(f"{key}_token_id") for name, key in names.items()}
    special = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)}
    before = ["bos_token"] if get("add_bos_token", adds_bos) and "bos_token" in special else []
    after = ["eos_token"] if get("add_eos_token", False) and "eos_token" in special else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*(special[name] for name in before), "$A", *(special[name] for name in after)],
        special_tokens=[(special[name], ids[name[:3]]) for name in before + after],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=_HandOver(tokenizer),
        chat_template=file.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def byte_level_bpe(file: GGUF, tokens: list[str]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = file.get("tokenizer.ggml.pre") or "default"
    if pre not in SPLITS:
        raise ValueError(
            f"{file.path} cuts text as {pre!r} does (tokenizer.ggml.pre), known are {', '.join(SPLITS)}; "
            "pass tokenizer= the name or folder of the original model"
        )
    if pre == "default":
        logger.warning(
            "%s does not say how its tokenizer cuts text (tokenizer.ggml.pre): it is cut by llama.cpp's default, which "
            "may differ from the model's own; pass tokenizer= the name or folder of the original model",
            file.path,
        )
    merges = [tuple(merge.split(" ")) for merge in file["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in WHOLE_PIECES))
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in SPLITS[pre]]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_bpe(file: GGUF, tokens: list[str]) -> Tokenizer:
    """Llama 2's and Mistral's vocabulary: no merges in the file, the score of the merged token orders them."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary, scores = {token: i for i, token in enumerate(tokens)}, file["tokenizer.ggml.scores"]
    merges = []
    for token, rank in vocabulary.items():
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(vocabulary[a], vocabulary[b], a, b) for a, b in cuts if a in vocabulary and b in vocabulary]
        merges += [(-scores[rank], rank, *pair) for pair in pairs]
    merges.sort()
    unknown = tokens[file.get("tokenizer.ggml.unknown_token_id", 0)]
    model = models.BPE(
        vocabulary, [(a, b) for *_, a, b in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer
