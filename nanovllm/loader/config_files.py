"""Reads config.json and generation_config.json as transformers does, or the same facts of
a GGUF file. Does not know what a model does with them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from nanovllm.loader.fields import cause, field_at_fault, read_object, shown
from nanovllm.loader.hub import ModelFiles
from nanovllm.loader.source import FLOATS

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def load_hf_config(
    files: ModelFiles,
    *,
    trust_remote_code: bool = False,
    hf_overrides: dict[str, object] | Callable[[PretrainedConfig], PretrainedConfig] | None = None,
) -> PretrainedConfig | SimpleNamespace:
    """The config of the model. Of a GGUF file it is a record of the config's fields.

    hf_overrides: fields to change, or a function that takes the config and returns
    another one. A field that is a dictionary is merged, not replaced.
    """
    if files.gguf is not None:
        config = SimpleNamespace(**files.gguf.hf_fields())
    else:
        config = load_config_file(files, trust_remote_code)
    if callable(hf_overrides):
        return hf_overrides(pretrained(config))
    override(config, dict(hf_overrides or {}))
    return config


def override(config: PretrainedConfig | SimpleNamespace, overrides: dict[str, object]) -> None:
    """Changes fields of a config. A dictionary changes fields of a dictionary or a config."""
    for name, value in rope_in_one_field(overrides, config).items():
        old = getattr(config, name, None)
        if isinstance(value, dict) and hasattr(old, "to_dict"):
            override(old, dict(value))
        elif isinstance(value, dict) and isinstance(old, dict):
            setattr(config, name, {**old, **value})
        else:
            setattr(config, name, value)


def text_config(
    config: PretrainedConfig | SimpleNamespace,
) -> PretrainedConfig | SimpleNamespace:
    """The part of a multimodal config that is about text. Another config is about nothing else."""
    text = getattr(config, "text_config", None)
    return config if text is None else text


def pretrained(config: PretrainedConfig | SimpleNamespace) -> PretrainedConfig:
    """The config of `load_hf_config` as transformers' object.

    A GGUF file needs it for clients only, and the import of transformers is slow.
    """
    if not isinstance(config, SimpleNamespace):
        return config
    from transformers import PretrainedConfig

    return PretrainedConfig(**vars(config))


def rope_in_one_field(
    overrides: dict[str, object], config: PretrainedConfig | SimpleNamespace
) -> dict[str, object]:
    """Moves rope_theta and rope_scaling into rope_parameters, if the config has it.

    transformers 4 has the first two fields, and transformers 5 the last one.
    """
    rope = getattr(config, "rope_parameters", None)
    # Old fields describe the set of the layers without a window.
    sets = None
    if rope and "full_attention" in rope:
        sets = rope
        rope = rope["full_attention"]
    if not rope or overrides.keys().isdisjoint({"rope_theta", "rope_scaling"}):
        return overrides
    scaling = overrides.pop("rope_scaling", rope) or {"rope_type": "default"}
    given = overrides.get("rope_parameters", {})
    if not isinstance(scaling, dict) or not isinstance(given, dict):
        raise ValueError(
            "hf_overrides: rope_scaling and rope_parameters must be dictionaries or None, got "
            f"{shown(scaling)} and {shown(given)}"
        )
    parameters = dict(scaling)
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    parameters["rope_theta"] = overrides.pop("rope_theta", rope["rope_theta"])
    parameters.update(given)
    overrides["rope_parameters"] = (
        parameters if sets is None else {**sets, "full_attention": parameters}
    )
    return overrides


def load_config_file(files: ModelFiles, trust_remote_code: bool) -> PretrainedConfig:
    """config.json as transformers reads it.

    Raises ValueError that names the file and the wrong field.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    path = files.folder / "config.json"
    try:
        fields = read_object(path)
    except ValueError as err:
        raise ValueError(f"model={files.model!r}: config.json cannot be used: {err}") from err
    is_remote = isinstance(fields.get("auto_map"), dict)
    if not is_remote and not isinstance(fields.get("model_type"), str):
        has = f"is {shown(fields['model_type'])}" if "model_type" in fields else "is missing"
        raise ValueError(
            f"model={files.model!r}: {path}: model_type {has}; accepted is a name such as 'llama'"
        )
    # transformers never sees the fields that it fails over. The config gets them later.
    aside = {name: value for name, value in fields.items() if breaks_transformers(name, value)}
    plain = {name: value for name, value in fields.items() if name not in aside}

    def from_fields(some: dict[str, object]) -> PretrainedConfig:
        return AutoConfig.for_model(**some)

    try:
        if is_remote or not aside:
            return AutoConfig.from_pretrained(files.folder, trust_remote_code=trust_remote_code)
        config = from_fields(plain)
    except Exception as err:  # transformers checks few fields: a wrong value raises any type
        field = None
        if not is_remote and fields["model_type"] not in CONFIG_MAPPING:
            field = "model_type"
        elif not is_remote:
            field = field_at_fault(plain, from_fields)
        at = "" if field is None else f": {field}={shown(fields[field])}"
        raise ValueError(f"model={files.model!r}: {path} cannot be used{at}: {cause(err)}") from err
    for name, value in aside.items():
        setattr(config, name, value)
    return config


def breaks_transformers(name: str, value: object) -> bool:
    """Whether transformers fails over the value of a field.

    Examples are dtype="auto" and auto_map=null.
    """
    if name in ("dtype", "torch_dtype"):
        return value is not None and not isinstance(getattr(torch, str(value), None), torch.dtype)
    return name in ("quantization_config", "auto_map") and not isinstance(value, dict)


def checkpoint_dtype(
    hf_config: PretrainedConfig | SimpleNamespace, files: ModelFiles
) -> torch.dtype | None:
    """The dtype of the weights, as the config states it.

    None if the config does not state it, and for a GGUF file, because its tensors have
    several types. Raises ValueError for a dtype that is not floating-point.
    """
    if files.gguf is not None:
        return None
    # The field may be text. transformers 5 renamed torch_dtype to dtype, and warns if the
    # old name is read as an attribute.
    given = None
    for config in (hf_config, text_config(hf_config)):
        given = given or getattr(config, "dtype", None) or vars(config).get("torch_dtype")
    if given is None or given == "auto":
        return None
    name = given.removeprefix("torch.") if isinstance(given, str) else ""
    dtype = getattr(torch, name, None) if name else given
    if dtype not in FLOATS:
        raise ValueError(
            f"{files.folder / 'config.json'}: dtype (or torch_dtype) is {shown(given)}; accepted "
            "are 'auto', 'float32', 'float16' and 'bfloat16', or pass dtype="
        )
    return dtype


def generation_config_path(files: ModelFiles, folder: str | None = None) -> Path:
    """The file that `load_generation_config` reads."""
    if folder is not None:
        return Path(folder).expanduser() / "generation_config.json"
    if files.gguf is not None:
        return files.gguf.path
    return files.folder / "generation_config.json"


def load_generation_config(files: ModelFiles, folder: str | None = None) -> dict[str, object]:
    """The fields of generation_config.json, or of a GGUF file. {} without a file.

    folder: another folder to read. Raises ValueError if it has no such file.
    """
    if folder is None and files.gguf is not None:
        return files.gguf.generation_config()
    path = generation_config_path(files, folder)
    if path.is_file():
        return read_object(path)
    if folder is not None:
        raise ValueError(f"generation_config={folder!r}: the folder has no generation_config.json")
    return {}
