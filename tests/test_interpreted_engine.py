"""The whole engine with every Triton kernel, under Triton's interpreter: it gives the tokens of the CPU's engine.

Norms, activations, the K/V write, attention, filters, draws and mixtures of experts run as kernels, in prompts, mixed
steps and the static path of CUDA graphs. The interpreter is chosen when triton is imported, so one test runs this file
again in a process of its own.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from interpreter import INTERPRETED, run_interpreted, starts_interpreter
from test_cuda_graphs import with_static_path
from tiny import greedy, make_llm, random_prompts, session_folder, tiny_model

from nanovllm import LLM, RequestOutput, SamplingParams, kernels
from nanovllm.kernels import cpu, moe, moe_cpu
from nanovllm.kernels.choice import has_kernel
from nanovllm.runner.cuda_graphs import DecodeGraphs

interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="test_the_engine_under_the_interpreter runs it"
)

MODELS: dict[str, dict[str, Any]] = {
    "Qwen3": {},
    "Mistral": {"sliding_window": 24},
    "Qwen2": {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1},
    "Qwen3Moe": {
        "head_dim": 32,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
}
PROMPTS = random_prompts([1, 17, 28, 5, 3, 2])  # the third is longer than Mistral's window
# The last two end first. The steps after them sample inside a graph, with filters and then without.
WAYS: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 8},
    {"temperature": 0.8, "seed": 1, "max_tokens": 7},
    {"top_p": 0.8, "top_k": 40, "seed": 2, "max_tokens": 6},
    {"min_p": 0.05, "temperature": 1.5, "seed": 3, "max_tokens": 5},
    {"top_k": 3, "logprobs": 3, "seed": 4, "max_tokens": 3},
    {"temperature": 0.0, "logprobs": 1, "max_tokens": 2},
]
KERNELS = {
    "_rms_norm_kernel",
    "_activation_and_mul_kernel",
    "_write_kernel",
    "_plan_kernel",
    "_decode_kernel",
    "_prefill_kernel",
    "_tile_sum_kernel",
    "_threshold_kernel",
    "_draw_kernel",
}
KERNELS_OF_EXPERTS = {"_route_kernel", "_group_kernel", "_grouped_kernel", "_combine_kernel"}


@starts_interpreter
def test_the_engine_under_the_interpreter():
    assert f"{len(MODELS)} passed" in run_interpreted(__file__)


@pytest.fixture
def every_kernel(monkeypatch):
    """A function that gives this process's engines the kernels of a GPU.

    It returns the set to which the names of launched kernels are added.
    """
    from triton.runtime.interpreter import GridExecutor

    from nanovllm.kernels import moe_triton, triton_ops

    launched: set[str] = set()
    run = GridExecutor.__call__

    def noted(self, *args, **kwargs):
        launched.add(self.fn.__name__)
        return run(self, *args, **kwargs)

    def of(module: ModuleType):
        return lambda x, name: module if has_kernel(name) else None

    def begin() -> set[str]:
        for owner, name in ((cpu, "kernel"), (cpu, "panel"), (moe_cpu, "kernel")):
            monkeypatch.setattr(owner, name, lambda *args: None)
        monkeypatch.setattr(kernels, "triton_for", of(triton_ops))
        monkeypatch.setattr(moe, "triton_for", of(moe_triton))
        monkeypatch.setattr(GridExecutor, "__call__", noted)
        return launched

    return begin


def outputs(llm: LLM) -> list[RequestOutput]:
    params = [SamplingParams(ignore_eos=True, **way) for way in WAYS]
    return llm.generate(PROMPTS, params, use_tqdm=False)


@interpreted
@pytest.mark.parametrize("family", MODELS)
def test_tokens_equal_the_cpu_s(every_kernel, family):
    folder, model = tiny_model(session_folder() / family, family, **MODELS[family])
    sizes = {"skip_tokenizer_init": True, "max_num_seqs": 6, "max_num_batched_tokens": 32}
    expected = outputs(make_llm(folder, **sizes))
    launched = every_kernel()
    llm = make_llm(folder, attention_backend="triton", async_scheduling=True, **sizes)
    llm.llm_engine.executor.runner.programs = None
    assert DecodeGraphs(llm.llm_engine.setup).parts == {"filters"}
    graphs = with_static_path(llm)
    found = outputs(llm)
    assert found[0].outputs[0].token_ids == greedy(model, PROMPTS[0], 8)
    for ours, cpus in zip(found, expected):
        assert ours.outputs[0].token_ids == cpus.outputs[0].token_ids
        assert_same_logprobs(ours.outputs[0].logprobs, cpus.outputs[0].logprobs)
    assert len(graphs.sizes_replayed) > graphs.sampled >= 4
    assert graphs.parts_sampled == {"filters"}
    assert launched >= KERNELS
    if family == "Qwen3Moe":
        assert launched >= KERNELS_OF_EXPERTS


def assert_same_logprobs(ours: list[dict] | None, cpus: list[dict] | None) -> None:
    assert (ours is None) == (cpus is None)
    for here, there in zip(ours or [], cpus or []):
        assert list(here) == list(there)
        for token, entry in here.items():
            assert entry.logprob == pytest.approx(there[token].logprob, abs=1e-4)
            assert entry.rank == there[token].rank
