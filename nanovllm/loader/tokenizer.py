"""Loads the tokenizer of a model: transformers reads a folder or a hub name, and
gguf_tokenizer.py reads a GGUF file. Does not know prompts.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.loader.fields import cause, field_at_fault, read_object, shown
from nanovllm.loader.hub import ModelFiles, expanded, is_gguf, resolve

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from nanovllm.loader.gguf_tokenizer import GGUFTokenizer

TOKENIZER_FILES = ("tokenizer*", "vocab*")
TOKENIZER_JSON = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)


def load_tokenizer(
    source: ModelFiles | str,
    *,
    config: PretrainedConfig | None = None,
    tokenizer_mode: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    download_dir: str | None = None,
    hf_token: str | bool | None = None,
) -> PreTrainedTokenizerBase | GGUFTokenizer:
    """The tokenizer in a model's files, or in a folder, GGUF file or hub repository.

    config: the config of the model in the same folder, if it is loaded already.
    tokenizer_mode: "slow" asks for the tokenizer in Python. Raises ValueError that says
    what to change if there is no tokenizer or it is damaged.
    """
    if not isinstance(source, ModelFiles):
        source = tokenizer_files(str(source), revision, download_dir, hf_token)
    if isinstance(source, ModelFiles) and source.gguf is not None:
        from nanovllm.loader import gguf_tokenizer

        return gguf_tokenizer.load_tokenizer(source.gguf)
    from transformers import AutoTokenizer

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
        # A wrong value of some fields raises only when the tokenizer is used.
        loaded.decode(loaded.encode("a"))
        return loaded

    name = str(source.folder) if isinstance(source, ModelFiles) else source
    try:
        refuse_empty(Path(name))
        return load(name)
    except Exception as err:  # transformers raises any type for a missing or damaged file
        raise ValueError(
            f"tokenizer={name!r} cannot be loaded ({tokenizer_fault(Path(name), load, err)}); give "
            "tokenizer= a folder or hub name that has one, or skip_tokenizer_init=True and token "
            "ids as prompts"
        ) from err


def refuse_empty(folder: Path) -> None:
    """Raises FileNotFoundError for a folder without the files of a tokenizer.

    transformers 5.0 makes an empty tokenizer for such a folder.
    """
    if folder.is_dir() and not has_tokenizer(folder):
        raise FileNotFoundError("no tokenizer.json, tokenizer.model or vocabulary in it")


def tokenizer_files(
    source: str, revision: str | None, download_dir: str | None, hf_token: str | bool | None
) -> ModelFiles | str:
    """The place that `tokenizer=` names: a GGUF file, or a folder or hub name.

    A folder with a GGUF file and no other tokenizer counts as the GGUF file.
    """
    path = Path(source).expanduser()
    may_be_gguf_folder = path.is_dir() and not has_tokenizer(path)
    in_folder = may_be_gguf_folder and any(is_gguf(file) for file in path.iterdir())
    in_hub = not path.exists() and source.lower().endswith(".gguf")
    if in_folder or in_hub or is_gguf(path):
        return resolve(
            source,
            revision=revision,
            download_dir=download_dir,
            hf_token=hf_token,
            load_format="gguf",
        )
    return str(path) if path.exists() else source


def has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(kind)) for kind in TOKENIZER_FILES)


def tokenizer_fault(
    folder: Path, load: Callable[[str], PreTrainedTokenizerBase], err: Exception
) -> str:
    """Why a tokenizer does not load, as far as that can be found out.

    Names the file, and for tokenizer_config.json the field.
    """
    for name in TOKENIZER_JSON:
        if (folder / name).is_file():
            try:
                read_object(folder / name)
            except ValueError as unreadable:
                return str(unreadable)
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return cause(err)
    fields = read_object(path)
    with tempfile.TemporaryDirectory() as copy:
        for file in folder.iterdir():
            if file.name != path.name:
                (Path(copy) / file.name).symlink_to(file.resolve())

        def load_with(some: dict[str, object]) -> None:
            (Path(copy) / path.name).write_text(json.dumps(some))
            load(copy)

        field = field_at_fault(fields, load_with)
    if field is None:
        return cause(err)
    return f"{path}: {field}={shown(fields[field])}: {cause(err)}"
