"""The GPU check on a machine without a GPU: its errors, what it reads, parts that fail."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from gpu import check, kernel_times, traces
from gpu.pytest_runs import Outcomes


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, check.__file__, "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "check.py needs a GPU" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_part_that_fails_or_hangs_costs_no_other(tmp_path):
    parts = {
        "dies": "raise SystemExit(3)",
        "hangs": "time.sleep(60)",
        "works": "return {'summary': 'fine'}",
    }
    lines = [
        "import sys, time",
        f"sys.path.insert(0, {str(check.ROOT / 'tests')!r})",
        "from gpu import check",
    ]
    for name, body in parts.items():
        limit = 2 if name == "hangs" else 120
        lines += [f"def {name}(tiny):", f"    {body}"]
        lines += [f"check.PARTS[{name!r}] = check.Part({limit}, {name})"]
    lines += ["check.__file__ = __file__", "sys.exit(check.main())"]
    script = tmp_path / "script.py"
    script.write_text("\n".join(lines))
    command = [
        sys.executable,
        str(script),
        "--tiny",
        "--out",
        str(tmp_path / "out"),
        "--parts",
        ",".join(parts),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    results = json.loads((tmp_path / "out" / "check.json").read_text())
    assert [results[name]["ok"] for name in parts] == [False, False, True]
    assert "ended with status 3" in results["dies"]["summary"]
    assert "did not end within 2 s" in results["hangs"]["summary"]
    assert "| works | ok | fine |" in (tmp_path / "out" / "check.md").read_text()


def test_a_trace_gives_waits_inside_steps_and_the_busy_share():
    def event(name: str, category: str, start: float, duration: float) -> dict[str, object]:
        return {"name": name, "cat": category, "ts": start, "dur": duration}

    events = [
        event(traces.STEP, "user_annotation", 0, 50),
        event(traces.STEP, "user_annotation", 50, 50),
        event("cudaEventSynchronize", "cuda_runtime", 40, 5),
        event("cudaMemcpyAsync", "cuda_runtime", 10, 1),
        event("aten::item", "cpu_op", 60, 1),
        event("cudaDeviceSynchronize", "cuda_runtime", 120, 5),  # the profiler's
        event("a", "kernel", 0, 40),
        event("b", "kernel", 30, 30),  # on another stream: 10 of it beside a
        event("a", "kernel", 80, 20),
    ]
    found = traces.read_trace(events, steps=2)
    assert found["waits"] == {"cudaEventSynchronize": 1, "aten::item": 1}
    assert found["busy"] == pytest.approx(0.8)
    assert found["kernels_us"] == {"a": 30, "b": 15}


ALONE = """\
tests/gpu/test_gpu.py::test_a[Qwen3-shape0] PASSED                       [ 10%]
tests/gpu/test_gpu.py::test_a[two words] FAILED                          [ 20%]
tests/gpu/test_gpu.py::test_b SKIPPED (no CUDA device)                   [ 30%]
tests/gpu/test_gpu.py::test_c ERROR                                      [ 40%]
tests/gpu/test_gpu.py::test_d """
PARALLEL = """\
[gw0] [ 10%] PASSED tests/gpu/test_gpu.py::test_a[Qwen3-shape0]
[gw3] [ 20%] FAILED tests/gpu/test_gpu.py::test_a[two words]
[gw1] [ 30%] SKIPPED tests/gpu/test_gpu.py::test_b
[gw2] [ 40%] ERROR tests/gpu/test_gpu.py::test_c """
AT_THE_END = """
=========================== short test summary info ============================
FAILED tests/gpu/test_gpu.py::test_a[two words] - AssertionError
"""


@pytest.mark.parametrize("output", [ALONE, PARALLEL, PARALLEL + AT_THE_END])
def test_the_outcomes_of_tests_that_ran_are_known_even_if_pytest_was_killed(output):
    outcomes = Outcomes.read(output.splitlines())
    assert outcomes.summary().startswith("1 passed, 2 failed, 1 skipped")
    assert outcomes.failed == [
        "tests/gpu/test_gpu.py::test_a[two words]",
        "tests/gpu/test_gpu.py::test_c",
    ]
    result = check.unfinished("did not end within 400 s", output.splitlines())
    assert not result["ok"]
    assert result["summary"].startswith("did not end within 400 s: 1 passed, 2 failed")
    assert ("then tests/gpu/test_gpu.py::test_d" in result["summary"]) == (output is ALONE)


def test_a_change_is_compared_with_its_baseline_of_the_same_call():
    results = {"bench-0.6b": {"speed": 200.0}}
    result = {"speed": 210.0, "summary": "210 tok/s"}
    check.compare(check.PARTS["pdl-on"], result, results)
    assert result["summary"] == "210 tok/s; 1.050 of the speed of bench-0.6b"
    alone = {"speed": 210.0, "summary": "210 tok/s"}
    check.compare(check.PARTS["pdl-on"], alone, {})
    assert alone["summary"] == "210 tok/s"


def test_every_baseline_is_a_part_that_comes_first():
    names = list(check.PARTS)
    for name, part in check.PARTS.items():
        if part.baseline:
            assert names.index(part.baseline) < names.index(name)


def test_a_rehearsal_of_kernels_runs_each_case_in_both_ways(capsys):
    result = kernel_times.kernels(tiny=True)
    assert result["ok"], capsys.readouterr().out
    assert {row["kernel"] for row in result["rows"]} == {
        "rms_norm", "add_rms_norm", "silu_and_mul", "gelu_and_mul", "qk_norm_rope", "draw",
        "route", "group_by_expert", "combine", "clamped_swiglu",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ratios", "text"),
    [
        ([2.0, 0.5, 4.0], "keep, 1.59 times as fast (0.50 to 4.00)"),
        ([0.5, 0.5], "leave out, 0.50 times as fast (0.50 to 0.50)"),
        ([0.5, math.nan], "keep: the definition does not run everywhere"),
    ],
)
def test_a_kernel_stays_if_it_is_faster_on_average(ratios, text):
    assert kernel_times.verdict(ratios) == text


def test_a_rehearsal_of_products_compares_both(monkeypatch):
    monkeypatch.setattr(kernel_times, "device_name", lambda: "cpu")

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight, bias)

    ours = SimpleNamespace(linear=product, swiglu=product)
    # Both places, because another test of this process may have imported the module.
    monkeypatch.setitem(sys.modules, "nanovllm.kernels.linear_triton", ours)
    monkeypatch.setattr("nanovllm.kernels.linear_triton", ours, raising=False)
    result = kernel_times.products(tiny=True)
    assert result["ok"]
    assert {(row["product"], row["rows"]) for row in result["rows"]} == {
        ("qkv", 1), ("qkv", 5), ("gate_up", 1), ("gate_up", 5),
    }  # fmt: skip
    assert "tiny qkv" in result["summary"]
