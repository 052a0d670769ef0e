"""Every example runs on a tiny model and prints what transformers says that it should.

One process runs all examples, because importing torch takes longer than an example.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import greedy, next_logits, session_folder, shared_model, tiny_tokenizer
from traced_run import data_of

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(
    path.stem for path in (ROOT / "examples").glob("*.py") if path.stem != "model_argument"
)
TOUR = session_folder() / "tour.html"
ARGUMENTS = {"tensor_parallel": ["2"], "tour": [str(TOUR)]}
# Runs the examples of its arguments, a JSON object {path: arguments}; prints JSON {path: output}.
RUNNER = """
import contextlib, io, json, runpy, sys
sys.path[:0] = ["examples"]
printed = {}
for path, arguments in json.loads(sys.argv[1]).items():
    sys.argv[1:] = arguments
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(path, run_name="__main__")
    printed[path] = out.getvalue()
    print(path, file=sys.stderr)
print(json.dumps(printed))
"""


@pytest.fixture(scope="module")
def outputs() -> dict[str, str]:
    """What each example prints."""
    folder, _ = shared_model()
    jobs = {f"examples/{name}.py": [folder, *ARGUMENTS.get(name, [])] for name in EXAMPLES}
    command = [sys.executable, "-c", RUNNER, json.dumps(jobs)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    printed = json.loads(result.stdout.splitlines()[-1])
    return {Path(path).stem: text for path, text in printed.items()}


def answer(prompt: str, num_tokens: int, model: Any = None) -> str:
    """transformers' greedy answer as text, up to EOS."""
    tokenizer = tiny_tokenizer()
    tokens = greedy(model or shared_model()[1], tokenizer.encode(prompt), num_tokens)
    if tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def test_every_example_has_a_test_here() -> None:
    tested = {
        name.removeprefix("test_example_") for name in globals() if name.startswith("test_example_")
    }
    assert set(EXAMPLES) == tested


def test_example_stream(outputs: dict[str, str]) -> None:
    text = answer("The sea is", 64)
    assert outputs["stream"].startswith(text + "\n")
    lines = outputs["stream"].splitlines()
    for prompt in ("One, two, three,", "Red, green, blue,"):
        assert any(line.endswith(f": {answer(prompt, 8)!r}") for line in lines), prompt


def test_example_chat(outputs: dict[str, str]) -> None:
    assert re.fullmatch(
        r"Q: What is the capital of France\?\nA: .*\n\nQ: And of Italy\?\nA: .*\n\n",
        outputs["chat"],
        re.DOTALL,
    )


def test_example_logprobs(outputs: dict[str, str]) -> None:
    tokenizer, (_, model) = tiny_tokenizer(), shared_model()
    logits = next_logits(model, tokenizer.encode("The capital of France is"))[-1]
    shown = [float(line.split()[-1]) for line in outputs["logprobs"].splitlines()[1:6]]
    assert shown == pytest.approx(logits.softmax(-1).topk(5).values.tolist(), abs=1e-3)
    text = "The cat sat on the mat."
    tokens = tokenizer.encode(text)
    logprobs = next_logits(model, tokens)[:-1].log_softmax(-1)
    mean = logprobs.gather(1, torch.tensor(tokens[1:])[:, None]).mean()
    assert f"{text!r}: perplexity {math.exp(-mean):.1f}" in outputs["logprobs"]


def test_example_shared_prefix(outputs: dict[str, str]) -> None:
    story = (
        "Anna has a dog. The dog is called Rex. Rex is brown and likes to swim in the lake. " * 3
    )
    questions = ["The dog is called", "The colour of the dog is", "The dog likes to"]
    prompts = [tiny_tokenizer().encode(story + question) for question in questions]
    same = [
        [a == b for a, b in zip(prompts[0], prompt)].index(False) // 16 * 16
        for prompt in prompts[1:]
    ]
    same[1] = max(same[1], [a == b for a, b in zip(prompts[1], prompts[2])].index(False) // 16 * 16)
    assert outputs["shared_prefix"].endswith(
        f"{sum(same)} of {sum(map(len, prompts))} prompt tokens came from the prefix cache\n"
    )


def test_example_weight_update(outputs: dict[str, str]) -> None:
    before, *steps, after = [
        float(line.split()[-1]) for line in outputs["weight_update"].splitlines()
    ]
    prompts = ["The sea is", "My name is", "In the morning"]
    assert before == pytest.approx(
        sum(len(set(answer(prompt, 24))) for prompt in prompts) / 3, abs=0.01
    )
    assert len(steps) == 5
    assert len({before, *steps}) > 1, "new weights had no effect"
    assert after == max(before, *steps)


def test_example_tensor_parallel(outputs: dict[str, str]) -> None:
    for prompt in ("The sea is", "One, two,"):
        assert f"{prompt!r} -> {answer(prompt, 16)!r}\n" in outputs["tensor_parallel"]


def test_example_tour(outputs: dict[str, str]) -> None:
    assert outputs["tour"].endswith(f"{TOUR} is written: open it in a browser\n")
    for prompt, length in (("My favourite season is", 20), ("The sea is", 48)):
        assert f"{prompt}{answer(prompt, length)!r}\n" in outputs["tour"]
    found = data_of(TOUR.read_text("utf-8"))["runs"]
    runs = {run["name"]: run["records"] for run in found}
    steps = {
        name: [record for record in records if record["kind"] == "step"]
        for name, records in runs.items()
    }
    assert any(
        len(step["waiting"]) and len(step["running"]) == 3 for step in steps["Continuous batching"]
    )
    admitted = [entry for step in steps["Shared prefix"] for entry in step["admitted"]]
    assert [bool(entry["hit"]) for entry in admitted] == [False] + [True] * 7
    assert any(step["preempted"] for step in steps["Small cache"])
