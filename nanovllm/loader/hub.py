"""From the name of a model to its files on this machine. A name is a folder, a GGUF file
or a Hugging Face hub name. Does not know what the files hold.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.loader import safetensors
from nanovllm.loader.fields import cause
from nanovllm.loader.gguf_parts import parts_pattern, without_later_parts

if TYPE_CHECKING:
    from nanovllm.loader.gguf import GGUF

LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")

# org/name, org/name/file.gguf or org/name:quantisation. The organisation may be missing,
# and the file may be in a folder of the repository.
HUB_NAME = re.compile(
    r"(?P<repo>(?:[\w.-]+/)?[\w.-]+?)"
    r"(?:/(?P<file>(?:[\w.-]+/)?[\w.-]+\.(?i:gguf))|:(?P<quantisation>[\w.-]+))?"
)
PICKLES = (".bin", ".pt", ".pth")
CONFIG_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.py"]
# Other formats of the same weights: they have a folder each, or Mistral's own file names.
OTHER_FORMATS = ["*/*", "consolidated*"]


@dataclass(frozen=True)
class ModelFiles:
    """The place of a model: a folder in Hugging Face's layout, or one GGUF file in it.

    Cheap to pickle, because a GGUF pickles as its path.
    """

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
    """Finds the files of `model`. Downloads a hub repository if the cache lacks it.

    Accepted are a folder, a GGUF file of any name, and `org/name`. In a GGUF repository
    one file is named by `org/name/file.gguf` or `org/name:Q4_K_M`. load_format="dummy"
    needs only a config. Raises ValueError that says what to change.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(
            f"load_format must be one of {', '.join(LOAD_FORMATS)}, got {load_format!r}"
        )
    path = Path(model).expanduser()
    if not path.exists():
        path = fetch(model, revision, download_dir, hf_token, load_format)
    if path.is_dir():
        path = choose(model, path, load_format)
    if path.is_dir():
        return ModelFiles(model, path)
    if not is_gguf(path):
        raise ValueError(
            f"model={model!r} is one file and no GGUF; give the folder that holds config.json "
            "and weights"
        )
    if load_format == "safetensors":
        raise ValueError(
            f"model={model!r} is a GGUF file; with load_format='safetensors' give a folder"
        )
    try:
        from nanovllm.loader.gguf import GGUF
    except ImportError as err:
        raise ImportError(
            f"{path} is a GGUF file, and the package that reads it is missing: "
            "pip install 'nanovllm[gguf]'"
        ) from err
    return ModelFiles(model, path.parent, GGUF(path))


def is_gguf(path: Path) -> bool:
    """Whether a file is a GGUF, by its suffix or its first four bytes.

    The suffix is enough, because a damaged GGUF must get an error that says so.
    """
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:  # the folder may hold files that this user may not read
        return False


def choose(model: str, folder: Path, load_format: str) -> Path:
    """The folder itself if it has config.json and weights, or else its only GGUF file.

    Of a split file it is one part.
    """
    has_config = (folder / "config.json").is_file()
    may_be_folder = has_config and load_format != "gguf"
    if may_be_folder and (load_format == "dummy" or safetensors.weight_files(folder)):
        return folder
    if load_format != "safetensors":
        ggufs = without_later_parts(path for path in folder.iterdir() if is_gguf(path))
        if len(ggufs) == 1:
            return ggufs[0]
        if len(ggufs) > 1:
            names = ", ".join(path.name for path in ggufs)
            raise ValueError(
                f"model={model!r} holds several GGUF files, give the path of one: {names}"
            )
    if load_format == "gguf":
        raise ValueError(f"model={model!r} holds no .gguf file, which load_format='gguf' asks for")
    if not has_config:
        raise ValueError(
            f"model={model!r}: {folder} has no config.json; give the folder that holds one, "
            "or a .gguf file"
        )
    pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES]
    if pickles:
        raise ValueError(
            f"model={model!r} has its weights as PyTorch pickles only ({pickles[0]}), which can "
            "run code when read: convert them with transformers' save_pretrained, which writes "
            "safetensors"
        )
    raise ValueError(
        f"model={model!r}: {folder} has a config.json but no weights; add model.safetensors "
        "(or the shards that its index names), or pass load_format='dummy' for random weights"
    )


def fetch(
    model: str, revision: str | None, cache: str | None, token: str | bool | None, load_format: str
) -> Path:
    """Downloads files of a hub repository. Returns the folder, or the one GGUF file.

    All parts of a split GGUF file are downloaded, and the first one is returned. cache:
    the folder to download into; None is the hub's own cache. With HF_HUB_OFFLINE set,
    only the cache is searched. Raises ValueError if the hub does not give the files.
    """
    repo, gguf_patterns = parse_hub_name(model)
    patterns = list(gguf_patterns or CONFIG_FILES)
    if not gguf_patterns and load_format != "dummy":
        patterns.append("*.safetensors")
    folder = download(
        repo,
        patterns,
        cache,
        token,
        named=f"model={model!r} is no folder or file here",
        advice="check the name, revision and network, pass hf_token for a gated model",
        ignore_patterns=None if gguf_patterns else OTHER_FORMATS,
        revision=revision,
    )
    if not gguf_patterns:
        return folder
    found = without_later_parts(path for part in gguf_patterns for path in folder.glob(part))
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found)
        raise ValueError(
            f"model={model!r} must mean one file of {repo}, but {' or '.join(gguf_patterns)} "
            f"matches {names or 'none'}; give {repo}/<file name>.gguf"
        )
    return found[0]


def fetch_adapter(
    path: str, patterns: list[str], cache: str | None, token: str | bool | None
) -> Path:
    """Downloads these files of an adapter on the hub. Returns their folder.

    Raises ValueError if the hub does not give them.
    """
    named = f"lora_path={path!r} is no folder here"
    return download(
        path, patterns, cache, token, named=named, advice="check the name and the network"
    )


def download(
    repo: str,
    patterns: list[str],
    cache: str | None,
    token: str | bool | None,
    *,
    named: str,
    advice: str,
    revision: str | None = None,
    ignore_patterns: list[str] | None = None,
) -> Path:
    """Downloads the files of a repository that match `patterns`. Returns their folder.

    Raises ValueError if the hub does not give them: its sentence begins with `named` and
    ends with `advice`.
    """
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(
            repo,
            revision=revision,
            cache_dir=expanded(cache),
            token=token,
            allow_patterns=patterns,
            ignore_patterns=ignore_patterns,
        )
    except Exception as err:  # the hub raises errors of many types
        raise ValueError(
            f"{named}, and the Hugging Face hub did not give it ({cause(err)}); {advice}, or give "
            "a local folder"
        ) from err
    return Path(snapshot)


def parse_hub_name(model: str) -> tuple[str, list[str]]:
    """(repository, patterns of its one GGUF file). A whole repository has no patterns.

    Raises ValueError for a text that is no hub name.
    """
    match = HUB_NAME.fullmatch(model)
    # "./name" and "name.gguf" are paths of files that do not exist, not names of
    # repositories.
    names_a_file = model.lower().endswith(".gguf")
    if match is None or model.startswith(".") or (names_a_file and match["file"] is None):
        raise ValueError(
            f"model={model!r} does not exist; give a folder, a .gguf file or a hub name such as "
            "org/name"
        )
    if match["quantisation"]:
        end = f"*[-.]{match['quantisation']}"
        names = [f"{end}.gguf", f"{end}-?????-of-?????.gguf"]
        return match["repo"], [*names, *(f"*/{name}" for name in names)]
    if match["file"] is None:
        return match["repo"], []
    return match["repo"], [parts_pattern(match["file"])]


def expanded(path: str | None) -> str | None:
    """The path with ~ replaced by the home folder."""
    return None if path is None else str(Path(path).expanduser())
