"""Gemma 2 and 3, OLMo 2 and 3, Phi-3 and 4: greedy tokens and logits equal to transformers'."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import (
    MORE_FAMILIES,
    greedy,
    next_logits,
    random_prompts,
    session_folder,
    tiny_model,
)

from nanovllm import LLM, SamplingParams
from nanovllm.kernels import cpu
from nanovllm.models.config import ModelConfig
from nanovllm.models.registry import read_config

# One token; about a block of 16, growing; longer than the window of 24 tokens, than a step of 64.
LENGTHS = [1, 14, 15, 16, 30, 100, 70]
NUM_TOKENS = 12
SHAPES: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in MORE_FAMILIES),
    ("Gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("Gemma3", {"attention_bias": True, "final_logit_softcapping": 6.0}),
    ("Olmo2", {"num_key_value_heads": 1, "attention_bias": True}),
    ("Phi3", {"partial_rotary_factor": 1.0, "sliding_window": None}),
]
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


def make_llm(folder: str, **kwargs: object) -> LLM:
    defaults = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 128,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 16,
        "num_gpu_blocks_override": 9,  # the prompts of LENGTHS take 23 blocks
    }
    return LLM(folder, **{**defaults, **kwargs})


def tokens_of(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    return [out.outputs[0].token_ids for out in llm.generate(prompts, GREEDY, use_tqdm=False)]


@cache
def oracle(case: int) -> tuple[str, list[list[int]], list[list[int]]]:
    """(folder of SHAPES[case], prompts, transformers' tokens)."""
    family, shape = SHAPES[case]
    folder, model = tiny_model(session_folder() / f"families-{case}", family, **shape)
    prompts = random_prompts(LENGTHS)
    return folder, prompts, [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize("case", range(len(SHAPES)), ids=[family for family, _ in SHAPES])
def test_tokens_equal_transformers_with_chunks_preemption_and_prefix_hits(case, backend, caplog):
    folder, prompts, expected = oracle(case)
    llm = make_llm(folder, attention_backend=backend)
    assert tokens_of(llm, prompts) == expected
    assert llm.llm_engine.scheduler.stats.num_preemptions > 0
    assert tokens_of(llm, [prompts[5]] * 2) == [expected[5]] * 2, "on prefix hits"
    if backend is None and cpu.load() is not None:
        assert "module by module" not in caplog.text, "small steps are recorded"


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_logits_are_within_1e_4_of_transformers(tmp_path, family):
    folder, model = tiny_model(tmp_path, family)
    llm = make_llm(folder, max_logprobs=-1)
    (prompt,) = random_prompts([90])
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, logprobs=-1)
    (out,) = llm.generate([prompt], params, use_tqdm=False)
    expected = next_logits(model, prompt).log_softmax(-1)
    for position, entry in enumerate([*out.prompt_logprobs[1:], out.outputs[0].logprobs[0]]):
        ours = torch.tensor([entry[token].logprob for token in range(300)])
        torch.testing.assert_close(ours, expected[position], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("Gemma2", {}),
        ("Gemma3", {}),
        ("Olmo3", {}),
        ("Phi3", {}),
        ("Qwen3", {}),
        ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
        ("GptOss", {"head_dim": 16, "num_local_experts": 4}),
    ],
)
def test_norms_of_bfloat16_round_where_transformers_rounds(tmp_path, family, shape):
    folder, model = tiny_model(tmp_path, family, **shape)
    model.bfloat16().save_pretrained(folder)
    llm = make_llm(folder, dtype="bfloat16")
    (ours,) = llm.apply_model(lambda decoder: dict(decoder.named_modules()))
    for name, norm in model.named_modules():
        if not name.endswith("norm"):
            continue
        x = torch.randn(40, norm.weight.numel()).bfloat16() * 3
        expected = norm(x)
        different = (ours[name](x.clone()) != expected).double()
        assert different.mean() < 0.02, name


@pytest.mark.parametrize(
    ("family", "shape"),
    [("Gemma2", {}), ("Gemma3", {}), ("Olmo2", {"num_key_value_heads": 1}), ("Phi3", {})],
)
def test_two_ranks_give_the_same_tokens(tmp_path, family, shape):
    folder, model = tiny_model(tmp_path, family, **shape)
    prompts = random_prompts([1, 40, 70])
    llm = make_llm(folder, tensor_parallel_size=2)
    try:
        assert tokens_of(llm, prompts) == [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    finally:
        llm.llm_engine.executor.close()


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(("max_model_len", "lengths"), [(64, [10, 40]), (128, [70, 100])])
def test_longrope_has_long_factors_where_sequences_may_be_long(tmp_path, max_model_len, lengths):
    folder, model = tiny_model(
        tmp_path,
        "Phi3",
        rope_parameters=LONG_ROPE,
        sliding_window=None,
        partial_rotary_factor=1.0,
        original_max_position_embeddings=64,
    )
    prompts = random_prompts(lengths)
    assert tokens_of(make_llm(folder, max_model_len=max_model_len), prompts) == [
        greedy(model, prompt, NUM_TOKENS) for prompt in prompts
    ]


# -- configs ---------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "query_pre_attn_scalar": 16,
    "sliding_window": 24,
}


def config(architecture: str, **fields: object) -> ModelConfig:
    return read_config(SimpleNamespace(architectures=[architecture], **{**SIZES, **fields}))


def test_configs_of_transformers_4_say_the_same():
    """They have no `layer_types`, and each RoPE in fields of its own."""
    gemma2 = config("Gemma2ForCausalLM")
    assert gemma2.sliding_windows == (24, None) * 3
    gemma3 = config(
        "Gemma3ForCausalLM",
        sliding_window_pattern=3,
        rope_theta=1e6,
        rope_local_base_freq=2e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    assert gemma3.sliding_windows == (24, 24, None) * 2
    assert gemma3.rope == {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    assert gemma3.sliding_rope == {"rope_type": "default", "rope_theta": 2e4}
    olmo3 = config(
        "Olmo3ForCausalLM", rope_theta=5e5, rope_scaling={"rope_type": "yarn", "factor": 8.0}
    )
    assert olmo3.sliding_windows == (24, 24, 24, None, 24, 24)
    assert olmo3.rope == {"rope_type": "yarn", "factor": 8.0, "rope_theta": 5e5}
    assert olmo3.sliding_rope == {"rope_type": "default", "rope_theta": 5e5}
    phi4 = config("Phi3ForCausalLM", partial_rotary_factor=0.75, sliding_window=None)
    assert phi4.rope["partial_rotary_factor"] == 0.75
    factors = {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    phi3 = config("Phi3ForCausalLM", rope_scaling=factors, original_max_position_embeddings=64)
    assert phi3.rope["rope_type"] == "longrope"
    assert phi3.rope["original_max_position_embeddings"] == 64


NESTED = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("architecture", "fields", "named"),
    [
        ("Gemma2ForCausalLM", {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping is -1.0"),
        ("Gemma2ForCausalLM", {"final_logit_softcapping": "x"}, "final_logit_softcapping is 'x'"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("Gemma3ForCausalLM", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        (
            "Gemma3ForCausalLM",
            {"rope_parameters": {"full_attention": NESTED}},
            "rope_parameters: sliding_attention is missing",
        ),
        (
            "Olmo3ForCausalLM",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e4},
                    "sliding_attention": NESTED,
                }
            },
            "rope_parameters: full_attention: factor is missing",
        ),
        (
            "Olmo2ForCausalLM",
            {"rope_parameters": {"full_attention": NESTED}},
            "one set of RoPE parameters",
        ),
        ("Phi3ForCausalLM", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        (
            "Phi3ForCausalLM",
            {"rope_parameters": {**LONG_ROPE, "short_factor": [1.0, -2.0]}},
            "short_factor is",
        ),
        ("Olmo2ForCausalLM", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_a_bad_config_is_an_error_that_names_the_field(architecture, fields, named):
    with pytest.raises(ValueError, match=named):
        config(architecture, **fields)
