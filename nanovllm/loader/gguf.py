"""GGUF files of the llama, qwen2 and qwen3 architectures: the metadata as a Hugging Face config, the tensors under
Hugging Face names and in Hugging Face's row order, dequantised where they are sliced.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf package knows the quantised
types; its reader is not used because it makes a numpy array of every token (2 s for a vocabulary of 49,152).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

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

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
LENGTH = struct.Struct("<Q")
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DEQUANTISE_AT_ONCE = 1 << 17  # weights; more fall out of the cache (twice as slow), fewer pay numpy's calls


class Entry(NamedTuple):
    """One line of the file's table of tensors."""

    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    start: int
    nbytes: int


class GGUFTensor:
    """A tensor on disk, as rows of packed bytes [shape[0], bytes]; slicing it dequantises the blocks that are touched."""

    def __init__(self, name: str, packed: np.ndarray, entry: Entry, row_order: np.ndarray | None) -> None:
        from gguf.constants import GGML_QUANT_SIZES

        self.name, self.packed, self.kind, self.row_order = name, packed, entry.kind, row_order
        self.shape = entry.shape
        self.dtype = PLAIN.get(entry.kind.name, torch.float32)
        self.block, self.block_bytes = GGML_QUANT_SIZES[entry.kind]

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
        from gguf.quants import dequantize

        blocks = packed.reshape(-1, self.block_bytes)
        out, step = np.empty((len(blocks), self.block), np.float32), max(1, DEQUANTISE_AT_ONCE // self.block)
        try:
            for i in range(0, len(out), step):
                # As one long row: given many short ones, the package makes a numpy call for every 16 of them.
                out[i : i + step] = dequantize(blocks[i : i + step].reshape(1, -1), self.kind).reshape(-1, self.block)
        except NotImplementedError as err:
            raise ValueError(f"{self.name} is of type {self.kind.name}, which the gguf package cannot read") from err
        return torch.from_numpy(out.reshape(shape))


class GGUF:
    """One opened file: its metadata, and a table of its tensors, none of them read. Pickles as its path.

    Raises ValueError for a file that is cut short, no GGUF, split, or of another architecture; ImportError without gguf.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        except ImportError as err:
            raise ImportError(f"{path} is a GGUF file, to read it install gguf: pip install 'nanovllm[gguf]'") from err
        self.path = path
        self.buffer: mmap.mmap | bytes = b""
        with path.open("rb") as file:
            if path.stat().st_size:
                self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.position = 0
        self.metadata: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        try:
            magic, version, num_tensors, num_fields = self.take("4sIQQ")
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError(f"{path} is no GGUF file of version 2 or 3 (it begins {magic!r}, version {version})")
            for _ in range(num_fields):
                key = self.text()
                self.metadata[key] = self.value(*self.take("I"))
            table = []
            for _ in range(num_tensors):
                name, (dims,) = self.text(), self.take("I")
                *reversed_shape, number, offset = self.take(f"{dims}QIQ")
                table.append((name, tuple(reversed(reversed_shape)), number, offset))
        except (struct.error, OverflowError, UnicodeDecodeError, KeyError) as err:
            raise ValueError(f"{path} ends or breaks within its metadata ({err}); fetch it again") from err
        alignment = self.metadata.get("general.alignment", 32)
        data = -(-self.position // alignment) * alignment
        known = {int(kind): kind for kind in GGMLQuantizationType}
        for name, shape, number, offset in table:
            if number not in known:
                raise ValueError(f"{path}: {name!r} is of type {number}, unknown to this gguf package; upgrade it")
            kind = known[number]
            block, block_bytes = GGML_QUANT_SIZES[kind]
            self.entries[name] = Entry(shape, kind, data + offset, math.prod(shape) // block * block_bytes)
        end = max((entry.start + entry.nbytes for entry in self.entries.values()), default=0)
        if end > len(self.buffer):
            raise ValueError(f"{path} is cut short: {len(self.buffer):,} bytes of {end:,}; fetch it again")
        if self.metadata.get("split.count", 1) > 1:
            raise ValueError(f"{path} is one part of a split file; join the parts: llama-gguf-split --merge")
        if self["general.architecture"] not in ARCHITECTURES:
            raise ValueError(
                f"{path} holds a model of architecture {self['general.architecture']!r}; "
                f"supported are {', '.join(ARCHITECTURES)}"
            )

    def __reduce__(self) -> tuple[type[GGUF], tuple[Path]]:
        return GGUF, (self.path,)

    def take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self.buffer, self.position)
        self.position += struct.calcsize("<" + layout)
        return values

    def text(self) -> str:
        start = self.position + 8
        self.position = start + LENGTH.unpack_from(self.buffer, start - 8)[0]
        return str(self.buffer[start : self.position], "utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.take(SCALARS[kind])[0]
        kind, length = self.take("IQ")
        if kind == STRING:
            return [self.text() for _ in range(length)]
        return list(self.take(f"{length}{SCALARS[kind]}"))

    def __getitem__(self, key: str) -> Any:
        """A field of the metadata that must be there."""
        if key not in self.metadata:
            raise ValueError(f"{self.path} has no {key!r} in its metadata; convert the model again")
        return self.metadata[key]

    def tensor(self, name: str) -> GGUFTensor:
        """By the name that it has in the file."""
        entry = self.entries[name]
        packed = np.frombuffer(self.buffer, np.uint8, entry.nbytes, entry.start)
        heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(name.split(".")[-2])
        order = None
        if heads and self["general.architecture"] == "llama":
            # llama.cpp rotates neighbouring rows, Hugging Face a head's two halves: row (h, half, i) is (h, i, half).
            rows = np.arange(entry.shape[0]).reshape(self[f"llama.attention.{heads}"], -1, 2)
            order = rows.swapaxes(1, 2).reshape(-1)
        return GGUFTensor(name, packed.reshape(entry.shape[0], -1), entry, order)

    def __iter__(self) -> Iterator[tuple[str, GGUFTensor]]:
        """(Hugging Face name, tensor). Raises ValueError for a tensor that has no place in these models."""
        for name in self.entries:
            if name == "rope_freqs.weight":
                continue  # no parameter: `hf_fields` reads it
            *block, stem, suffix = name.split(".")
            if stem not in TENSOR_NAMES or suffix not in ("weight", "bias"):
                raise ValueError(f"{self.path} holds {name!r}, which no {self['general.architecture']} model here has")
            layer = f"model.layers.{block[1]}." if block else ""
            yield f"{layer}{TENSOR_NAMES[stem]}.{suffix}", self.tensor(name)

    def hf_fields(self) -> dict[str, Any]:
        """The fields of the config.json that the file was converted from, as far as its metadata tells."""
        family = self["general.architecture"]

        def get(key: str) -> Any:
            return self.metadata.get(f"{family}.{key}")

        def need(key: str) -> Any:
            return self[f"{family}.{key}"]

        heads, hidden = need("attention.head_count"), need("embedding_length")
        head_dim = get("attention.key_length") or hidden // heads
        if get("rope.dimension_count") not in (None, head_dim):
            raise ValueError(f"{self.path} rotates {get('rope.dimension_count')} of {head_dim} dimensions of a head")
        window = get("attention.sliding_window")
        is_mistral = bool(window) and family == "llama"  # llama.cpp has no word of its own for it
        return {
            "model_type": "mistral" if is_mistral else family,
            "architectures": ["MistralForCausalLM" if is_mistral else ARCHITECTURES[family]],
            "vocab_size": self.entries["token_embd.weight"].shape[0],
            "hidden_size": hidden,
            "intermediate_size": need("feed_forward_length"),
            "num_hidden_layers": need("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv") or heads,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": need("context_length"),
            "rope_parameters": self.rope_parameters(head_dim),
            "attention_bias": "blk.0.attn_q.bias" in self.entries,
            "mlp_bias": "blk.0.ffn_up.bias" in self.entries,
            "sliding_window": window,
            "use_sliding_window": bool(window),  # Qwen's switch; from layer 0 on
            "max_window_layers": 0,
            "tie_word_embeddings": "output.weight" not in self.entries,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.metadata.get("tokenizer.ggml.padding_token_id"),
        }

    def rope_parameters(self, head_dim: int) -> dict[str, Any]:
        prefix = f"{self['general.architecture']}.rope."
        theta = self.metadata.get(prefix + "freq_base", 10000.0)
        scaling = {k[len(prefix) :]: v for k, v in self.metadata.items() if k.startswith(prefix + "scal")}
        kind, factor = scaling.pop("scaling.type", "none"), scaling.pop("scaling.factor", 1.0)
        trained = scaling.pop("scaling.original_context_length", None)
        betas = {f"beta_{end}": scaling.pop(f"scaling.yarn_beta_{end}", None) for end in ("fast", "slow")}
        scaling.pop("scaling.finetuned", None)
        if unknown := [key for key, value in scaling.items() if value != 1.0]:
            raise ValueError(f"{self.path} scales RoPE by {prefix}{unknown[0]}, which is not supported")
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
        if "rope_freqs.weight" in self.entries:
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
        divisors = self.tensor("rope_freqs.weight")[...].double()
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
        ends = [self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        fields: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(end for end in ends if end is not None))}
        for key, name in SAMPLING.items():
            if (value := self.metadata.get(f"general.sampling.{key}")) is not None:
                fields[name] = value
        return fields
