"""GGUF files of the llama, qwen2 and qwen3 architectures: the metadata as a Hugging Face config, the tensors under
Hugging Face names and in Hugging Face's row order, dequantised where they are sliced. The gguf package, which must be
there to import this module, reads the format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from nanovllm.loader.fields import Fields
from nanovllm.loader.safetensors import unreadable

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

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
}

SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}

# A token that ends an answer is known by its name too: many files name one end only, or none, in their metadata.
# The names are those of llama.cpp (src/llama-vocab.cpp), which also ends at the padding and separators of fill-in-the-middle.
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
SPECIAL_KINDS = (3, 4)  # control tokens and user-defined ones, which no plain text is cut into

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DEQUANTISE_AT_ONCE = 1 << 17  # weights; more fall out of the cache (twice as slow), fewer pay numpy's calls


class Reader(gguf.GGUFReader):
    """Holds the mapped file as a plain array: each slice of a numpy.memmap runs Python, and a vocabulary is 10^5 slices."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, np.asarray(value) if name == "data" else value)


class GGUFTensor:
    """A tensor on disk, as rows of packed bytes [shape[0], bytes]; slicing it dequantises the blocks that are touched."""

    def __init__(self, tensor: gguf.ReaderTensor) -> None:
        self.name, self.kind = tensor.name, tensor.tensor_type
        self.shape: tuple[int, ...] = tuple(reversed(tensor.shape.tolist()))
        self.packed = tensor.data.reshape(self.shape[0], -1).view(np.uint8)
        self.dtype = PLAIN.get(self.kind.name, torch.float32)
        self.block, self.block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        self.row_order: np.ndarray | None = None  # where row i lies, for all i

    def __getitem__(self, index: Any) -> Tensor:
        """Slices, at most one a dimension; `...` is all."""
        slices = () if index is ... else index if isinstance(index, tuple) else (index,)
        rows, columns = (*slices, slice(None), slice(None))[:2]
        packed = self.packed[rows if self.row_order is None else self.row_order[rows]]
        if len(self.shape) == 1:
            return self.unpack(packed).reshape(-1)
        start, stop, step = columns.indices(self.shape[1])
        first, last = start // self.block, -(-stop // self.block)
        blocks = self.unpack(packed[:, first * self.block_bytes : last * self.block_bytes])
        return blocks[:, start - first * self.block : stop - first * self.block : step]

    def unpack(self, packed: np.ndarray) -> Tensor:
        """uint8 [rows, bytes of whole blocks] -> [rows, weights]."""
        shape = len(packed), packed.shape[1] // self.block_bytes * self.block
        if not packed.size:
            return torch.empty(shape, dtype=self.dtype)
        if self.kind.name in PLAIN:
            return torch.from_numpy(packed.copy()).view(self.dtype)
        blocks = packed.reshape(-1, self.block_bytes)
        out, step = np.empty((len(blocks), self.block), np.float32), max(1, DEQUANTISE_AT_ONCE // self.block)
        try:
            for i in range(0, len(out), step):
                # As one long row: given many short ones, the package makes a numpy call for every 16 of them.
                out[i : i + step] = gguf.dequantize(blocks[i : i + step].reshape(1, -1), self.kind).reshape(
                    -1, self.block
                )
        except NotImplementedError as err:
            raise ValueError(f"{self.name} is of type {self.kind.name}, which the gguf package cannot read") from err
        return torch.from_numpy(out.reshape(shape))


class GGUF:
    """One file: its metadata, and its tensors, none of them read. Pickles as its path.

    Raises ValueError for a file that is cut short, no GGUF, split, or of another architecture.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if self.get("split.count", 1) > 1:
            raise ValueError(f"{path} is one part of a split file; join the parts: llama-gguf-split --merge")
        if self["general.architecture"] not in ARCHITECTURES:
            raise ValueError(
                f"{path} holds a model of architecture {self['general.architecture']!r}; "
                f"supported are {', '.join(ARCHITECTURES)}"
            )

    @cached_property
    def reader(self) -> Reader:
        """Opens the file, again where `close` came before."""
        try:
            reader = Reader(self.path)
        except (ValueError, IndexError, KeyError) as err:
            if "GGMLQuantizationType" in str(err):
                raise ValueError(f"{self.path} needs a newer gguf package: {err}; pip install -U gguf") from err
            raise unreadable(self.path, "GGUF", err) from err
        if reader.byte_order != "I":
            raise ValueError(f"{self.path} is of the other byte order; convert it for this machine")
        return reader

    @cached_property
    def tokens(self) -> list[str]:
        """The vocabulary: the token of each id. Empty where the file holds none."""
        return self.get("tokenizer.ggml.tokens", [])

    @cached_property
    def token_kinds(self) -> list[int]:
        """The kind of each token: 3 is a control token, 4 a user-defined one. Empty where the file says nothing."""
        return self.get("tokenizer.ggml.token_type", [])

    def close(self) -> None:
        """Lets go of the file and of what was read of it, tens of MB for a vocabulary."""
        for name in ("reader", "tokens", "token_kinds"):
            self.__dict__.pop(name, None)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def get(self, key: str, default: Any = None) -> Any:
        """A field of the metadata."""
        field = self.reader.get_field(key)
        return default if field is None else field.contents()

    def __getitem__(self, key: str) -> Any:
        """A field of the metadata that must be there."""
        if (value := self.get(key)) is None:
            raise ValueError(f"{self.path} has no {key!r} in its metadata; convert the model again")
        return value

    @property
    def tensors(self) -> dict[str, gguf.ReaderTensor]:
        """By the names that they have in the file."""
        return {tensor.name: tensor for tensor in self.reader.tensors}

    def lazy(self, tensor: gguf.ReaderTensor) -> GGUFTensor:
        found = GGUFTensor(tensor)
        heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(tensor.name.split(".")[-2])
        if heads and self["general.architecture"] == "llama":
            # llama.cpp rotates neighbouring rows, Hugging Face a head's two halves: row (h, half, i) is (h, i, half).
            number = self.get_one(f"attention.{heads}") or self.get_one("attention.head_count")
            rows = np.arange(found.shape[0]).reshape(number, -1, 2)
            found.row_order = rows.swapaxes(1, 2).reshape(-1)
        return found

    def get_one(self, key: str) -> Any:
        """A field of the architecture, without its prefix. A list with a value for each layer is that value.

        Raises ValueError where the values differ.
        """
        key = f"{self['general.architecture']}.{key}"
        value = self.get(key)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise ValueError(f"{self.path}: {key} is {value}; accepted is one value for all layers")
        return value[0]

    def __iter__(self) -> Iterator[tuple[str, Tensor | GGUFTensor]]:
        """(Hugging Face name, tensor). Raises ValueError for a tensor that has no place in these models."""
        for name, tensor in self.tensors.items():
            if name == "rope_freqs.weight":
                continue  # no parameter: `hf_fields` reads it
            *block, stem, suffix = name.split(".")
            if stem not in TENSOR_NAMES or suffix not in ("weight", "bias"):
                raise ValueError(f"{self.path} holds {name!r}, which no {self['general.architecture']} model here has")
            yield hf_name(block, stem, suffix), self.lazy(tensor)
        yield from self.missing_biases()

    def missing_biases(self) -> Iterator[tuple[str, Tensor]]:
        """A bias of zeros for each projection that lacks one where a Hugging Face model of this config has one.

        There one switch is for q, k, v and o, and one for the feed-forward; a GGUF file has any of these biases.
        """
        tensors = self.tensors
        stems = self.biased_stems("attn") + self.biased_stems("ffn")
        for name in tensors:
            *block, stem, suffix = name.split(".")
            if suffix == "weight" and stem in stems and ".".join([*block, stem, "bias"]) not in tensors:
                yield hf_name(block, stem, "bias"), torch.zeros(int(tensors[name].shape[-1]))

    def biased_stems(self, kind: str) -> tuple[str, ...]:
        """The projections of attention ("attn") or of the feed-forward ("ffn"), if the model has biases there."""
        is_qwen2 = self["general.architecture"] == "qwen2"
        if kind == "attn" and is_qwen2:
            return "attn_q", "attn_k", "attn_v"  # its config has no switch
        stems = tuple(stem for stem in TENSOR_NAMES if stem.startswith(kind) and not stem.endswith("norm"))
        has_one = any(name.endswith(f".{stem}.bias") for name in self.tensors for stem in stems)
        return stems if has_one else ()

    def hf_fields(self) -> dict[str, Any]:
        """The fields of the config.json that the file was converted from, as far as its metadata tells."""
        family, tensors = self["general.architecture"], self.tensors
        if "token_embd.weight" not in tensors:
            raise ValueError(f"{self.path} has no token_embd.weight: it is a vocabulary only, or a part of a model")
        fields = Fields(f"{self.path}: {family}", self.get_one)
        heads, hidden = fields.integer("attention.head_count"), fields.integer("embedding_length")
        head_dim = fields.integer("attention.key_length", default=hidden // heads)
        rotated = fields.integer("rope.dimension_count", default=head_dim)
        if rotated != head_dim:
            raise ValueError(f"{self.path} rotates {rotated} of {head_dim} dimensions of a head")
        window = self.get_one("attention.sliding_window")
        is_mistral = bool(window) and family == "llama"  # llama.cpp has no word of its own for it
        return {
            "model_type": "mistral" if is_mistral else family,
            "architectures": ["MistralForCausalLM" if is_mistral else ARCHITECTURES[family]],
            "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
            "hidden_size": hidden,
            "intermediate_size": fields.integer("feed_forward_length"),
            "num_hidden_layers": fields.integer("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": fields.integer("attention.head_count_kv", default=heads, least=0) or heads,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon", zero=True),
            "max_position_embeddings": fields.integer("context_length"),
            "rope_parameters": self.rope_parameters(head_dim),
            "attention_bias": bool(self.biased_stems("attn")),
            "mlp_bias": bool(self.biased_stems("ffn")),
            "sliding_window": window or None,
            "use_sliding_window": bool(window),  # Qwen's switch; from layer 0 on
            "max_window_layers": 0,
            "tie_word_embeddings": "output.weight" not in tensors,
            "bos_token_id": self.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.get("tokenizer.ggml.padding_token_id"),
        }

    def rope_parameters(self, head_dim: int) -> dict[str, Any]:
        prefix = f"{self['general.architecture']}.rope."
        theta = self.get(prefix + "freq_base", 10000.0)
        scaling = {k[len(prefix) :]: self[k] for k in self.reader.fields if k.startswith(prefix + "scal")}
        kind, factor = scaling.pop("scaling.type", "none"), scaling.pop("scaling.factor", 1.0)
        trained = scaling.pop("scaling.original_context_length", None)
        betas = {f"beta_{end}": scaling.pop(f"scaling.yarn_beta_{end}", None) for end in ("fast", "slow")}
        scaling.pop("scaling.finetuned", None)
        if unknown := [key for key, value in scaling.items() if value != 1.0]:
            raise ValueError(f"{self.path} scales RoPE by {prefix}{unknown[0]}, which is not supported")
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
        if "rope_freqs.weight" in self.tensors:
            return rope | self.llama3_scaling(theta, head_dim, trained or 8192)
        if kind == "none" or factor == 1.0:
            return rope
        if kind == "linear":
            return rope | {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            trained = trained or self[f"{self['general.architecture']}.context_length"]
            given = {key: value for key, value in betas.items() if value is not None}
            return rope | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained} | given
        raise ValueError(f"{self.path} has RoPE scaling of type {kind!r}; supported are none, linear and yarn")

    def llama3_scaling(self, theta: float, head_dim: int, trained: int) -> dict[str, Any]:
        """Llama 3's scaling comes as a tensor of what each frequency is divided by; the largest is the factor."""
        divisors = self.lazy(self.tensors["rope_freqs.weight"])[...].double()
        factor, low, high = divisors.max().item(), 1.0, 4.0
        turns = trained * theta ** -(torch.arange(0, head_dim, 2).double() / head_dim) / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        if not torch.allclose(divisors, 1 / (keep + (1 - keep) / factor), rtol=1e-4):
            raise ValueError(f"{self.path} divides RoPE's frequencies (rope_freqs.weight) otherwise than Llama 3 does")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": trained,
        }

    def generation_config(self) -> dict[str, Any]:
        """What a generation_config.json would say: every token that ends an answer, and the sampling that is advised."""
        fields: dict[str, Any] = {"eos_token_id": self.end_tokens()}
        for key, name in SAMPLING.items():
            if (value := self.get(f"general.sampling.{key}")) is not None:
                fields[name] = value
        return fields

    def end_tokens(self) -> list[int]:
        """Ids of the tokens that end an answer: those that the metadata lists, then those known by their names."""
        keys = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
        listed = [self.get(f"tokenizer.ggml.{key}_token_id") for key in keys]
        named = {
            token: i
            for i, (token, kind) in enumerate(zip(self.tokens, self.token_kinds))
            if token in ENDS and kind in SPECIAL_KINDS
        }
        # Two families of formats use "<|end|>" inside an answer, and one has a "</s>" without a meaning.
        if named.keys() & {"<|call|>", "<|calls|>"} and named.keys() & {"<|return|>", "<|flush|>"}:
            named.pop("<|end|>", None)
        if "<|tool_response>" in named:
            named.pop("</s>", None)
        return list(dict.fromkeys(i for i in (*listed, *named.values()) if i is not None))


def hf_name(block: list[str], stem: str, suffix: str) -> str:
    """(["blk", "3"], "attn_q", "weight") -> "model.layers.3.self_attn.q_proj.weight"."""
    layer = f"model.layers.{block[1]}." if block else ""
    return f"{layer}{TENSOR_NAMES[stem]}.{suffix}"
