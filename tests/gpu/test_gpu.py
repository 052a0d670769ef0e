"""The engine on a GPU: the tokens of transformers and of the CPU, memory, and no waiting.

The tests run with and without graphs, with and without overlap, and with every backend.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu.engines import PROMPTS, make_llm, recorded, recorded_pieces, tokens_of
from tiny import WAYS, greedy, random_prompts, shared_model, tiny_model

from nanovllm import SamplingParams
from nanovllm.attention.base import AttentionSpec
from nanovllm.attention.select import BACKENDS, make
from nanovllm.cache.spec import PagedKV
from nanovllm.runner.cuda_graphs import DecodeGraphs, is_decode
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.runner.pieces import CutAttention
from nanovllm.runner.readouts.next_tokens import NextTokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

GRAPHS_AND_OVERLAP = [(True, True), (True, False), (False, True), (False, False)]


def backends(dtype: torch.dtype, block_size: int) -> list[str]:
    """The attention backends that this machine can run."""
    if not torch.cuda.is_available():
        return []
    spec = AttentionSpec((PagedKV(4, 2, 32),), block_size, dtype, torch.device("cuda", 0))
    return [name for name in BACKENDS if not isinstance(make(name, spec, "auto"), str)]


LENGTHS = [20, 3, 25, 11, 20, 1, 8, 14, 20, 17, 6]  # batches shrink through all sizes of graphs
SHAPES = [
    ("Qwen3", {}),
    ("Qwen3", {"head_dim": 128, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("Qwen2", {}),
    ("Llama", {"attention_bias": True, "mlp_bias": True}),
    ("Mistral", {"sliding_window": 24}),
]


@pytest.mark.parametrize(("family", "shape"), SHAPES)
def test_greedy_tokens_equal_transformers(tmp_path, family, shape):
    folder, model = tiny_model(tmp_path, family, **shape)
    expected = [greedy(model, prompt, n) for prompt, n in zip(PROMPTS, LENGTHS)]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in LENGTHS]
    for backend in backends(torch.float32, 16):
        for graphs, overlap in GRAPHS_AND_OVERLAP:
            llm = make_llm(
                folder, graphs=graphs, async_scheduling=overlap, attention_backend=backend
            )
            assert recorded(llm) == (graphs and backend != "torch")
            assert recorded_pieces(llm) == recorded(llm)
            for times in ("first", "on prefix hits"):
                outs = llm.generate(PROMPTS, params, use_tqdm=False)
                assert [out.outputs[0].token_ids for out in outs] == expected, (
                    backend,
                    graphs,
                    overlap,
                    times,
                )


@pytest.mark.parametrize("block_size", [None, 1, 8, 256])
def test_any_block_size_gives_the_same_tokens(block_size):
    folder, model = shared_model()
    expected = [greedy(model, prompt, 20) for prompt in PROMPTS]
    size = block_size or 64
    for backend in backends(torch.float32, size):
        llm = make_llm(
            folder,
            attention_backend=backend,
            block_size=block_size,
            num_gpu_blocks_override=2048 // size + 20,
        )
        assert llm.llm_engine.scheduler.block_size == size
        assert tokens_of(llm, PROMPTS) == expected, backend


@pytest.mark.parametrize(("graphs", "overlap"), GRAPHS_AND_OVERLAP)
def test_preempted_sequences_give_the_same_tokens(graphs, overlap):
    folder, model = shared_model()
    prompts = random_prompts([7, 30, 16, 45, 21, 1, 32, 50] * 4, seed=3)
    expected = [greedy(model, prompt, 40) for prompt in prompts[:12]]
    llm = make_llm(
        folder,
        graphs=graphs,
        async_scheduling=overlap,
        num_gpu_blocks_override=12,
        max_model_len=100,
        max_num_seqs=16,
    )
    assert tokens_of(llm, prompts, 40)[:12] == expected
    assert llm.llm_engine.scheduler.stats.num_preemptions > 10


@pytest.mark.parametrize(("graphs", "overlap"), GRAPHS_AND_OVERLAP)
def test_any_sampling_gives_the_tokens_of_the_cpu(graphs, overlap):
    folder, _ = shared_model()
    prompts = random_prompts([12, 20, 5, 33, 8, 17, 2, 40, 9])
    params = [
        SamplingParams(max_tokens=30 - 3 * i, ignore_eos=True, **way) for i, way in enumerate(WAYS)
    ]
    llm = make_llm(folder, graphs=graphs, async_scheduling=overlap)
    cpu = make_llm(folder, device="cpu")
    found, expected = (engine.generate(prompts, params, use_tqdm=False) for engine in (llm, cpu))
    for way, ours, theirs in zip(WAYS, found, expected):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids, way
        for a, b in zip(ours.outputs[0].logprobs or (), theirs.outputs[0].logprobs or ()):
            assert a.keys() == b.keys()
            assert all(abs(a[token].logprob - b[token].logprob) < 1e-3 for token in a)


def test_filters_are_sampled_inside_a_graph(monkeypatch):
    """Greedy rows, temperatures and filters share one recording, beside padding rows."""
    folder, _ = shared_model()
    prompts = random_prompts([12, 20, 5, 33, 8])
    ways = [{}, {"top_k": 5}, {"temperature": 0.0}, {"top_p": 0.7, "seed": 1}, {"min_p": 0.2}]
    params = [
        SamplingParams(max_tokens=24 - 4 * i, ignore_eos=True, **way) for i, way in enumerate(ways)
    ]
    expected = make_llm(folder, device="cpu").generate(prompts, params, use_tqdm=False)
    llm = make_llm(folder)

    def outside(self: DecodeGraphs, batch: Any) -> torch.Tensor:
        raise AssertionError(f"a batch with {set(batch.parts)} was sampled outside the graph")

    monkeypatch.setattr(DecodeGraphs, "hidden_states", outside)
    found = llm.generate(prompts, params, use_tqdm=False)
    assert [out.outputs[0].token_ids for out in found] == [
        out.outputs[0].token_ids for out in expected
    ]


def test_nothing_waits_for_the_device_between_launches(monkeypatch):
    """torch raises at any operation that makes the host wait. Only `collect` may wait."""
    folder, _ = shared_model()
    llm, launch, kinds = make_llm(folder), ModelRunner.launch, set()

    def guarded(self: ModelRunner, batch: Any) -> Any:
        kinds.add((is_decode(batch), not batch.parts))
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(self, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(ModelRunner, "launch", guarded)
    params = [
        SamplingParams(max_tokens=30 - 3 * i, ignore_eos=True, **way) for i, way in enumerate(WAYS)
    ]
    llm.generate(random_prompts([12, 20, 5, 33, 8, 17, 2, 40, 9]), params, use_tqdm=False)
    assert kinds == {(True, True), (True, False), (False, True), (False, False)}


def test_torch_s_random_numbers_are_the_user_s_own():
    def numbers(between: Callable[[], object]) -> torch.Tensor:
        torch.manual_seed(1)
        between()
        return torch.rand(5, device="cuda")

    folder, _ = shared_model()
    expected = numbers(lambda: None)
    assert torch.equal(numbers(lambda: tokens_of(make_llm(folder), PROMPTS)), expected)


def run_out_of_memory(tokens: torch.Tensor) -> None:
    raise torch.OutOfMemoryError(f"no memory for {len(tokens)} sequences")


def wait_for_the_device(tokens: torch.Tensor) -> None:
    tokens.cpu()  # may not be captured, and makes the capture invalid


@pytest.mark.parametrize("failure", [run_out_of_memory, wait_for_the_device])
@pytest.mark.parametrize("size", [20, 4])
def test_a_failed_capture_leaves_an_eager_engine_and_a_healthy_torch(
    monkeypatch, caplog, failure, size
):
    folder, model = shared_model()
    expected = [greedy(model, prompt, 20) for prompt in PROMPTS]
    sample = NextTokens.sample

    def failing(self: NextTokens, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        tokens = sample(self, logits, batch)
        if torch.cuda.is_current_stream_capturing() and len(tokens) == size:
            failure(tokens)
        return tokens

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "nanovllm"):
        patch.setattr(NextTokens, "sample", failing)
        llm = make_llm(folder)
    assert not recorded(llm)
    assert f"recording a graph for {size} sequences failed" in caplog.text
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.manual_seed(0)
    first = torch.rand(3, device="cuda")
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3, device="cuda"), first)
    assert tokens_of(llm, PROMPTS) == expected
    another = make_llm(folder)
    assert recorded(another)
    assert tokens_of(another, PROMPTS) == expected


@pytest.mark.parametrize("failure", [run_out_of_memory, wait_for_the_device])
def test_a_failed_capture_of_a_piece_leaves_decode_graphs_and_eager_prompts(
    monkeypatch, caplog, failure
):
    folder, model = shared_model()
    expected = [greedy(model, prompt, 20) for prompt in PROMPTS]
    attend = CutAttention.attend

    def failing(self: CutAttention, layer: int, q: torch.Tensor, *sinks: Any) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing() and layer == 1:
            failure(q)
        return attend(self, layer, q, *sinks)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "nanovllm"):
        patch.setattr(CutAttention, "attend", failing)
        llm = make_llm(folder)
    assert recorded(llm)
    assert not recorded_pieces(llm)
    assert "prefill runs without CUDA graphs" in caplog.text
    assert tokens_of(llm, PROMPTS) == expected
    another = make_llm(folder)
    assert recorded_pieces(another)
    assert tokens_of(another, PROMPTS) == expected


def test_pieces_of_transformers_own_code_give_its_tokens():
    folder, model = shared_model()
    llm = make_llm(folder, model_impl="transformers")
    assert recorded_pieces(llm)
    assert tokens_of(llm, PROMPTS) == [greedy(model, prompt, 20) for prompt in PROMPTS]


def test_two_engines_of_different_models_on_one_gpu(tmp_path):
    folder, model = shared_model()
    other_folder, other_model = tiny_model(tmp_path, "Llama", hidden_size=32)
    llm, other = make_llm(folder), make_llm(other_folder, block_size=8, num_gpu_blocks_override=160)
    for _ in range(2):
        assert tokens_of(llm, PROMPTS) == [greedy(model, prompt, 20) for prompt in PROMPTS]
        assert tokens_of(other, PROMPTS) == [greedy(other_model, prompt, 20) for prompt in PROMPTS]


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_that_slept_gives_the_same_tokens(level):
    folder, model = shared_model()
    expected = [greedy(model, prompt, 20) for prompt in PROMPTS]
    llm = make_llm(folder, enable_sleep_mode=True)
    assert tokens_of(llm, PROMPTS) == expected
    llm.sleep(level)
    assert not recorded(llm)
    ballast = torch.full((64 << 20,), 3.0, device="cuda")  # lies where weights and pages were
    llm.wake_up()
    assert recorded(llm)
    assert tokens_of(llm, PROMPTS) == expected
    assert (ballast == 3).all()


def test_an_fp8_cache_halves_the_pages_and_costs_little_accuracy():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")
    folder, _ = shared_model()
    prompts = random_prompts([200, 90])
    plain, fp8 = (
        make_llm(folder, dtype="bfloat16", kv_cache_dtype=kind) for kind in ("auto", "fp8")
    )
    sizes = [llm.llm_engine.executor.runner.attention.page_bytes() for llm in (plain, fp8)]
    assert sizes[0] == 2 * sizes[1]
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    scores = [
        torch.tensor(
            [
                entry[token].logprob
                for out in llm.generate(prompts, params, use_tqdm=False)
                for token, entry in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:])
            ]
        )
        for llm in (plain, fp8)
    ]
    assert 0 < (scores[0] - scores[1]).abs().mean() < 0.3
