"""bench.py: workloads and limits against published figures, every mode on a tiny model, no engine left behind.

No peer runs here, and no test depends on time.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

import bench
from benchmarks import engines, limit, ours, peer_files, quantise, workloads
from nanovllm import loader
from nanovllm.kernels import cpu

ROOT = Path(__file__).parent.parent


def sizes(shape: str, tmp_path: Path) -> limit.Sizes:
    folder = workloads.write_shape(shape, tmp_path)
    return limit.sizes_of(ours.model_config(str(folder), dummy=True), itemsize=2)


def test_the_field_s_workload_has_its_published_token_counts() -> None:
    work = workloads.field_workload()
    assert (len(work.prompts), sum(map(len, work.prompts)), sum(work.outputs)) == (
        256,
        142_827,
        133_966,
    )


@pytest.mark.parametrize(
    ("shape", "kv_kib", "seconds"), [("0.6b", 112, 3.72), ("8b", 144, 10.59), ("14b", 160, 16.62)]
)
def test_limit_of_an_h200_is_the_published_one(
    shape: str, kv_kib: int, seconds: float, tmp_path: Path
) -> None:
    model = sizes(shape, tmp_path)
    h200 = limit.Machine(bandwidth=4.3e12, flops=790e12)
    found = limit.limit(workloads.field_workload(), model, h200, limit.LARGE_GPU_STEP)
    assert model.kv_bytes == kv_kib * 1024
    assert found["seconds"] == pytest.approx(seconds, abs=0.005)


def test_limit_of_one_request_is_its_weights_and_kv_once_a_token(tmp_path: Path) -> None:
    model = sizes("0.6b", tmp_path)
    found = limit.limit(
        workloads.workload_b(), model, limit.Machine(bandwidth=1.0, flops=1e30), 2048
    )
    context = (
        sum(length + 1 for length in range(128, 255)) + 2 * 128 + 127
    )  # read by 127 decodes; prefill and writes
    logits = 128 * 2 * 2 * 151936
    assert found["seconds"] == pytest.approx(
        128 * model.weight_bytes + context * model.kv_bytes + logits
    )


def test_the_probe_of_a_gpu_fits_beside_an_engine() -> None:
    """An engine with its default share leaves 4.7 GiB of an 80 GB GPU."""
    with FakeTensorMode():  # allocates nothing
        source, target, a, b = limit.probed_tensors("cuda", "bfloat16")
    assert {tensor.device.type for tensor in (source, target, a, b)} == {"cuda"}
    product = a.nbytes
    needed = source.nbytes + target.nbytes + a.nbytes + b.nbytes + product
    assert needed <= 1.5 * 2**30
    largest_cache = 126 << 20  # of a B200
    assert source.nbytes + target.nbytes >= 8 * largest_cache


def test_limit_counts_a_shared_prefix_s_products_once(tmp_path: Path) -> None:
    model, machine = sizes("0.6b", tmp_path), limit.Machine(bandwidth=1e30, flops=1.0)
    found = limit.limit(workloads.workload_c(), model, machine, 1 << 20)
    layers = model.weight_bytes // 2 - model.vocab_size * model.hidden_size
    tokens = 512 + 64 * 32 + 64 * 31
    assert found["products"] == pytest.approx(2 * layers * tokens)


def test_rounds_differ_in_tokens_and_agree_in_lengths_and_sharing() -> None:
    work = workloads.workload_c()
    rounds = [work.variant(number, 512) for number in range(3)]
    assert [[len(p) for p in prompts] for prompts in rounds] == [[544] * 64] * 3
    assert all(engines.common_prefix(prompts) == 512 for prompts in rounds)
    assert len({prompts[0][0] for prompts in rounds}) == 3


def test_parts_charge_each_moment_to_the_innermost_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(engines, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    owner = SimpleNamespace(inner=lambda: None)
    owner.outer = lambda: (owner.inner(), owner.inner())
    untouched = dict(vars(owner))
    with engines.Parts([(owner, "outer", "a"), (owner, "inner", "b")]) as parts:
        owner.outer()
    assert parts.seconds == {"a": 3, "b": 2}  # ticks: 0 outer, 1-2 and 3-4 inner, 5 the end
    assert parts.calls == {"a": 1, "b": 2}
    assert vars(owner) == untouched


def test_measure_profile_and_limit_of_a_tiny_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    arguments = "--shape tiny --workload B --repeats 2 --roofline --profile --engine-arg kv_cache_memory_bytes=20000000"
    bench.main([*arguments.split(), "--json", str(file)])
    found = json.loads(file.read_text())
    (result,) = found["results"]
    assert (result["engine"], result["workload"], result["output_tokens"]) == ("nanovllm", "B", 128)
    assert len(result["seconds"]) == len(result["first_token"]) == len(found["probes"]) == 2
    assert result["output_tokens_per_second"] > 0
    assert result["share_of_limit"] > 0
    assert 0 < result["memory"]["kv_cache"] <= 20_000_000
    assert result["rss"] > 0
    assert result["profile"]["steps"] == 128
    assert {"schedule", "prepare", "sample", "update", "detokenise"} < set(
        result["profile"]["parts"]
    )
    printed = capsys.readouterr().out
    assert "| B | nanovllm | qwen3-tiny |" in printed
    assert "| schedule |" in printed


def test_host_and_startup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu.load()  # with the compiler, because later tests in this process get the same library
    monkeypatch.setenv("CXX", "no-compiler")  # the cold start would otherwise wait for one
    file = tmp_path / "found.json"
    bench.main(["--host", "--json", str(file)])
    host = json.loads(file.read_text())["host_us"]
    for parts in host.values():
        assert list(parts) == ["schedule", "prepare", "launch", "update", "sum", "launches"]
        assert all(value > 0 for value in parts.values())
    # Two graphs, the copy of the inputs, their scatter, the copy of the tokens.
    plain, inside, *outside = (parts["launches"] for parts in host.values())
    assert plain == inside == 5
    assert all(launches > 5 for launches in outside)
    if find_spec("triton"):
        mixed = json.loads(file.read_text())["mixed_step"]
        # Each of 28 layers attends by two kernels, and one more plans the step's decodes.
        assert (mixed["pieces"]["replays"], mixed["pieces"]["Triton"]) == (29, 57)
        assert mixed["eager"]["Triton"] + mixed["eager"]["products"] > 250
    bench.main(["--startup", "--shape", "tiny", "--repeats", "1", "--json", str(file)])
    assert {
        caches: len(seconds) for caches, seconds in json.loads(file.read_text())["startup"].items()
    } == {
        "warm": 1,
        "cold": 1,
    }
    assert "microseconds" in capsys.readouterr().out


def test_an_engine_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"nanovllm failed:(.|\n)*config\.json"):
        bench.Engine(
            "nanovllm",
            sys.executable,
            {"model": str(tmp_path), "dummy": True, "text": False, "dtype": "auto", "args": {}},
            {},
        )


def test_a_shape_as_gguf_reads_back_as_the_same_model(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    folder = workloads.write_shape("tiny", tmp_path)
    file = peer_files.gguf_file(folder, tmp_path / "cache", dummy=True)
    given = ours.model_config(str(folder), dummy=True)
    found = ours.model_config(str(file))
    for field in (
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "hidden_size",
        "vocab_size",
    ):
        assert getattr(found, field) == getattr(given, field), field
    names = {name for name, _ in loader.iter_weights(loader.resolve(str(file)))}
    assert {"model.layers.1.self_attn.q_norm.weight", "model.layers.0.mlp.down_proj.weight"} < names


def test_what_the_command_line_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, reason in (
        (["--workload", "A,Z"], "Z is not known"),
        (["--compare", "vllm,sglang"], "'sglang' is not known"),
        (["--engine-arg", "block_size"], "must be name=value"),
        (["--model", "m", "--shape", "tiny"], "exclude each other"),
    ):
        with pytest.raises(SystemExit):
            bench.parse(arguments)
        assert reason in capsys.readouterr().err
    options = bench.parse(
        ["--compare", "hf,llama.cpp=/other/python", "--engine-arg", "block_size=32"]
    )
    assert isinstance(options, argparse.Namespace)
    assert options.compare == {"hf": sys.executable, "llama.cpp": "/other/python"}
    assert options.engine_arg == {"block_size": 32}


# -- engines end with bench.py -------------------------------------------------------------------------------------

# Answers each message. Says that it is started when the first has come, because an engine that
# was not asked anything ends with its input. Its child computes for ever. Both ignore every signal that can be ignored.
# Both hold the pipe that FAKE_ENGINE_ALIVE names open for writing until they are dead.
FAKE_ENGINE = """#!/bin/sh
trap '' TERM INT HUP
exec 9>"$FAKE_ENGINE_ALIVE"
answer() { echo '{"first_token_at": 0, "seconds": 1, "rss": 1}'; }
read -r message
echo started >&9
(while true; do :; done) &
answer
while read -r message; do answer; done
while true; do :; done
"""
# Starts a fake engine as bench.py does, and says so. The engine then computes, or it is stopped.
STARTS_AN_ENGINE = """
import signal, sys
from benchmarks.process import Engine
engine = Engine("fake", sys.argv[1], {}, {})
if sys.argv[2] == "running":
    engine.send(signal.SIGCONT)
print("ready", flush=True)
signal.pause()
"""
# bench.py itself, with fake engines and a million rounds: it does not end.
RUNS_BENCH = """
import runpy, sys
sys.executable, sys.argv = sys.argv[1], ["bench.py", *sys.argv[2:]]
runpy.run_path("bench.py", run_name="__main__")
"""


class FakeEngine:
    """`interpreter` takes the place of Python; the rest tells whether such a process lives."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.interpreter = str(folder / "fake")
        Path(self.interpreter).write_text(FAKE_ENGINE)
        Path(self.interpreter).chmod(0o755)
        os.mkfifo(folder / "alive")
        monkeypatch.setenv("FAKE_ENGINE_ALIVE", str(folder / "alive"))
        self.reader = os.open(folder / "alive", os.O_RDONLY | os.O_NONBLOCK)

    def read(self) -> bytes:
        """Waits for what the next writer writes, or for b"": no process has the pipe open."""
        ready, _, _ = select.select([self.reader], [], [], 600)
        assert ready, "no engine has started, or an engine has outlived bench.py by ten minutes"
        return os.read(self.reader, 100)

    def wait_until_started(self) -> None:
        assert self.read() == b"started\n"

    def wait_until_dead(self) -> None:
        assert self.read() == b""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEngine]:
    made = FakeEngine(tmp_path, monkeypatch)
    yield made
    os.close(made.reader)


@pytest.mark.parametrize("state", ["running", "stopped"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_an_engine_ends_when_its_parent_is_killed(
    number: signal.Signals, state: str, fake: FakeEngine
) -> None:
    command = [sys.executable, "-c", STARTS_AN_ENGINE, fake.interpreter, state]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"ready\n"
    fake.wait_until_started()
    parent.send_signal(number)
    parent.communicate()
    assert parent.returncode == -number
    fake.wait_until_dead()


def test_bench_ends_its_engines_and_deletes_its_files_on_sigterm(
    fake: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    command = [
        sys.executable,
        "-c",
        RUNS_BENCH,
        fake.interpreter,
        "--shape",
        "tiny",
        "--workload",
        "B",
    ]
    process = subprocess.Popen(
        [*command, "--repeats", "1000000"], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    try:
        fake.wait_until_started()
        assert list(scratch.iterdir())
        process.terminate()
        assert process.wait() == 128 + signal.SIGTERM
    finally:
        process.kill()
    fake.wait_until_dead()
    assert not list(scratch.iterdir())


def test_a_closed_engine_leaves_no_process(fake: FakeEngine) -> None:
    engine = bench.Engine("fake", fake.interpreter, {}, {})
    fake.wait_until_started()
    assert engine.run([[1]], [1])["seconds"] == 1
    engine.close()
    fake.wait_until_dead()
    assert engine.guard.returncode == -signal.SIGKILL


# -- peers' files --------------------------------------------------------------------------------------------------


def test_transformers_reads_the_folder_of_a_gguf_file_as_the_same_model(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    import torch
    import transformers

    shape, folder = workloads.write_shape("tiny", tmp_path), tmp_path / "folder"
    gguf = peer_files.gguf_file(shape, tmp_path / "cache", dummy=True)
    peer_files.write_hf_model(ours.Checkpoint(gguf), folder)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert isinstance(loaded, transformers.Qwen3ForCausalLM)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    state = loaded.state_dict()
    for name, tensor in ours.Checkpoint(gguf).weights():
        assert torch.equal(state[name].bfloat16(), tensor.bfloat16()), name
    given = transformers.AutoConfig.from_pretrained(shape)
    for field in (
        "rope_parameters",
        "rope_theta",
        "rope_scaling",
        "tie_word_embeddings",
        "head_dim",
    ):
        assert getattr(loaded.config, field, None) == getattr(given, field, None), field
    assert loaded.config.rms_norm_eps == pytest.approx(
        given.rms_norm_eps
    )  # GGUF files hold it as a float32


# -- quantised files -------------------------------------------------------------------------------


def models(arguments: str, name: str) -> list[bench.Model]:
    return bench.Bench(bench.parse(arguments.split())).models_of(name)


@pytest.mark.parametrize("name", peer_files.GGUF_PACKAGE_FORMATS)
def test_a_file_without_llama_cpp_has_all_matrices_in_one_type(name: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    shape, cache = workloads.write_shape("tiny", tmp_path), tmp_path / "cache"
    file = peer_files.quantised_file(shape, name, cache, dummy=True, python=None)
    assert peer_files.quantised_file(shape, name, cache, dummy=True, python=None) == file
    kinds = {(t.tensor_type.name, len(t.shape)) for t in gguf.GGUFReader(file).tensors}
    assert kinds == {(name, 2), ("F32", 1)}
    given = gguf.GGUFReader(peer_files.gguf_file(shape, cache, dummy=True))
    found = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors
    }
    steps = {"Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31, "Q8_0": 127}
    for tensor in given.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        # A block spans at most twice its largest value, and its step is a share of the span.
        allowed = 2.01 * abs(values).max() / steps.get(name, 1 << 10)
        assert abs(found[tensor.name] - values).max() <= allowed


def test_a_format_that_needs_llama_cpp_says_so(tmp_path: Path) -> None:
    shape = workloads.write_shape("tiny", tmp_path)
    with pytest.raises(ValueError, match=r"--formats Q4_K_M needs llama\.cpp.*accepted are Q4_0"):
        peer_files.quantised_file(shape, "Q4_K_M", tmp_path, dummy=True, python=None)


def test_llama_cpp_s_quantiser_is_called_with_files_and_format(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\nshift; [ "$3" = Q6_K ] || { echo "no $3" >&2; exit 1; }; cp "$1" "$2"\n'
    )
    python.chmod(0o755)
    shape, cache = workloads.write_shape("tiny", tmp_path), tmp_path / "cache"
    file = peer_files.quantised_file(shape, "Q6_K", cache, dummy=True, python=str(python))
    assert file.read_bytes() == peer_files.gguf_file(shape, cache, dummy=True).read_bytes()
    with pytest.raises(ValueError, match="--formats Q9: no Q9"):
        peer_files.quantised_file(shape, "Q9", cache, dummy=True, python=str(python))
    assert {path.name for path in cache.iterdir()} >= {
        "qwen3-tiny-bf16.gguf",
        "qwen3-tiny-Q6_K.gguf",
    }


def test_quantise_knows_the_formats_by_llama_cpp_s_constants() -> None:
    api = SimpleNamespace(LLAMA_FTYPE_MOSTLY_Q4_0=2, LLAMA_FTYPE_ALL_F32=0, other=3)
    assert quantise.formats(api) == {"Q4_0": 2}


def test_which_engines_multiply_stored_weights(tmp_path: Path) -> None:
    file = str(tmp_path / "m.gguf")
    (own,) = models(f"--model {file}", "A")
    (stored,) = models(f"--model {file} --weights file", "A")
    (quantised,) = models(f"--model {file}", "Q")
    assert stored == quantised
    engines_of = ("nanovllm", "llama.cpp", "dequantised", "vllm", "hf")
    assert [own.stored_by(name) for name in engines_of] == [False] * 5
    assert [stored.stored_by(name) for name in engines_of] == [True, True, False, False, False]
    for arguments in ("--shape tiny --weights file", "--model folder --weights file"):
        with pytest.raises(
            SystemExit, match=r"need a GGUF file, and A runs on .*--model file\.gguf"
        ):
            models(arguments, "A")


def test_only_dequantised_weights_of_a_file_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    shape = workloads.write_shape("tiny", tmp_path)
    file = peer_files.gguf_file(shape, tmp_path, dummy=True)
    jobs: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr(bench, "Engine", lambda name, python, job, env: jobs.update({name: job}))
    run = bench.Bench(bench.parse(["--cache", str(tmp_path)]))
    model = bench.Model(file, stored=True)
    for name in ("nanovllm", "dequantised", "llama.cpp"):
        run.start(name, "python", model, 256)
    assert "quantization" not in jobs["nanovllm"]["args"]
    assert jobs["dequantised"]["args"]["quantization"] == "none"
    assert jobs["dequantised"]["engine"] == "nanovllm"
    assert jobs["llama.cpp"]["gguf"] == str(file)
    assert jobs["llama.cpp"]["kv_numbers"] == 2 * 2 * 16 * 2  # K and V, KV heads, head_dim, layers
    assert not any(job["text"] or job["dummy"] for job in jobs.values())
    run.start("nanovllm", "python", bench.Model(file), 256)
    assert jobs["nanovllm"]["args"]["quantization"] == "none"
    run.start("nanovllm", "python", bench.Model(shape, dummy=True), 256)
    assert "quantization" not in jobs["nanovllm"]["args"]


def test_formats_with_large_blocks_run_on_the_shape_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "smollm2", lambda: tmp_path / "smollm2.gguf")
    asked: list[tuple[str, str]] = []

    def write(place: Path, form: str, *_: object) -> Path:
        asked.append((place.name, form))
        return tmp_path / f"{form}.gguf"

    monkeypatch.setattr(bench, "quantised_file", write)
    models("--formats Q4_0,Q4_K_M,IQ4_NL,IQ4_XS", "Q")
    models("--formats Q4_0 --shape 8b", "Q")
    assert asked == [
        ("smollm2.gguf", "Q4_0"),
        ("qwen3-0.6b", "Q4_K_M"),
        ("smollm2.gguf", "IQ4_NL"),
        ("qwen3-0.6b", "IQ4_XS"),
        ("qwen3-8b", "Q4_0"),
    ]


def test_limit_of_stored_weights_reads_the_bytes_of_the_file(tmp_path: Path) -> None:
    config = ours.model_config(str(workloads.write_shape("0.6b", tmp_path)), dummy=True)
    work, machine = workloads.workload_q(), limit.Machine(bandwidth=1.0, flops=1e30)
    whole = limit.sizes_of(config, 2)
    quarter = limit.sizes_of(config, 2, whole.weight_bytes // 4)
    seconds = [limit.limit(work, model, machine, 2048)["seconds"] for model in (whole, quarter)]
    assert seconds[0] - seconds[1] == pytest.approx(128 * whole.weight_bytes * 3 / 4)


def test_row_of_a_quantised_file() -> None:
    def result(engine: str, first: float, rest: float, rss: int) -> bench.Result:
        made = bench.Result(engine, "Q", "m.gguf", 128, 128, 50 << 20, True)
        made.first_token, made.seconds, made.startup = [first], [first + rest], [1.5]
        made.rss, made.memory = rss << 20, {"kv_cache": 100 << 20, "weights": 50 << 20}
        return made

    ours_, its = result("nanovllm", 0.5, 1.27, 180), result("llama.cpp", 0.25, 2.54, 160)
    work = {"Q": workloads.workload_q()}
    table = bench.report([ours_, its], work).splitlines()
    assert "| m.gguf | nanovllm | 100 |  | 256 |  |  | 500 | 1.5 | 180 | 80 | 50 |" in table
    assert "| m.gguf | llama.cpp | 50 | 2.00 | 512 | 0.50 |  | 250 | 1.5 | 160 | 60 | 50 |" in table


def test_measure_a_quantised_file_of_a_tiny_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    shape = workloads.write_shape("tiny", tmp_path)
    file = peer_files.quantised_file(shape, "Q8_0", tmp_path, dummy=True, python=None)
    found = tmp_path / "found.json"
    arguments = (
        f"--workload Q --model {file} --repeats 1 --engine-arg kv_cache_memory_bytes=20000000"
    )
    bench.main([*arguments.split(), "--json", str(found)])
    (result,) = json.loads(found.read_text())["results"]
    assert (result["workload"], result["model"], result["stored"]) == ("Q", file.name, True)
    assert result["file_bytes"] == file.stat().st_size
    cache = result["memory"]["kv_cache"]
    assert result["resident_beside_kv_cache"] == result["rss"] - cache
    assert result["decode_tokens_per_second"][0] > 0
    assert result["prefill_tokens_per_second"] == [128 / result["first_token"][0]]
    assert f"| {file.name} | nanovllm |" in capsys.readouterr().out
