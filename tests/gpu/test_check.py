"""The GPU check on a machine without a GPU: its errors, its reading of a trace, parts that fail."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from gpu import check


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
        lines += [f"def {name}(tiny):", f"    {body}", f"check.PARTS[{name!r}] = ({limit}, {name})"]
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
        event(check.STEP, "user_annotation", 0, 50),
        event(check.STEP, "user_annotation", 50, 50),
        event("cudaEventSynchronize", "cuda_runtime", 40, 5),
        event("cudaMemcpyAsync", "cuda_runtime", 10, 1),
        event("aten::item", "cpu_op", 60, 1),
        event("cudaDeviceSynchronize", "cuda_runtime", 120, 5),  # the profiler's
        event("a", "kernel", 0, 40),
        event("b", "kernel", 30, 30),  # on another stream: 10 of it beside a
        event("a", "kernel", 80, 20),
    ]
    found = check.read_trace(events, steps=2)
    assert found["waits"] == {"cudaEventSynchronize": 1, "aten::item": 1}
    assert found["busy"] == pytest.approx(0.8)
    assert found["kernels_us"] == {"a": 30, "b": 15}
