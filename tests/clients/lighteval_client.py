"""lighteval's vllm backend against its accelerate backend: multiple choice and greedy texts.

The tasks and the model are made here, because nothing is downloaded.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from lighteval.utils import imports
from packaging.requirements import Requirement
from tiny import shared_model

# lighteval asks for vLLM 0.10.0 to 0.10.1, when its modules are imported.
imports.required_dependencies()[0]["vllm"] = Requirement("vllm")

from lighteval.logging.evaluation_tracker import EvaluationTracker  # noqa: E402
from lighteval.metrics.metrics import Metrics  # noqa: E402
from lighteval.models.abstract_model import ModelConfig  # noqa: E402
from lighteval.models.transformers.transformers_model import TransformersModelConfig  # noqa: E402
from lighteval.models.vllm.vllm_model import AsyncVLLMModel, VLLMModelConfig  # noqa: E402
from lighteval.pipeline import ParallelismManager, Pipeline, PipelineParameters  # noqa: E402
from lighteval.tasks.lighteval_task import LightevalTaskConfig  # noqa: E402
from lighteval.tasks.registry import Registry  # noqa: E402
from lighteval.tasks.requests import Doc  # noqa: E402

DOCS = [
    {"question": "the other", "choices": [" in here", " the", " on", " then he"], "answer": 1},
    {"question": "in the inn", "choices": [" her", " on", " the other one", " e"], "answer": 0},
    {"question": "Whether the heron", "choices": [" is", " in", " there", " ?"], "answer": 2},
]
LENGTH = 16
STOP = ["\n\n"]
TOLERANCE = 1e-3  # nats; both run in float32
TASKS_TABLE: list[LightevalTaskConfig] = []  # lighteval reads this name of a module of tasks


def leave_out_shipped_tasks() -> None:
    """lighteval imports all tasks that it has. Some of them ask the hub when they are imported."""
    Registry._load_from_files = staticmethod(lambda *_: {})
    Registry._load_from_subdirs = staticmethod(lambda *_: {})


def prompt(line: dict[str, Any], task_name: str) -> Doc:
    return Doc(
        task_name=task_name,
        query=line["question"],
        choices=line["choices"],
        gold_index=line["answer"],
    )


def make_tasks(folder: Path) -> None:
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, DOCS)))
    metrics = {"tiny_choices": Metrics.loglikelihood_acc, "tiny_texts": Metrics.exact_match}
    for name, metric in metrics.items():
        task = LightevalTaskConfig(
            name=name,
            prompt_function=prompt,
            hf_repo=str(folder),
            hf_subset="default",
            hf_avail_splits=["test"],
            evaluation_splits=["test"],
            metrics=[metric],
            generation_size=LENGTH,
            stop_sequence=STOP,
        )
        TASKS_TABLE.append(task)


def responses(config: ModelConfig, launcher: ParallelismManager, folder: str) -> dict[str, Any]:
    """Name of a task -> the model's response to each document."""
    pipeline = Pipeline(
        tasks=",".join(f"{task.name}|0" for task in TASKS_TABLE),
        pipeline_parameters=PipelineParameters(
            launcher_type=launcher, custom_tasks_directory=sys.modules[__name__]
        ),
        evaluation_tracker=EvaluationTracker(output_dir=folder, save_details=False),
        model_config=config,
    )
    pipeline.evaluate()
    details = pipeline.get_details()
    return {name: [one.model_response for one in found] for name, found in details.items()}


def check_async(config: VLLMModelConfig, expected: list[list[str]]) -> None:
    """lighteval's cache fails with its asynchronous model, so that its pipeline cannot run it."""
    model = AsyncVLLMModel(config)
    model._cache = None
    docs = [prompt(line, "tiny_texts") for line in DOCS]
    for doc in docs:
        doc.generation_size = LENGTH
        doc.stop_sequences = STOP
        doc.num_samples = 1
    answers = asyncio.run(model.greedy_until(docs))
    model.cleanup()
    # The pipeline shuffles documents.
    assert sorted(answer.text for answer in answers) == sorted(expected)
    print(f"    {len(answers)} texts of AsyncLLM equal")


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Texts and greedy flags must be equal, and log-likelihoods nearly so."""
    assert sorted(ours) == sorted(theirs) == ["tiny_choices|0", "tiny_texts|0"]
    texts = [answer.text for answer in ours["tiny_texts|0"]]
    assert texts == [answer.text for answer in theirs["tiny_texts|0"]]
    largest = 0.0
    for one, other in zip(ours["tiny_choices|0"], theirs["tiny_choices|0"], strict=True):
        assert list(one.argmax_logits_eq_gold) == list(other.argmax_logits_eq_gold)
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            largest = max(largest, abs(float(a) - float(b)))
    choices = sum(len(answer.logprobs) for answer in ours["tiny_choices|0"])
    print(f"    {len(texts)} texts equal")
    print(f"    {choices} log-likelihoods, largest difference {largest:.1e} nats")
    assert largest < TOLERANCE


def main() -> None:
    leave_out_shipped_tasks()
    with tempfile.TemporaryDirectory() as name:
        data = Path(name, "data")
        data.mkdir()
        make_tasks(data)
        for template in (False, True):
            model = {
                "model_name": shared_model()[0],
                "dtype": "float32",
                "override_chat_template": template,
            }
            engine = VLLMModelConfig(**model, cache_dir=f"{name}/ours-{template}")
            oracle = TransformersModelConfig(
                **model, cache_dir=f"{name}/theirs-{template}", batch_size=1
            )
            print(f"chat template: {template}")
            ours = responses(engine, ParallelismManager.VLLM, name)
            theirs = responses(oracle, ParallelismManager.ACCELERATE, name)
            compare(ours, theirs)
            check_async(engine, [answer.text for answer in theirs["tiny_texts|0"]])


if __name__ == "__main__":
    main()
