"""Reads LoRA adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors.

A tensor is checked by its header and read when it is sliced. Does not know layers: the
caller says which matrices the model has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nanovllm.loader import safetensors
from nanovllm.loader.fields import Fields, is_integer, is_number, read_object, shown
from nanovllm.loader.hub import fetch_adapter
from nanovllm.loader.safetensors import SafetensorsTensor
from nanovllm.loader.source import FLOATS, LazyTensor, listing
from nanovllm.loader.text_half import text_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LINEAR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<factor>[AB])")
BASE = re.compile(r"(?P<module>.+)\.base_layer\.weight")
EXPERT = re.compile(r"\.experts(\.|$)")

MERGE = "merge the adapter into the weights with PEFT's merge_and_unload"
# Fields of adapter_config.json that change the result -> why they are refused.
REFUSED = {
    "use_dora": f"DoRA scales the rows of the merged matrix; {MERGE}",
    "modules_to_save": f"whole trained modules replace modules of the model; {MERGE}",
    "lora_bias": f"biases of the factors are not supported; {MERGE}",
    "trainable_token_indices": f"trained rows of the embedding are not supported; {MERGE}",
    "layer_replication": "the model has other layers then",
    "alora_invocation_tokens": "the adapter begins in the middle of a prompt (aLoRA)",
    "target_parameters": "the adapter changes parameters that are no layers",
    "use_qalora": f"QALoRA pools the inputs of the layers; {MERGE}",
    "use_bdlora": f"block-diagonal factors are not supported; {MERGE}",
    "arrow_config": "Arrow chooses adapters by token",
    "kasa_config": f"KaSA changes the matrices of the model; {MERGE}",
    "monteclora_config": f"MonteCLoRA samples the factors; {MERGE}",
    "velora_config": f"VeLoRA is not supported; {MERGE}",
    "ensure_weight_tying": f"embedding and output head share their factors; {MERGE}",
}
# How the factors began. Other names of PEFT's begin by changing the model's own weights.
INITIALISATIONS = ("gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class LowRank:
    """The matrix [out_features, in_features] changes by scale * b @ a.

    a: [rank, in_features]. b: [out_features, rank]. The change of an embedding
    [vocabulary, hidden] is the transpose: a [rank, vocabulary], b [hidden, rank].
    """

    a: LazyTensor
    b: LazyTensor
    scale: float
    is_embedding: bool

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def find_adapter(path: str, download_dir: str | None, hf_token: str | bool | None) -> Path:
    """The folder with the files of an adapter. A hub name is downloaded.

    Raises ValueError that says what is missing.
    """
    if not path:
        raise ValueError("lora_path is empty; accepted are a folder and a name on the hub")
    folder = Path(path).expanduser()
    if not folder.exists():
        folder = fetch_adapter(path, [CONFIG, WEIGHTS], download_dir, hf_token)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            pickled = (folder / "adapter_model.bin").is_file() and name == WEIGHTS
            hint = "; adapter_model.bin may run code when read: save the adapter with PEFT again"
            raise ValueError(
                f"lora_path={path!r}: {folder} has no {name}; accepted is a folder with {CONFIG} "
                f"and {WEIGHTS}{hint if pickled else ''}"
            )
    return folder


def versions(folder: Path) -> tuple[tuple[int, int], ...]:
    """(time of the last change in ns, bytes) of each file of an adapter. () if one is missing."""
    try:
        found = [(folder / name).stat() for name in (CONFIG, WEIGHTS)]
    except OSError:
        return ()
    return tuple((stat.st_mtime_ns, stat.st_size) for stat in found)


def read_adapter(
    folder: Path, shapes: Mapping[str, tuple[int, int]], max_rank: int
) -> dict[str, LowRank]:
    """Module name -> the change of its matrix. No tensor is read yet.

    shapes: the name and [out_features, in_features] of every matrix of the model; an
    embedding and an output head are [vocabulary, hidden]. Raises ValueError that names
    the field or the tensor.
    """
    config = AdapterConfig(folder / CONFIG)
    path = folder / WEIGHTS
    handle = safetensors.open_file(path)
    factors: dict[tuple[str, bool], dict[str, tuple[str, LazyTensor]]] = {}
    for name in handle.keys():  # noqa: SIM118 - a handle is no mapping
        tensor = SafetensorsTensor(name, handle.get_slice(name))
        found = parse(path, name, tensor, shapes)
        if found is not None:
            module, factor, is_embedding = found
            factors.setdefault((module, is_embedding), {})[factor] = (name, tensor)
    if not factors:
        raise ValueError(f"{path} holds no factors of LoRA; accepted is what PEFT saves")
    return {
        module: low_rank(path, module, is_embedding, pair, shapes[module], max_rank, config)
        for (module, is_embedding), pair in factors.items()
    }


def parse(
    path: Path, name: str, tensor: LazyTensor, shapes: Mapping[str, tuple[int, int]]
) -> tuple[str, str, bool] | None:
    """(module, "A" or "B", whether it is of an embedding) of a tensor.

    None for PEFT's copy of the model's own embedding. Raises ValueError for a tensor
    that the model has no place for.
    """
    own = text_name(name.removeprefix(PREFIX))
    linear = LINEAR.fullmatch(own)
    embedding = EMBEDDING.fullmatch(own)
    base = BASE.fullmatch(own)
    match = linear or embedding or base
    if match is None or not name.startswith(PREFIX):
        raise ValueError(
            f"{path}: tensor {name} is no factor of LoRA; accepted are "
            f"{PREFIX}<module>.lora_A.weight and lora_B.weight, for embeddings lora_embedding_A "
            "and lora_embedding_B"
        )
    module = match["module"]
    is_table = module.endswith("embed_tokens")
    suits = not is_table if linear else is_table or (base is not None and module == "lm_head")
    if EXPERT.search(module):
        raise ValueError(
            f"{path}: tensor {name} changes an expert, {module}; adapters of experts are not "
            f"supported: {MERGE}"
        )
    if module not in shapes or not suits:
        raise ValueError(
            f"{path}: tensor {name} has no place in the model; it has LoRA for its linear layers, "
            f"such as {listing(shapes, 2)}"
        )
    if base is None:
        return module, match["factor"], embedding is not None
    if tuple(tensor.shape) != shapes[module]:
        raise ValueError(
            f"{path}: tensor {name} has shape {list(tensor.shape)}, the model has "
            f"{list(shapes[module])}; an adapter with another vocabulary is not supported"
        )
    return None


def low_rank(
    path: Path,
    module: str,
    is_embedding: bool,
    pair: dict[str, tuple[str, LazyTensor]],
    shape: tuple[int, int],
    max_rank: int,
    config: AdapterConfig,
) -> LowRank:
    """The two factors of a module. Raises ValueError where they do not suit the model."""
    for factor, other in (("A", "B"), ("B", "A")):
        if factor not in pair:
            name = pair[other][0]
            raise ValueError(f"{path}: tensor {name} is there without its lora factor {factor}")
    rank = config.rank(module)
    out_features, in_features = shape[::-1] if is_embedding else shape
    wanted = {"A": (rank, in_features), "B": (out_features, rank)}
    for factor, (name, tensor) in pair.items():
        if tuple(tensor.shape) != wanted[factor]:
            raise ValueError(
                f"{path}: tensor {name} has shape {list(tensor.shape)}, the model and r={rank} in "
                f"{CONFIG} ask for {list(wanted[factor])}"
            )
        if tensor.dtype not in FLOATS:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(
                f"{path}: tensor {name} is stored as {dtype}; accepted are float32, float16 and "
                "bfloat16"
            )
    if rank > max_rank:
        raise ValueError(
            f"{path}: tensor {pair['A'][0]} has rank {rank}, and max_lora_rank={max_rank}; raise "
            "max_lora_rank"
        )
    return LowRank(pair["A"][1], pair["B"][1], config.scale(module), is_embedding)


class AdapterConfig:
    """The fields of adapter_config.json that the result depends on."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError that names the file and the field."""
        self.fields = fields = Fields(path, read_object(path).get)
        if fields.get("peft_type") != "LORA":
            raise fields.refuse("peft_type", "'LORA'")
        for name, reason in REFUSED.items():
            if fields.get(name):
                raise ValueError(f"{path}: {name} is {shown(fields.get(name))}: {reason}")
        if fields.get("bias") not in (None, "none"):
            raise fields.refuse("bias", f"'none'; for trained biases {MERGE}")
        start = fields.get("init_lora_weights")
        if not (start is None or isinstance(start, bool) or start in INITIALISATIONS):
            accepted = ", ".join(map(repr, (True, False, *INITIALISATIONS)))
            raise fields.refuse("init_lora_weights", f"one of {accepted}; for others {MERGE}")
        self.default_rank = fields.integer("r", 8)
        self.default_alpha = fields.number("lora_alpha", 8, zero=True)
        self.is_rank_stabilised = fields.flag("use_rslora")
        self.ranks = self._pattern("rank_pattern")
        if not all(is_integer(rank) and rank > 0 for rank in self.ranks.values()):
            raise fields.refuse("rank_pattern", "an object of integers of at least 1")
        self.alphas = self._pattern("alpha_pattern")

    def _pattern(self, name: str) -> dict[re.Pattern[str], float]:
        """A field that gives modules a number of their own, by regular expressions."""
        given = self.fields.get(name) or {}
        accepted = "an object of regular expressions and numbers"
        if not isinstance(given, dict) or not all(map(is_number, given.values())):
            raise self.fields.refuse(name, accepted)
        try:
            # A pattern must match the end of the name, from the beginning or after a dot.
            return {re.compile(rf"(?:.*\.)?(?:{key})$"): value for key, value in given.items()}
        except re.error as err:
            raise self.fields.refuse(name, accepted) from err

    def rank(self, module: str) -> int:
        return int(first_match(self.ranks, module, self.default_rank))

    def scale(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) of rsLoRA (Kalajdzievski, 2023)."""
        rank = self.rank(module)
        alpha = first_match(self.alphas, module, self.default_alpha)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def first_match(patterns: dict[re.Pattern[str], float], module: str, default: float) -> float:
    return next((value for key, value in patterns.items() if key.match(module)), default)
