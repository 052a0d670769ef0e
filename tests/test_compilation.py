"""`compilation_config` and the arguments beside it: what each form means, and what is refused."""

from __future__ import annotations

import argparse
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import make_llm, shared_model

from nanovllm import EngineArgs
from nanovllm.compilation import KERNELS, ON_REQUEST, Compilation
from nanovllm.runner.cuda_graphs import recorded_sizes


def of(**arguments: Any) -> Compilation:
    return EngineArgs("model", **arguments).compilation


class Mode(IntEnum):
    VLLM_COMPILE = 3


class GraphMode(Enum):
    NONE = 0
    FULL_DECODE_ONLY = (2, 0)


@pytest.mark.parametrize(
    ("value", "mode"),
    [
        (None, None),
        (0, 0),
        (3, 3),
        ("2", 2),
        ("NONE", 0),
        ("vllm_compile", 3),
        ({"mode": 1}, 1),
        ({"level": 2}, 2),
        ({"mode": "STOCK_TORCH_COMPILE"}, 1),
        ('{"mode": 3}', 3),
        (SimpleNamespace(mode=Mode.VLLM_COMPILE, pass_config=None), 3),
        (SimpleNamespace(level=0), 0),
        (Compilation(mode=2), 2),
    ],
)
def test_every_form_of_a_mode(value, mode):
    assert of(compilation_config=value).mode == mode


@pytest.mark.parametrize(
    ("value", "graphs"),
    [
        (None, None),
        ("NONE", False),
        ("none", False),
        (0, False),
        (GraphMode.NONE, False),
        ("PIECEWISE", True),
        (2, True),
        (GraphMode.FULL_DECODE_ONLY, True),
    ],
)
def test_graphs(value, graphs):
    assert of(compilation_config={"cudagraph_mode": value}).cudagraphs is graphs


@pytest.mark.parametrize("value", [None, "PIECEWISE", "FULL", 2, "FULL_AND_PIECEWISE"])
def test_steps_with_prompts_have_graphs_unless_the_mode_means_decodes_only(value):
    assert of(compilation_config={"cudagraph_mode": value}).prefill_graphs
    for name in (GraphMode.FULL_DECODE_ONLY, "full_decode_only"):
        assert not of(compilation_config={"cudagraph_mode": name}).prefill_graphs


@pytest.mark.parametrize(
    ("custom_ops", "left_out"),
    [
        ([], ON_REQUEST),
        (["+few_rows_linear"], ON_REQUEST - {"few_rows_linear"}),
        (["all"], set()),
        (["none"], KERNELS),
        ("none,+draw", KERNELS - {"draw"}),
        (["-rms_norm"], ON_REQUEST | {"rms_norm", "add_rms_norm"}),
        (["all", "-rotary_embedding", "-pdl"], {"qk_norm_rope", "pdl"}),
        (["none", "+gelu_new"], KERNELS),  # vLLM has such a kernel
    ],
)
def test_hand_written_kernels(custom_ops, left_out):
    assert of(compilation_config={"custom_ops": custom_ops}).left_out() == left_out


def test_sizes_of_graphs():
    config = {"cudagraph_capture_sizes": [8, 2, 2], "max_cudagraph_capture_size": 4}
    for found in (
        of(compilation_config=config),
        of(cudagraph_capture_sizes=[2, 8], max_cudagraph_capture_size=4),
        of(compilation_config={"cudagraph_capture_sizes": [1]}, **config),
    ):
        assert found.capture_sizes == (2, 8)
        assert found.max_capture_size == 4
        assert recorded_sizes(64, found) == [2, 4]
    assert of(cuda_graph_sizes=[16]) == Compilation(max_capture_size=16)
    assert of(cuda_graph_sizes=[1, 16]) == Compilation(capture_sizes=(1, 16))
    assert of(cudagraph_capture_sizes=[]).cudagraphs is False


def test_sizes_of_graphs_are_at_most_the_number_of_sequences():
    assert recorded_sizes(20, Compilation()) == [1, 2, 4, 8, 16, 20]
    assert recorded_sizes(20, Compilation(max_capture_size=10)) == [1, 2, 4, 8, 10]
    assert recorded_sizes(20, Compilation(capture_sizes=(1, 512))) == [1, 20]


def test_enforce_eager_turns_compilation_and_graphs_off():
    found = of(enforce_eager=True, compilation_config={"mode": 3, "cudagraph_mode": "FULL"})
    assert found.mode == 0
    assert found.cudagraphs is False


def test_backends():
    assert of(compilation_config={"backend": ""}).backend == "inductor"
    assert of(compilation_config={"backend": "eager"}).backend == "eager"
    assert of(compilation_config={"use_inductor": False}).backend == "eager"


def test_fields_of_vllm_without_a_meaning_are_accepted():
    fields = {"compile_sizes": [1, 2], "pass_config": {}, "splitting_ops": [], "cache_dir": "x"}
    assert of(compilation_config=fields) == Compilation()


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (4, ValueError, "mode=4"),
        (True, ValueError, "mode=True"),
        ({"mode": "fast"}, ValueError, "mode='fast'"),
        ("{mode: 3}", ValueError, "is no JSON"),
        ({"modes": 3}, ValueError, "did you mean 'mode'"),
        ({"cudagraph_capture_size": [1]}, ValueError, "did you mean 'cudagraph_capture_sizes'"),
        ({"backend": "openxla"}, ValueError, "backend='openxla'"),
        ({"cudagraph_mode": "HALF"}, ValueError, "cudagraph_mode='HALF'"),
        ({"custom_ops": ["+rms_nrom"]}, ValueError, "did you mean 'rms_norm'"),
        ({"custom_ops": ["rms_norm"]}, ValueError, "custom_ops holds 'rms_norm'"),
        ({"custom_ops": ["all", "none"]}, ValueError, "both 'none' and 'all'"),
        ({"custom_ops": 3}, TypeError, "custom_ops=3"),
        ({"cudagraph_capture_sizes": [0]}, ValueError, "cudagraph_capture_sizes=0"),
        ({"cudagraph_capture_sizes": 4}, TypeError, "cudagraph_capture_sizes=4"),
        ({"max_cudagraph_capture_size": 0}, ValueError, "max_cudagraph_capture_size=0"),
        (3.5, TypeError, "compilation_config=3.5"),
    ],
)
def test_refused_values_are_named(value, error, words):
    with pytest.raises(error, match=words):
        of(compilation_config=value)


def test_the_command_line():
    parser = EngineArgs.add_cli_args(argparse.ArgumentParser())
    words = ["--compilation-config", '{"mode": 3, "custom_ops": ["none"]}']
    args = parser.parse_args(["--model", "m", *words, "--cudagraph-capture-sizes", "1", "8"])
    found = EngineArgs.from_cli_args(args).compilation
    assert found == Compilation(mode=3, custom_ops=("none",), capture_sizes=(1, 8))
    args = parser.parse_args(["--model", "m", "--compilation-config", "3"])
    assert EngineArgs.from_cli_args(args).compilation == Compilation(mode=3)


def test_an_engine_reads_it():
    config = {"mode": 0, "custom_ops": ["-draw"]}
    llm = make_llm(shared_model()[0], compilation_config=config)
    setup = llm.llm_engine.executor.runner.setup
    assert setup.compilation == Compilation(mode=0, custom_ops=("-draw",))
    choice = llm.llm_engine.executor.runner.kernel_choice
    assert choice.without == ON_REQUEST | {"draw"}
    assert not choice.compiles
