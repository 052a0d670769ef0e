"""Recorded programs of the CPU: whatever is done to the Python model takes effect, to the bit, as it does without them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import random_prompts, shared_model, tiny_model
from torch import Tensor, nn

from nanovllm import LLM, SamplingParams, kernels
from nanovllm.attention.base import AttentionSpec
from nanovllm.attention.cpu_backend import CpuAttention
from nanovllm.cache.spec import PagedKV
from nanovllm.core.batch import AttentionMetadata
from nanovllm.kernels import cpu
from nanovllm.kernels.rope import Rope
from nanovllm.layers.norm import RMSNorm
from nanovllm.models.decoder import MLP
from nanovllm.runner import cpu_program
from nanovllm.weights.base import Weight

pytestmark = pytest.mark.skipif(
    cpu.load() is None, reason="cpu.cpp does not build here (no C++ compiler)"
)
PROMPTS = random_prompts([5, 1, 17])
PARAMS = SamplingParams(temperature=0, max_tokens=6, logprobs=3, ignore_eos=True)
Change = Callable[[Any], None]


def make_llm(dtype: str, **kwargs: Any) -> LLM:
    defaults = {"skip_tokenizer_init": True, "max_num_batched_tokens": 64, "max_num_seqs": 32}
    sizes = {"num_gpu_blocks_override": 256, "enable_prefix_caching": False}
    return LLM(
        kwargs.pop("folder", None) or shared_model()[0],
        dtype=dtype,
        **{**defaults, **sizes, **kwargs},
    )


def outputs(llm: LLM, prompts: list[list[int]] = PROMPTS, params: Any = PARAMS) -> list[Any]:
    return [
        (out.outputs[0].token_ids, out.outputs[0].logprobs)
        for out in llm.generate(prompts, params, use_tqdm=False)
    ]


def model_of(llm: LLM) -> Any:
    return llm.llm_engine.executor.runner.model


def programs_of(llm: LLM) -> Any:
    return llm.llm_engine.executor.runner.programs


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def pair(request: Any) -> tuple[LLM, LLM]:
    """(an engine that records, an engine that does not)."""
    fast, plain = make_llm(request.param), make_llm(request.param, enforce_eager=True)
    assert programs_of(plain) is None
    return fast, plain


@pytest.fixture(scope="module")
def expected(pair: tuple[LLM, LLM]) -> list[Any]:
    return outputs(pair[1])


@pytest.fixture(autouse=True)
def a_program_is_there_and_nothing_is_left(
    pair: tuple[LLM, LLM], expected: list[Any]
) -> Iterator[None]:
    """Each test begins with an engine that replays, and leaves both models as they were."""
    fast, plain = pair
    outputs(fast)
    assert (3, 0) in programs_of(fast).programs
    yield
    assert outputs(fast) == outputs(plain) == expected


# -- changes that take effect ------------------------------------------------------------------------------------------


class Sum(nn.Module):
    """Another module at the place of one of ours."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x.mean(-1, keepdim=True)


class ScaledWeight(Weight):
    """A weight around another one, as adapters are."""

    def __init__(self, base: Weight) -> None:
        self.base = base

    def sources(self, *args: Any) -> Any:
        return self.base.sources(*args)

    def linear(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.base.linear(layer, x, bias) * 2

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        return self.base.embedding(layer, ids)

    def begin_loading(self, layer: nn.Module) -> None:
        self.base.begin_loading(layer)

    def finish_loading(self, layer: nn.Module) -> None:
        self.base.finish_loading(layer)


def layer_of(model: Any) -> Any:
    return model.model.layers[1]


def replace_mlp(model: Any) -> None:
    layer_of(model).mlp = Sum(layer_of(model).mlp)


def replace_mlp_in_the_dictionary(model: Any) -> None:
    layer_of(model)._modules["mlp"] = Sum(layer_of(model).mlp)


def wrap_down_proj(model: Any) -> None:
    layer_of(model).mlp.down_proj = Sum(layer_of(model).mlp.down_proj)


def swap_layers(model: Any) -> None:
    layers = model.model.layers
    layers[0].mlp, layers[1].mlp = layers[1].mlp, layers[0].mlp


def wrap_a_weight(model: Any) -> None:
    layer = layer_of(model).mlp.down_proj
    layer.storage = ScaledWeight(layer.storage)


def instance_forward(model: Any) -> None:
    mlp = layer_of(model).mlp
    mlp.forward = lambda x: MLP.forward(mlp, x) * 2


def another_class(model: Any) -> None:
    class Twice(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    layer_of(model).mlp.__class__ = Twice


def new_parameter(model: Any) -> None:
    norm = layer_of(model).input_layernorm
    norm.weight = nn.Parameter(norm.weight * 2, requires_grad=False)


def new_parameter_in_the_dictionary(model: Any) -> None:
    norm = layer_of(model).input_layernorm
    norm._parameters["weight"] = nn.Parameter(norm.weight * 2, requires_grad=False)


def new_data(model: Any) -> None:
    weight = layer_of(model).self_attn.q_norm.weight
    weight.data = weight.data * 2


def rewritten_in_place(model: Any) -> None:
    layer_of(model).input_layernorm.weight.data.mul_(2)


def another_eps(model: Any) -> None:
    layer_of(model).post_attention_layernorm.eps = 1.0


def a_bias(model: Any) -> None:
    layer = layer_of(model).self_attn.o_proj
    layer.bias = nn.Parameter(torch.ones_like(model.model.norm.weight), requires_grad=False)


def another_table(model: Any) -> None:
    rotary = layer_of(model).self_attn.rotary_emb
    rotary.cos_sin = rotary.cos_sin.flip(0)


CHANGES = [
    replace_mlp,
    replace_mlp_in_the_dictionary,
    wrap_down_proj,
    swap_layers,
    wrap_a_weight,
    instance_forward,
    another_class,
    new_parameter,
    new_parameter_in_the_dictionary,
    new_data,
    rewritten_in_place,
    another_eps,
    a_bias,
    another_table,
]


def snapshot(model: Any) -> list[Any]:
    """All that a change may touch."""
    kept = []
    for module in model.modules():
        for attributes in (module._modules, module._parameters, module._buffers, vars(module)):
            kept.append((attributes, dict(attributes)))
        for parameter in module._parameters.values():
            if parameter is not None:
                kept.append((parameter, (parameter.data, parameter.data.clone())))
        kept.append((module, type(module)))
    return kept


def restore(kept: list[Any]) -> None:
    for owner, value in kept:
        if isinstance(owner, dict):
            owner.clear()
            owner.update(value)
        elif isinstance(owner, nn.Module):
            owner.__class__ = value
        else:
            data, numbers = value
            owner.data = data.copy_(numbers)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_the_model_takes_effect(pair: tuple[LLM, LLM], change: Change) -> None:
    fast, plain = pair
    before = outputs(fast)
    kept = [snapshot(model_of(llm)) for llm in pair]
    for llm in pair:
        change(model_of(llm))
    after = outputs(plain)
    assert after != before
    assert outputs(fast) == outputs(fast) == after
    for each in kept:
        restore(each)


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_a_hook_takes_effect(pair: tuple[LLM, LLM], kind: str) -> None:
    fast, plain = pair
    before = outputs(fast)

    def changed(*args: Any) -> Any:
        return args[-1] * 2 if kind == "forward" else (args[-1][0] * 2,)

    handles = [
        getattr(layer_of(model_of(llm)).mlp, f"register_{kind}_hook")(changed) for llm in pair
    ]
    after = outputs(plain)
    assert after != before
    assert outputs(fast) == after
    for handle in handles:
        handle.remove()
    assert outputs(fast) == before


@pytest.mark.parametrize("on_all", [False, True])
def test_a_hook_that_only_watches_sees_every_step(pair: tuple[LLM, LLM], on_all: bool) -> None:
    seen: list[tuple[int, ...]] = []

    def watch(module: nn.Module, args: Any, result: Any) -> None:
        if isinstance(module, MLP):
            seen.append(tuple(result.shape))

    counts = []
    for llm in pair:
        register = (
            nn.modules.module.register_module_forward_hook
            if on_all
            else layer_of(model_of(llm)).mlp.register_forward_hook
        )
        handle = register(watch)
        outputs(llm)
        handle.remove()
        counts.append(list(seen))
        seen.clear()
    assert counts[0] == counts[1]
    assert len(counts[0]) == (12 if on_all else 6)


@pytest.mark.parametrize(
    "target",
    [(MLP, "forward"), (RMSNorm, "add"), (nn.Module, "__call__"), (kernels, "silu_and_mul")],
)
def test_a_function_replaced_for_all_is_called(
    pair: tuple[LLM, LLM], target: tuple[Any, str], monkeypatch: Any
) -> None:
    fast, plain = pair
    before = outputs(fast)
    original, calls = getattr(*target), []

    def counted(*args: Any) -> Any:
        calls.append(len(args))
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(*target, counted)
        assert outputs(fast) == before
        of_fast = len(calls)
        outputs(plain)
        assert len(calls) == 2 * of_fast > 0
    assert outputs(fast) == before


def test_a_method_of_the_attention_backend_replaced_is_called(
    pair: tuple[LLM, LLM], monkeypatch: Any
) -> None:
    fast, _ = pair
    attention, calls = fast.llm_engine.executor.runner.attention, []
    before, attend = outputs(fast), attention.attend
    with monkeypatch.context() as patch:
        patch.setattr(attention, "attend", lambda layer, q: calls.append(layer) or attend(layer, q))
        assert outputs(fast) == before
        assert calls == [0, 1] * 6
    assert outputs(fast) == before


def test_new_weights_take_effect(pair: tuple[LLM, LLM], tmp_path: Any) -> None:
    fast, plain = pair
    before = outputs(fast)
    _, other = tiny_model(tmp_path, "Qwen3", rms_norm_eps=1e-5)
    for model in (other, shared_model()[1]):
        for llm in pair:
            model_of(llm).load_weights(model.state_dict().items())
        after = outputs(plain)
        assert (after == before) is (model is not other)
        assert outputs(fast) == outputs(fast) == after


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_and_wake_up(pair: tuple[LLM, LLM], level: int) -> None:
    fast, _ = pair
    before = outputs(fast)
    for _ in range(2):
        fast.sleep(level)
        assert not programs_of(fast).arena.blocks
        fast.wake_up()
        assert outputs(fast) == before


# -- the same to the bit -----------------------------------------------------------------------------------------------


def test_random_mixed_batches_are_the_same_to_the_bit(pair: tuple[LLM, LLM]) -> None:
    fast, plain = pair
    rng = random.Random(0)
    for seed in range(2):
        prompts = random_prompts([rng.randint(1, 40) for _ in range(24)], seed=seed)
        params = [
            SamplingParams(
                temperature=rng.choice([0, 1]),
                seed=i,
                max_tokens=rng.randint(1, 20),
                logprobs=2,
                ignore_eos=True,
            )
            for i in range(24)
        ]
        assert outputs(fast, prompts, params) == outputs(plain, prompts, params)
    assert len(programs_of(fast).programs) > 5


def test_two_engines_in_one_process(pair: tuple[LLM, LLM], tmp_path: Any) -> None:
    folder, _ = tiny_model(tmp_path, "Qwen2")
    fast, other = pair[0], make_llm("float32", folder=folder)
    expected = outputs(fast), outputs(other)
    for _ in range(3):
        assert (outputs(fast), outputs(other)) == expected
    assert programs_of(other).programs


def test_memory_is_bounded(pair: tuple[LLM, LLM], monkeypatch: Any) -> None:
    fast, plain = pair
    monkeypatch.setattr(cpu_program, "MAX_PROGRAMS", 3)
    programs_of(fast).clear()
    prompts = random_prompts([1] * 12)
    params = [
        SamplingParams(temperature=0, max_tokens=3 * i, ignore_eos=True, logprobs=1)
        for i in range(1, 13)
    ]
    sizes = []
    for _ in range(3):  # 1 to 12 sequences, so each time all programs are recorded again
        assert outputs(fast, prompts, params) == outputs(plain, prompts, params)
        assert len(programs_of(fast).programs) == 3
        sizes.append(sum(len(block) for block in programs_of(fast).arena.blocks.values()))
    assert sizes[0] == sizes[1] == sizes[2]
    largest = (
        12 * (64 + 3 * 192 + 2 * 128 + 192 + 96) * 4
    )  # embedding to MLP of 12 tokens, if nothing were used twice
    assert sizes[0] < 4 * largest


@pytest.mark.parametrize("pair", ["float32"], indirect=True)
def test_all_words_of_attention_and_all_small_kernels_are_recorded(pair: tuple[LLM, LLM]) -> None:
    del pair
    rope = Rope(2, 1, 32, torch.rand(64, 8), torch.rand(32), torch.rand(32), 1e-6, 1.0)
    layer = PagedKV(2, 1, 32, 3, softcap=2.0, has_sinks=True)
    other = PagedKV(4, 1, 16, value_dim=32, has_sinks=True)
    spec = AttentionSpec((layer, other), 16, torch.float32, torch.device("cpu"))
    attention = CpuAttention(spec)
    attention.allocate(4)
    table, norm, weight = torch.randn(9, 128), torch.rand(128), torch.randn(128, 64)
    sinks = torch.randn(4)
    ids = torch.zeros(5, dtype=torch.int64)
    places = torch.arange(5, dtype=torch.int32)
    one = [torch.tensor(numbers, dtype=torch.int32) for numbers in ([0, 5], [5], [[2]])]
    attention.begin(AttentionMetadata(places, places + 32, *one, 5, 1, 5))

    def step() -> Tensor:
        x = kernels.scale(kernels.embedding(ids, table), 2.5)
        normed = kernels.rms_norm(x, norm, 1e-6, 1.0, True)
        heads = attention.attend(0, attention.write(0, normed, rope), sinks[:2])
        x = kernels.add(x, kernels.linear(heads, weight, None))
        attention.store(1, x[:, :16].unsqueeze(1), x[:, 32:64].unsqueeze(1))
        gelu = kernels.gelu_and_mul(x)
        out = attention.attend(1, gelu.view(5, 4, 16), sinks)
        return kernels.add_rms_norm(x, out, norm, 1e-6, 1.0)[0]

    recorder = cpu_program.Recorder(cpu_program.Arena(), {})
    token = cpu.RECORDER.set(recorder)
    with recorder:
        hidden = step()
    cpu.RECORDER.reset(token)
    assert recorder.reason is None
    program = cpu_program.Program(recorder, hidden)
    for _ in range(2):
        ids.random_(9)
        expected = step()
        assert torch.equal(program.replay(), expected)


# -- what cannot be recorded -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", ["float32"], indirect=True)
def test_a_module_that_cannot_be_recorded_runs_and_one_line_says_so(
    pair: tuple[LLM, LLM], caplog: Any
) -> None:
    kept = [snapshot(model_of(llm)) for llm in pair]
    for llm in pair:
        norm = model_of(llm).model.norm
        norm.weight = nn.Parameter(
            norm.weight.bfloat16(), requires_grad=False
        )  # no kernel mixes two dtypes
    fast, plain = pair
    programs_of(fast).reported.clear()
    assert outputs(fast) == outputs(plain)
    assert outputs(fast) == outputs(plain)
    assert not programs_of(fast).programs
    (line,) = [
        record.getMessage()
        for record in caplog.records
        if "module by module" in record.getMessage()
    ]
    assert "model.norm calls aten." in line
    for each in kept:
        restore(each)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replace_mlp, "model.layers.1.mlp is a test_cpu_program.Sum"),
        (instance_forward, "model.layers.1.mlp has a forward of its own"),
        (wrap_a_weight, "a weight is a test_cpu_program.ScaledWeight"),
    ],
)
def test_the_line_names_the_module(
    pair: tuple[LLM, LLM], change: Change, words: str, caplog: Any
) -> None:
    fast, _ = pair
    programs_of(fast).reported.clear()
    kept = snapshot(model_of(fast))
    change(model_of(fast))
    outputs(fast)
    outputs(fast)
    assert [record.getMessage().count(words) for record in caplog.records] == [1]
    restore(kept)


def test_the_torch_backend_is_not_recorded() -> None:
    assert programs_of(make_llm("float32", attention_backend="torch")) is None


def test_a_recording_imports_no_dynamo():
    """torch wraps a mode's method into one that imports Dynamo, unless the mode says no."""
    assert not hasattr(cpu_program.Recorder.__torch_dispatch__, "__wrapped__")
