"""config.json and generation_config.json as transformers reads them, or what a GGUF file says of the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nanovllm.loader.fields import cause, field_at_fault, read_object, shown
from nanovllm.loader.hub import ModelFiles

if TYPE_CHECKING:
    from transformers import PretrainedConfig


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
        config = load_config_file(files, trust_remote_code)
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


def load_config_file(files: ModelFiles, trust_remote_code: bool) -> PretrainedConfig:
    """config.json as transformers reads it. Raises ValueError that names the file and the field at fault."""
    from transformers import CONFIG_MAPPING, AutoConfig

    path = files.folder / "config.json"
    try:
        fields = read_object(path)
    except ValueError as err:
        raise ValueError(f"model={files.model!r}: config.json cannot be used: {err}") from err
    remote = isinstance(fields.get("auto_map"), dict)
    if not remote and not isinstance(fields.get("model_type"), str):
        has = f"is {shown(fields['model_type'])}" if "model_type" in fields else "is missing"
        raise ValueError(f"model={files.model!r}: {path}: model_type {has}; accepted is a name such as 'llama'")
    aside = {name: value for name, value in fields.items() if breaks_transformers(name, value)}
    plain = {name: value for name, value in fields.items() if name not in aside}

    def from_fields(some: dict[str, Any]) -> PretrainedConfig:
        return AutoConfig.for_model(**some)

    try:
        if remote or not aside:
            return AutoConfig.from_pretrained(files.folder, trust_remote_code=trust_remote_code)
        config = from_fields(plain)
    except Exception as err:  # transformers checks little: a wrong value shows as an error of any type
        field = None if remote else field_at_fault(plain, from_fields)
        field = "model_type" if not remote and fields["model_type"] not in CONFIG_MAPPING else field
        at = "" if field is None else f": {field}={shown(fields[field])}"
        raise ValueError(f"model={files.model!r}: {path} cannot be used{at}: {cause(err)}") from err
    for name, value in aside.items():
        setattr(config, name, value)
    return config


def breaks_transformers(name: str, value: Any) -> bool:
    """Whether transformers fails over a value before it, or we, could read it: dtype="auto", auto_map=null."""
    if name in ("dtype", "torch_dtype"):
        return value is not None and not isinstance(getattr(torch, str(value), None), torch.dtype)
    return name in ("quantization_config", "auto_map") and not isinstance(value, dict)


def checkpoint_dtype(hf_config: PretrainedConfig, files: ModelFiles) -> torch.dtype | None:
    """What the config says that the weights are stored in; None where it says nothing, and for GGUF's mixture.

    Raises ValueError for what is no floating-point type.
    """
    if files.gguf is not None:
        return None
    # transformers 5 renamed torch_dtype, and warns when it reads the old name; either may be text.
    given = getattr(hf_config, "dtype", None) or vars(hf_config).get("torch_dtype")
    if given is None or given == "auto":
        return None
    name = given.removeprefix("torch.") if isinstance(given, str) else ""
    dtype = getattr(torch, name, None) if name else given
    if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"{files.folder / 'config.json'}: dtype (or torch_dtype) is {shown(given)}; accepted are 'auto', "
            "'float32', 'float16' and 'bfloat16', or pass dtype="
        )
    return dtype


def generation_config_path(files: ModelFiles, folder: str | None = None) -> Path:
    """The file that `load_generation_config` reads."""
    if folder is None and files.gguf is not None:
        return files.gguf.path
    return (files.folder if folder is None else Path(folder).expanduser()) / "generation_config.json"


def load_generation_config(files: ModelFiles, folder: str | None = None) -> dict[str, Any]:
    """generation_config.json, or what a GGUF file says of the same; {} where there is none.

    folder: where to read it instead. Raises ValueError where it is not there.
    """
    path = generation_config_path(files, folder)
    if folder is None and files.gguf is not None:
        return files.gguf.generation_config()
    if path.is_file():
        return read_object(path)
    if folder is not None:
        raise ValueError(f"generation_config={folder!r}: the folder has no generation_config.json")
    return {}
