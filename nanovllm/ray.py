"""Ray: a predictor for `Dataset.map_batches`, and `run-batch` over a cluster.

Ray starts the replicas, gives them their devices and starts them again when a node fails.
Each replica is one engine in an actor.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nanovllm.batch import fingerprint, job, rows
from nanovllm.batch.columns import MESSAGES, NUMBER, PROMPT, RESULTS, Columns
from nanovllm.batch.output_file import OutputFile
from nanovllm.batch.rows import Part, Row
from nanovllm.batch.work import BAD_ROW, Answers, JsonObject, Work, sampling_defaults, sentence
from nanovllm.config import EngineArgs, positive
from nanovllm.errors import ValidationError
from nanovllm.llm import make_engine

Columnar = dict[str, Any]  # column -> numpy array, as Ray's batches are

LINES_A_PART = 1000
OUTPUT_COLUMNS = tuple(name for name in RESULTS if name != NUMBER)
NO_RESULTS: JsonObject = {
    "generated_text": None,
    "finish_reason": None,
    "num_prompt_tokens": 0,
    "num_generated_tokens": 0,
}


def replica_resources(args: EngineArgs, num_cpus: int = 1) -> dict[str, int]:
    """What one replica needs, for `map_batches`: GPUs, or CPUs where it runs on CPUs.

    All GPUs of a replica are on one node, because an actor is.
    """
    from nanovllm.runner.setup import pick_device

    if args.device == "cpu" or (args.device == "auto" and pick_device("auto").type == "cpu"):
        return {"num_cpus": num_cpus}
    return {"num_gpus": args.tensor_parallel_size}


class LLMPredictor:
    """Answers batches of rows with a column `prompt` or `messages`.

        dataset.map_batches(
            LLMPredictor,
            fn_constructor_kwargs={"engine_args": {"model": "Qwen/Qwen3-0.6B"}},
            batch_size=1024,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=4),
            num_gpus=1,
        )

    Rows keep their order and their columns. A row that fails has a sentence in `error`.
    """

    def __init__(
        self,
        engine_args: Mapping[str, Any],
        sampling_params: Mapping[str, object] | None = None,
    ) -> None:
        """engine_args: arguments of `LLM`. sampling_params: fields of SamplingParams.

        A column `sampling_params` replaces fields for one row. Without a seed there, the
        samples of two runs differ, because Ray gives rows to replicas as they are free.
        """
        args = EngineArgs(**engine_args)
        check_trace(args)
        self.engine = make_engine(args)
        self.format = Columns(sampling_defaults(self.engine, sampling_params or {}))
        self.num_seen = int.from_bytes(os.urandom(6), "big")  # begins the seeds of this replica

    def __call__(self, batch: Columnar) -> Columnar:
        """The batch with the columns of `OUTPUT_COLUMNS`.

        Raises ValueError for a batch without a prompt, or with a column of that name.
        """
        if not {PROMPT, MESSAGES} & batch.keys():
            raise ValidationError(
                f"the dataset needs a column {PROMPT!r} or {MESSAGES!r}; its columns are "
                f"{', '.join(batch)}"
            )
        num_rows = len(next(iter(batch.values())))
        results = self._results(batch, num_rows)
        found = dict(batch)
        for name in OUTPUT_COLUMNS:
            if name in batch:
                raise ValidationError(f"the column {name!r} is reserved for results; rename it")
            found[name] = column([each[name] for each in results])
        return found

    def _results(self, batch: Columnar, num_rows: int) -> list[JsonObject]:
        first = self.num_seen
        self.num_seen += num_rows
        results: list[JsonObject] = [{} for _ in range(num_rows)]

        def works() -> Iterator[Work]:
            for index in range(num_rows):
                record = {name: plain(values[index]) for name, values in batch.items()}
                try:
                    yield self.format.read(Row(first + index, record))
                except BAD_ROW as error:
                    results[index] = {**NO_RESULTS, "error": sentence(error)}

        with closing(Answers(self.engine, works())) as answers:
            for result in answers:
                index = result.work.number - first
                if result.error is None:
                    results[index] = self.format.answer(result)
                else:
                    results[index] = {**NO_RESULTS, "error": result.error}
        return results


def plain(value: Any) -> Any:
    """A value of an array without numpy's types."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return [plain(each) for each in value]
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return value


def column(values: list[Any]) -> np.ndarray:
    """Numbers as integers, everything else as objects."""
    if values and all(isinstance(value, int) for value in values):
        return np.array(values, dtype=np.int64)
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


# -- run-batch --ray -------------------------------------------------------------------------------


@dataclass
class Cluster:
    """How a job uses a cluster.

    address: of a running cluster; None stands for Ray's own choice, which starts one here
    if there is none. concurrency: replicas. None: the number that the GPUs allow,
    and one on each node without GPUs. num_cpus: of a replica without GPUs.
    """

    address: str | None = None
    concurrency: int | None = None
    num_cpus: int = 1
    lines_a_part: int = LINES_A_PART


class PartWriter:
    """An actor that answers parts of the input. Each becomes a file of its own."""

    def __init__(self, options: job.Options, name: str) -> None:
        self.options = options
        self.name = name
        self.engine = make_engine(options.args)
        self.defaults = sampling_defaults(self.engine, options.sampling)

    def __call__(self, batch: Columnar) -> Columnar:
        """batch: one part, a column for each field of `Part`.

        Returns the summary, a column for each field.
        """
        part = Part(**{name: int(values[0]) for name, values in batch.items()})
        path = part_file(self.options.output_file, part)
        # Two actors may answer one part, if Ray takes the first for dead. The files are equal.
        draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.new")
        summary = job.Summary(part.num_rows, 0)
        file_format = job.make_format(self.name, self.options, self.defaults)
        source = rows.read(self.options.input_file, part)
        with OutputFile(draft) as output, job.Progress(summary, False) as progress:
            job.Job(file_format, output, summary, progress).run(self.engine, source)
        os.replace(draft, path)
        return {name: np.array([value]) for name, value in asdict(summary).items()}


def part_file(output: Path, part: Part) -> Path:
    return output / f"part-{part.index:06}.jsonl"


def run_batch(options: job.Options, cluster: Cluster) -> job.Summary:
    """`run-batch` over a cluster. The output is a folder with a file for each part.

    Input, output and model must lie on a file system that all nodes see. Answers the parts
    that the folder lacks. Raises ValueError as `job.run_batch` does.
    """
    check(options, cluster)
    # Actors run in folders of their own.
    options = replace(
        options,
        input_file=options.input_file.absolute(),
        output_file=options.output_file.absolute(),
    )
    source = rows.scan(options.input_file, cluster.lines_a_part)
    name = job.format_name(options)
    found = fingerprint.fingerprint(source, options.args, name, options.sampling)
    found["lines of a part"] = str(cluster.lines_a_part)
    output = options.output_file
    output.mkdir(exist_ok=True)
    if options.overwrite:
        for file in output.glob("part-*"):
            file.unlink()
    if any(output.iterdir()):
        fingerprint.check(output, found)
    else:
        fingerprint.write(output, found)
    missing = [part for part in source.parts if not part_file(output, part).exists()]
    summary = job.Summary(source.num_rows, source.num_rows - sum(each.num_rows for each in missing))
    if missing:
        run_parts(options, cluster, name, missing, summary)
    for draft in output.glob("part-*.new"):  # of actors that died
        draft.unlink()
    return summary


def run_parts(
    options: job.Options, cluster: Cluster, name: str, missing: list[Part], summary: job.Summary
) -> None:
    """Answers parts on all replicas, and adds to `summary` what they did."""
    ray = import_ray()
    if not ray.is_initialized():
        ray.init(address=cluster.address, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    resources = cluster_resources(options.args, cluster)
    size = cluster.concurrency or num_replicas(resources)
    dataset = ray.data.from_items(
        [asdict(part) for part in missing], override_num_blocks=len(missing)
    ).map_batches(
        PartWriter,
        fn_constructor_kwargs={"options": options, "name": name},
        batch_size=1,
        # A pool of a fixed size would wait for all its actors after a node is lost.
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=size, initial_size=size),
        **resources,
    )
    num_done = summary.num_done_before
    with job.Progress(summary, options.shows_progress) as progress:
        for done in dataset.iter_rows():
            num_done += int(done["num_rows"])
            for field in ("num_errors", "num_prompt_tokens", "num_generated_tokens"):
                setattr(summary, field, getattr(summary, field) + int(done[field]))
            progress.show(num_done)


def cluster_resources(args: EngineArgs, cluster: Cluster) -> dict[str, int]:
    """What one replica needs. The driver's machine may have no GPU, where others have."""
    if args.device == "auto" and import_ray().cluster_resources().get("GPU"):
        return {"num_gpus": args.tensor_parallel_size}
    return replica_resources(args, cluster.num_cpus)


def num_replicas(resources: Mapping[str, int]) -> int:
    """As many replicas as the GPUs of the cluster allow. One on each node without GPUs."""
    ray = import_ray()
    if "num_gpus" in resources:
        return max(1, int(ray.cluster_resources()["GPU"]) // resources["num_gpus"])
    return sum(node["Alive"] for node in ray.nodes())


def import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValidationError(
            f"--ray needs Ray; install it with pip install 'nanovllm[ray]' ({error})"
        ) from None
    return ray


def check_trace(args: EngineArgs) -> None:
    """Raises ValueError for a trace, which all replicas would write."""
    if args.trace is not None:
        raise ValidationError(
            f"trace={args.trace!r} is not supported with Ray, which starts several engines; "
            "accepted is None"
        )


def check(options: job.Options, cluster: Cluster) -> None:
    """Raises ValueError for options that cannot work on a cluster."""
    positive("concurrency", cluster.concurrency, optional=True)
    positive("cpus_per_replica", cluster.num_cpus)
    positive("lines_per_part", cluster.lines_a_part)
    if options.args.data_parallel_size > 1:
        raise ValidationError(
            f"data_parallel_size={options.args.data_parallel_size} is not supported with --ray; "
            "use --concurrency, which is the number of engines in the cluster"
        )
    check_trace(options.args)
    output = options.output_file
    if output.exists() and not output.is_dir():
        raise ValidationError(f"output_file={str(output)!r} is a file; --ray writes a folder")
    import_ray()
    job.check_options(options)
