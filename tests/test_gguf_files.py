"""GGUF files as people have them: split into parts, without some metadata, with RoPE's many keys.

The oracle is the gguf package, transformers, or the same model in one file.
"""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

import nanovllm
from nanovllm import LLM, SamplingParams, loader
from nanovllm.layers.rotary import rope_frequencies

gguf = pytest.importorskip("gguf")

TENSORS = {
    "token_embd.weight": (96, 64),
    "output_norm.weight": (64,),
    **{f"blk.{layer}.attn_norm.weight": (64,) for layer in range(5)},
}
NUMBERS = {
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 128,
    "block_count": 5,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


SHAPES = {
    "attn_norm": (64,),
    "attn_q": (64, 64),
    "attn_k": (32, 64),
    "attn_v": (32, 64),
    "attn_output": (64, 64),
    "ffn_norm": (64,),
    "ffn_gate": (128, 64),
    "ffn_up": (128, 64),
    "ffn_down": (64, 128),
}


def write(
    path: Path,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    arch: str = "llama",
    **split: int,
) -> Path:
    """A file of random weights, or its parts if `split` has split_max_tensors.

    metadata: further fields, and other values of these. tensors: name -> shape or array.
    """
    writer = gguf.GGUFWriter(path, arch, **split)
    fields = {f"{arch}.{name}": value for name, value in NUMBERS.items()}
    for key, value in {**fields, **(metadata or {})}.items():
        add(writer, key, value)
    generator = np.random.default_rng(0)
    for name, value in (tensors or TENSORS).items():
        is_shape = isinstance(value, tuple)
        array = generator.standard_normal(value) if is_shape else value
        writer.add_tensor(name, np.asarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: Any, key: str, value: Any) -> None:
    kinds = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    kinds[type(value)](key, value)


def read(path: Path) -> dict[str, torch.Tensor]:
    files = loader.resolve(str(path))
    return {name: tensor[...] for name, tensor in loader.iter_weights(files)}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# Split files


@pytest.fixture
def split(tmp_path: Path) -> tuple[Path, list[Path]]:
    """(a whole file, the three parts of the same model in another folder)."""
    metadata = {"tokenizer.ggml.tokens": ["a", "b", "c"]}
    whole = write(tmp_path / "whole.gguf", metadata)
    folder = tmp_path / "parts"
    folder.mkdir()
    write(folder / "m.gguf", metadata, split_max_tensors=3)
    return whole, sorted(folder.iterdir())


def test_any_part_of_a_split_file_is_the_whole_model(split: Any) -> None:
    whole, parts = split
    assert [part.name for part in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for place in (*parts, parts[0].parent):
        assert_same(read(place), read(whole))
        files = loader.resolve(str(place))
        assert files.gguf.path == parts[0]
        assert files.gguf.tokens == ["a", "b", "c"]
        again = pickle.loads(pickle.dumps(files))
        assert dict(loader.iter_weights(again)).keys() == read(whole).keys()


def test_a_missing_part_is_named(split: Any) -> None:
    _, parts = split
    parts[1].unlink()
    for place in (parts[0], parts[2], parts[0].parent):
        with pytest.raises(ValueError, match=r"of 3 parts.*m-00002-of-00003\.gguf is missing"):
            loader.resolve(str(place))


def test_a_part_that_does_not_belong_is_named(split: Any, tmp_path: Path) -> None:
    whole, parts = split
    shutil.copy(parts[2], parts[1])
    with pytest.raises(ValueError, match=r"m-00002-of-00003\.gguf is part 3 of 3.*another file"):
        read(parts[0])
    shutil.copy(whole, parts[1])
    with pytest.raises(ValueError, match=r"m-00002-of-00003\.gguf is part 1 of 1.*another file"):
        read(parts[0])
    alone = shutil.copy(parts[2], tmp_path / "renamed.gguf")
    with pytest.raises(ValueError, match=r"renamed\.gguf is part 3 of 3.*-00003-of-00003\.gguf"):
        loader.resolve(str(alone))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (dict(reversed(TENSORS.items())), "holds 'token_embd.weight', which a part before holds"),
        (TENSORS | {"blk.5.attn_norm.weight": (64,)}, r"split file of 7 tensors.*parts hold 8"),
    ],
)
def test_parts_of_two_models_are_an_error(
    split: Any, tmp_path: Path, tensors: dict[str, Any], message: str
) -> None:
    _, parts = split
    other = tmp_path / "other"
    other.mkdir()
    write(other / "m.gguf", tensors=tensors, split_max_tensors=3)
    shutil.copy(other / parts[2].name, parts[2])
    with pytest.raises(ValueError, match=message):
        read(parts[0])


def test_the_hub_gives_all_parts_of_a_split_file(
    split: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    whole, parts = split
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / "abc"
    (snapshot / "large").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for part in parts:
        shutil.copy(part, snapshot / part.name.replace("m-", "tiny-Q8_0-"))
        shutil.copy(part, snapshot / "large" / part.name.replace("m-", "tiny-F32-"))
    for name in (
        "org/tiny:Q8_0",
        "org/tiny:F32",
        "org/tiny/tiny-Q8_0-00001-of-00003.gguf",
        "org/tiny/large/tiny-F32-00003-of-00003.gguf",
    ):
        files = loader.resolve(name, download_dir=str(tmp_path))
        assert files.gguf.path.name.endswith("-00001-of-00003.gguf")
        assert dict(loader.iter_weights(files)).keys() == read(whole).keys()


def test_the_hub_is_asked_for_all_parts(monkeypatch: Any) -> None:
    """The hub filters the files of a repository with fnmatch."""
    from huggingface_hub.utils import filter_repo_objects

    repository = [
        "config.json",
        "tiny-Q8_0.gguf",
        "tiny-Q4_K_M-00001-of-00002.gguf",
        "tiny-Q4_K_M-00002-of-00002.gguf",
        "tiny-IQ4_K_M.gguf",
        "big/tiny-F16-00001-of-00002.gguf",
        "big/tiny-F16-00002-of-00002.gguf",
    ]

    def asked(model: str) -> list[str]:
        found: list[str] = []

        def download(repo: str, **options: Any) -> str:
            patterns = {name: options[name] for name in ("allow_patterns", "ignore_patterns")}
            found.extend(filter_repo_objects(repository, **patterns))
            raise OSError("nothing is downloaded here")

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        with pytest.raises(ValueError, match="nothing is downloaded here"):
            loader.resolve(model)
        return found

    assert asked("org/tiny:Q8_0") == repository[1:2]
    assert asked("org/tiny/tiny-Q8_0.gguf") == repository[1:2]
    assert asked("org/tiny:Q4_K_M") == repository[2:4]
    assert asked("org/tiny/tiny-Q4_K_M-00002-of-00002.gguf") == repository[2:4]
    assert asked("org/tiny:F16") == repository[5:]
    assert asked("org/tiny/big/tiny-F16-00001-of-00002.gguf") == repository[5:]


# The output head


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_head_that_is_a_copy_of_the_embedding_is_tied(tmp_path: Path, kind: str) -> None:
    stored = gguf.GGMLQuantizationType[kind]
    embedding = np.random.default_rng(0).standard_normal((96, 64)).astype(np.float32)
    other = embedding.copy()
    other[-1, -1] = 9.0

    def tied(**tensors: np.ndarray) -> bool:
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
        for name, value in NUMBERS.items():
            add(writer, f"llama.{name}", value)
        for name, array in tensors.items():
            as_kind = gguf.GGMLQuantizationType.F16 if name == "half" else stored
            writer.add_tensor(
                "output.weight" if name == "half" else f"{name}.weight",
                gguf.quants.quantize(array, as_kind),
                raw_dtype=as_kind,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        files = loader.resolve(str(tmp_path))
        is_tied = loader.load_hf_config(files).tie_word_embeddings
        assert loader.head_differs(files) != is_tied
        return is_tied

    assert tied(token_embd=embedding)
    assert tied(token_embd=embedding, output=embedding)
    assert not tied(token_embd=embedding, output=other)
    assert not tied(token_embd=embedding, output=other[:90])
    assert not tied(token_embd=embedding, half=embedding)


# RoPE

PREFIX = "llama.rope.scaling."


def rope_of(path: Path) -> dict[str, Any]:
    return loader.load_hf_config(loader.resolve(str(path))).rope_parameters


@pytest.mark.parametrize(
    ("metadata", "rope"),
    [
        ({}, {"rope_type": "default"}),
        ({"type": "none", "factor": 4.0}, {"rope_type": "default"}),
        ({"factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"type": "linear", "factor": 0.0}, {"rope_type": "default"}),
        ({"llama.rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"llama.rope.scale_linear": 4.0, "factor": 2.0, "finetuned": True, "attn_factor": 1.0},
            {"rope_type": "linear", "factor": 2.0},
        ),
    ],
)
def test_rope_scaling_is_that_of_llama_cpp(
    tmp_path: Path, metadata: dict[str, Any], rope: dict[str, Any]
) -> None:
    """llama.cpp (build of llama-cpp-python 0.3.36): the type is linear if the file does not say,
    and `rope.scale_linear` is the old name of the factor.
    """
    fields = {key if "." in key else PREFIX + key: value for key, value in metadata.items()}
    assert rope_of(write(tmp_path / "m.gguf", fields)) == {"rope_theta": 10000.0, **rope}


@pytest.mark.parametrize(
    ("metadata", "rope"),
    [
        ({}, {}),
        ({"yarn_ext_factor": 1.0}, {}),
        ({"yarn_ext_factor": -1.0}, {}),
        ({"yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0}, {"beta_fast": 16.0, "beta_slow": 2.0}),
        ({"yarn_attn_factor": 0.75}, {"attention_factor": 0.75}),
        ({"yarn_log_multiplier": 0.5}, {"mscale": 1.0, "mscale_all_dim": 0.5}),
        ({"yarn_log_multiplier": 0.0}, {}),
    ],
)
def test_yarn_is_that_of_transformers(
    tmp_path: Path, metadata: dict[str, Any], rope: dict[str, Any]
) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    fields = {"type": "yarn", "factor": 4.0, "original_context_length": 32, **metadata}
    path = write(tmp_path / "m.gguf", {PREFIX + key: value for key, value in fields.items()})
    expected = {
        "rope_theta": 10000.0,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        **rope,
    }
    found = rope_of(path)
    assert found == expected
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=128,
        rope_theta=10000.0,
        rope_scaling=expected,
    )
    theirs, scale = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    frequencies, ours = rope_frequencies(found, 16, 128)
    torch.testing.assert_close(frequencies, theirs)
    assert ours == pytest.approx(scale)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"type": "longrope", "factor": 4.0}, "type 'longrope'; supported are none, linear and"),
        ({"type": "linear", "attn_factor": 1.2}, r"attn_factor=1.2.*accepted is 1.0"),
        ({"alpha": 1000.0}, r"llama.rope.scaling.alpha=1000.0, which is not supported"),
        ({"type": "yarn", "yarn_ext_factor": 0.5}, r"ext_factor is 0.5; accepted is 1.0 with"),
        ({"type": "linear", "yarn_ext_factor": 1.0}, r"ext_factor is 1.0; accepted is 0.0 without"),
    ],
)
def test_rope_scaling_of_another_kind_is_a_sentence(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "m.gguf", {PREFIX + key: value for key, value in metadata.items()})
    with pytest.raises(ValueError, match=message):
        rope_of(path)


def test_rope_that_is_scaled_twice_is_a_sentence(tmp_path: Path) -> None:
    tensors = {**TENSORS, "rope_freqs.weight": np.ones(8)}
    path = write(tmp_path / "m.gguf", {PREFIX + "factor": 4.0}, tensors)
    with pytest.raises(ValueError, match=r"scales RoPE twice, by rope_freqs.weight and by type"):
        rope_of(path)
    assert rope_of(write(path, tensors=tensors))["factor"] == 1.0


# Relatives of the families

PROMPT = list(range(5, 45)) * 2
BIASES = {f"{name}.bias": SHAPES[name][:1] for name in ("attn_q", "attn_k", "attn_v")}
QK_NORM = {"attn_q_norm.weight": (16,), "attn_k_norm.weight": (16,)}
WIDE = {f"{name}.weight": (64, 64) for name in ("attn_k", "attn_v")}
WIDE_QK_NORM = {**WIDE, "attn_q_norm.weight": (64,), "attn_k_norm.weight": (64,)}
SECTIONS = {"rope.dimension_sections": [2, 3, 3, 0]}
LINEAR = {"rope.scaling.factor": 4.0}
YARN = {**LINEAR, "rope.scaling.type": "yarn", "rope.scaling.original_context_length": 32}
POST_NORMS = {"post_attention_norm.weight": (64,), "post_ffw_norm.weight": (64,)}
WINDOW = {"attention.sliding_window": 24}
SOFTCAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}
# Layer 6 of 6 has no window, and the base below.
GEMMA3 = {**WINDOW, "block_count": 6, "rope.freq_base": 1e6, **LINEAR}
EXPERTS = {
    **dict.fromkeys(("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")),
    "ffn_gate_inp.weight": (4, 64),
    "ffn_gate_exps.weight": (4, 128, 64),
    "ffn_up_exps.weight": (4, 128, 64),
    "ffn_down_exps.weight": (4, 64, 128),
}
ROUTES = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 128}
SHARED = {
    "ffn_gate_inp_shexp.weight": (64,),
    "ffn_gate_shexp.weight": (128, 64),
    "ffn_up_shexp.weight": (128, 64),
    "ffn_down_shexp.weight": (64, 128),
}
SINKS = {
    **BIASES,
    **EXPERTS,
    "ffn_norm.weight": None,
    "post_attention_norm.weight": (64,),
    "attn_sinks.weight": (4,),
    "attn_output.bias": (64,),
    "ffn_gate_inp.bias": (4,),
    "ffn_gate_exps.bias": (4, 128),
    "ffn_up_exps.bias": (4, 128),
    "ffn_down_exps.bias": (4, 64),
}
# Architecture, further tensors of a layer (None: the layer lacks it), further metadata; then the
# first 3 tokens of llama-cpp-python 0.3.36: Llama(path, n_ctx=128), eval(PROMPT), the largest of
# scores[-1], eval.
RELATIVES: list[tuple[str, dict[str, Any], dict[str, Any], list[int]]] = [
    ("llama", {}, {}, [7, 20, 1]),
    ("llama", {}, LINEAR, [84, 74, 62]),
    ("llama", {}, YARN, [37, 19, 1]),
    ("mistral3", {}, {}, [7, 20, 1]),
    ("internlm2", {}, {}, [7, 20, 1]),
    ("xverse", {}, {}, [7, 20, 1]),
    ("ernie4_5", {}, {}, [7, 20, 1]),
    ("exaone", {}, {}, [7, 31, 75]),
    ("qwen2", BIASES, {}, [70, 58, 54]),
    ("qwen2vl", BIASES, SECTIONS, [70, 58, 54]),
    ("qwen3", QK_NORM, {}, [13, 83, 82]),
    ("qwen3vl", QK_NORM, SECTIONS, [13, 83, 82]),
    ("llama", EXPERTS, ROUTES, [23, 69, 75]),
    ("qwen2moe", {**BIASES, **EXPERTS, **SHARED}, ROUTES, [63, 71, 22]),
    ("qwen3moe", {**QK_NORM, **EXPERTS}, ROUTES, [22, 33, 33]),
    (
        "olmoe",
        {**WIDE_QK_NORM, **EXPERTS},
        {**ROUTES, "attention.head_count_kv": 4},
        [6, 19, 66],
    ),
    # llama.cpp rounds the ends of YaRN's ramp, also for gpt-oss. transformers does not.
    ("gpt-oss", SINKS, {**ROUTES, **WINDOW}, [29, 68, 92]),
    ("gemma2", POST_NORMS, {**WINDOW, **SOFTCAPS}, [20, 39, 39]),
    ("gemma3", {**POST_NORMS, **QK_NORM}, GEMMA3, [32, 52, 95]),
]


def write_relative(
    path: Path, arch: str, further: dict[str, Any], metadata: dict[str, Any]
) -> Path:
    generator = np.random.default_rng(5)
    tensors: dict[str, Any] = {"token_embd.weight": (96, 64), "output.weight": (96, 64)}
    if arch.startswith("gemma"):
        del tensors["output.weight"]  # llama.cpp's code ties the two
    tensors["output_norm.weight"] = (64,)
    layer = {**{f"{name}.weight": shape for name, shape in SHAPES.items()}, **further}
    for i in range(metadata.get("block_count", 2)):
        tensors.update({f"blk.{i}.{name}": shape for name, shape in layer.items() if shape})
    arrays = {
        name: 0.2 * generator.standard_normal(shape) + ("norm" in name)
        for name, shape in tensors.items()
    }
    for name in arrays:
        if arch.startswith("gemma") and "post_" in name:
            arrays[name] *= 8  # otherwise Gemma's large embeddings repeat the last token
    fields = {"block_count": 2, "vocab_size": 96, "rope.dimension_count": 16, **metadata}
    fields = {f"{arch}.{name}": value for name, value in fields.items()}
    return write(path, {**fields, "tokenizer.ggml.model": "none"}, arrays, arch)


@pytest.mark.parametrize(("arch", "further", "metadata", "expected"), RELATIVES)
def test_an_architecture_generates_what_llama_cpp_generates(
    tmp_path: Path,
    arch: str,
    further: dict[str, Any],
    metadata: dict[str, Any],
    expected: list[int],
) -> None:
    path = write_relative(tmp_path / "m.gguf", arch, further, metadata)
    llm = LLM(str(path), dtype="float32", num_gpu_blocks_override=32, skip_tokenizer_init=True)
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    (out,) = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
    assert list(out.outputs[0].token_ids) == expected


def test_every_architecture_is_compared_with_llama_cpp() -> None:
    from nanovllm.loader.gguf import ARCHITECTURES

    assert {arch for arch, *_ in RELATIVES} == set(ARCHITECTURES)


def test_a_scaling_of_q_by_position_is_a_sentence(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.gguf", {"mistral3.attention.temperature_scale": 0.1}, arch="mistral3"
    )
    with pytest.raises(ValueError, match=r"mistral3: attention.temperature_scale is 0.1.*is 0,"):
        loader.load_hf_config(loader.resolve(str(path)))


# What a start imports

TOKENS = ["<s>", "</s>", *"abcdefgh", "Ġ", "ab", "Ġa", "<|end|>", "<|x|>"]
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, *[1] * 11, 3, 4],
    "tokenizer.ggml.merges": ["a b", "Ġ a"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{{ messages[0]['content'] }}",
}
MODEL = {
    "token_embd.weight": (len(TOKENS), 64),
    "output_norm.weight": (64,),
    **{f"blk.0.{name}.weight": shape for name, shape in SHAPES.items()},
}
START = """
import sys
from nanovllm import LLM, SamplingParams
llm = LLM(sys.argv[1], device="cpu", num_gpu_blocks_override=16)
params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
(out,) = llm.generate(["ab a"], params, use_tqdm=False)
assert len(out.outputs[0].token_ids) == 2
unused = {"transformers", "huggingface_hub", "safetensors", "jinja2", "triton", "sympy",
          "torch._dynamo", "torch._inductor", "torch.onnx"} & set(sys.modules)
assert not unused, unused
assert llm.get_tokenizer().bos_token == "<s>"
assert llm.model_config.hf_config.hidden_size == 64
assert "transformers" in sys.modules
"""


def write_model(path: Path, metadata: dict[str, Any] | None = None) -> Path:
    """A model of one layer with a tokenizer."""
    return write(path, {"llama.block_count": 1, **TOKENIZER, **(metadata or {})}, MODEL)


def test_a_start_imports_no_library_that_only_clients_need(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf")
    folder = Path(nanovllm.__file__).parents[1]
    subprocess.run([sys.executable, "-c", START, str(path)], check=True, cwd=folder)


@pytest.mark.parametrize("has_kinds", [True, False])
def test_the_engines_tokenizer_does_what_that_of_transformers_does(
    tmp_path: Path, has_kinds: bool
) -> None:
    metadata = {} if has_kinds else {"tokenizer.ggml.token_type": [1] * len(TOKENS)}
    path = write_model(tmp_path / "m.gguf", metadata)
    ours = loader.load_tokenizer(str(path))
    theirs = loader.load_tokenizer(str(path)).to_transformers()
    assert ours.eos_token_id == theirs.eos_token_id
    names = ["<s>", "ab", "none", "<0x0A>"]
    assert ours.convert_tokens_to_ids(names) == theirs.convert_tokens_to_ids(names)
    for token_id in range(len(TOKENS) + 2):
        assert ours.convert_ids_to_tokens(token_id) == theirs.convert_ids_to_tokens(token_id)

    @settings(max_examples=50, deadline=None)
    @given(st.text("abcdefgh <|x|>end/s"), st.booleans())
    def agree(text: str, flag: bool) -> None:
        ids = theirs.encode(text, add_special_tokens=flag)
        assert ours.encode(text, add_special_tokens=flag) == ids
        expected = theirs.decode(ids, skip_special_tokens=flag)
        assert ours.decode(ids, skip_special_tokens=flag) == expected

    agree()


def test_a_client_that_changes_the_tokenizer_changes_that_of_the_engine(tmp_path: Path) -> None:
    llm = make(write_model(tmp_path / "m.gguf"))
    params = SamplingParams(max_tokens=1, ignore_eos=True)

    def prompt_ids() -> list[int]:
        return llm.generate(["abcd"], params, use_tqdm=False)[0].prompt_token_ids

    assert prompt_ids() == [0, 11, 4, 5]
    tokenizer = llm.get_tokenizer()
    assert tokenizer is llm.get_tokenizer() is llm.llm_engine.get_tokenizer()
    tokenizer("abcd", truncation=True, max_length=2)
    assert prompt_ids() == [0, 11, 4, 5]
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("d", "c")
    assert prompt_ids() == [0, 11, 4, 4]


# Metadata that is missing


def without(path: Path, *keys: str) -> Path:
    """A model of one layer whose file lacks these fields."""
    fields = {name: value for name, value in TOKENIZER.items() if name not in keys}
    return write(path, {"llama.block_count": 1, **fields}, MODEL)


def make(path: Path) -> LLM:
    return LLM(str(path), dtype="float32", num_gpu_blocks_override=16)


def test_chat_without_a_template_is_a_sentence(tmp_path: Path) -> None:
    llm = make(without(tmp_path / "m.gguf", "tokenizer.chat_template"))
    messages = [{"role": "user", "content": "ab"}]
    with pytest.raises(ValueError, match="has no chat template; pass chat_template="):
        llm.chat(messages, use_tqdm=False)
    params = SamplingParams(max_tokens=1)
    template = TOKENIZER["tokenizer.chat_template"]
    (out,) = llm.chat(messages, params, chat_template=template, use_tqdm=False)
    assert out.prompt_token_ids == [11]


def test_without_kinds_the_ends_of_answers_are_control_tokens(tmp_path: Path) -> None:
    """llama.cpp makes control tokens of tokens that it knows as ends, and all others are plain."""
    llm = make(without(tmp_path / "m.gguf", "tokenizer.ggml.token_type"))
    end = TOKENS.index("<|end|>")
    assert llm.llm_engine.eos_token_ids == {1, end}
    tokenizer = llm.get_tokenizer()
    assert tokenizer.encode("ab<|end|>", add_special_tokens=False) == [11, end]
    assert tokenizer.decode([11, end, 0, 1], skip_special_tokens=True) == "ab"
    assert len(tokenizer.encode("<|x|>", add_special_tokens=False)) != 1


@pytest.mark.parametrize("key", ["model", "tokens", "merges", "scores"])
def test_a_tokenizer_that_is_not_whole_is_a_sentence(tmp_path: Path, key: str) -> None:
    path = without(tmp_path / "m.gguf", f"tokenizer.ggml.{key}")
    if key == "scores":
        write_model(path, {"tokenizer.ggml.model": "llama"})
    message = rf"m\.gguf has no 'tokenizer.ggml.{key}'.*pass tokenizer=.*skip_tokenizer_init=True"
    with pytest.raises(ValueError, match=message):
        make(path)
    LLM(str(path), num_gpu_blocks_override=16, skip_tokenizer_init=True)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"merges": ["a b", "q z"]}, r"tokenizer.ggml.merges cannot be used .*pass tokenizer="),
        ({"merges": ["ab"]}, r"tokenizer.ggml.merges cannot be used .*pass tokenizer="),
        ({"token_type": [1, 1]}, r"token_type has 2 items; accepted is one for each of the 15"),
        ({"model": "llama", "scores": [0.0, 1.0]}, r"scores has 2 items; accepted is one for each"),
    ],
)
def test_lists_that_do_not_fit_the_vocabulary_are_a_sentence(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    fields = {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}
    with pytest.raises(ValueError, match=message):
        make(write_model(tmp_path / "m.gguf", fields))
