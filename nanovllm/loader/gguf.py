"""Reads GGUF files of the architectures llama, qwen2, qwen3, gemma2, gemma3 and relatives.

The metadata becomes the fields of a Hugging Face config. The tensors get Hugging Face
names and Hugging Face's row order, and a slice of a tensor is dequantised when it is
asked for. The package gguf reads the format: importing this module needs it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from nanovllm.core.batch import ceil_div
from nanovllm.loader.fields import Fields
from nanovllm.loader.gguf_gemma import PATTERN, gemma_fields
from nanovllm.loader.gguf_parts import find_parts
from nanovllm.loader.safetensors import unreadable
from nanovllm.loader.source import Blocks, LazyTensor, Part

# Name in the file -> name in transformers. Several names stand for one computation: tests
# compare each name with the first of its kind. Text alone runs through a Qwen-VL as
# through a Qwen.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral3": "LlamaForCausalLM",
    "internlm2": "LlamaForCausalLM",
    "xverse": "LlamaForCausalLM",
    "ernie4_5": "LlamaForCausalLM",
    "exaone": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2vl": "Qwen2ForCausalLM",
    "qwen2moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3vl": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "gpt-oss": "GptOssForCausalLM",
}
# llama.cpp rotates neighbouring rows of Q and K in these, and the two halves of a head in
# the others, as transformers does in all.
NEIGHBOURS = ("llama", "mistral3", "internlm2", "xverse", "ernie4_5")

TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
# Gemma has norms after both parts of a layer too. The file holds the factors of its norms,
# and transformers the factors less 1.
GEMMA = ("gemma2", "gemma3")
GEMMA_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Names that one architecture has besides these, or instead of them.
FAMILY_NAMES = {
    "gpt-oss": {
        "attn_sinks": "self_attn.sinks",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_gate_inp": "mlp.router",
    },
    **dict.fromkeys(GEMMA, GEMMA_NAMES),
}

SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}

# Field of YaRN in `rope.scaling.` -> its name in rope_parameters of transformers.
YARN_FIELDS = {
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}

# The names of tokens that end an answer, as in llama.cpp (src/llama-vocab.cpp). They are
# needed, because the metadata of many files lists one end token only, or none. llama.cpp
# also ends an answer at the padding and the separators of fill-in-the-middle.
ENDS = {
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
    "<turn|>",
    "<|tool_response>",
    "</s>",
    "<eos>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "[e~[",
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "[PAD]",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<reponame>",
    "<REPO>",
    "<|file_sep|>",
}
SOFTMAX = 1  # llama.cpp's number of the router's function
PLAIN_TEXT, CONTROL, USER_DEFINED = 1, 3, 4  # kinds of tokens
# The tokenizer never cuts plain text into them.
SPECIAL_KINDS = (CONTROL, USER_DEFINED)

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
COMPARE_AT_ONCE = 4096  # rows
TEXT = gguf.GGUFValueType.STRING
LIST_HEADER = struct.Struct("=IQ")  # type of the items, number of items
LENGTH = struct.Struct("=Q")  # of a text, in bytes
# Weights. More of them do not fit into the CPU's cache, and fewer make many numpy calls
# (docs/experiments.md).
DEQUANTISE_AT_ONCE = 1 << 17


class Reader(gguf.GGUFReader):
    """A GGUFReader that reads a list at once.

    The package makes a few numpy arrays for each item, and a vocabulary has 100,000 items
    (docs/experiments.md).
    """

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[Any], list[int], list[gguf.GGUFValueType]]:
        """(bytes of the value, its parts, indices of the parts that hold data, types).

        A list of numbers has one part, an array. A list of texts has a str for each text.
        """
        if raw_type != gguf.GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        item, count = LIST_HEADER.unpack_from(self.data, orig_offs)
        start = orig_offs + LIST_HEADER.size
        types = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(item)]
        if item != TEXT:
            numbers = self._get(start, self.gguf_scalar_to_np[types[1]], count)
            return LIST_HEADER.size + numbers.nbytes, [numbers], [0], types
        content = memoryview(self.data)
        texts = []
        at = start
        for _ in range(count):
            (length,) = LENGTH.unpack_from(content, at)
            at += LENGTH.size
            texts.append(str(content[at : at + length], "utf-8"))
            at += length
        return at - orig_offs, texts, list(range(count)), types

    def value(self, key: str) -> Any:
        """A field of the metadata. None if the file lacks it."""
        field = self.get_field(key)
        if field is None:
            return None
        if field.types[0] == gguf.GGUFValueType.ARRAY and field.types[-1] == TEXT:
            return [field.parts[i] for i in field.data]
        return field.contents()


def open_file(path: Path) -> Reader:
    """Reads all of a file but its weights. Raises ValueError for a file that cannot be read."""
    try:
        reader = Reader(path)
    except (ValueError, IndexError, KeyError, struct.error) as err:
        if "GGMLQuantizationType" in str(err):
            raise ValueError(
                f"{path} needs a newer gguf package: {err}; pip install -U gguf"
            ) from err
        raise unreadable(path, "GGUF", err) from err
    if reader.byte_order != "I":
        raise ValueError(f"{path} is of the other byte order; convert it for this machine")
    return reader


def part_numbers(reader: Reader) -> tuple[int, int]:
    """(number of this part, from 0; number of parts). (0, 1) for a whole file."""
    number = reader.value("split.no") or 0
    count = reader.value("split.count") or 1
    return number, count


def open_part(path: Path, number: int, count: int) -> Reader:
    """Opens a part of a split file. Raises ValueError if its metadata says another part."""
    reader = open_file(path)
    found = part_numbers(reader)
    if found != (number, count):
        raise ValueError(
            f"{path} is part {found[0] + 1} of {found[1]} by its metadata (split.no, split.count), "
            f"and not part {number + 1} of {count}: it belongs to another file"
        )
    return reader


class GGUFTensor:
    """A tensor on disk, as rows of packed bytes. Slicing dequantises the slice.

    packed: uint8 [shape[0], bytes of a row]. row_order: row i of the tensor is
    row_order[i] of `packed`. None: the rows are in order. expert: the matrix of a tensor
    of three dimensions. offset: what the file has more than the tensor; only a tensor of
    one dimension has it.
    """

    def __init__(self, tensor: gguf.ReaderTensor, expert: int | None = None) -> None:
        self.name = tensor.name
        self.kind = tensor.tensor_type
        self.shape: tuple[int, ...] = tuple(reversed(tensor.shape.tolist()))
        data = tensor.data
        if expert is not None:
            self.shape = self.shape[1:]
            data = data[expert]
        if tensor.name.endswith("ffn_gate_inp_shexp.weight"):
            self.shape = (1, *self.shape)  # llama.cpp drops the dimension of the one row
        self.packed = data.reshape(self.shape[0], -1).view(np.uint8)
        self.dtype = PLAIN.get(self.kind.name, torch.float32)
        # Weights and bytes of one block.
        self.block, self.block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        self.row_order: np.ndarray | None = None
        self.offset = 0.0

    def __getitem__(self, part: Part, /) -> Tensor:
        """part: at most one slice for each dimension, or `...` for the whole tensor."""
        rows, columns = slice(None), slice(None)
        if isinstance(part, slice):
            rows = part
        elif isinstance(part, tuple):
            rows, columns = (*part, columns)[:2]
        packed = self.packed[rows if self.row_order is None else self.row_order[rows]]
        if len(self.shape) == 1:
            return self.unpack(packed).reshape(-1) - self.offset
        start, stop, step = columns.indices(self.shape[1])
        first = start // self.block
        last = ceil_div(stop, self.block)
        blocks = self.unpack(packed[:, first * self.block_bytes : last * self.block_bytes])
        offset = first * self.block
        return blocks[:, start - offset : stop - offset : step]

    @property
    def type(self) -> str:
        """The name of the type in the file."""
        return self.kind.name

    def in_blocks(self, part: tuple[slice, ...]) -> bool:
        """Whether the columns begin and end with blocks."""
        start, stop, step = part[1].indices(self.shape[1])
        return step == 1 and start % self.block == 0 and stop % self.block == 0

    def blocks(self, part: tuple[slice, ...]) -> Blocks | None:
        """The slices of rows and columns as the file stores them.

        None if the columns do not begin and end with blocks.
        """
        if not self.in_blocks(part):
            return None
        rows, columns = part
        start, stop, _ = columns.indices(self.shape[1])
        row_order = np.arange(self.shape[0]) if self.row_order is None else self.row_order
        first = start // self.block * self.block_bytes
        last = stop // self.block * self.block_bytes
        return Blocks(self.kind.name, self.packed[:, first:last], row_order[rows])

    def unpack(self, packed: np.ndarray) -> Tensor:
        """uint8 [rows, bytes of whole blocks] -> [rows, weights]."""
        shape = len(packed), packed.shape[1] // self.block_bytes * self.block
        if not packed.size:
            return torch.empty(shape, dtype=self.dtype)
        if self.kind.name in PLAIN:
            return torch.from_numpy(packed.copy()).view(self.dtype)
        blocks = packed.reshape(-1, self.block_bytes)
        out = np.empty((len(blocks), self.block), np.float32)
        step = max(1, DEQUANTISE_AT_ONCE // self.block)
        try:
            for start in range(0, len(out), step):
                # One long row, because the package makes a numpy call for every few rows.
                row = blocks[start : start + step].reshape(1, -1)
                numbers = gguf.dequantize(row, self.kind)
                out[start : start + step] = numbers.reshape(-1, self.block)
        except NotImplementedError as err:
            raise ValueError(
                f"{self.name} is of type {self.kind.name}, which the gguf package cannot read"
            ) from err
        return torch.from_numpy(out.reshape(shape))


class GGUF:
    """One model: its metadata, and its tensors, not read yet. Pickles as its paths.

    The model is one file, or a split file of several parts. The first part has all
    metadata. Raises ValueError for a file that is no GGUF, that is cut short, that misses
    a part, or that holds another architecture.
    """

    def __init__(self, path: Path) -> None:
        """path: the file, or any part of a split file."""
        self.path = path
        self.parts = find_parts(path, *part_numbers(self.reader))
        if self.parts[0] != path:
            self.close()
            self.path = self.parts[0]
        if self["general.architecture"] not in ARCHITECTURES:
            raise ValueError(
                f"{path} holds a model of architecture {self['general.architecture']!r}; "
                f"supported are {', '.join(ARCHITECTURES)}"
            )

    @cached_property
    def reader(self) -> Reader:
        """The open file.

        The first use opens it, and the first use after `close` opens it again.
        """
        return open_file(self.path)

    @cached_property
    def tensors(self) -> dict[str, gguf.ReaderTensor]:
        """Name in the file -> tensor, of all parts.

        Raises ValueError for parts that do not make a whole.
        """
        if len(self.parts) == 1:
            return {tensor.name: tensor for tensor in self.reader.tensors}
        found: dict[str, gguf.ReaderTensor] = {}
        for number, path in enumerate(self.parts):
            reader = open_part(path, number, len(self.parts))
            for tensor in reader.tensors:
                if tensor.name in found:
                    raise ValueError(f"{path} holds {tensor.name!r}, which a part before holds too")
                found[tensor.name] = tensor
        expected = self.get("split.tensors.count", len(found))
        if len(found) != expected:
            raise ValueError(
                f"{self.path} belongs to a split file of {expected} tensors "
                f"(split.tensors.count), but its {len(self.parts)} parts hold {len(found)}; fetch "
                "all parts again"
            )
        return found

    @cached_property
    def tokens(self) -> list[str]:
        """The vocabulary: the text of each token id. Empty if the file has none."""
        return self.get("tokenizer.ggml.tokens", [])

    @cached_property
    def token_kinds(self) -> list[int]:
        """The kind of each token: 1 is plain, 3 a control token, 4 a user-defined token.

        If the file does not list kinds, the tokens that end an answer are control tokens,
        as in llama.cpp.
        """
        kinds = self.per_token("tokenizer.ggml.token_type")
        return kinds or [CONTROL if token in ENDS else PLAIN_TEXT for token in self.tokens]

    def per_token(self, key: str) -> list[Any]:
        """A list with an item for each token. Empty if the file lacks it.

        Raises ValueError for a list of another length.
        """
        found = self.get(key, [])
        if found and self.tokens and len(found) != len(self.tokens):
            raise ValueError(
                f"{self.path}: {key} has {len(found)} items; accepted is one for each of the "
                f"{len(self.tokens)} tokens"
            )
        return found

    def close(self) -> None:
        """Closes the file and frees its vocabulary, which takes tens of megabytes."""
        for name in ("reader", "tensors", "tokens", "token_kinds"):
            self.__dict__.pop(name, None)

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "parts": self.parts}

    # -- metadata ----------------------------------------------------------------------------------

    @property
    def family(self) -> str:
        """A name of ARCHITECTURES."""
        return self["general.architecture"]

    def get(self, key: str, default: object = None) -> Any:
        """A field of the metadata."""
        value = self.reader.value(key)
        return default if value is None else value

    def __getitem__(self, key: str) -> Any:
        """A field of the metadata. Raises ValueError if the file lacks it."""
        value = self.get(key)
        if value is None:
            raise ValueError(f"{self.path} has no {key!r} in its metadata; convert the model again")
        return value

    def get_one(self, key: str) -> Any:
        """A field of the architecture. key: its name without the architecture.

        A list with the same value for each layer counts as that value. Raises ValueError
        for a list of different values.
        """
        key = f"{self.family}.{key}"
        value = self.get(key)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise ValueError(f"{self.path}: {key} is {value}; accepted is one value for all layers")
        return value[0]

    # -- tensors -----------------------------------------------------------------------------------

    def head_differs(self) -> bool:
        """Whether the file has an output head that is not a copy of its embedding.

        Compares packed bytes. Tensors of two types count as different.
        """
        embedding = self.tensors.get("token_embd.weight")
        head = self.tensors.get("output.weight")
        if embedding is None or head is None:
            return False
        if head.tensor_type != embedding.tensor_type or head.data.shape != embedding.data.shape:
            return True
        for start in range(0, len(head.data), COMPARE_AT_ONCE):
            rows = slice(start, start + COMPARE_AT_ONCE)
            if not np.array_equal(embedding.data[rows], head.data[rows]):
                return True
        return False

    def matrix_types(self) -> set[str]:
        """The names of the types in which the file stores its matrices."""
        return {each.tensor_type.name for each in self.tensors.values() if len(each.shape) > 1}

    def lazy(self, tensor: gguf.ReaderTensor) -> GGUFTensor:
        """The tensor with its rows in Hugging Face's order."""
        found = GGUFTensor(tensor)
        stem = tensor.name.split(".")[-2]
        heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(stem)
        if heads and self.family in NEIGHBOURS:
            # Row (head, half, i) of Hugging Face is row (head, i, half) of the file.
            number = self.get_one(f"attention.{heads}") or self.get_one("attention.head_count")
            rows = np.arange(found.shape[0]).reshape(number, -1, 2)
            found.row_order = rows.swapaxes(1, 2).reshape(-1)
        if self.family in GEMMA and tensor.name.endswith("norm.weight"):
            found.offset = 1.0
        return found

    def __iter__(self) -> Iterator[tuple[str, LazyTensor]]:
        """(Hugging Face name, tensor).

        Raises ValueError for a tensor that no model here has.
        """
        for name, tensor in self.tensors.items():
            if name == "rope_freqs.weight":
                continue  # no parameter: `hf_fields` reads it
            *block, stem, suffix = name.split(".")
            if stem not in self.tensor_names or suffix not in ("weight", "bias"):
                raise ValueError(
                    f"{self.path} holds {name!r}, which no {self.family} model here has"
                )
            hf = self.hf_name(block, stem, suffix)
            if stem.endswith("_exps"):
                yield from self.experts(hf, tensor)
            else:
                yield hf, self.lazy(tensor)
        yield from self.missing_biases()

    @property
    def tensor_names(self) -> dict[str, str]:
        """Name in the file -> name in Hugging Face's layer."""
        return {**TENSOR_NAMES, **FAMILY_NAMES.get(self.family, {})}

    def hf_name(self, block: list[str], stem: str, suffix: str) -> str:
        """(["blk", "3"], "attn_q", "weight") -> "model.layers.3.self_attn.q_proj.weight"."""
        layer = f"model.layers.{block[1]}." if block else ""
        name = f"{layer}{self.tensor_names[stem]}"
        return name if stem == "attn_sinks" else f"{name}.{suffix}"

    def experts(self, name: str, tensor: gguf.ReaderTensor) -> Iterator[tuple[str, LazyTensor]]:
        """The matrices of a tensor [experts, rows, columns], or the rows of [experts, rows].

        name: "...mlp.experts.down_proj.weight" becomes "...mlp.experts.0.down_proj.weight"
        and so on.
        """
        parent, _, matrix = name.partition(".experts.")
        for expert in range(int(tensor.shape[-1])):
            yield f"{parent}.experts.{expert}.{matrix}", GGUFTensor(tensor, expert)

    def missing_biases(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, zeros) of each bias that the config has and the file lacks.

        A Hugging Face config has one switch for the biases of q, k, v and o, and one for
        the feed-forward. A GGUF file may have any of these biases.
        """
        tensors = self.tensors
        stems = self.biased_stems("attn") + self.biased_stems("ffn")
        for name in tensors:
            *block, stem, suffix = name.split(".")
            bias = ".".join([*block, stem, "bias"])
            if suffix == "weight" and stem in stems and bias not in tensors:
                yield self.hf_name(block, stem, "bias"), torch.zeros(int(tensors[name].shape[-1]))

    def biased_stems(self, kind: str) -> tuple[str, ...]:
        """The projections of attention ("attn") or feed-forward ("ffn") with a bias.

        One bias in the file counts for all projections of the kind. () if there is none.
        """
        if kind == "attn" and self.family in ("qwen2", "qwen2vl", "qwen2moe"):
            return "attn_q", "attn_k", "attn_v"  # the config of qwen2 has no switch
        projections = [stem for stem in TENSOR_NAMES if not stem.endswith("norm")]
        stems = tuple(stem for stem in projections if stem.startswith(kind))
        has_bias = any(name.endswith(f".{stem}.bias") for name in self.tensors for stem in stems)
        return stems if has_bias else ()

    # -- the files of a Hugging Face model ---------------------------------------------------------

    def hf_fields(self) -> dict[str, object]:
        """The fields of config.json, as far as the metadata states them."""
        found = self.common_fields()
        if self.family not in GEMMA:
            return found
        pattern = self.get(f"{self.family}.{PATTERN}")
        fields = Fields(f"{self.path}: {self.family}", self.get_one)
        return found | gemma_fields(self.family, fields, pattern, found)

    def common_fields(self) -> dict[str, object]:
        """The fields of config.json that all families have."""
        family, tensors = self.family, self.tensors
        if "token_embd.weight" not in tensors:
            raise ValueError(
                f"{self.path} has no token_embd.weight: it is a vocabulary only, or a part of a "
                "model"
            )
        fields = Fields(f"{self.path}: {family}", self.get_one)
        if fields.number("attention.temperature_scale", default=0.0, zero=True):
            raise fields.refuse(
                "attention.temperature_scale", "0, because Q is not scaled by position here"
            )
        heads = fields.integer("attention.head_count")
        kv_heads = fields.integer("attention.head_count_kv", default=heads, least=0)
        head_dim = self.head_dim(fields)
        window = self.get_one("attention.sliding_window")
        # llama.cpp has no architecture of its own for Mistral.
        is_mistral = bool(window) and family == "llama"
        architecture = "MistralForCausalLM" if is_mistral else ARCHITECTURES[family]
        experts = self.expert_fields(fields)
        if family == "llama" and experts:
            architecture = "MixtralForCausalLM"
        return {
            "model_type": architecture.removesuffix("ForCausalLM").lower(),
            "architectures": [architecture],
            "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
            "hidden_size": fields.integer("embedding_length"),
            "intermediate_size": fields.integer("feed_forward_length"),
            "num_hidden_layers": fields.integer("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads or heads,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon", zero=True),
            "max_position_embeddings": fields.integer("context_length"),
            "rope_parameters": self.rope_parameters(head_dim),
            "attention_bias": bool(self.biased_stems("attn")),
            "mlp_bias": bool(self.biased_stems("ffn")),
            "sliding_window": window or None,
            # Two fields of Qwen: the window counts from layer 0 on.
            "use_sliding_window": bool(window),
            "max_window_layers": 0,
            "layer_types": self.layer_types(),
            **experts,
            "tie_word_embeddings": not self.head_differs(),
            "bos_token_id": self.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.get("tokenizer.ggml.padding_token_id"),
        }

    def layer_types(self) -> list[str] | None:
        """Which layers have the window. None: all that the rest of the config says.

        llama.cpp knows it of the architecture.
        """
        if self.family != "gpt-oss":
            return None
        kinds = ("sliding_attention", "full_attention")
        return [kinds[layer % 2] for layer in range(self[f"{self.family}.block_count"])]

    def expert_fields(self, fields: Fields) -> dict[str, object]:
        """The fields of config.json about experts. {} for a model without experts."""
        count = fields.integer("expert_count", default=0, least=0)
        if not count:
            return {}
        if fields.number("attention.clamp_kqv", default=0.0, zero=True):
            raise fields.refuse("attention.clamp_kqv", "0, because Q, K and V are not clipped here")
        # llama.cpp multiplies the weights of experts if the scale is neither 0 nor 1.
        if fields.number("expert_weights_scale", default=1.0, zero=True) not in (0.0, 1.0):
            raise fields.refuse("expert_weights_scale", "1.0")
        if fields.integer("expert_gating_func", default=1) != SOFTMAX:
            raise fields.refuse("expert_gating_func", f"{SOFTMAX}, a softmax over all experts")
        width = fields.integer("feed_forward_length")
        expert_width = self.rows_of("ffn_gate_exps", width)
        return {
            # Only Qwen has another feed-forward besides its experts.
            "intermediate_size": width if self.family.startswith("qwen") else expert_width,
            "num_experts": count,
            "num_local_experts": count,
            "num_experts_per_tok": fields.integer("expert_used_count"),
            "moe_intermediate_size": expert_width,
            "shared_expert_intermediate_size": self.rows_of("ffn_gate_shexp", width),
            # llama.cpp knows it of the architecture.
            "norm_topk_prob": self.family == "qwen3moe",
        }

    def rows_of(self, stem: str, default: int) -> int:
        """The output features of a matrix of the first layer that has it."""
        for name, tensor in self.tensors.items():
            if name.endswith(f".{stem}.weight"):
                return int(tensor.shape[1])
        return default

    def head_dim(self, fields: Fields) -> int:
        """Raises ValueError for a model that rotates only a part of each head."""
        default = fields.integer("embedding_length") // fields.integer("attention.head_count")
        head_dim = fields.integer("attention.key_length", default=default)
        rotated = fields.integer("rope.dimension_count", default=head_dim)
        if rotated != head_dim:
            raise ValueError(f"{self.path} rotates {rotated} of {head_dim} dimensions of a head")
        return head_dim

    def rope_parameters(self, head_dim: int) -> dict[str, object]:
        """The field rope_parameters of config.json.

        Raises ValueError for a scaling that is not known here and that changes anything.
        """
        theta = self.get(f"{self.family}.rope.freq_base", 10000.0)
        scaling = self.rope_scaling()
        kind = scaling.get("type", "linear")  # llama.cpp's default
        factor = scaling.get("factor") or 1.0
        trained = scaling.get("original_context_length")
        if kind not in ("none", "linear", "yarn"):
            raise ValueError(
                f"{self.path} has RoPE scaling of type {kind!r}; supported are none, linear and "
                "yarn"
            )
        is_scaled = kind == "yarn" or (kind == "linear" and factor != 1.0)
        if "rope_freqs.weight" in self.tensors:
            if is_scaled:
                raise ValueError(
                    f"{self.path} scales RoPE twice, by rope_freqs.weight and by type {kind!r}; "
                    "supported is one of them"
                )
            found = self.llama3_scaling(theta, head_dim, trained or 8192)
            return {"rope_theta": theta, **found}
        if not is_scaled:
            return {"rope_theta": theta, "rope_type": "default"}
        found = {"rope_theta": theta, "rope_type": kind, "factor": factor}
        if kind == "yarn":
            if self.family == "gpt-oss":
                found["truncate"] = False  # it was trained so, and files do not say it
            found["original_max_position_embeddings"] = (
                trained or self[f"{self.family}.context_length"]
            )
            for name, hf in YARN_FIELDS.items():
                if name in scaling:
                    found[hf] = scaling[name]
            if scaling.get("yarn_log_multiplier"):
                found["mscale"] = 1.0
                found["mscale_all_dim"] = scaling["yarn_log_multiplier"]
        return found

    def rope_scaling(self) -> dict[str, Any]:
        """The fields `<architecture>.rope.scaling.*` that have an effect, without this prefix.

        Raises ValueError for a scaling that is not known here and that changes anything.
        """
        known = ("type", "factor", "original_context_length", "yarn_log_multiplier", *YARN_FIELDS)
        prefix = f"{self.family}.rope.scaling."
        # The old name of the factor counts if the file lacks the new one.
        scaling = {"factor": self.get(f"{self.family}.rope.scale_linear")}
        for key in self.reader.fields:
            if not key.startswith(prefix):
                continue
            name = key.removeprefix(prefix)
            value = self[key]
            if name in known:
                scaling[name] = value
            elif name == "yarn_ext_factor":
                self.check_extrapolation(value)
            elif name != "finetuned" and value != 1.0:
                raise ValueError(
                    f"{self.path} scales RoPE by {key}={value}, which is not supported; accepted "
                    "is 1.0"
                )
        return scaling

    def check_extrapolation(self, value: float) -> None:
        """Raises ValueError for a share of YaRN that is not the whole. Below 0 it is not set."""
        is_yarn = self.get(f"{self.family}.rope.scaling.type") == "yarn"
        if value >= 0 and value != is_yarn:
            key = f"{self.family}.rope.scaling.yarn_ext_factor"
            accepted = "1.0 with type 'yarn'" if is_yarn else "0.0 without type 'yarn'"
            raise ValueError(f"{self.path}: {key} is {value}; accepted is {accepted}")

    def llama3_scaling(self, theta: float, head_dim: int, trained: int) -> dict[str, object]:
        """Llama 3's scaling. The file has it as a tensor: the divisor of each frequency.

        trained: the length of the texts that the model was first trained on, in tokens.
        Raises ValueError if the tensor does not follow Llama 3's formula.
        """
        divisors = self.lazy(self.tensors["rope_freqs.weight"])[...].double()
        factor = divisors.max().item()  # of the slowest frequency
        low, high = 1.0, 4.0
        frequencies = theta ** -(torch.arange(0, head_dim, 2).double() / head_dim)
        rotations = trained * frequencies / (2 * math.pi)  # full circles over a text
        kept = ((rotations - low) / (high - low)).clamp(0, 1)
        if not torch.allclose(divisors, 1 / (kept + (1 - kept) / factor), rtol=1e-4):
            raise ValueError(
                f"{self.path} divides RoPE's frequencies (rope_freqs.weight) otherwise than "
                "Llama 3 does"
            )
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": trained,
        }

    def generation_config(self) -> dict[str, object]:
        """The fields of generation_config.json: end tokens, and sampling parameters."""
        fields: dict[str, object] = {"eos_token_id": self.end_tokens()}
        for key, name in SAMPLING.items():
            value = self.get(f"general.sampling.{key}")
            if value is not None:
                fields[name] = value
        return fields

    def end_tokens(self) -> list[int]:
        """Ids of the tokens that end an answer.

        First the ids that the metadata lists, then the tokens whose names are in ENDS.
        """
        keys = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
        listed = [self.get(f"tokenizer.ggml.{key}_token_id") for key in keys]
        named = {}
        for token_id, (token, kind) in enumerate(zip(self.tokens, self.token_kinds)):
            if token in ENDS and kind in SPECIAL_KINDS:
                named[token] = token_id
        # Two families of formats use "<|end|>" inside an answer, and one has a "</s>"
        # without a meaning.
        if named.keys() & {"<|call|>", "<|calls|>"} and named.keys() & {"<|return|>", "<|flush|>"}:
            named.pop("<|end|>", None)
        if "<|tool_response>" in named:
            named.pop("</s>", None)
        return list(dict.fromkeys(i for i in (*listed, *named.values()) if i is not None))
