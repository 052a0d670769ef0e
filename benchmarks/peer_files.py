"""Writes the model of the benchmark into a cache folder, once, in the peers' formats.

vLLM and transformers read a folder in Hugging Face's layout, and llama.cpp reads a GGUF
file. All files are in bfloat16, except the quantised GGUF files of workload Q.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.ours import Checkpoint

QUANTISE = Path(__file__).with_name("quantise.py")
# File formats whose blocks have 32 weights, or one.
SIMPLE_FORMATS = (
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "IQ4_NL",
    "MXFP4",
    "F16",
    "BF16",
)
# File formats that the package gguf writes without llama.cpp.
GGUF_PACKAGE_FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16")


def hf_folder(model: Path, cache: Path) -> Path:
    """`model` itself, or for a GGUF file a folder with its weights in bfloat16.

    nanovllm's loader reads the file, because transformers needs the package accelerate
    for it. tests/test_loader.py compares the two loaders.
    """
    if model.suffix != ".gguf":
        return model
    folder = cache / f"{model.name.removesuffix('.gguf')}-bf16"
    if not (folder / "model.safetensors").exists():
        checkpoint = Checkpoint(model)
        if checkpoint.has_tokenizer():
            checkpoint.save_tokenizer(folder)
        write_hf_model(checkpoint, folder)
    return folder


def write_hf_model(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes config.json and model.safetensors, in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = checkpoint.config() | {"torch_dtype": "bfloat16"}
    # transformers 4 reads rope_theta and rope_scaling, transformers 5 reads
    # rope_parameters.
    rope = dict(config["rope_parameters"])
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in checkpoint.weights()}
    part = folder / "model.part"
    save_file(tensors, part, metadata={"format": "pt"})
    shutil.move(part, folder / "model.safetensors")


def gguf_file(model: Path, cache: Path, dummy: bool) -> Path:
    """A GGUF file in bfloat16, from a GGUF file or, with `dummy`, from a config.json.

    A config alone gets random weights. Raises ValueError for a folder with weights.
    """
    path = cache / f"{model.name.removesuffix('.gguf')}-bf16.gguf"
    if path.exists():
        return path
    if model.suffix != ".gguf" and not dummy:
        raise ValueError(
            f"--compare llama.cpp reads GGUF files and config-only shapes, and {model} is neither"
        )
    import gguf

    cache.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    if dummy:
        write_random(gguf, json.loads((model / "config.json").read_text()), part)
    else:
        write_copy(gguf, model, part, "BF16")
    shutil.move(part, path)
    return path


def quantised_file(model: Path, name: str, cache: Path, dummy: bool, python: str | None) -> Path:
    """A GGUF file in the file format `name`, such as Q4_K_M, from a source of `gguf_file`.

    python: an interpreter that has llama-cpp-python. It mixes tensor types as llama.cpp
    does. With None all matrices have one type, and the name of the file ends in "-pure".
    Raises ValueError for a format that needs llama.cpp and for one that is not known.
    """
    if model.name.endswith(f".{name}.gguf"):
        return model
    if name == "BF16":
        return gguf_file(model, cache, dummy)
    end = f"{name}-pure" if python is None else name
    path = cache / f"{model.name.removesuffix('.gguf')}-{end}.gguf"
    if path.exists():
        return path
    if python is None and name not in GGUF_PACKAGE_FORMATS:
        raise ValueError(
            f"--formats {name} needs llama.cpp, which writes the file: give --compare "
            "llama.cpp=/path/to/python, or --model with such a file; without llama.cpp "
            f"accepted are {', '.join(GGUF_PACKAGE_FORMATS)}"
        )
    source, part = gguf_file(model, cache, dummy), path.with_suffix(".part")
    if python is None:
        import gguf

        write_copy(gguf, source, part, name)
    else:
        command = [python, str(QUANTISE), str(source), str(part), name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"--formats {name}: {done.stderr.strip()[-1000:]}")
    shutil.move(part, path)
    return path


def write_copy(gguf: Any, model: Path, path: Path, form: str) -> None:
    """Copies a GGUF file, with its matrices in the tensor type `form`."""
    reader = gguf.GGUFReader(model)
    kinds = {kind.value: kind for kind in gguf.GGUFValueType}
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    skip = (
        "GGUF.version",
        "GGUF.tensor_count",
        "GGUF.kv_count",
        "general.architecture",
        "general.file_type",
    )
    for name, field in reader.fields.items():
        if name not in skip:
            inner = kinds[field.types[-1]] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{form}"])
    kind = gguf.GGMLQuantizationType[form]
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        add(gguf, writer, tensor.name, values, kind)
    finish(writer)


def write_random(gguf: Any, config: dict[str, Any], path: Path) -> None:
    """Writes a Qwen3 with random weights and without a tokenizer.

    All weights repeat one block of random numbers, because speed does not depend on them.
    """
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    block = (config["vocab_size"], config["hidden_size"])
    numbers = np.random.default_rng(0).normal(0, 0.02, block).astype(np.float32)
    for name, shape in qwen3_shapes(config).items():
        values = np.ones(shape, np.float32) if len(shape) == 1 else np.resize(numbers, shape)
        add(gguf, writer, f"{name}.weight", values, gguf.GGMLQuantizationType.BF16)
    finish(writer)


def qwen3_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name of a tensor in a GGUF file, without ".weight" -> its shape."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    dim, vocab = config["head_dim"], config["vocab_size"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocab, hidden), "output_norm": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["output"] = (vocab, hidden)
    layer = {
        "attn_norm": (hidden,),
        "attn_q": (q, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_q_norm": (dim,),
        "attn_k_norm": (dim,),
        "attn_output": (hidden, q),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    for i in range(config["num_hidden_layers"]):
        shapes.update({f"blk.{i}.{name}": shape for name, shape in layer.items()})
    return shapes


def add(gguf: Any, writer: Any, name: str, values: np.ndarray, kind: Any) -> None:
    """Adds a matrix in the type `kind`, or a vector in float32 as llama.cpp's converter does."""
    if values.ndim == 1:
        writer.add_tensor(name, values.astype(np.float32))
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
