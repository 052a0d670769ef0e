"""`nanovllm run-batch`: a file of requests -> a file of answers, by one engine or several."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

from nanovllm.batch import fingerprint, rows
from nanovllm.batch.columns import MESSAGES, PROMPT, Columns, check_names
from nanovllm.batch.openai_files import OpenAIFiles
from nanovllm.batch.output_file import OutputFile
from nanovllm.batch.rows import InputFile, Row
from nanovllm.batch.work import (
    BAD_ROW,
    Answers,
    JsonObject,
    Result,
    Work,
    sampling_defaults,
    sentence,
)
from nanovllm.config import EngineArgs, one_of
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import ValidationError
from nanovllm.llm import make_engine
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

FORMATS = ("auto", "openai", "columns")
ROWS_TO_SEE = 100  # "auto" decides by the first row of these that is readable


@dataclass
class Options:
    """What a run reads and writes.

    served_names: further names of the model in requests.
    sampling: fields of SamplingParams for requests that do not say otherwise.
    """

    input_file: Path
    output_file: Path
    args: EngineArgs
    served_names: list[str] = field(default_factory=list)
    file_format: str = "auto"
    sampling: Mapping[str, object] = field(default_factory=dict)
    overwrite: bool = False
    shows_progress: bool = True


@dataclass
class Summary:
    """What one run has done."""

    num_rows: int  # of the input
    num_done_before: int
    num_errors: int = 0  # of this run
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    seconds: float = 0.0  # without the engine's start

    def count(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self.num_prompt_tokens += len(output.prompt_token_ids)
            for completion in output.outputs:
                self.num_generated_tokens += len(completion.token_ids)

    def __str__(self) -> str:
        seconds = max(self.seconds, 1e-9)
        num_now = self.num_rows - self.num_done_before
        return (
            f"{num_now:,} of {self.num_rows:,} requests in {seconds:.1f} s "
            f"({num_now / seconds:.1f} requests/s), {self.num_errors:,} errors; tokens a second: "
            f"{self.num_prompt_tokens / seconds:,.0f} read, "
            f"{self.num_generated_tokens / seconds:,.0f} generated"
        )


class Format(Protocol):
    """How rows are read and answers written: `OpenAIFiles` or `Columns`."""

    def read(self, row: Row) -> Work: ...
    def answer(self, result: Result) -> JsonObject: ...
    def error(self, row: Row, error: str, is_refused: bool) -> JsonObject: ...
    def number(self, line: JsonObject) -> int | None: ...


def make_format(name: str, options: Options, defaults: Mapping[str, object]) -> Format:
    if name == "columns":
        return Columns(defaults)
    return OpenAIFiles(options.served_names or [options.args.model], defaults)


def run_batch(options: Options) -> Summary:
    """Answers all rows that the output lacks.

    Raises ValueError or OSError, whose message is for the user, before the engine starts
    and nothing has changed.
    """
    check_options(options)
    source = rows.scan(options.input_file)
    name = format_name(options)
    found = fingerprint.fingerprint(source, options.args, name, options.sampling)
    with OutputFile(options.output_file) as output:
        if options.overwrite:
            output.clear()
        if output.is_empty():
            fingerprint.write(options.output_file, found)
        else:
            fingerprint.check(options.output_file, found)
        output.resume(make_format(name, options, {}).number)
        if len(output.done) == source.num_rows:
            return Summary(source.num_rows, source.num_rows)
        return answer_rows(options, name, source, output)


def answer_rows(options: Options, name: str, source: InputFile, output: OutputFile) -> Summary:
    """Starts the engine and runs the rows that `output` lacks."""
    engine = make_engine(options.args)
    summary = Summary(source.num_rows, len(output.done))
    try:
        file_format = make_format(name, options, sampling_defaults(engine, options.sampling))
        with Progress(summary, options.shows_progress) as progress:
            Job(file_format, output, summary, progress).run(engine, rows.read(source.path))
    finally:
        engine.close()
    return summary


class Progress:
    """A bar over the rows, with tokens a second. Measures the time of the summary."""

    def __init__(self, summary: Summary, is_shown: bool) -> None:
        from tqdm.auto import tqdm

        self.summary = summary
        self.start = time.perf_counter()
        self.bar = tqdm(
            total=summary.num_rows,
            initial=summary.num_done_before,
            desc="Requests",
            unit="req",
            dynamic_ncols=True,
            disable=not is_shown,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.summary.seconds = time.perf_counter() - self.start

    def show(self, num_done: int) -> None:
        """num_done: rows of the output, former runs included."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        read = self.summary.num_prompt_tokens / seconds
        generated = self.summary.num_generated_tokens / seconds
        self.bar.set_postfix_str(
            f"tokens/s: {read:,.0f} read, {generated:,.0f} generated", refresh=False
        )
        self.bar.update(num_done - self.bar.n)


class Job:
    """Writes a line for each row that the output lacks, in the order in which they finish."""

    def __init__(
        self, file_format: Format, output: OutputFile, summary: Summary, progress: Progress
    ) -> None:
        self.format = file_format
        self.output = output
        self.summary = summary
        self.progress = progress

    def run(self, engine: LLMEngine, source: Iterator[Row]) -> None:
        with closing(Answers(engine, self._works(source))) as answers:
            for result in answers:
                work = result.work
                if result.error is not None:
                    row = Row(work.number, work.row)
                    self._write_error(row, result.error, result.is_refused)
                else:
                    self.summary.count(result.outputs)
                    self.output.write(self.format.answer(result), work.number)
                if not answers.results:  # the last one of a step
                    self._flush()
        self._flush()

    def _works(self, source: Iterator[Row]) -> Iterator[Work]:
        """The work of each row that is not done. Rows that cannot be read become errors."""
        for row in source:
            work = None
            error = row.error
            if error is None:
                try:
                    # Rows that are done are read too, because ids must differ from theirs.
                    work = self.format.read(row)
                except BAD_ROW as failure:
                    error = sentence(failure)
            if row.number in self.output.done:
                continue
            if work is not None:
                yield work
            else:
                self._write_error(row, error or "", is_refused=True)

    def _write_error(self, row: Row, error: str, is_refused: bool) -> None:
        self.summary.num_errors += 1
        self.output.write(self.format.error(row, error, is_refused), row.number)

    def _flush(self) -> None:
        self.output.flush()
        self.progress.show(len(self.output.done))


def check_options(options: Options) -> None:
    one_of("format", options.file_format, FORMATS)
    check_names(options.sampling)
    SamplingParams.from_optional(**options.sampling)
    if not options.input_file.is_file():
        raise ValidationError(f"input_file={str(options.input_file)!r} is no file here")
    output = options.output_file
    if rows.is_parquet(output):
        raise ValidationError(
            f"output_file={str(output)!r}: results are appended as JSON lines, which Parquet files "
            "do not allow; accepted is another name, such as one that ends in .jsonl"
        )
    if not output.absolute().parent.is_dir():
        raise ValidationError(f"output_file={str(output)!r}: its folder does not exist")
    if output.exists() and output.samefile(options.input_file):
        raise ValidationError(f"output_file={str(output)!r} is the input file too")


def format_name(options: Options) -> str:
    """ "openai" or "columns"."""
    if options.file_format == "auto":
        return detect(options.input_file)
    return options.file_format


def detect(path: Path) -> str:
    """The format of an input, by the first row that can be read.

    Raises ValueError for a Parquet file without the columns of a prompt.
    """
    if rows.is_parquet(path):
        names = rows.parquet_file(path).schema_arrow.names
        if not {PROMPT, MESSAGES} & set(names):
            raise ValidationError(
                f"{path} needs a column {PROMPT!r} or {MESSAGES!r}; its columns are "
                f"{', '.join(names)}"
            )
        return "columns"
    for row in islice(rows.read(path), ROWS_TO_SEE):
        if row.error is None:
            is_plain = PROMPT in row.record or MESSAGES in row.record
            return "columns" if is_plain else "openai"
    return "openai"
