"""What an engine may choose on a GPU changes no token: graphs, pieces, kernels, compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_reference import make_case
from gpu.engines import PROMPTS, make_llm, recorded, tokens_of
from tiny import greedy, random_prompts, shared_model, tiny_model
from torch import Tensor
from torch.nn import functional as F

from nanovllm import LLM, SamplingParams, kernels
from nanovllm.kernels.choice import KernelChoice, kernel_choice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def runner_of(llm: LLM) -> Any:
    return llm.llm_engine.executor.runner


def drawn(llm: LLM, params: list[SamplingParams]) -> list[list[int]]:
    prompts = random_prompts([12, 20, 5, 33])
    outs = llm.generate(prompts, params, use_tqdm=False)
    return [out.outputs[0].token_ids for out in outs]


# -- pieces ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "shape"), [("Qwen3", {}), ("Llama", {}), ("Mistral", {"sliding_window": 24})]
)
def test_steps_with_prompts_replay_pieces_and_give_transformers_tokens(
    tmp_path, monkeypatch, family, shape
):
    folder, model = tiny_model(tmp_path, family, **shape)
    prompts = random_prompts([7, 30, 16, 45, 21, 1, 32, 50] * 2, seed=3)
    llm = make_llm(folder, max_num_seqs=4)
    pieces = runner_of(llm).pieces
    replay = pieces.forward
    replays = []

    def noted(*batches: Any) -> Tensor:
        replays.append(batches)
        return replay(*batches)

    monkeypatch.setattr(pieces, "forward", noted)
    assert tokens_of(llm, prompts) == [greedy(model, prompt, 20) for prompt in prompts]
    assert replays


def test_pieces_come_back_after_sleep():
    folder, model = shared_model()
    expected = [greedy(model, prompt, 20) for prompt in PROMPTS]
    llm = make_llm(folder, enable_sleep_mode=True)
    assert runner_of(llm).pieces is not None
    llm.sleep(1)
    assert runner_of(llm).pieces is None
    llm.wake_up()
    assert runner_of(llm).pieces is not None
    assert tokens_of(llm, PROMPTS) == expected


# -- kernels and compilation -------------------------------------------------------------------------

CHOICES: dict[str, dict[str, Any]] = {
    "compiled definitions": {"mode": 3, "custom_ops": ["none"]},
    "plain definitions": {"mode": 0, "custom_ops": ["none"]},
    "kernels alone": {"mode": 0},
    "dependent launches": {"custom_ops": ["+pdl"]},
    "no graphs of steps with prompts": {"cudagraph_mode": "FULL_DECODE_ONLY"},
    "no graphs": {"cudagraph_mode": "NONE"},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("family", "shape"), [("Qwen3", {}), ("Gemma2", {})])
def test_every_choice_gives_transformers_tokens(tmp_path, family, shape, choice):
    folder, model = tiny_model(tmp_path, family, **shape)
    llm = make_llm(folder, compilation_config=CHOICES[choice])
    assert recorded(llm) == (choice != "no graphs")
    assert tokens_of(llm, PROMPTS) == [greedy(model, prompt, 20) for prompt in PROMPTS]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_draws_the_tokens_of_the_cpu(choice):
    ways: list[dict[str, Any]] = [
        {"temperature": 0.6, "seed": 4},
        {"top_p": 0.8, "top_k": 40, "presence_penalty": 1.0},
        {"min_p": 0.05, "logprobs": 3, "repetition_penalty": 1.2},
        {"temperature": 0.0, "prompt_logprobs": 2, "logit_bias": {3: 2.0}},
    ]
    params = [SamplingParams(max_tokens=20, ignore_eos=True, **way) for way in ways]
    folder, _ = shared_model()
    expected = drawn(make_llm(folder, device="cpu"), params)
    assert drawn(make_llm(folder, compilation_config=CHOICES[choice]), params) == expected


def test_one_compilation_serves_batches_of_all_sizes():
    folder, model = shared_model()
    llm = make_llm(folder, compilation_config=CHOICES["compiled definitions"], enforce_eager=False)
    tokens_of(llm, PROMPTS[:3], 5)
    with torch.compiler.set_stance("fail_on_recompile"):
        found = tokens_of(llm, PROMPTS)
    assert found == [greedy(model, prompt, 20) for prompt in PROMPTS]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


OPERATIONS: dict[str, Callable[[int], Callable[[], Any]]] = {
    "rms_norm": lambda rows: lambda x=normal(rows, 96), w=normal(96): kernels.rms_norm(x, w, 1e-6),
    "add_rms_norm": lambda rows: (
        lambda x=normal(rows, 96), r=normal(rows, 96), w=normal(96): kernels.add_rms_norm(
            x.clone(), r.clone(), w, 1e-6
        )
    ),
    "silu_and_mul": lambda rows: lambda x=normal(rows, 192): kernels.silu_and_mul(x),
    "gelu_and_mul": lambda rows: lambda x=normal(rows, 192): kernels.gelu_and_mul(x),
}


@pytest.mark.parametrize("rows", [1, 2, 5, 130])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_kernel_its_definition_and_the_compiled_definition_agree(name, rows):
    work = OPERATIONS[name](rows)
    default = KernelChoice()
    found = []
    for choice in (
        default,
        KernelChoice(default.without | {name}),
        KernelChoice(default.without | {name}, compiles=True),
    ):
        with kernel_choice(choice), torch.inference_mode():
            found.append(work())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=2e-2, atol=2e-2)


# -- programs that hand results to each other ----------------------------------------------------------


def replays(work: Callable[[], Tensor], count: int = 2000) -> tuple[Tensor, int]:
    """(the result of `work`, how many replays of it as a graph gave other bits)."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = work().clone()
    stream.synchronize()
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        different += (work() != expected).any()
    different.zero_()
    for _ in range(count):
        graph.replay()
    return expected, int(different)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decode_attention_gives_the_same_bits_in_every_replay(dtype):
    """The last program of a sequence to arrive adds the parts of the others."""
    from nanovllm.attention.triton_backend import TritonAttention

    lengths = [4000, 1, 17, 300, 2500]
    case = make_case(
        [1] * len(lengths), lengths, heads=(16, 8), head_dim=128, dtype=dtype, device="cuda"
    )
    backend = TritonAttention(case.spec)
    case.run(backend, 0)
    meta = backend.meta
    q = torch.cat(case.q)

    def step() -> Tensor:
        backend.begin(meta)
        return backend.attend(0, q)

    found, different = replays(step)
    assert different == 0
    torch.testing.assert_close(found.float(), case.expected(0), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("rows", [1, 5, 16, 130, 256])
@pytest.mark.parametrize(("features", "depth"), [(1024, 3072), (1024, 2048), (4096, 1024)])
def test_products_of_few_rows_give_the_same_bits_in_every_replay(rows, features, depth):
    from nanovllm.kernels import linear_triton

    x = normal(rows, depth)
    weight = normal(features, depth) / 32
    exact = x.double() @ weight.double().T
    found, different = replays(lambda: linear_triton.linear(x, weight, None), count=300)
    assert different == 0
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=2e-2)
    activated, different = replays(lambda: linear_triton.swiglu(x, weight, None), count=300)
    assert different == 0
    gate, up = exact.chunk(2, dim=-1)
    torch.testing.assert_close(activated.double(), F.silu(gate) * up, rtol=3e-2, atol=5e-2)


def test_an_engine_with_products_of_few_rows_scores_as_without_them():
    folder, _ = shared_model()
    prompts = random_prompts([40, 63, 9])
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    scores = []
    for operations in ([], ["+few_rows_linear", "+swiglu_linear", "+pdl"]):
        llm = make_llm(folder, dtype="bfloat16", compilation_config={"custom_ops": operations})
        outs = llm.generate(prompts, params, use_tqdm=False)
        scores.append(
            torch.tensor(
                [
                    entry[token].logprob
                    for out in outs
                    for token, entry in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:])
                ]
            )
        )
    assert (scores[0] - scores[1]).abs().mean() < 0.02
