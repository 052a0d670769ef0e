"""From the name of a model to its config, tokenizer and weights: a folder, a GGUF file, or a Hugging Face hub name.

Knows file formats; knows neither layers nor ranks. A rank that needs a slice of a tensor slices it, and only that is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from nanovllm.loader import safetensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from nanovllm.loader.gguf import GGUF

LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
TOKENIZER_FILES = ("tokenizer*", "vocab*")
NO_PARAMETER = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")  # old checkpoints saved these tables


class LazyTensor(Protocol):
    """A tensor of a checkpoint. `w[a:b]`, `w[:, a:b]`, `w[...]` read that part and return it as a tensor of `dtype`."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, index: Any) -> Tensor: ...


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

    Accepted: a folder, a .gguf file, `org/name`, and of a GGUF repository `org/name/file.gguf` or `org/name:Q4_K_M`.
    With load_format="dummy" a config is enough. Raises ValueError with what to change.
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
    if path.suffix != ".gguf" or load_format == "safetensors":
        raise ValueError(f"model={model!r} is one file; with load_format={load_format!r} give the folder that holds it")
    try:
        from nanovllm.loader.gguf import GGUF
    except ImportError as err:
        raise ImportError(f"{path} is a GGUF file, to read it install gguf: pip install 'nanovllm[gguf]'") from err
    return ModelFiles(model, path.parent, GGUF(path))


def choose(model: str, folder: Path, load_format: str) -> Path:
    """The folder itself where it holds config.json and safetensors, else the one GGUF file in it."""
    has_config = (folder / "config.json").is_file()
    ggufs = sorted(folder.glob("*.gguf"))
    if has_config and load_format != "gguf" and (load_format == "dummy" or safetensors.weight_files(folder)):
        return folder
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
    name = re.fullmatch(r"((?:[\w.-]+/)?[\w.-]+?)(?:/([\w.-]+\.gguf)|:([\w.-]+))?", model)
    if name is None or model.startswith(".") or (model.endswith(".gguf") and name[2] is None):
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
                cache_dir=cache,
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


def load_hf_config(
    files: ModelFiles,
    *,
    trust_remote_code: bool = False,
    hf_overrides: dict[str, Any] | Callable[[PretrainedConfig], PretrainedConfig] | None = None,
) -> PretrainedConfig:
    """The model's config. `hf_overrides` is merged into it, dictionaries within it too; or is a function of it."""
    if files.gguf is not None:
        from transformers import PretrainedConfig

        # Not LlamaConfig and its kin: in transformers 5 their imports take a second, for defaults that are not needed.
        config = PretrainedConfig(**files.gguf.hf_fields())
    else:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(files.folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, ImportError) as err:
            raise ValueError(
                f"model={files.model!r}: {files.folder / 'config.json'} cannot be used: {cause(err)}"
            ) from err
    if callable(hf_overrides):
        return hf_overrides(config)
    for key, value in in_one_spelling(dict(hf_overrides or {}), config).items():
        old = getattr(config, key, None)
        setattr(config, key, {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value)
    return config


def in_one_spelling(overrides: dict[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """What transformers 4 calls rope_theta and rope_scaling lies in 5's rope_parameters, where a config has these."""
    rope = getattr(config, "rope_parameters", None)
    if rope and not overrides.keys().isdisjoint({"rope_theta", "rope_scaling"}):
        scaling = dict(overrides.pop("rope_scaling", rope) or {"rope_type": "default"})
        scaling.setdefault("rope_type", scaling.get("type", "default"))
        theta = overrides.pop("rope_theta", rope["rope_theta"])
        overrides["rope_parameters"] = {**scaling, "rope_theta": theta, **overrides.get("rope_parameters", {})}
    return overrides


def checkpoint_dtype(hf_config: PretrainedConfig, files: ModelFiles) -> torch.dtype | None:
    """What the config says that the weights are stored in; None where it says nothing, and for GGUF's mixture."""
    if files.gguf is not None:
        return None
    # transformers 5 renamed torch_dtype, and warns when it reads the old name; either may be text.
    dtype = getattr(hf_config, "dtype", None) or vars(hf_config).get("torch_dtype")
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def load_generation_config(files: ModelFiles) -> dict[str, Any]:
    """generation_config.json, or what a GGUF file says of the same; {} where there is none."""
    if files.gguf is not None:
        return files.gguf.generation_config()
    path = files.folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as err:
        raise ValueError(f"{path} is not JSON ({err}); mend it, or remove it") from err


def load_tokenizer(
    source: ModelFiles | str,
    *,
    tokenizer_mode: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    download_dir: str | None = None,
    hf_token: str | bool | None = None,
) -> PreTrainedTokenizerBase:
    """The live tokenizer of a model, or of any folder, .gguf file or hub name; tokenizer_mode "slow" is the Python one."""
    if isinstance(source, str) and source.endswith(".gguf"):
        source = resolve(source, revision=revision, download_dir=download_dir, hf_token=hf_token, load_format="gguf")
    if isinstance(source, ModelFiles) and source.gguf is not None:
        from nanovllm.loader import gguf_tokenizer

        return gguf_tokenizer.load_tokenizer(source.gguf)
    from transformers import AutoTokenizer

    name = str(source.folder) if isinstance(source, ModelFiles) else source
    try:
        if Path(name).is_dir() and not any(any(Path(name).glob(kind)) for kind in TOKENIZER_FILES):
            raise FileNotFoundError(
                "no tokenizer.json, tokenizer.model or vocabulary in it"
            )  # 5.0 invents an empty one
        return AutoTokenizer.from_pretrained(
            name,
            use_fast=tokenizer_mode != "slow",
            trust_remote_code=trust_remote_code,
            revision=revision,
            cache_dir=download_dir,
            token=hf_token,
        )
    except Exception as err:  # a missing or damaged file shows as an error of any type
        raise ValueError(
            f"tokenizer={name!r} cannot be loaded ({cause(err)}); give tokenizer= a folder or hub name that has one, "
            "or skip_tokenizer_init=True and token ids as prompts"
        ) from err


def iter_weights(files: ModelFiles) -> Iterator[tuple[str, LazyTensor]]:
    """(Hugging Face name, tensor) of every parameter in the checkpoint, none of them read yet."""
    for name, tensor in files.gguf if files.gguf is not None else safetensors.iter_tensors(files.folder):
        if not NO_PARAMETER.search(name):
            yield name, tensor
    if files.gguf is not None:
        files.gguf.close()


def cause(err: Exception) -> str:
    """An error of another library in a line."""
    text = str(err).strip() or "no message"
    return f"{type(err).__name__}: {text.splitlines()[0][:200]}"
