"""Tiny models made by transformers, which is also the oracle: random weights, large enough that
tokens differ.
"""

from __future__ import annotations

import atexit
import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from nanovllm import LLM

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 298,
    "eos_token_id": 299,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
# Sampling of every kind, greedy and random rows among each other.
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6, "seed": 4},
    {"top_p": 0.8, "top_k": 40},
    {"min_p": 0.05, "logprobs": 3},
    {"presence_penalty": 1.0, "repetition_penalty": 1.2},
    {"allowed_token_ids": list(range(50)), "logit_bias": {3: 2.0}},
    {"temperature": 0.0, "prompt_logprobs": 2, "logprobs": 1},
    {"temperature": 1.5, "min_tokens": 2},
]
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3": {"head_dim": 32},
    "Qwen2": {},
    "Llama": {},
    "Mistral": {"head_dim": 16, "sliding_window": None},
}
# Families that compute something else than these. Layers 1 and 2 (and 3) have windows, the last
# has none.
MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "Gemma2": {
        "head_dim": 32,
        "query_pre_attn_scalar": 20,
        "sliding_window": 24,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 6.0,
        "tie_word_embeddings": True,
    },
    "Gemma3": {
        "head_dim": 32,
        "query_pre_attn_scalar": 20,
        "sliding_window": 24,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "tie_word_embeddings": True,
    },
    "Olmo2": {},
    "Olmo3": {
        "num_hidden_layers": 4,
        "sliding_window": 24,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "rope_theta": 1e4,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "Phi3": {"partial_rotary_factor": 0.75, "sliding_window": 50},
}
CONFIG_NAMES = {"Gemma3": "Gemma3TextConfig"}


def tiny_model(folder: Path, family: str, **overrides: Any) -> tuple[str, Any]:
    """Saves a random model of the family (float32) and returns (its folder, the transformers
    model).
    """
    config_class = getattr(transformers, CONFIG_NAMES.get(family, f"{family}Config"))
    model_class = getattr(transformers, f"{family}ForCausalLM")
    torch.manual_seed(len(family) + len(str(sorted(overrides.items()))))
    sizes = {**SIZES, **{**FAMILIES, **MORE_FAMILIES}.get(family, {}), **overrides}
    model = model_class(config_class(**sizes)).float().eval()
    # Biases and norms begin as 0 and 1, which hides mistakes.
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or name.endswith("_bias"):
            parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    return str(folder), model


@torch.no_grad()
def greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """The next `num_tokens` of transformers' greedy decoding, EOS or not."""
    ids = torch.tensor([prompt])
    # Without a mask, a token in the prompt that equals the padding id is masked out.
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def next_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """[len(tokens), vocabulary] float32: transformers' logits after each token."""
    return model(torch.tensor([tokens])).logits[0].float()


def random_prompts(lengths: list[int], vocab_size: int = 298, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


# -- shared models and engines, each made once -----------------------------------------------------

BOS, EOS = 298, 299
# Tokens of several characters; between them and BOS ids mean nothing.
WORDS = ["th", "the", "in", "er", "on", "he"]
CHAT_TEMPLATE = (
    "<s>{% for m in messages %}{% if m.role == 'stranger' %}{{ raise_exception('who is stranger?') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def tiny_tokenizer() -> Any:
    """Byte-level BPE whose first 256 ids are the bytes.

    Encoding adds BOS; there is a chat template that writes it too.
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # what GPT-2 leaves as it is
    hidden = (chr(256 + i) for i in itertools.count())
    letters = [chr(byte) if byte in shown else next(hidden) for byte in range(256)]
    vocab = {token: i for i, token in enumerate([*letters, *WORDS])}
    merges = [(word[:-1], word[-1]) for word in WORDS]
    tokenizer = Tokenizer(models.BPE({**vocab, "<s>": BOS, "</s>": EOS}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


@cache
def session_folder() -> Path:
    folder = TemporaryDirectory(prefix="nanovllm-tests-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@cache
def shared_model(family: str = "Qwen3") -> tuple[str, Any]:
    """(folder, transformers model); the folder has a tokenizer too."""
    folder, model = tiny_model(session_folder() / family, family)
    tiny_tokenizer().save_pretrained(folder)
    return folder, model


@cache
@torch.no_grad()
def scripted_model(script: tuple[int, ...]) -> str:
    """The folder of a model that, after any token of `script` (all different), is sure that the
    next one follows.
    """
    sizes = {"hidden_size": 304, "num_hidden_layers": 1, "intermediate_size": 8, "head_dim": 16}
    folder, model = tiny_model(session_folder() / f"script-{abs(hash(script))}", "Llama", **sizes)
    layer = model.model.layers[0]
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
    model.model.norm.weight.fill_(1)
    model.model.embed_tokens.weight.copy_(torch.eye(300, 304))
    model.lm_head.weight.zero_()
    model.lm_head.weight[script[1:], script[:-1]] = 1
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


ENGINES: list[LLM] = []


def make_llm(folder: str | None = None, **kwargs: Any) -> LLM:
    """An engine small enough to preempt and to cut prompts into chunks when it is asked to do a
    little more.
    """
    defaults = {
        "dtype": "float32",
        "num_gpu_blocks_override": 256,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 64,
    }
    ENGINES.append(LLM(folder or shared_model()[0], **{**defaults, **kwargs}))
    return ENGINES[-1]


@cache
def shared_llm(**kwargs: Any) -> LLM:
    """The one engine of these arguments over the shared model."""
    return make_llm(**kwargs)


def assert_idle(llm: LLM) -> None:
    """Nothing is left of any request: no page, no row, no output."""
    scheduler = llm.llm_engine.scheduler
    assert not any(scheduler.blocks.ref_counts)
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks
    assert not scheduler.waiting
    assert not scheduler.unfinished
    assert len(scheduler.running) == 0
    assert not scheduler.table.seqs
    assert len(scheduler.table.free_rows) == len(scheduler.table.seq_id)
    assert not llm.llm_engine.has_unfinished_requests()
    assert not llm.llm_engine.undelivered


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """For modules that import it: after each test every engine is idle."""
    yield
    for llm in ENGINES:
        assert_idle(llm)
