"""Steps that hold prompts, as recorded pieces between attentions.

`TapeRecorder` stands for CUDA graphs: it notes torch's operations of a piece, and a replay repeats
them into the same tensors. So a stale or misplaced input, a missing operation or a cut at the
wrong place gives other tokens than transformers'. The C++ kernels are off, because torch does not
see their calls.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_cuda_graphs import PretendedCuda, with_static_path
from tiny import greedy, make_llm, nothing_is_left, random_prompts, shared_model  # noqa: F401
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm import LLM, SamplingParams, kernels
from nanovllm.kernels import cpu
from nanovllm.models.transformers_attention import PAGES
from nanovllm.runner import memory
from nanovllm.runner.cuda_graphs import NEVER_ENDED, CaptureError
from nanovllm.runner.pieces import SIZES, CudaRecorder, Pieces, alias, piece_sizes

Call = tuple[Any, tuple[Any, ...], dict[str, Any], Any]


# -- what stands for CUDA graphs -------------------------------------------------------------------


class Tape(TorchDispatchMode):
    """Notes every operation of torch while `calls` is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] | None = None

    @classmethod
    def is_infra_mode(cls) -> bool:
        """True, so that compiled code runs here too."""
        return True

    @torch.compiler.disable
    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.nanovllm.attend_pages.default:
            *tensors, number = args
            with self:  # the operations inside count, and torch hides them here
                return PAGES[number].run(*tensors)
        result = function(*args, **(kwargs or {}))
        if self.calls is not None:
            self.calls.append((function, args, kwargs or {}, result))
        return result


def replayed(calls: list[Call]) -> None:
    """Repeats operations. Each result goes to the tensor of the recording."""
    for function, args, kwargs, old in calls:
        if function._schema.name.startswith(("aten::empty", "aten::new_empty")):
            continue  # such memory holds what it held
        if function._schema.is_mutable:
            function(*args, **kwargs)
        elif isinstance(old, Tensor) and not shares_memory(old, args):
            old.copy_(function(*args, **kwargs))
        else:
            assert isinstance(old, (Tensor, list, tuple)), "a piece asks for a number"
            views = [old] if isinstance(old, Tensor) else old
            assert all(shares_memory(view, args) for view in views), function


def shares_memory(x: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether x is a view of an argument."""
    where = x.untyped_storage().data_ptr()
    return any(isinstance(a, Tensor) and a.untyped_storage().data_ptr() == where for a in args)


class TapeRecorder:
    """A `Recorder` whose pieces are lists of operations."""

    def __init__(self, stream: object = None) -> None:
        self.tape = Tape()
        self.replays = 0

    @contextmanager
    def ready(self, work: Callable[[], object], largest: bool) -> Iterator[None]:
        with self.tape:
            work()
            yield

    @contextmanager
    def piece(self) -> Iterator[Callable[[], None]]:
        assert self.tape.calls is None, "a piece inside a piece"
        calls: list[Call] = []
        self.tape.calls = calls

        def replay() -> None:
            self.replays += 1
            replayed(calls)

        try:
            yield replay
        finally:
            self.tape.calls = None


@pytest.fixture(autouse=True, scope="module")
def plain_definitions() -> Iterator[None]:
    """Everything runs as torch's operations."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load", "kernel", "panel"):
            patch.setattr(cpu, name, lambda *args: None)
        yield


class CountedPieces(Pieces):
    """Notes the numbers of tokens of the steps that were replayed."""

    def forward(self, host_batch, batch):
        self.counts = [*getattr(self, "counts", []), len(host_batch.tokens.ids)]
        return super().forward(host_batch, batch)


def with_pieces(llm: LLM) -> CountedPieces:
    runner = llm.llm_engine.executor.runner
    pieces = CountedPieces(runner.setup, runner.attention, TapeRecorder())
    with torch.inference_mode():
        for size in pieces.sizes[::-1]:
            pieces.record(size, runner.forward)
    runner.pieces = pieces
    return pieces


def tokens(llm: LLM, prompts: list[list[int]], params: Any) -> list[list[int]]:
    return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, params, use_tqdm=False)]


def torch_llm(folder: str | None = None, **kwargs: Any) -> LLM:
    return make_llm(folder, attention_backend="torch", max_num_seqs=8, **kwargs)


# -- sizes -----------------------------------------------------------------------------------------


def test_sizes_grow_by_tiles_of_products():
    assert piece_sizes(1) == [16]
    assert piece_sizes(64) == [16, 32, 64]
    assert piece_sizes(300) == [16, 32, 64, 128, 256, 384]
    assert piece_sizes(16384) == list(SIZES)
    assert SIZES[-1] == 2048


@given(st.integers(1, 2048), st.integers(1, 20000))
def test_a_step_has_a_size_unless_it_is_larger_than_all(count, limit):
    sizes = piece_sizes(limit)
    assert sizes == sorted(set(sizes))
    if count <= limit:
        assert count <= sizes[-1]


def test_an_alias_is_the_same_memory_and_does_not_own_it():
    x = torch.arange(24.0).view(4, 6)[1:, 2:4]
    other = alias(x)
    assert torch.equal(other, x)
    assert other.stride() == x.stride()
    other[0, 0] = 100
    assert x[0, 0] == 100
    assert other.untyped_storage()._cdata != x.untyped_storage()._cdata


GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


# -- equal tokens ----------------------------------------------------------------------------------

LENGTHS = [1, 15, 16, 17, 100, 33, 5, 70, 3, 9, 40]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("family", ["Qwen3", "Gemma3"])
def test_greedy_tokens_equal_transformers(family, overlap):
    """Prompts, mixed steps, chunks of a prompt and decodes, with and without prefix hits."""
    folder, model = shared_model(family)
    prompts = random_prompts(LENGTHS)
    budgets = [8, 3, 12, 5, 7, 1, 8, 6, 10, 9, 6]
    expected = [greedy(model, prompt, n) for prompt, n in zip(prompts, budgets)]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in budgets]
    llm = torch_llm(folder, async_scheduling=overlap, max_num_batched_tokens=60)
    pieces = with_pieces(llm)
    assert tokens(llm, prompts, params) == expected
    assert tokens(llm, prompts, params) == expected, "on prefix hits"
    assert pieces.sizes == [16, 32, 64]
    assert 60 in pieces.counts
    assert min(pieces.counts) < 8
    layers = llm.llm_engine.setup.config.num_layers
    assert pieces.recorder.replays == len(pieces.counts) * (layers + 1)


WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0, "prompt_logprobs": 2},
    {"temperature": 0.6, "seed": 4},
    {"top_p": 0.8, "top_k": 40},
    {"min_p": 0.05, "logprobs": 3},
    {"presence_penalty": 1.0, "repetition_penalty": 1.2},
    {"allowed_token_ids": list(range(50)), "logit_bias": {3: 2.0}},
]


def test_any_sampling_gives_what_the_eager_path_gives():
    prompts = random_prompts([12, 20, 5, 33, 8, 17, 2])
    params = [
        SamplingParams(max_tokens=9 - i, ignore_eos=True, **way) for i, way in enumerate(WAYS)
    ]
    eager, recorded = (torch_llm(max_num_batched_tokens=48) for _ in range(2))
    pieces = with_pieces(recorded)
    found, expected = (llm.generate(prompts, params, use_tqdm=False) for llm in (recorded, eager))
    assert len(pieces.counts) > 8
    for out, other in zip(found, expected):
        assert out.outputs[0].token_ids == other.outputs[0].token_ids
        assert out.outputs[0].logprobs == other.outputs[0].logprobs
        assert out.prompt_logprobs == other.prompt_logprobs


def test_decodes_replay_graphs_and_all_other_steps_pieces():
    """Twice as many requests as rows, so prompts enter in groups."""
    _, model = shared_model()
    prompts = random_prompts([9, 20, 14, 3, 30, 7, 12, 5, 16, 8, 11, 2]) * 3
    expected = [greedy(model, prompt, 8) for prompt in prompts[:12]] * 3
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    llm = make_llm(attention_backend="torch", max_num_seqs=18, enable_prefix_caching=False)
    graphs, pieces = with_static_path(llm), with_pieces(llm)
    llm.llm_engine.reset()
    assert llm.llm_engine.scheduler.admission_group == 2
    assert tokens(llm, prompts, params) == expected
    assert graphs.sizes_replayed
    assert all(count > 18 for count in pieces.counts), "every step of pieces holds a prompt"


def test_rows_of_padding_are_finite_whatever_the_memory_held():
    """An expert's router must not see NaN."""
    llm = torch_llm(max_num_batched_tokens=32)
    pieces = with_pieces(llm)
    for step in pieces.steps.values():
        for cut in step.cuts:
            cut.out.numpy().fill(np.nan)
    tokens(llm, random_prompts([9, 20]), GREEDY)
    for step in pieces.steps.values():
        assert step.hidden.isfinite().all()


def test_steps_of_more_tokens_and_steps_with_adapters_run_as_before():
    _, model = shared_model()
    prompts = random_prompts([9, 30, 3])
    llm = torch_llm(max_num_batched_tokens=64)
    pieces = with_pieces(llm)
    pieces.sizes = [16]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    assert tokens(llm, prompts, params) == [greedy(model, prompt, 4) for prompt in prompts]
    assert max(pieces.counts) <= 16


# -- changes of the model --------------------------------------------------------------------------


@pytest.fixture
def tapes(monkeypatch):
    """Recording on a CPU by the functions that record on a GPU."""
    monkeypatch.setattr(memory, "CudaRecorder", TapeRecorder)
    monkeypatch.setattr(memory, "Pieces", CountedPieces)
    monkeypatch.setattr(memory, "record_graphs", lambda runner, count=None: None)


def prepared_runner(llm: LLM) -> Any:
    """The runner of an engine on a CPU that records pieces as one on a GPU does."""
    runner = llm.llm_engine.executor.runner
    runner.capture_stream = object()
    runner.records_pieces = True
    memory.record(runner)
    return runner


def test_pieces_are_recorded_again_after_sleep(tapes):
    _, model = shared_model()
    prompts = random_prompts([9, 30, 3])
    expected = [greedy(model, prompt, 6) for prompt in prompts]
    llm = torch_llm()
    runner = prepared_runner(llm)
    before = runner.pieces
    assert tokens(llm, prompts, GREEDY) == expected
    llm.sleep(1)
    assert runner.pieces is None
    assert not before.steps
    llm.wake_up(["weights"])
    assert runner.pieces is None, "the cache is not back yet"
    llm.wake_up(["kv_cache"])
    assert runner.pieces not in (None, before)
    assert tokens(llm, prompts, GREEDY) == expected
    assert runner.pieces.counts


def test_new_weights_take_effect(tapes):
    """They are written where the old ones were, so the pieces read them."""
    prompts = random_prompts([9, 30, 3])
    llm = torch_llm(max_num_batched_tokens=64)
    runner = prepared_runner(llm)
    name = "model.layers.0.mlp.down_proj.weight"
    weight = 3 * dict(shared_model()[1].named_parameters())[name].detach()
    before = tokens(llm, prompts, GREEDY)
    runner.model.load_weights([(name, weight)])
    llm.reset_prefix_cache()
    found = tokens(llm, prompts, GREEDY)
    runner.pieces = None
    llm.reset_prefix_cache()
    assert found == tokens(llm, prompts, GREEDY) != before


def test_a_forward_hook_is_recorded_with_the_model(tapes):
    """As with decode graphs: a hook that comes later takes effect with the next recording."""
    prompts = random_prompts([9, 30, 3])
    llm = torch_llm(max_num_batched_tokens=64, enable_prefix_caching=False)
    runner = prepared_runner(llm)
    plain = tokens(llm, prompts, GREEDY)
    runner.model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: -2 * out)
    assert tokens(llm, prompts, GREEDY) == plain
    memory.record(runner)
    found = tokens(llm, prompts, GREEDY)
    runner.pieces = None
    assert found == tokens(llm, prompts, GREEDY) != plain


def test_an_engine_whose_recording_fails_goes_on_eagerly(tapes, monkeypatch, caplog):
    tried = []

    def failing(self: Pieces, size: int, forward: Any) -> None:
        tried.append(size)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CountedPieces, "record", failing)
    llm = torch_llm(max_num_batched_tokens=64)
    with caplog.at_level("WARNING", "nanovllm"):
        runner = prepared_runner(llm)
    assert runner.pieces is None
    assert tried == [64]
    warnings = [each.message for each in caplog.records if "CUDA graphs" in each.message]
    assert warnings == [
        "prefill runs without CUDA graphs: recording a graph for 64 tokens failed: CUDA out of memory"
    ]
    _, model = shared_model()
    (prompt,) = random_prompts([9])
    assert tokens(llm, [prompt], GREEDY) == [greedy(model, prompt, 6)]


def test_a_model_that_catches_an_error_of_its_recording_is_not_recorded(tapes):
    llm = torch_llm(max_num_batched_tokens=16)
    runner = prepared_runner(llm)
    forward = runner.forward
    runs = []

    def again(batch: Any, attention: Any) -> Tensor:
        runs.append(batch)
        if len(runs) == 2:
            forward(batch, attention)
        return forward(batch, attention)

    with pytest.raises(CaptureError, match=r"layers \[0, 1, 0, 1\] attended instead of \[0, 1\]"):
        Pieces(runner.setup, runner.attention, TapeRecorder()).record(16, again)


# -- models of transformers ------------------------------------------------------------------------


@pytest.mark.parametrize("is_compiled", [False, True])
def test_transformers_own_code_is_recorded(is_compiled, monkeypatch, caplog):
    if is_compiled and not hasattr(TorchDispatchMode, "is_infra_mode"):
        pytest.skip("torch.compile of this version refuses modes such as Tape")
    monkeypatch.setattr(kernels, "linear", F.linear)
    monkeypatch.setattr(kernels, "embedding", F.embedding)
    folder, model = shared_model()
    prompts = random_prompts([9, 30, 3, 17])
    llm = torch_llm(folder, model_impl="transformers", max_num_batched_tokens=48)
    if is_compiled:
        llm.llm_engine.executor.runner.compile_model("eager")
    pieces = with_pieces(llm)
    assert tokens(llm, prompts, GREEDY) == [greedy(model, prompt, 6) for prompt in prompts]
    assert len(pieces.counts) > 5
    assert "torch.compile" not in caplog.text


def test_a_model_does_not_keep_what_it_attended_by_while_it_was_recorded(tapes):
    llm = torch_llm(model_impl="transformers", max_num_batched_tokens=16)
    runner = prepared_runner(llm)
    assert runner.pieces.steps
    assert runner.model.step.backend is runner.attention


# -- recording, with what stands for torch.cuda ----------------------------------------------------


def test_each_piece_is_a_graph_of_one_pool(monkeypatch):
    cuda = PretendedCuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    recorder = CudaRecorder(cuda)
    with torch.inference_mode(), recorder.ready(lambda: cuda.did.append("work"), True):
        with recorder.piece():
            cuda.did.append("one")
        cuda.did.append("attend")
        with recorder.piece() as replay:
            cuda.did.append("two")
    begin = "begin pool, thread_local, False"
    assert cuda.did == [
        "synchronize", "work", "stream ready", "clear workspaces", "empty cache",
        begin, "one", "end", "attend", begin, "two", "end", "clear workspaces",
    ]  # fmt: skip
    replay()
    assert cuda.did[-1] == "replay"


class NothingKept:
    """A `Recorder` that keeps no tensor alive, as CUDA graphs keep none."""

    @contextmanager
    def ready(self, work: Callable[[], object], largest: bool) -> Iterator[None]:
        work()
        yield

    @contextmanager
    def piece(self) -> Iterator[Callable[[], None]]:
        yield lambda: None


def test_all_that_a_piece_reads_stays_alive():
    """The first piece holds the backend's `begin`, which reads the metadata."""
    runner = torch_llm(max_num_batched_tokens=32).llm_engine.executor.runner
    pieces = Pieces(runner.setup, runner.attention, NothingKept())
    read: list[weakref.ref[Tensor]] = []

    def forward(batch: Any, attention: Any) -> Tensor:
        found = [batch.tokens.ids, *vars(batch.attention).values()]
        read[:] = [weakref.ref(x) for x in found if isinstance(x, Tensor)]
        return runner.forward(batch, attention)

    with torch.inference_mode():
        for size in (32, 16):
            pieces.record(size, forward)
            runner.attention.begin(pieces.static_batch(size).attention)
            assert len(read) == 6
            assert all(x() is not None for x in read)


def test_a_failure_in_a_piece_gives_everything_back(monkeypatch):
    cuda, kept = PretendedCuda(monkeypatch), len(NEVER_ENDED)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    llm = torch_llm(max_num_batched_tokens=16)
    runner = llm.llm_engine.executor.runner
    pieces = Pieces(runner.setup, runner.attention, CudaRecorder(cuda))
    calls = []

    def fails_at_last(batch: Any, attention: Any) -> Tensor:
        hidden = runner.forward(batch, attention)
        calls.append(hidden)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return hidden

    with pytest.raises(CaptureError, match="no memory"), torch.inference_mode():
        pieces.record(16, fails_at_last)
    assert cuda.did[-7:] == [
        "end", "set state", "end pool", "release pool", "clear workspaces", "reset", "reset",
    ]  # fmt: skip
    assert cuda.did.count("end") == 3, "two layers have attended"
    assert not pieces.steps
    assert NEVER_ENDED[kept:] == [cuda]
    NEVER_ENDED.pop()
