"""From the name of a model to its files on this machine: a folder, a GGUF file, or a Hugging Face hub name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.loader import safetensors
from nanovllm.loader.fields import cause

if TYPE_CHECKING:
    from nanovllm.loader.gguf import GGUF

LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")


@dataclass(frozen=True)
class ModelFiles:
    """Where a model lies on this machine: a folder in Hugging Face's layout, or one GGUF file in it. Cheap to pickle."""

    model: str
    folder: Path
    gguf: GGUF | None = None


def resolve(
    model: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    hf_token: str | bool | None = None,
    load_format: str = "auto",
) -> ModelFiles:
    """Finds `model`, and fetches it where it is the name of a hub repository and not yet in the cache.

    Accepted: a folder, a GGUF file of any name, `org/name`, and of a GGUF repository `org/name/file.gguf` or
    `org/name:Q4_K_M`. With load_format="dummy" a config is enough. Raises ValueError with what to change.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format must be one of {', '.join(LOAD_FORMATS)}, got {load_format!r}")
    path = Path(model).expanduser()
    if not path.exists():
        path = fetch(model, revision, download_dir, hf_token, load_format)
    if path.is_dir():
        path = choose(model, path, load_format)
    if path.is_dir():
        return ModelFiles(model, path)
    if not is_gguf(path):
        raise ValueError(f"model={model!r} is one file and no GGUF; give the folder that holds config.json and weights")
    if load_format == "safetensors":
        raise ValueError(f"model={model!r} is a GGUF file; with load_format='safetensors' give a folder")
    try:
        from nanovllm.loader.gguf import GGUF
    except ImportError as err:
        raise ImportError(f"{path} is a GGUF file, to read it install gguf: pip install 'nanovllm[gguf]'") from err
    return ModelFiles(model, path.parent, GGUF(path))


def is_gguf(path: Path) -> bool:
    """Whether a file is a GGUF: its first four bytes say so, and a damaged one is known by its suffix."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:  # a file in a folder that we may not read
        return False


def choose(model: str, folder: Path, load_format: str) -> Path:
    """The folder itself where it holds config.json and safetensors, else the one GGUF file in it."""
    has_config = (folder / "config.json").is_file()
    if has_config and load_format != "gguf" and (load_format == "dummy" or safetensors.weight_files(folder)):
        return folder
    ggufs = [path for path in sorted(folder.iterdir()) if is_gguf(path)]
    if len(ggufs) == 1 and load_format != "safetensors":
        return ggufs[0]
    if len(ggufs) > 1 and load_format != "safetensors":
        names = ", ".join(path.name for path in ggufs)
        raise ValueError(f"model={model!r} holds several GGUF files, give the path of one: {names}")
    if load_format == "gguf":
        raise ValueError(f"model={model!r} holds no .gguf file, which load_format='gguf' asks for")
    if not has_config:
        raise ValueError(
            f"model={model!r}: {folder} has no config.json; give the folder that holds one, or a .gguf file"
        )
    pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))]
    if pickles:
        raise ValueError(
            f"model={model!r} has its weights as PyTorch pickles only ({pickles[0]}), which can run code when read: "
            "convert them with transformers' save_pretrained, which writes safetensors"
        )
    raise ValueError(
        f"model={model!r}: {folder} has a config.json but no weights; add model.safetensors "
        "(or the shards that its index names), or pass load_format='dummy' for random weights"
    )


def fetch(model: str, revision: str | None, cache: str | None, token: str | bool | None, load_format: str) -> Path:
    """Downloads what is needed of a hub repository into the cache (or `cache`). HF_HUB_OFFLINE: looks there only."""
    name = re.fullmatch(r"((?:[\w.-]+/)?[\w.-]+?)(?:/([\w.-]+\.(?i:gguf))|:([\w.-]+))?", model)
    if name is None or model.startswith(".") or (model.lower().endswith(".gguf") and name[2] is None):
        raise ValueError(f"model={model!r} does not exist; give a folder, a .gguf file or a hub name such as org/name")
    from huggingface_hub import snapshot_download

    repo, file, quantisation = name.groups()
    pattern = file or (f"*[-.]{quantisation}.gguf" if quantisation else None)
    folder_files = ["*.json", "*.jinja", "*.txt", "*.model", "*.py"] + ["*.safetensors"] * (load_format != "dummy")
    try:
        folder = Path(
            snapshot_download(
                repo,
                revision=revision,
                cache_dir=expanded(cache),
                token=token,
                allow_patterns=[pattern] if pattern else folder_files,
                # Other formats of the same weights: a folder for each, or Mistral's own names.
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except Exception as err:  # each of the hub's many errors means: not there, not allowed, or not reachable
        raise ValueError(
            f"model={model!r} is no folder or file here, and the Hugging Face hub did not give it "
            f"({cause(err)}); check the name, revision and network, pass hf_token for a gated model, "
            "or give a local folder"
        ) from err
    if pattern is None:
        return folder
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ValueError(
            f"model={model!r} must mean one file of {repo}, but {pattern} matches "
            f"{', '.join(path.name for path in found) or 'none'}; give {repo}/<file name>.gguf"
        )
    return found[0]


def expanded(path: str | None) -> str | None:
    """A path with ~ put in full."""
    return None if path is None else str(Path(path).expanduser())
