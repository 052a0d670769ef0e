"""How fast nanovllm is here: throughput, share of the machine's limit, where the time goes, and peers beside it.

    python bench.py                                     # the workloads that suit this machine, with their share of the limit
    python bench.py --compare hf,vllm=/path/to/python   # the same by other engines, in turn with ours
    python bench.py --profile | --host | --startup      # time by part of a step; the host's half alone; process start

Every engine runs in a process of its own (benchmarks/process.py), which ends with this one.
Throughput is requested output tokens over wall time.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.limit import LARGE_GPU_STEP, Machine, Sizes, limit, probe, sizes_of
from benchmarks.ours import Host, ceil_div, default_dtype, model_config
from benchmarks.peer_files import gguf_file, hf_folder
from benchmarks.process import Engine, exit_on_signals
from benchmarks.workloads import SHAPES, WORKLOADS, Workload, draw, smollm2, write_shape


def peer_environment(name: str, device: str) -> dict[str, str]:
    """Each peer's best settings on this machine."""
    if name != "vllm" or device == "cuda":
        return {}
    found = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout.split()
    preload = [word for word in found if "/libtcmalloc_minimal.so" in word or "/libtcmalloc.so" in word][:1]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        **({"LD_PRELOAD": preload[0]} if preload else {}),
    }


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """One engine on one workload; lists have an entry a round."""

    engine: str
    workload: str
    model: str
    output_tokens: int
    seconds: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)  # seconds, where the workload is one request
    startup: list[float] = field(default_factory=list)  # seconds from process start to a first token
    rss: int = 0  # bytes, after the last round
    memory: dict[str, int] | None = None  # bytes of weights and of the KV cache
    profile: dict[str, Any] | None = None
    limit: dict[str, float] | None = None

    @property
    def throughput(self) -> float:
        return self.output_tokens / statistics.median(self.seconds)

    @property
    def share(self) -> float | None:
        return self.limit["seconds"] / statistics.median(self.seconds) if self.limit else None

    @property
    def throughput_at_limit(self) -> float | None:
        return self.output_tokens / self.limit["seconds"] if self.limit else None

    def record(self) -> dict[str, Any]:
        return {**vars(self), "output_tokens_per_second": self.throughput, "share_of_limit": self.share}


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        auto = options.dtype == "auto"
        dtype = default_dtype(self.device) if auto else getattr(torch, options.dtype)
        self.dtype, self.itemsize = str(dtype).removeprefix("torch."), dtype.itemsize
        self.scratch = tempfile.TemporaryDirectory()
        self.probes: list[Machine] = []

    def names(self) -> list[str]:
        default = ["field"] if self.device == "cuda" else ["A", "B", "C", "D"]
        return self.options.workload or default

    def model_of(self, work: Workload) -> tuple[Path, bool]:
        """Where the model lies, and whether its weights are random."""
        if self.options.model:
            return Path(self.options.model), False
        shape = self.options.shape or work.shape
        return (write_shape(shape, Path(self.scratch.name)), True) if shape else (smollm2(), False)

    def probe(self) -> None:
        self.probes.append(probe(self.device, self.dtype))
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def machine(self) -> Machine:
        """Of all probes the median, less what the options give."""
        options, tp = self.options, self.options.tensor_parallel_size
        bandwidth = options.bandwidth or statistics.median(p.bandwidth for p in self.probes)
        flops = options.flops or statistics.median(p.flops for p in self.probes)
        return Machine(bandwidth * tp, flops * tp)

    def start(
        self, name: str, python: str, model: Path, dummy: bool, longest: int, env: dict[str, str] | None = None
    ) -> Engine:
        cache = Path(self.options.cache).expanduser()
        args: dict[str, Any] = {}
        job: dict[str, Any] = {}
        if name in ("nanovllm", "vllm"):
            args = {"max_model_len": longest, "tensor_parallel_size": self.options.tensor_parallel_size}
        if name == "nanovllm":
            args |= self.options.engine_arg
        if name in ("hf", "vllm"):
            model = hf_folder(model, cache)
        if name == "llama.cpp":
            job = {"gguf": str(gguf_file(model, cache, dummy))}
        job |= {
            "model": str(model),
            "dummy": dummy,
            "dtype": self.dtype,
            "temperature": self.options.temperature,
            "threads": os.cpu_count(),
            "args": args,
        }
        print(f"starting {name} on {model.name}", file=sys.stderr)
        return Engine(name, python, job, {**peer_environment(name, self.device), **(env or {})})

    def measure(self) -> list[Result]:
        """All workloads by all engines. Workloads with the same model share processes."""
        works = {name: WORKLOADS[name]() for name in self.names()}
        groups: dict[tuple[Path, bool], list[str]] = {}
        for name, work in works.items():
            groups.setdefault(self.model_of(work), []).append(name)
        results: list[Result] = []
        for (model, dummy), names in groups.items():
            results += self.measure_model(model, dummy, {name: works[name] for name in names})
        return results

    def measure_model(self, model: Path, dummy: bool, works: dict[str, Workload]) -> list[Result]:
        longest = max(len(p) + n for w in works.values() for p, n in zip(w.prompts, w.outputs))
        longest = ceil_div(longest, 256) * 256
        sizes = self.sizes(model)
        pythons = {"nanovllm": sys.executable, **self.options.compare}
        table = {
            (engine, name): Result(engine, name, model.name, work.output_tokens)
            for name, work in works.items()
            for engine in pythons
        }
        engines: dict[str, Engine] = {}
        numbers = itertools.count(1)  # of variants: no engine sees the same tokens twice

        def running(engine: str) -> Engine:
            if engine not in engines:
                engines[engine] = self.start(engine, pythons[engine], model, dummy, longest)
                for name, work in works.items():
                    table[engine, name].startup.append(engines[engine].startup)
                    prompts = work.variant(next(numbers), sizes.vocab_size)
                    engines[engine].run(prompts, [min(n, 4) for n in work.outputs])
            return engines[engine]

        try:
            for number in range(self.options.repeats):
                self.probe()
                # Each round begins with another engine, so that no engine always follows the same neighbour.
                first = number % len(pythons)
                this_round = list(pythons)[first:] + list(pythons)[:first]
                for name, work in works.items():
                    for engine in this_round:
                        self.once(running(engine), table[engine, name], work, next(numbers), sizes.vocab_size)
                        if self.device == "cuda" and len(pythons) > 1:  # a stopped process still holds its memory
                            engines.pop(engine).close()
            if self.options.profile:
                for name, work in works.items():
                    prompts = work.variant(next(numbers), sizes.vocab_size)
                    table["nanovllm", name].profile = running("nanovllm").run(prompts, work.outputs, profile=True)
        finally:
            for started in engines.values():
                started.close()
        for (_, name), result in table.items():
            if self.options.roofline:
                result.limit = limit(works[name], sizes, self.machine(), self.step_tokens())
            if result.memory is not None:
                result.memory["weights"] = sizes.weight_bytes
        return list(table.values())

    def once(self, engine: Engine, result: Result, work: Workload, number: int, vocab_size: int) -> None:
        if len(work.prompts) == 1:
            result.first_token.append(engine.run(work.variant(-number, vocab_size), [1])["seconds"])
        reply = engine.run(work.variant(number, vocab_size), work.outputs)
        result.seconds.append(reply["seconds"])
        result.rss, result.memory = reply["rss"], reply.get("memory")

    def sizes(self, model: Path) -> Sizes:
        return sizes_of(model_config(str(model), dummy=self.options.model is None), self.itemsize)

    def step_tokens(self) -> int:
        given = self.options.engine_arg.get("max_num_batched_tokens")
        return given or (LARGE_GPU_STEP if self.device == "cuda" else 2048)

    def startup(self) -> dict[str, list[float]]:
        """Seconds from the start of a process to its first token: caches as they are, and all of ours empty."""
        model, dummy = self.model_of(WORKLOADS[self.names()[0]]())
        found: dict[str, list[float]] = {"warm": [], "cold": []}
        for _ in range(self.options.repeats):
            for caches, seconds in found.items():
                with tempfile.TemporaryDirectory() as empty:
                    names = ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
                    env = dict.fromkeys(names, empty) if caches == "cold" else {}
                    engine = self.start("nanovllm", sys.executable, model, dummy, 512, env)
                    engine.close()
                seconds.append(engine.startup)
        return found


def host_time(count: int = 256, steps: int = 200) -> dict[str, float]:
    """Median microseconds of the host's work on a decode step of `count` sequences, the model replaced by a constant.

    Prompts of 100..1024 tokens at temperature 0.6; a step is scheduled, prepared (packed into its one buffer) and updated.
    """
    prompts, _ = draw(count, 100, 1024)
    outputs = [steps + 50] * count
    host = Host(prompts, outputs, 1024 + outputs[0], LARGE_GPU_STEP)
    parts: dict[str, list[float]] = {"schedule": [], "prepare": [], "update": [], "sum": []}
    while len(parts["sum"]) < steps:
        times = [time.perf_counter()]
        step = host.schedule()
        times.append(time.perf_counter())
        host.prepare(step)
        times.append(time.perf_counter())
        host.update(step)
        times.append(time.perf_counter())
        if len(step.rows) == int((step.ends - step.starts).sum()) == count:
            for name, seconds in zip(parts, (*np.diff(times), times[-1] - times[0])):
                parts[name].append(float(seconds))
    return {name: 1e6 * statistics.median(seconds) for name, seconds in parts.items()}


# -- reports -----------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    """Median, and the range where there is more than one."""
    text = f"{scale * statistics.median(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({scale * min(values):.{digits}f}-{scale * max(values):.{digits}f})"


def report(results: list[Result], works: dict[str, Workload]) -> str:
    ours = {result.workload: result for result in results if result.engine == "nanovllm"}
    head = ["workload", "engine", "model", "output tok/s", "ours / its", "share of the limit", "first token, ms"]
    head += ["decode tok/s", "start to first token, s", "resident, MB"]
    rows = []
    for result in sorted(results, key=lambda r: list(works).index(r.workload)):
        rates = [result.output_tokens / s for s in result.seconds]
        ratio = ours[result.workload].throughput / result.throughput
        decode = [(result.output_tokens - 1) / (s - f) for s, f in zip(result.seconds, result.first_token)]
        rows.append(
            [
                result.workload,
                result.engine,
                result.model,
                spread(rates, digits=0),
                "" if result.engine == "nanovllm" else f"{ratio:.2f}",
                f"{result.share:.0%} of {result.throughput_at_limit:.0f}" if result.limit else "",
                spread(result.first_token, 1e3, 0) if decode else "",
                spread(decode, digits=0) if decode else "",
                spread(result.startup),
                f"{result.rss / 2**20:.0f}",
            ]
        )
    text = "".join(f"- {name}: {work.about}\n" for name, work in works.items()) + "\n" + table(head, rows)
    for result in ours.values():
        if result.memory is not None:
            mb = {name: size / 2**20 for name, size in {"resident": result.rss, **result.memory}.items()}
            rest = mb["resident"] - mb["weights"] - mb["kv_cache"]
            text += (
                f"\nMemory, {result.workload}: {mb['resident']:.0f} MB resident = weights {mb['weights']:.0f} + KV cache "
                f"{mb['kv_cache']:.0f} + {rest:.0f}"
            )
    return text + "\n" + "".join(map(profile_report, ours.values()))


def profile_report(result: Result) -> str:
    """Milliseconds a step by part."""
    if result.profile is None:
        return ""
    steps, total = result.profile["steps"], result.profile["seconds"]
    parts = {name: seconds for name, seconds in result.profile["parts"].items() if seconds}
    parts["anything else"] = total - sum(parts.values())
    rows = [[name, f"{1e3 * seconds / steps:.3f}", f"{seconds / total:.1%}"] for name, seconds in parts.items()]
    title = f"\nWhere the time of {result.workload} goes ({steps} steps, {total:.2f} s with the timers on):\n\n"
    return title + table(["part", "ms a step", "share"], rows)


def machine_report(bench: Bench) -> str:
    rates = f"{bench.dtype} matmul {spread([p.flops / 1e9 for p in bench.probes], digits=0)} GFLOP/s"
    copies = f"copy {spread([p.bandwidth / 1e9 for p in bench.probes], digits=0)} GB/s"
    return f"Machine: {processor(bench.device)}; {rates}; {copies}; Python {platform.python_version()}\n"


def processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{os.cpu_count()} x {line.partition(':')[2].strip()}"
    return f"{os.cpu_count()} x {platform.machine()}"


# -- command line ------------------------------------------------------------------------------------------------------


def engine_arg(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} must be name=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def peers(text: str) -> dict[str, str]:
    """hf,vllm=/path/to/python -> the interpreter of each."""
    found = {}
    for item in text.split(","):
        name, _, python = item.partition("=")
        if name not in ("hf", "vllm", "llama.cpp"):
            raise argparse.ArgumentTypeError(f"{name!r} is not known; accepted are hf, vllm and llama.cpp")
        found[name] = python or sys.executable
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--workload",
        type=lambda text: text.split(","),
        help=f"comma-separated, of {', '.join(WORKLOADS)} (docs/benchmarks.md describes them); "
        "default field on a GPU, else A,B,C,D",
    )
    add("--model", help="a folder, .gguf file or hub name; default SmolLM2 for A, B and C, a shape for field and D")
    add("--shape", choices=SHAPES, help="random weights in this Qwen3 size, for every workload")
    add("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    add("--tensor-parallel-size", type=int, default=1)
    add("--temperature", type=float, default=0.6)
    add("--repeats", type=int, default=3, help="interleaved rounds")
    add("--engine-arg", type=engine_arg, action="append", default=[], metavar="NAME=VALUE", help="to nanovllm.LLM")
    add(
        "--compare",
        type=peers,
        default={},
        metavar="ENGINES",
        help="hf,vllm,llama.cpp, each optionally =/path/to/python",
    )
    add("--cache", default="~/.cache/nanovllm/bench", help="where peers' copies of the model are kept")
    add("--roofline", action="store_true", help="share of the limit of this machine, measured between rounds")
    add("--bandwidth", type=float, help="bytes a second for --roofline, instead of the measured copy")
    add(
        "--flops", type=float, help="floating-point operations a second for --roofline, instead of the measured product"
    )
    add("--profile", action="store_true", help="then one more run of ours with a timer on each part of a step")
    add("--host", action="store_true", help="only: the host's half of a decode step of 256 sequences, without a model")
    add("--startup", action="store_true", help="only: seconds from process start to first token, caches warm and cold")
    add("--json", metavar="FILE", help="everything measured, for machines")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.workload or ()) - set(WORKLOADS))
    if unknown:
        parser.error(f"--workload {','.join(unknown)} is not known; accepted are {', '.join(WORKLOADS)}")
    if options.model and options.shape:
        parser.error("--model and --shape exclude each other")
    options.engine_arg = dict(options.engine_arg)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    record: dict[str, Any] = {"command": " ".join(sys.argv if arguments is None else arguments)}
    if options.host:
        record["host_us"] = parts = host_time()
        print("Host, decode step of 256 sequences, microseconds (median):\n")
        print(table(list(parts), [[f"{value:.0f}" for value in parts.values()]]))
    else:
        bench = Bench(options)
        if options.startup:
            bench.probe()
            record["startup"] = startup = bench.startup()
            print("Process start to first token, seconds:\n")
            print(table(list(startup), [[spread(seconds, digits=2) for seconds in startup.values()]]))
        else:
            results = bench.measure()
            record["results"] = [result.record() for result in results]
            print(report(results, {name: WORKLOADS[name]() for name in bench.names()}))
        record["probes"] = [vars(machine) for machine in bench.probes]
        record["processor"], record["dtype"] = processor(bench.device), bench.dtype
        print(machine_report(bench))
    if options.json:
        Path(options.json).write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    exit_on_signals()
    main()
