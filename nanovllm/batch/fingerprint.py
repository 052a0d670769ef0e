"""What an output depends on, in a small file beside it: a resumed run must not mix two models."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import xxhash

from nanovllm.batch.rows import InputFile
from nanovllm.config import EngineArgs
from nanovllm.errors import ValidationError

SUFFIX = ".run.json"
EDGE = 1 << 20  # bytes at both ends of a model's file that are hashed
# Arguments of the engine that change speed or memory, and no answer.
ONLY_SPEED = (
    "hf_token",
    "download_dir",
    "device",
    "attention_backend",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "gpu_memory_utilization",
    "num_gpu_blocks_override",
    "kv_cache_memory_bytes",
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "async_scheduling",
    "enforce_eager",
    "compilation_config",
    "cudagraph_capture_sizes",
    "max_cudagraph_capture_size",
    "cuda_graph_sizes",
    "scheduling_policy",
    "disable_log_stats",
    "enable_sleep_mode",
    "max_loras",
    "max_cpu_loras",
    "tensor_parallel_size",
    "enable_expert_parallel",
    "data_parallel_size",
    "distributed_executor_backend",
    "step_timeout",
    "trace",
)

Fingerprint = dict[str, str]


def fingerprint(
    source: InputFile, args: EngineArgs, file_format: str, sampling: Mapping[str, object]
) -> Fingerprint:
    """Name -> value, as text. Holds the arguments of the engine that can change answers."""
    found = {
        "input file": source.digest,
        "format": file_format,
        "sampling_params": json.dumps(sampling, sort_keys=True, default=str),
    }
    for name, value in vars(args).items():
        if name not in ONLY_SPEED:
            found[name] = str(value)
    files = model_files(args.model)
    if files:
        found["files of the model"] = files
    return found


def model_files(model: str) -> str:
    """A hash over names, sizes and both ends of a model's files. "" for a name on the hub."""
    path = Path(model).expanduser()
    if not path.exists():
        return ""
    digest = xxhash.xxh3_128()
    files = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.is_file())
    for each in files:
        size = each.stat().st_size
        digest.update(f"{each.name} {size}\n".encode())
        with each.open("rb") as file:
            digest.update(file.read(EDGE))
            file.seek(max(size - EDGE, 0))
            digest.update(file.read(EDGE))
    return digest.hexdigest()


def sidecar(output: Path) -> Path:
    return output.with_name(output.name + SUFFIX)


def write(output: Path, found: Fingerprint) -> None:
    """Replaces the file as a whole, so that no crash leaves half of one."""
    path = sidecar(output)
    draft = path.with_name(path.name + ".new")
    draft.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)


def check(output: Path, found: Fingerprint) -> None:
    """Raises ValueError unless the run that began `output` had the same fingerprint."""
    path = sidecar(output)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValidationError(
            f"{output} has content, and {path.name}, which says how it was made, is missing; move "
            "the file away, or replace it with --overwrite"
        ) from None
    changed = []
    for name in sorted({*stored, *found}):
        before = stored.get(name)
        now = found.get(name)
        if before != now:
            changed.append(f"{name} (was {before}, is {now})")
    if changed:
        raise ValidationError(
            f"{output} was begun with other settings: {'; '.join(changed)}; use the same again, "
            "another output file, or --overwrite"
        )
