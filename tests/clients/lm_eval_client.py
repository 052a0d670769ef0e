"""lm-eval's vllm backend against its hf backend: multiple choice, generate_until, rolling.

The tasks and the model are made here, because nothing is downloaded.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from tiny import shared_model

DOCS = [
    {"question": "the other", "choices": [" in here", " the", "on", " then he"], "answer": 1},
    {"question": "in the inn", "choices": ["her", " on", " the other one", "e"], "answer": 0},
    {"question": "Whether the heron", "choices": [" is", " in", " there", "?"], "answer": 2},
]
HEAD = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
"""
TASKS = {
    "multiple_choice": """\
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "generate_until": """\
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 16, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "loglikelihood_rolling": """\
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
""",
}
TOLERANCE = 1e-3  # nats; both run in float32


def write_tasks(folder: Path) -> list[str]:
    data = folder / "docs.jsonl"
    data.write_text("\n".join(map(json.dumps, DOCS)))
    names = []
    for kind, text in TASKS.items():
        names.append(f"tiny_{kind}")
        head = HEAD.format(name=names[-1], data=data, kind=kind)
        (folder / f"{names[-1]}.yaml").write_text(head + text)
    return names


def answers(model: str, args: dict[str, Any], folder: Path, names: list[str]) -> dict[str, Any]:
    """The model's answers to each task, in the order of documents."""
    found = simple_evaluate(
        model=model,
        model_args={"pretrained": shared_model()[0], "dtype": "float32", **args},
        tasks=names,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = {}
    for name in names:
        in_order = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        samples[name] = [sample["resps"] for sample in in_order]
    return samples


def largest_difference(one: Any, other: Any) -> float:
    """Over nested lists of numbers, flags and texts. Flags and texts must be equal."""
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other), (one, other)
        return max((largest_difference(a, b) for a, b in zip(one, other)), default=0.0)
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other)
    assert str(one) == str(other), (one, other)
    return 0.0


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = write_tasks(folder)
        engine = {"max_model_len": 256, "enforce_eager": True}
        ours = answers("vllm", engine, folder, names)
        theirs = answers("hf", {"max_length": 256}, folder, names)
    for task in names:
        difference = largest_difference(ours[task], theirs[task])
        print(f"{task}: {len(ours[task])} documents, largest difference {difference:.1e}")
        assert difference < TOLERANCE


if __name__ == "__main__":
    main()
