"""bench.py: its workloads and limits against published figures, and that every mode runs. No peer, and nothing timed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import bench
from benchmarks import engines, limit, peer_files, workloads
from nanovllm import loader
from nanovllm.models.config import read_config


def sizes(shape: str, tmp_path: Path) -> limit.Sizes:
    files = loader.resolve(str(workloads.write_shape(shape, tmp_path)), load_format="dummy")
    return limit.sizes_of(read_config(loader.load_hf_config(files)), itemsize=2)


def test_the_field_s_workload_has_its_published_token_counts() -> None:
    work = workloads.field_workload()
    assert (len(work.prompts), sum(map(len, work.prompts)), sum(work.outputs)) == (256, 142_827, 133_966)


@pytest.mark.parametrize(("shape", "kv_kib", "seconds"), [("0.6b", 112, 3.72), ("8b", 144, 10.59), ("14b", 160, 16.62)])
def test_limit_of_an_h200_is_the_published_one(shape: str, kv_kib: int, seconds: float, tmp_path: Path) -> None:
    model = sizes(shape, tmp_path)
    h200 = limit.Machine(bandwidth=4.3e12, flops=790e12)
    found = limit.limit(workloads.field_workload(), model, h200, limit.LARGE_GPU_STEP)
    assert model.kv_bytes == kv_kib * 1024
    assert found["seconds"] == pytest.approx(seconds, abs=0.005)


def test_limit_of_one_request_is_its_weights_and_kv_once_a_token(tmp_path: Path) -> None:
    model = sizes("0.6b", tmp_path)
    found = limit.limit(workloads.workload_b(), model, limit.Machine(bandwidth=1.0, flops=1e30), 2048)
    context = sum(length + 1 for length in range(128, 255)) + 2 * 128 + 127  # read by 127 decodes; prefill and writes
    logits = 128 * 2 * 2 * 151936
    assert found["seconds"] == pytest.approx(128 * model.weight_bytes + context * model.kv_bytes + logits)


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


def test_parts_charge_each_moment_to_the_innermost_function(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_measure_profile_and_limit_of_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert {"schedule", "prepare", "sample", "update", "detokenise"} < set(result["profile"]["parts"])
    printed = capsys.readouterr().out
    assert "| B | nanovllm | qwen3-tiny |" in printed
    assert "| schedule |" in printed


def test_host_and_startup(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-compiler")  # the cold start would otherwise wait for one
    file = tmp_path / "found.json"
    bench.main(["--host", "--json", str(file)])
    parts = json.loads(file.read_text())["host_us"]
    assert list(parts) == ["schedule", "prepare", "update", "sum"]
    assert all(value > 0 for value in parts.values())
    bench.main(["--startup", "--shape", "tiny", "--repeats", "1", "--json", str(file)])
    assert {caches: len(seconds) for caches, seconds in json.loads(file.read_text())["startup"].items()} == {
        "warm": 1,
        "cold": 1,
    }
    assert "microseconds" in capsys.readouterr().out


def test_an_engine_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"nanovllm failed:(.|\n)*config\.json"):
        bench.Engine(
            "nanovllm", sys.executable, {"model": str(tmp_path), "dummy": True, "dtype": "auto", "args": {}}, {}
        )


def test_a_shape_as_gguf_reads_back_as_the_same_model(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    folder = workloads.write_shape("tiny", tmp_path)
    gguf = loader.resolve(str(peer_files.gguf_file(folder, tmp_path / "cache", dummy=True)))
    ours = read_config(loader.load_hf_config(loader.resolve(str(folder), load_format="dummy")))
    theirs = read_config(loader.load_hf_config(gguf))
    assert (ours.num_layers, ours.num_heads, ours.num_kv_heads, ours.head_dim, ours.hidden_size, ours.vocab_size) == (
        theirs.num_layers,
        theirs.num_heads,
        theirs.num_kv_heads,
        theirs.head_dim,
        theirs.hidden_size,
        theirs.vocab_size,
    )
    names = {name for name, _ in loader.iter_weights(gguf)}
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
    options = bench.parse(["--compare", "hf,llama.cpp=/other/python", "--engine-arg", "block_size=32"])
    assert isinstance(options, argparse.Namespace)
    assert options.compare == {"hf": sys.executable, "llama.cpp": "/other/python"}
    assert options.engine_arg == {"block_size": 32}
