"""The plain definitions under torch.compile: equal results, one compilation, no graph breaks.

GPUs run them so where they have no kernel. Here Inductor makes C++ of them. Tests that count
compilations leave Inductor out, because it takes long and adds none.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import greedy, random_prompts
from tiny_decoders import VOCAB_SIZE, tiny_decoder
from torch import Tensor
from torch._dynamo.utils import counters

import nanovllm
from nanovllm import LLM, SamplingParams, kernels
from nanovllm.kernels import cpu, moe, moe_cpu
from nanovllm.kernels.choice import KernelChoice, kernel_choice
from nanovllm.kernels.rope import Rope
from nanovllm.layers import heads_norm
from nanovllm.runner import memory
from nanovllm.runner.readouts import next_tokens
from nanovllm.sampling import allowed_ids, base, logprobs, penalties, sampler

VOCAB = 1000
SIZE = 64
HEAD = 16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numbers(limit: int, *shape: int, seed: int = 0, low: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, limit, shape, generator=generator, dtype=torch.int32)


WEIGHT = normal(SIZE, seed=1)
ROPE = Rope(4, 2, HEAD, normal(512, HEAD, seed=2), normal(HEAD, seed=3), normal(HEAD), 1e-6)


# -- what the definitions should give, in float64 --------------------------------------------------


def rms(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, _: bool = False) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (weight + offset)


def added_rms(x: Tensor, residual: Tensor, *rest: Any) -> list[Tensor]:
    return [rms(x + residual, *rest), x + residual]


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def silu_product(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return silu(gate) * up


def rotated(qkv: Tensor, positions: Tensor, rope: Rope) -> list[Tensor]:
    """Each pair of numbers as a complex number, rotated by multiplication."""
    assert rope.q_norm is not None
    assert rope.k_norm is not None
    q, k, v = qkv.view(len(qkv), -1, HEAD).split([4, 2, 2], 1)
    cos, sin = rope.cos_sin.double()[positions.long()].chunk(2, -1)
    rotation = torch.complex(cos, sin)[:, None]
    found = []
    for x, weight in ((q, rope.q_norm), (k, rope.k_norm)):
        first, second = rms(x, weight.double(), rope.eps).chunk(2, -1)
        pairs = torch.complex(first, second) * rotation
        found.append(torch.cat([pairs.real, pairs.imag], -1))
    return [*found, v]


def most_likely(logits: Tensor, k: int, renormalise: bool) -> list[Tensor]:
    weights, ids = logits.softmax(-1).topk(k)
    return [weights / weights.sum(-1, keepdim=True) if renormalise else weights, ids]


def weighted_sum(y: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    return (y[rows.long()] * weights[..., None]).sum(1)


def loop_of_penalties(
    x: Tensor, seen: Tensor, counts: Tensor, presence: Tensor, frequency: Tensor, repetition: Tensor
) -> Tensor:
    out = x.clone()
    for row in range(len(x)):
        tokens = seen[row].nonzero().squeeze(1)
        old = x[row, tokens]
        factor = repetition[row]
        out[row, tokens] = torch.where(old > 0, old / factor, old * factor)
        out[row] -= frequency[row] * counts[row]
        out[row, counts[row] > 0] -= presence[row]
    return out


# -- every definition, with arguments for any number of rows ---------------------------------------


@dataclass
class Case:
    """arguments: number of rows -> what the definition is called with. formula: see above."""

    definition: Callable[..., Any]
    arguments: Callable[[int], tuple[Any, ...]]
    formula: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        return self.definition.__name__


def text_of(rows: int) -> tuple[Tensor, ...]:
    """Texts of three tokens each, of which the first is the prompt."""
    owner = torch.arange(rows).repeat_interleave(3)
    starts = torch.arange(rows, dtype=torch.int32) * 3
    history = numbers(VOCAB, 3 * rows, low=-1)
    return history, owner, numbers(VOCAB, rows).long(), starts, torch.ones_like(starts)


def penalised_rows(rows: int) -> tuple[Tensor, ...]:
    factors = [0.5 + normal(rows, seed=seed).abs() for seed in range(3)]
    counts = numbers(3, rows, VOCAB).float()
    return normal(rows, VOCAB), (counts > 0) | (normal(rows, VOCAB, seed=4) > 1), counts, *factors


def biased_rows(rows: int) -> tuple[Tensor, ...]:
    at = numbers(rows, rows + 2)
    return normal(rows, VOCAB), at, numbers(VOCAB, rows + 2), normal(rows + 2)


NORM = (WEIGHT, 1e-5, 0.0, False)
GEMMA_NORM = (WEIGHT, 1e-6, 1.0, True)
CASES = [
    Case(kernels._rms_norm, lambda n: (normal(n, SIZE), *NORM), rms),
    Case(
        kernels._add_rms_norm,
        lambda n: (normal(n, SIZE), normal(n, SIZE, seed=5), *GEMMA_NORM),
        added_rms,
    ),
    Case(kernels._silu_and_mul, lambda n: (normal(n, SIZE),), silu_product),
    Case(kernels._gelu_and_mul, lambda n: (normal(n, SIZE),)),
    Case(kernels._add, lambda n: (normal(n, SIZE), normal(n, SIZE, seed=5))),
    Case(kernels._scale, lambda n: (normal(n, SIZE), 3.5)),
    Case(kernels.softcap, lambda n: (normal(n, SIZE), 3.5)),
    Case(
        kernels._qk_norm_rope,
        lambda n: (normal(n, 8 * HEAD), numbers(512, n), ROPE),
        rotated,
    ),
    Case(kernels._argmax, lambda n: (normal(n, VOCAB),), lambda x: x.argmax(-1)),
    Case(moe._route, lambda n: (normal(n, 8), 2, True), most_likely),
    Case(moe._group_by_expert, lambda n: (numbers(8, n, 2), 1, 6)),
    Case(moe._gather, lambda n: (normal(n, SIZE), numbers(n, 2 * n))),
    Case(
        moe._combine,
        lambda n: (
            normal(2 * n, SIZE),
            torch.randperm(2 * n).int().view(n, 2),
            normal(n, 2, seed=6),
        ),
        weighted_sum,
    ),
    Case(moe._add_gated, lambda n: (normal(n, SIZE), normal(n, SIZE, seed=5), normal(n, 1))),
    Case(moe._clamped_swiglu, lambda n: (3 * normal(n, SIZE), 1.7, 2.0)),
    Case(heads_norm.mean_square, lambda n: (normal(n, SIZE),)),
    Case(heads_norm.normalised, lambda n: (normal(n, SIZE), normal(n, 1).abs(), WEIGHT, 0.1, True)),
    Case(
        logprobs.log_softmax,
        lambda n: (normal(n, VOCAB),),
        lambda x: x - x.exp().sum(-1, keepdim=True).log(),
    ),
    Case(logprobs.score_and_rank, lambda n: (normal(n, VOCAB), numbers(VOCAB, n))),
    Case(sampler.scaled, lambda n: (normal(n, VOCAB), normal(n), normal(n, seed=5).abs())),
    Case(penalties.texts, text_of),
    Case(penalties.penalised, penalised_rows, loop_of_penalties),
    Case(base.biased, biased_rows),
    Case(allowed_ids.without, lambda n: (normal(n, VOCAB), normal(n, VOCAB, seed=5) > 0)),
]
WITH_FORMULA = [case for case in CASES if case.formula is not None]


def test_every_compiled_definition_of_the_package_stands_here():
    pattern = re.compile(r"^@compiled\(.*\)\ndef (\w+)", re.MULTILINE)
    files = Path(nanovllm.__file__).parent.rglob("*.py")
    names = [name for file in files for name in pattern.findall(file.read_text())]
    assert sorted(names) == sorted(case.name for case in CASES)


def copied(arguments: tuple[Any, ...]) -> list[Any]:
    """The same arguments, because a definition may overwrite them."""
    return [x.clone() if isinstance(x, Tensor) else x for x in arguments]


def listed(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.fixture(autouse=True)
def no_failures(caplog):
    """A definition that does not compile runs as it is written, and logs why."""
    counters.clear()
    yield
    assert "without torch.compile" not in caplog.text


# -- one compilation, equal results ----------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.inference_mode()
def test_one_compilation_serves_all_numbers_of_rows(case):
    """And one more serves a single row, because torch compiles a size of 1 apart."""
    choice = KernelChoice(compiles=True, backend="eager")
    for rows in (7, 1, 4, 2, 300, 1, 64):
        arguments = case.arguments(rows)
        expected = listed(case.definition(*copied(arguments)))
        with kernel_choice(choice):
            found = listed(case.definition(*copied(arguments)))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert counters["stats"]["unique_graphs"] == 2
    assert choice.done.count == 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("case", WITH_FORMULA, ids=lambda case: case.name)
@torch.inference_mode()
def test_inductors_code_gives_what_the_formula_gives_in_float64(case):
    with kernel_choice(KernelChoice(compiles=True)):
        for rows in (5, 33):
            arguments = case.arguments(rows)
            exact = [x.double() if is_float(x) else x for x in copied(arguments)]
            expected = listed(case.formula(*exact))
            found = listed(case.definition(*copied(arguments)))
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-5)


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@torch.inference_mode()
def test_inductors_code_rounds_where_the_definition_rounds():
    x = normal(40, SIZE).bfloat16()
    arguments = (x, WEIGHT.bfloat16(), 1e-5, 0.0, False)
    with kernel_choice(KernelChoice(compiles=True)):
        found = kernels._rms_norm(*arguments)
    assert torch.equal(found, kernels._rms_norm(*arguments))


# -- whose choice counts ---------------------------------------------------------------------------


@torch.inference_mode()
def test_nothing_compiles_unless_an_engine_chose_so():
    kernels._scale(normal(3, 4), 2.0)
    with kernel_choice(KernelChoice(without=frozenset(["rms_norm"]))):
        kernels._scale(normal(3, 4), 2.0)
    assert not counters["stats"]


@torch.inference_mode()
def test_engines_share_no_compiled_code():
    """So the many models of one process never reach torch's limit of versions of a function."""
    choices = [KernelChoice(compiles=True, backend="eager") for _ in range(12)]
    for size, choice in enumerate(choices, start=2):
        with kernel_choice(choice):
            kernels._scale(normal(3, size), 2.0)
    assert [choice.done.count for choice in choices] == [1] * 12


@torch.inference_mode()
def test_a_definition_that_does_not_compile_runs_as_it_is_written(caplog):
    def broken(graph: Any, inputs: Any) -> Callable[..., Any]:
        raise NotImplementedError("no such device")

    backend: Any = broken
    x = normal(3, 4)
    with kernel_choice(KernelChoice(compiles=True, backend=backend)):
        for _ in range(2):
            assert torch.equal(kernels._scale(x, 2.0), 2 * x)
    (line,) = [each.message for each in caplog.records if "torch.compile" in each.message]
    assert line.startswith("scale runs without torch.compile")
    assert "no such device" in line
    caplog.clear()


# -- whole engines ---------------------------------------------------------------------------------

PROMPTS = random_prompts([1, 5, 18, 33], VOCAB_SIZE)


@pytest.fixture
def no_cpu_kernels(monkeypatch):
    """Every operation has its definition alone, as on a GPU where all kernels are left out."""
    for module in (cpu, moe_cpu):
        monkeypatch.setattr(module, "kernel", lambda *names: None)
    monkeypatch.setattr(cpu, "fits_panels", lambda depth, dtype: False)


def make_llm(folder: str, **arguments: Any) -> LLM:
    defaults = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "num_gpu_blocks_override": 64,
        "max_num_batched_tokens": 64,
        "enable_prefix_caching": False,
    }
    return LLM(folder, **{**defaults, **arguments})


def compile_all(llm: LLM, backend: str = "eager") -> KernelChoice:
    choice = KernelChoice(compiles=True, backend=backend)
    llm.llm_engine.executor.runner.kernel_choice = choice
    return choice


def answers(llm: LLM, **params: Any) -> list[Any]:
    asked = SamplingParams(max_tokens=8, ignore_eos=True, **params)
    outs = llm.generate(PROMPTS, asked, use_tqdm=False)
    return [out.outputs[0] for out in outs]


def tokens_of(llm: LLM, **params: Any) -> list[list[int]]:
    return [list(answer.token_ids) for answer in answers(llm, **params)]


@pytest.mark.parametrize(
    "architecture",
    ["Qwen3ForCausalLM", "Gemma2ForCausalLM", "Olmo2ForCausalLM", "Qwen2MoeForCausalLM"],
)
@pytest.mark.usefixtures("no_cpu_kernels")
def test_compiled_models_give_transformers_tokens(tmp_path, architecture):
    folder, model = tiny_decoder(tmp_path, architecture)
    llm = make_llm(folder, attention_backend="torch")
    choice = compile_all(llm)
    assert tokens_of(llm, temperature=0) == [greedy(model, ids, 8) for ids in PROMPTS]
    assert choice.done.count > 0
    assert not counters["graph_break"]


EVERYTHING = {
    "temperature": 0.8,
    "seed": 7,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.3,
    "repetition_penalty": 1.3,
    "logit_bias": {3: 2.0, 9: -1.0},
    "allowed_token_ids": list(range(100)),
    "min_p": 0.02,
    "logprobs": 3,
}


@pytest.mark.usefixtures("no_cpu_kernels")
def test_two_engines_with_different_choices_give_the_same(tmp_path):
    folder, _ = tiny_decoder(tmp_path, "Qwen3ForCausalLM")
    plain, other = (make_llm(folder, attention_backend="torch") for _ in range(2))
    choice = compile_all(other)
    for _ in range(2):
        before = choice.done.count
        expected = answers(plain, **EVERYTHING)
        assert choice.done.count == before
        for one, two in zip(answers(other, **EVERYTHING), expected, strict=True):
            assert one.token_ids == two.token_ids
            for entry, same in zip(one.logprobs, two.logprobs, strict=True):
                assert entry.keys() == same.keys()
                for token, found in entry.items():
                    assert found.rank == same[token].rank
                    assert found.logprob == pytest.approx(same[token].logprob, abs=1e-5)
    assert choice.done.count > 5


@pytest.mark.usefixtures("no_cpu_kernels")
def test_the_profiled_step_has_all_of_sampling_and_compiles_nothing(tmp_path, monkeypatch):
    """Its peak is that of plain definitions, which take more memory than compiled ones."""
    folder, _ = tiny_decoder(tmp_path, "Qwen3ForCausalLM")
    llm = make_llm(folder, attention_backend="torch")
    choice = compile_all(llm)
    runner = llm.llm_engine.executor.runner
    parts: set[str] = set()
    run = runner.run
    monkeypatch.setattr(runner, "run", lambda batch: parts.update(batch.parts) or run(batch))
    memory.profile_step(runner)
    assert parts == {"filters", "penalties", "logprobs"}
    assert choice.done.count == 0
    assert runner.kernel_choice is choice


# -- more rows than are copied at once -------------------------------------------------------------


def test_rows_in_pieces_give_what_they_give_at_once(monkeypatch, tmp_path):
    folder, _ = tiny_decoder(tmp_path, "Qwen3ForCausalLM")
    llm = make_llm(folder)
    expected = answers(llm, **EVERYTHING)
    for module in (penalties, allowed_ids, next_tokens):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", 3)
    for one, two in zip(answers(llm, **EVERYTHING), expected, strict=True):
        assert one.token_ids == two.token_ids
        assert one.logprobs == two.logprobs


# -- the CPU's choice ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, 0, 3])
def test_a_cpu_compiles_transformers_models_if_it_is_asked(tmp_path, mode):
    folder, model = tiny_decoder(tmp_path, "Qwen3ForCausalLM")
    config = {"mode": mode, "backend": "eager"}
    llm = make_llm(folder, model_impl="transformers", compilation_config=config)
    runner = llm.llm_engine.executor.runner
    assert tokens_of(llm, temperature=0) == [greedy(model, ids, 8) for ids in PROMPTS]
    assert runner.kernel_choice.done.count == (1 if mode else 0)


def test_on_a_cpu_a_mode_changes_nothing_for_our_own_models(tmp_path, caplog):
    folder, model = tiny_decoder(tmp_path, "Qwen3ForCausalLM")
    with caplog.at_level(logging.INFO, logger="nanovllm"):
        llm = make_llm(folder, compilation_config=3)
    assert "mode=3 compiles nothing" in caplog.text
    assert tokens_of(llm, temperature=0) == [greedy(model, ids, 8) for ids in PROMPTS]
    assert not counters["stats"]
