"""The console script `nanovllm`: batch files, a chat in the terminal, a recorded run.

Imports the engine after the arguments are checked, because torch takes seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from nanovllm.config import EngineArgs

USAGE_ERROR = 2
TRACED_TOKENS = 64  # of an answer of `nanovllm trace`, by default
INTERRUPTED = 130  # as shells say it: 128 and the number of SIGINT


def main(arguments: Sequence[str] | None = None) -> None:
    """arguments: of the command line; None stands for the process's own."""
    args = make_parser().parse_args(arguments)
    try:
        engine_args = EngineArgs.from_cli_args(args)
        args.run(args, engine_args)
    except (ValueError, TypeError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(INTERRUPTED)


def fail(message: str) -> NoReturn:
    print(f"nanovllm: error: {message}", file=sys.stderr)
    sys.exit(USAGE_ERROR)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nanovllm", description="Runs language models offline.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_run_batch(
        commands.add_parser(
            "run-batch",
            help="answer a file of requests",
            description="Answers a file of requests: OpenAI's batch format, or JSON lines or "
            "Parquet with a column 'prompt' or 'messages'. The same command goes on where a "
            "killed one stopped.",
        )
    )
    add_chat(commands.add_parser("chat", help="chat in the terminal"))
    add_trace(
        commands.add_parser(
            "trace",
            help="record a run as a page",
            description="Completes prompts and records every step: a page (.html), JSON lines "
            "(.jsonl) or Chrome's trace events (.json).",
        )
    )
    return parser


def add_run_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--input-file", type=Path, required=True, help=".jsonl or .parquet")
    parser.add_argument(
        "-o", "--output-file", type=Path, required=True, help="JSON lines, appended as they finish"
    )
    parser.add_argument(
        "--format",
        default="auto",
        help="openai, columns, or auto: as the first line says",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="drop the output of a former run first"
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    add_cluster(parser)
    add_sampling(parser)
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(run=run_batch)


def add_cluster(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a cluster of Ray")
    group.add_argument(
        "--ray", action="store_true", help="run on a cluster; the output is a folder"
    )
    group.add_argument("--address", help="of the cluster; without it Ray finds or starts one")
    group.add_argument(
        "--concurrency",
        type=int,
        help="engines in the cluster; without it all GPUs, or one a node without GPUs",
    )
    group.add_argument(
        "--cpus-per-replica", type=int, default=1, help="of an engine on CPUs; the default is 1"
    )
    group.add_argument(
        "--lines-per-part",
        type=int,
        default=1000,
        help="lines that are lost together when a node fails; the default is 1000",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sampling-params",
        type=json_object,
        default={},
        metavar="JSON",
        help="fields of SamplingParams for requests that do not say otherwise, such as "
        '\'{"temperature": 0, "max_tokens": 256}\'',
    )


def json_object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} must be a JSON object")
    return value


def run_batch(args: argparse.Namespace, engine_args: EngineArgs) -> None:
    from nanovllm.batch import job

    names = args.served_model_name or []
    options = job.Options(
        args.input_file,
        args.output_file,
        engine_args,
        served_names=[names] if isinstance(names, str) else names,
        file_format=args.format,
        sampling=args.sampling_params,
        overwrite=args.overwrite,
        shows_progress=not args.no_progress,
    )
    try:
        if args.ray:
            from nanovllm import ray

            cluster = ray.Cluster(
                args.address, args.concurrency, args.cpus_per_replica, args.lines_per_part
            )
            summary = ray.run_batch(options, cluster)
        else:
            summary = job.run_batch(options)
    except KeyboardInterrupt:
        print("\nThe same command goes on where this one stopped.", file=sys.stderr)
        raise
    print(f"{summary}\n{args.output_file} is complete.", file=sys.stderr)


def add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system-prompt", help="the first message of each conversation")
    add_sampling(parser)
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(run=chat)


def chat(args: argparse.Namespace, engine_args: EngineArgs) -> None:
    from nanovllm.terminal_chat import run

    run(engine_args, args.system_prompt, args.sampling_params)


def add_trace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-p", "--prompt", action="append", required=True, help="text; may be given several times"
    )
    parser.add_argument(
        "-o", "--output-file", default="run.html", help="the record; the default is run.html"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        help=f"of each answer; without it the sampling parameters', or {TRACED_TOKENS}",
    )
    parser.add_argument("--logprobs", type=int, help="record as many likely tokens")
    add_sampling(parser)
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(run=trace)


def trace(args: argparse.Namespace, engine_args: EngineArgs) -> None:
    from nanovllm.batch.columns import check_names
    from nanovllm.batch.work import sampling_defaults
    from nanovllm.llm import LLM
    from nanovllm.sampling_params import SamplingParams

    check_names(args.sampling_params)
    llm = LLM(**{**vars(engine_args), "trace": args.output_file})
    fields = {
        "max_tokens": TRACED_TOKENS,
        **sampling_defaults(llm.llm_engine, args.sampling_params),
    }
    for name in ("max_tokens", "logprobs"):
        if getattr(args, name) is not None:
            fields[name] = getattr(args, name)
    params = SamplingParams.from_optional(**fields)
    for output in llm.generate(args.prompt, params):
        for completion in output.outputs:
            print(f"{output.prompt}{completion.text}")
    print(f"{args.output_file} is written.", file=sys.stderr)
