"""The live tokenizer of a model: transformers' from a folder or the hub, ours from a GGUF file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.loader.fields import cause, field_at_fault, read_object, shown
from nanovllm.loader.hub import ModelFiles, expanded, is_gguf, resolve

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer*", "vocab*")
TOKENIZER_JSON = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")


def load_tokenizer(
    source: ModelFiles | str,
    *,
    config: PretrainedConfig | None = None,
    tokenizer_mode: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    download_dir: str | None = None,
    hf_token: str | bool | None = None,
) -> PreTrainedTokenizerBase:
    """The live tokenizer of a model, or of any folder, GGUF file or hub name; tokenizer_mode "slow" is the Python one.

    config: of the model that the tokenizer lies beside, where it is loaded already.
    """
    source = source if isinstance(source, ModelFiles) else tokenizer_files(source, revision, download_dir, hf_token)
    if isinstance(source, ModelFiles) and source.gguf is not None:
        from nanovllm.loader import gguf_tokenizer

        return gguf_tokenizer.load_tokenizer(source.gguf)
    from transformers import AutoTokenizer

    name = str(source.folder) if isinstance(source, ModelFiles) else source

    def load(name: str) -> PreTrainedTokenizerBase:
        loaded = AutoTokenizer.from_pretrained(
            name,
            config=config,
            use_fast=tokenizer_mode != "slow",
            trust_remote_code=trust_remote_code,
            revision=revision,
            cache_dir=expanded(download_dir),
            token=hf_token,
        )
        loaded.decode(loaded.encode("a"))  # some fields are read no earlier
        return loaded

    try:
        if Path(name).is_dir() and not has_tokenizer(Path(name)):
            raise FileNotFoundError(
                "no tokenizer.json, tokenizer.model or vocabulary in it"
            )  # 5.0 invents an empty one
        return load(name)
    except Exception as err:  # a missing or damaged file shows as an error of any type
        raise ValueError(
            f"tokenizer={name!r} cannot be loaded ({tokenizer_fault(Path(name), load, err)}); give tokenizer= a folder "
            "or hub name that has one, or skip_tokenizer_init=True and token ids as prompts"
        ) from err


def tokenizer_files(
    source: str, revision: str | None, download_dir: str | None, hf_token: str | bool | None
) -> ModelFiles | str:
    """What `tokenizer=` names: a GGUF file, also one that is alone in its folder; else a folder or a hub name."""
    source = str(source)
    path = Path(source).expanduser()
    alone = path.is_dir() and not has_tokenizer(path) and any(is_gguf(file) for file in path.iterdir())
    if alone or is_gguf(path) or (not path.exists() and source.lower().endswith(".gguf")):
        return resolve(source, revision=revision, download_dir=download_dir, hf_token=hf_token, load_format="gguf")
    return str(path) if path.exists() else source


def has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(kind)) for kind in TOKENIZER_FILES)


def tokenizer_fault(folder: Path, load: Callable[[str], Any], err: Exception) -> str:
    """Why a tokenizer does not load: its file, and in tokenizer_config.json the field, as far as they are known."""
    for name in TOKENIZER_JSON:
        if (folder / name).is_file():
            try:
                read_object(folder / name)
            except ValueError as why:
                return str(why)
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return cause(err)
    fields = read_object(path)
    with tempfile.TemporaryDirectory() as copy:
        for file in folder.iterdir():
            if file.name != path.name:
                (Path(copy) / file.name).symlink_to(file.resolve())

        def load_with(some: dict[str, Any]) -> None:
            (Path(copy) / path.name).write_text(json.dumps(some))
            load(copy)

        field = field_at_fault(fields, load_with)
    return cause(err) if field is None else f"{path}: {field}={shown(fields[field])}: {cause(err)}"
