"""Measures the speed of nanovllm on this machine, also as a share of the machine's limit
and beside other engines ("peers").

    python bench.py                # throughput of the workloads that suit this machine
    python bench.py --roofline     # the same, and the share of the limit
    python bench.py --compare hf,vllm=/path/to/python    # the same with peers
    python bench.py --profile      # the same, and the time of each part of a step
    python bench.py --workload Q --compare llama.cpp=/path/to/python   # quantised files
    python bench.py --host         # only the host's part of a step
    python bench.py --startup      # only the time from process start to the first token

Every engine runs in a process of its own (benchmarks/process.py), which ends with this
one. Throughput is requested output tokens over wall time.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.host_time import host_times
from benchmarks.limit import LARGE_GPU_STEP, Machine, Sizes, limit, probe, sizes_of
from benchmarks.mixed_step import mixed_step_time
from benchmarks.ours import Checkpoint, ceil_div, default_dtype, model_config
from benchmarks.peer_files import SIMPLE_FORMATS, gguf_file, hf_folder, quantised_file
from benchmarks.process import Engine, exit_on_signals
from benchmarks.workloads import SHAPES, WORKLOADS, Workload, smollm2, write_shape

# "dequantised" is nanovllm itself, with the weights of a GGUF file dequantised.
PEERS = ("hf", "vllm", "llama.cpp", "dequantised")
# These multiply the weights of a GGUF file as it stores them, if they are asked to.
READS_BLOCKS = ("nanovllm", "llama.cpp")
CPU_STEP = 2048  # tokens of one step on a CPU, by default
FORMATS = ("Q4_0", "Q4_1", "Q8_0", "Q4_K_M", "Q6_K")
# Workload Q measures formats with blocks of 256 weights on this shape. The rows of SmolLM2
# have 576 weights, and llama.cpp gives such rows other formats.
SHAPE_FOR_LARGE_BLOCKS = "0.6b"


def physical_cores() -> int:
    """The physical cores that this process may use."""
    cpus = os.sched_getaffinity(0)
    found = set()
    for cpu in cpus:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        if not siblings.exists():
            return len(cpus)
        found.add(siblings.read_text())
    return len(found)


def peer_environment(name: str, device: str) -> dict[str, str]:
    """The environment variables with which a peer is fastest on this machine."""
    if name != "vllm" or device == "cuda":
        return {}
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    libraries = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout.split()
    for word in libraries:
        if "/libtcmalloc_minimal.so" in word or "/libtcmalloc.so" in word:
            environment["LD_PRELOAD"] = word
            break
    return environment


# -- measuring -------------------------------------------------------------------------------------


@dataclass
class Result:
    """One engine on one workload. Lists have one entry for each round."""

    engine: str
    workload: str
    model: str
    prompt_tokens: int
    output_tokens: int
    file_bytes: int  # of a GGUF file, or 0
    stored: bool  # whether the engine multiplies the weights as the GGUF file stores them
    seconds: list[float] = field(default_factory=list)
    # Seconds to the first token. Empty unless the workload is one request.
    first_token: list[float] = field(default_factory=list)
    # Seconds from process start to the first token.
    startup: list[float] = field(default_factory=list)
    rss: int = 0  # bytes, after the last round
    memory: dict[str, int] | None = None  # bytes of the weights and of the KV cache
    profile: dict[str, Any] | None = None
    limit: dict[str, float] | None = None

    @property
    def throughput(self) -> float:
        """Output tokens a second."""
        return self.output_tokens / statistics.median(self.seconds)

    @property
    def decode(self) -> list[float]:
        """Tokens a second after the first token. Empty unless the workload is one request."""
        times = [total - first for total, first in zip(self.seconds, self.first_token)]
        return [(self.output_tokens - 1) / seconds for seconds in times]

    @property
    def prefill(self) -> list[float]:
        """Prompt tokens a second up to the first token. Empty unless it is one request."""
        return [self.prompt_tokens / seconds for seconds in self.first_token]

    @property
    def beside_cache(self) -> int | None:
        """Resident bytes without the KV cache."""
        return None if self.memory is None else self.rss - self.memory["kv_cache"]

    @property
    def share(self) -> float | None:
        """The throughput as a share of the machine's limit."""
        if self.limit is None:
            return None
        return self.limit["seconds"] / statistics.median(self.seconds)

    @property
    def throughput_at_limit(self) -> float | None:
        """Output tokens a second at the machine's limit."""
        if self.limit is None:
            return None
        return self.output_tokens / self.limit["seconds"]

    def record(self) -> dict[str, Any]:
        """The result for --json."""
        return {
            **vars(self),
            "output_tokens_per_second": self.throughput,
            "decode_tokens_per_second": self.decode,
            "prefill_tokens_per_second": self.prefill,
            "resident_beside_kv_cache": self.beside_cache,
            "share_of_limit": self.share,
        }


@dataclass(frozen=True)
class Model:
    """A model that engines run.

    place: a folder, a GGUF file or a hub name. dummy: `place` has only a config.json, and
    the weights are random. stored: engines multiply the weights as the GGUF file stores
    them, if they can (READS_BLOCKS). Otherwise weights are in the dtype of the run.
    """

    place: Path
    dummy: bool = False
    stored: bool = False

    @property
    def is_gguf(self) -> bool:
        return self.place.suffix == ".gguf"

    def has_text(self) -> bool:
        """Whether there is a tokenizer."""
        if self.is_gguf:
            return Checkpoint(self.place).has_tokenizer()
        return not self.dummy

    def stored_by(self, engine: str) -> bool:
        return self.stored and engine in READS_BLOCKS


class Bench:
    """One run of bench.py: the options, the machine, and a folder for written models."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if options.dtype == "auto":
            dtype = default_dtype(self.device)
        else:
            dtype = getattr(torch, options.dtype)
        self.dtype = str(dtype).removeprefix("torch.")
        self.itemsize = dtype.itemsize
        self.cache = Path(options.cache).expanduser()
        self.scratch = tempfile.TemporaryDirectory()
        self.probes: list[Machine] = []

    def names(self) -> list[str]:
        """The workloads to run."""
        default = ["field"] if self.device == "cuda" else ["A", "B", "C", "D"]
        return self.options.workload or default

    def models_of(self, name: str) -> list[Model]:
        """The models on which the workload `name` runs.

        Exits if the weights shall be used as stored and a model is no GGUF file.
        """
        stored = name == "Q" or self.options.weights == "file"
        if self.options.model:
            models = [Model(Path(self.options.model), stored=stored)]
        elif name == "Q":
            models = [self.quantised(form) for form in self.options.formats]
        else:
            place, dummy = self.source(self.options.shape or WORKLOADS[name]().shape)
            models = [Model(place, dummy, stored)]
        for model in models:
            if stored and not model.is_gguf:
                raise SystemExit(
                    f"bench.py: workload Q and --weights file need a GGUF file, and {name} runs on "
                    f"{model.place}; give --model file.gguf"
                )
        return models

    def source(self, shape: str | None) -> tuple[Path, bool]:
        """(SmolLM2 or a folder of this shape, whether the weights are random)."""
        if shape:
            return write_shape(shape, Path(self.scratch.name)), True
        return smollm2(), False

    def quantised(self, form: str) -> Model:
        """A GGUF file in the file format `form`, of --shape or of the model that fits.

        Exits if the file cannot be written.
        """
        shape = self.options.shape
        if shape is None and form not in SIMPLE_FORMATS:
            shape = SHAPE_FOR_LARGE_BLOCKS
        place, dummy = self.source(shape)
        python = self.options.compare.get("llama.cpp")
        if python is None and importlib.util.find_spec("llama_cpp"):
            python = sys.executable
        print(f"writing {form} of {place.name}, unless the cache has it", file=sys.stderr)
        try:
            file = quantised_file(place, form, self.cache, dummy, python)
        except ValueError as err:
            raise SystemExit(f"bench.py: {err}") from err
        return Model(file, stored=True)

    def probe(self) -> None:
        """Measures the speed of the machine once more."""
        self.probes.append(probe(self.device, self.dtype))
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def machine(self) -> Machine:
        """The median of all probes, or the figures that the options give."""
        options, ranks = self.options, self.options.tensor_parallel_size
        bandwidth = options.bandwidth or statistics.median(p.bandwidth for p in self.probes)
        flops = options.flops or statistics.median(p.flops for p in self.probes)
        return Machine(bandwidth * ranks, flops * ranks)

    def start(
        self,
        name: str,
        python: str,
        model: Model,
        longest: int,
        env: dict[str, str] | None = None,
    ) -> Engine:
        """Starts the process of an engine. Returns after its first token.

        longest: the most tokens of one sequence. env: more environment variables.
        """
        job: dict[str, Any] = {
            "model": str(model.place),
            "dummy": model.dummy,
            "text": model.has_text(),
            "dtype": self.dtype,
            "temperature": self.options.temperature,
            "args": {},
        }
        if name in ("nanovllm", "dequantised", "vllm"):
            job["args"] = {
                "max_model_len": longest,
                "tensor_parallel_size": self.options.tensor_parallel_size,
            }
        if name in ("nanovllm", "dequantised"):
            job["engine"] = "nanovllm"
            if model.is_gguf and not model.stored_by(name):
                job["args"]["quantization"] = "none"
            job["args"] |= self.options.engine_arg
        if name in ("hf", "vllm"):
            job["model"] = str(hf_folder(model.place, self.cache))
        if name == "llama.cpp":
            job |= self.llama_cpp_job(model)
        print(f"starting {name} on {model.place.name}", file=sys.stderr)
        return Engine(name, python, job, {**peer_environment(name, self.device), **(env or {})})

    def llama_cpp_job(self, model: Model) -> dict[str, Any]:
        file = model.place if model.stored else gguf_file(model.place, self.cache, model.dummy)
        return {
            "gguf": str(file),
            "threads": physical_cores(),
            "kv_numbers": self.sizes(model).kv_bytes // self.itemsize,
        }

    def measure(self) -> list[Result]:
        """All workloads by all engines. Workloads with the same model share processes."""
        groups: dict[Model, dict[str, Workload]] = {}
        for name in self.names():
            for model in self.models_of(name):
                groups.setdefault(model, {})[name] = WORKLOADS[name]()
        results: list[Result] = []
        for model, works in groups.items():
            results += ModelBench(self, model, works).measure()
        return results

    def sizes(self, model: Model, stored: bool = False) -> Sizes:
        """stored: the weights have the bytes of the file."""
        config = model_config(str(model.place), dummy=model.dummy)
        return sizes_of(config, self.itemsize, model.place.stat().st_size if stored else None)

    def step_tokens(self) -> int:
        """The most tokens of one step of nanovllm."""
        given = self.options.engine_arg.get("max_num_batched_tokens")
        return given or (LARGE_GPU_STEP if self.device == "cuda" else CPU_STEP)

    def startup(self) -> dict[str, list[float]]:
        """Seconds from process start to the first token.

        "warm": caches as they are. "cold": the caches of compiled kernels are empty.
        """
        model = self.models_of(self.names()[0])[0]
        names = ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        found: dict[str, list[float]] = {"warm": [], "cold": []}
        for _ in range(self.options.repeats):
            for caches, seconds in found.items():
                with tempfile.TemporaryDirectory() as empty:
                    env = dict.fromkeys(names, empty) if caches == "cold" else {}
                    engine = self.start("nanovllm", sys.executable, model, 512, env)
                    engine.close()
                seconds.append(engine.startup)
        return found


class ModelBench:
    """The workloads of one model by all engines.

    `results`: (engine, workload) -> Result. `engines`: the processes that live.
    """

    def __init__(self, bench: Bench, model: Model, works: dict[str, Workload]) -> None:
        self.bench = bench
        self.model = model
        self.works = works
        longest = max(len(p) + n for w in works.values() for p, n in zip(w.prompts, w.outputs))
        self.longest = ceil_div(longest, 256) * 256
        self.sizes = bench.sizes(model)
        self.pythons = {"nanovllm": sys.executable, **bench.options.compare}
        self.results = {
            (engine, name): self.new_result(engine, name, work)
            for name, work in works.items()
            for engine in self.pythons
        }
        self.engines: dict[str, Engine] = {}
        # Every call takes another variant, so that no engine sees a prompt twice.
        self.numbers = itertools.count(1)

    def new_result(self, engine: str, name: str, work: Workload) -> Result:
        place = self.model.place
        return Result(
            engine,
            name,
            place.name,
            prompt_tokens=sum(map(len, work.prompts)),
            output_tokens=work.output_tokens,
            file_bytes=place.stat().st_size if self.model.is_gguf else 0,
            stored=self.model.stored_by(engine),
        )

    def measure(self) -> list[Result]:
        options = self.bench.options
        try:
            for number in range(options.repeats):
                self.bench.probe()
                self.measure_round(number)
            if options.profile:
                self.profile()
        finally:
            for engine in self.engines.values():
                engine.close()
        for (_, name), result in self.results.items():
            sizes = self.bench.sizes(self.model, result.stored)
            if options.roofline:
                step_tokens = self.bench.step_tokens()
                machine = self.bench.machine()
                result.limit = limit(self.works[name], sizes, machine, step_tokens)
            if result.memory is not None:
                result.memory["weights"] = sizes.weight_bytes
        return list(self.results.values())

    def measure_round(self, number: int) -> None:
        """Every workload once by every engine.

        Each round begins with another engine, so that neighbours change.
        """
        names = list(self.pythons)
        first = number % len(names)
        # On a GPU a stopped process still uses its memory.
        one_at_a_time = self.bench.device == "cuda" and len(names) > 1
        for name in self.works:
            for engine in names[first:] + names[:first]:
                self.measure_once(engine, name)
                if one_at_a_time:
                    self.engines.pop(engine).close()

    def measure_once(self, engine: str, name: str) -> None:
        process, work, result = self.running(engine), self.works[name], self.results[engine, name]
        if len(work.prompts) == 1:
            reply = process.run(self.variant(work), [1])
            result.first_token.append(reply["seconds"])
        reply = process.run(self.variant(work), work.outputs)
        result.seconds.append(reply["seconds"])
        result.rss = reply["rss"]
        result.memory = reply.get("memory")

    def running(self, engine: str) -> Engine:
        """The process of an engine.

        A new process first runs every workload with short outputs.
        """
        if engine not in self.engines:
            process = self.bench.start(engine, self.pythons[engine], self.model, self.longest)
            self.engines[engine] = process
            for name, work in self.works.items():
                self.results[engine, name].startup.append(process.startup)
                process.run(self.variant(work), [min(n, 4) for n in work.outputs])
        return self.engines[engine]

    def variant(self, work: Workload) -> list[list[int]]:
        return work.variant(next(self.numbers), self.sizes.vocab_size)

    def profile(self) -> None:
        """Runs every workload once more, with a timer on each part of a step of nanovllm."""
        for name, work in self.works.items():
            process = self.running("nanovllm")
            reply = process.run(self.variant(work), work.outputs, profile=True)
            self.results["nanovllm", name].profile = reply


# -- reports ---------------------------------------------------------------------------------------

COLUMNS = [
    "workload",
    "engine",
    "model",
    "output tok/s",
    "ours / its",
    "share of the limit",
    "first token, ms",
    "decode tok/s",
    "start to first token, s",
    "resident, MB",
]
QUANTISED_COLUMNS = [
    "file",
    "engine",
    "decode tok/s",
    "ours / its",
    "prefill tok/s",
    "ours / its",
    "share of the limit",
    "first token, ms",
    "start to first token, s",
    "resident, MB",
    "beside the KV cache, MB",
    "file, MB",
]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    """The median, and with several values their range."""
    text = f"{scale * statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return text
    low, high = scale * min(values), scale * max(values)
    return f"{text} ({low:.{digits}f}-{high:.{digits}f})"


def report(results: list[Result], works: dict[str, Workload]) -> str:
    ours = {(r.workload, r.model): r for r in results if r.engine == "nanovllm"}
    pairs = [(result, ours[result.workload, result.model]) for result in results]
    pairs.sort(key=lambda pair: list(works).index(pair[0].workload))
    rows = [result_row(*pair) for pair in pairs if pair[0].workload != "Q"]
    quantised = [quantised_row(*pair) for pair in pairs if pair[0].workload == "Q"]
    text = "".join(f"- {name}: {work.about}\n" for name, work in works.items())
    if rows:
        text += "\n" + table(COLUMNS, rows)
    if quantised:
        text += "\n" + table(QUANTISED_COLUMNS, quantised)
    text += "".join(map(memory_report, ours.values()))
    return text + "\n" + "".join(map(profile_report, ours.values()))


def result_row(result: Result, ours: Result) -> list[str]:
    """The cells of COLUMNS."""
    ratio = "" if result is ours else f"{ours.throughput / result.throughput:.2f}"
    first_token = decode = ""
    if result.first_token:
        first_token = spread(result.first_token, 1e3, 0)
        decode = spread(result.decode, digits=0)
    return [
        result.workload,
        result.engine,
        f"{result.model}, as stored" if result.stored else result.model,
        spread([result.output_tokens / seconds for seconds in result.seconds], digits=0),
        ratio,
        share_text(result),
        first_token,
        decode,
        spread(result.startup),
        megabytes(result.rss),
    ]


def quantised_row(result: Result, ours: Result) -> list[str]:
    """The cells of QUANTISED_COLUMNS."""
    decode = prefill = ""
    if result is not ours:
        decode = f"{statistics.median(ours.decode) / statistics.median(result.decode):.2f}"
        prefill = f"{statistics.median(ours.prefill) / statistics.median(result.prefill):.2f}"
    return [
        result.model,
        result.engine,
        spread(result.decode, digits=0),
        decode,
        spread(result.prefill, digits=0),
        prefill,
        share_text(result),
        spread(result.first_token, 1e3, 0),
        spread(result.startup),
        megabytes(result.rss),
        "" if result.beside_cache is None else megabytes(result.beside_cache),
        megabytes(result.file_bytes),
    ]


def share_text(result: Result) -> str:
    if result.limit is None:
        return ""
    return f"{result.share:.0%} of {result.throughput_at_limit:.0f}"


def megabytes(count: int) -> str:
    return f"{count / 2**20:.0f}"


def memory_report(result: Result) -> str:
    """Resident memory as a sum of its parts."""
    if result.memory is None:
        return ""
    resident = result.rss / 2**20
    weights = result.memory["weights"] / 2**20
    cache = result.memory["kv_cache"] / 2**20
    return (
        f"\nMemory, {result.workload}, {result.model}: {resident:.0f} MB resident = weights {weights:.0f} + "
        f"KV cache {cache:.0f} + {resident - weights - cache:.0f}"
    )


def profile_report(result: Result) -> str:
    """Milliseconds of each part of a step."""
    if result.profile is None:
        return ""
    steps, total = result.profile["steps"], result.profile["seconds"]
    parts = {name: seconds for name, seconds in result.profile["parts"].items() if seconds}
    parts["anything else"] = total - sum(parts.values())
    rows = [
        [name, f"{1e3 * seconds / steps:.3f}", f"{seconds / total:.1%}"]
        for name, seconds in parts.items()
    ]
    title = f"Where the time of {result.workload} goes"
    title += f" ({steps} steps, {total:.2f} s with the timers on):"
    return f"\n{title}\n\n" + table(["part", "ms a step", "share"], rows)


def machine_report(bench: Bench) -> str:
    flops = spread([machine.flops / 1e9 for machine in bench.probes], digits=0)
    bandwidth = spread([machine.bandwidth / 1e9 for machine in bench.probes], digits=0)
    return (
        f"Machine: {processor(bench.device)}; {bench.dtype} matmul {flops} GFLOP/s; "
        f"copy {bandwidth} GB/s; Python {platform.python_version()}\n"
    )


def processor(device: str) -> str:
    """The name of the GPU, or the number and the model of the CPU's cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{os.cpu_count()} x {line.partition(':')[2].strip()}"
    return f"{os.cpu_count()} x {platform.machine()}"


# -- command line ----------------------------------------------------------------------------------


def engine_arg(text: str) -> tuple[str, object]:
    """name=value -> (name, value). A value that is no literal of Python is a text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} must be name=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def peers(text: str) -> dict[str, str]:
    """hf,vllm=/path/to/python -> the Python interpreter of each peer."""
    found = {}
    for item in text.split(","):
        name, _, python = item.partition("=")
        if name not in PEERS:
            raise argparse.ArgumentTypeError(
                f"{name!r} is not known; accepted are {', '.join(PEERS)}"
            )
        found[name] = python or sys.executable
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_options(parser)
    add_measurement_options(parser)
    return parser


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """The model and the settings of the engines."""
    add = parser.add_argument
    add(
        "--model",
        help="a folder, .gguf file or hub name; by default SmolLM2 for A, B and C, random weights "
        "for field and D, and for Q a file in each of --formats",
    )
    add("--shape", choices=SHAPES, help="random weights in this Qwen3 size, for every workload")
    add("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    add("--tensor-parallel-size", type=int, default=1)
    add("--temperature", type=float, default=0.6)
    add(
        "--engine-arg",
        type=engine_arg,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument for nanovllm.LLM",
    )
    add(
        "--compare",
        type=peers,
        default={},
        metavar="ENGINES",
        help="peers: hf,vllm,llama.cpp, each with =/path/to/python if it has its own environment, "
        "and dequantised: nanovllm with the weights of a GGUF file dequantised",
    )
    add(
        "--weights",
        choices=["dtype", "file"],
        default="dtype",
        help="file: nanovllm and llama.cpp multiply the weights as the GGUF file of --model stores "
        "them, as Q always does; dtype: every engine multiplies them in --dtype",
    )
    add(
        "--formats",
        type=lambda text: text.split(","),
        default=list(FORMATS),
        help="the file formats of Q, comma-separated, as llama.cpp names them; by default "
        + ",".join(FORMATS),
    )
    add(
        "--cache",
        default="~/.cache/nanovllm/bench",
        help="the folder for copies of the model in the formats of peers",
    )


def add_measurement_options(parser: argparse.ArgumentParser) -> None:
    """The workloads and the figures to measure."""
    add = parser.add_argument
    add(
        "--workload",
        type=lambda text: text.split(","),
        help=f"comma-separated, of {', '.join(WORKLOADS)} (docs/benchmarks.md describes them); "
        "by default field on a GPU, and A,B,C,D on a CPU",
    )
    add("--repeats", type=int, default=3, help="rounds; the engines take turns in each round")
    add(
        "--roofline",
        action="store_true",
        help="the share of the limit of this machine, which is measured before each round",
    )
    add("--bandwidth", type=float, help="for --roofline: bytes a second, not the measured copy")
    add(
        "--flops",
        type=float,
        help="for --roofline: floating-point operations a second, not the measured product",
    )
    add(
        "--profile",
        action="store_true",
        help="one more run of nanovllm, with a timer on each part of a step",
    )
    add(
        "--host",
        action="store_true",
        help="only the host's part of a decode step of 256 sequences, without a model",
    )
    add(
        "--startup",
        action="store_true",
        help="only the seconds from process start to first token, with warm and cold caches",
    )
    add("--json", metavar="FILE", help="writes all results to a file")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser()
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.workload or ()) - set(WORKLOADS))
    if unknown:
        parser.error(
            f"--workload {','.join(unknown)} is not known; accepted are {', '.join(WORKLOADS)}"
        )
    if options.model and options.shape:
        parser.error("--model and --shape exclude each other")
    options.engine_arg = dict(options.engine_arg)
    return options


def run_host() -> dict[str, Any]:
    found = host_times()
    print("Host, decode step of 256 sequences, microseconds (median):\n")
    names = ["sampling", *found["temperature"]]
    rows = [
        [sampling, *(f"{value:.0f}" for value in parts.values())]
        for sampling, parts in found.items()
    ]
    print(table(names, rows))
    return {"host_us": found, **run_mixed_step()}


def run_mixed_step() -> dict[str, Any]:
    """The host's work on a step with prompts. Nothing where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return {}
    found = mixed_step_time()
    print("\nHost, model of a step of 224 decodes and 4 prompts, without drivers:\n")
    columns = list(found["eager"])
    rows = [
        [name, *(f"{parts[column]:.0f}" for column in columns)] for name, parts in found.items()
    ]
    print(table(["model", *columns], rows))
    return {"mixed_step": found}


def run_startup(bench: Bench) -> dict[str, Any]:
    bench.probe()
    startup = bench.startup()
    print("Process start to first token, seconds:\n")
    print(table(list(startup), [[spread(seconds, digits=2) for seconds in startup.values()]]))
    return {"startup": startup}


def run_workloads(bench: Bench) -> dict[str, Any]:
    results = bench.measure()
    print(report(results, {name: WORKLOADS[name]() for name in bench.names()}))
    return {"results": [result.record() for result in results]}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    record: dict[str, Any] = {"command": " ".join(sys.argv if arguments is None else arguments)}
    if options.host:
        record |= run_host()
    else:
        bench = Bench(options)
        record |= run_startup(bench) if options.startup else run_workloads(bench)
        record["probes"] = [vars(machine) for machine in bench.probes]
        record["processor"] = processor(bench.device)
        record["dtype"] = bench.dtype
        print(machine_report(bench))
    if options.json:
        Path(options.json).write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    exit_on_signals()
    main()
