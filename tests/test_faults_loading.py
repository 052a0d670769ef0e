"""Model files of other makers: each loads as its maker's own library loads it, or is refused by one sentence.

The oracle is transformers for folders and llama.cpp for GGUF files: what is written here of the latter is what build
11549 (xllamacpp 2026.10.11549) answers for the same file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import EOS, greedy, scripted_model, tiny_model, tiny_tokenizer
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanovllm import LLM, SamplingParams, loader
from nanovllm.kernels import library

gguf = pytest.importorskip("gguf")
Kind = gguf.TokenType
PROMPT = [70, 71, 72, 73]
MISSING = "<missing>"
IS_5 = int(transformers.__version__.split(".")[0]) >= 5
needs_5 = pytest.mark.skipif(
    not IS_5, reason="transformers 4 checks fewer fields, and reads some otherwise"
)
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: Any) -> dict[str, str]:
    """Folders of tiny models with tokenizers."""
    made = {}
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        made[family], _ = tiny_model(
            tmp_path_factory.mktemp(family), family, max_position_embeddings=64
        )
        tiny_tokenizer().save_pretrained(made[family])
    return made


def changed(base: str, folder: Path, file: str, fields: dict[str, Any]) -> str:
    """A copy of a model's folder in which `file` has other fields; MISSING takes a field out."""
    shutil.copytree(base, folder)
    path = folder / file
    merged = {**(json.loads(path.read_text()) if path.exists() else {}), **fields}
    path.write_text(
        json.dumps({name: value for name, value in merged.items() if value is not MISSING})
    )
    return str(folder)


def make(folder: str | Path, **arguments: Any) -> LLM:
    return LLM(str(folder), **{"dtype": "float32", "num_gpu_blocks_override": 256, **arguments})


def tokens(llm: LLM, params: SamplingParams = GREEDY) -> list[int]:
    return llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0].token_ids


def of_transformers(folder: str) -> list[int]:
    dtype = {"dtype" if IS_5 else "torch_dtype": torch.float32}
    return greedy(AutoModelForCausalLM.from_pretrained(folder, **dtype), PROMPT, 6)


def outcome(run: Callable[[], list[int]]) -> tuple[list[int] | None, Exception | None]:
    """What a call returns, and what it raises."""
    try:
        return run(), None
    except Exception as err:
        return None, err


# config.json

RUN = [
    ("Llama", {"architectures": None}),
    ("Qwen3", {"architectures": MISSING}),
    ("Mistral", {"architectures": []}),
    ("Qwen2", {"architectures": "Qwen2ForCausalLM"}),
    ("Llama", {"hidden_act": "swish"}),
    ("Llama", {"head_dim": None}),
    ("Mistral", {"head_dim": MISSING}),
    ("Llama", {"rms_norm_eps": MISSING, "hidden_act": MISSING, "tie_word_embeddings": MISSING}),
    ("Llama", {"dtype": "auto"}),
    ("Llama", {"dtype": MISSING, "torch_dtype": "torch.float32"}),
    ("Qwen3", {"dtype": None, "torch_dtype": None}),
    ("Llama", {"quantization_config": None}),
    ("Llama", {"quantization_config": {"quant_method": "none"}}),
    # Llama has no window, and only Llama has biases in its feed-forward.
    ("Llama", {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}),
    ("Qwen2", {"mlp_bias": True}),
    ("Mistral", {"attention_bias": "auto"}),
    ("Mistral", {"sliding_window": 2}),
    ("Mistral", {"sliding_window": 2, "layer_types": ["full_attention", "sliding_attention"]}),
    (
        "Mistral",
        {
            "sliding_window": 2,
            "layer_types": ["full_attention", "sliding_attention"],
            "architectures": None,
        },
    ),
    ("Qwen3", {"sliding_window": 0}),
    ("Qwen3", {"use_sliding_window": True, "sliding_window": None, "layer_types": MISSING}),
    (
        "Qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 2,
            "layer_types": None,
            "max_window_layers": 1,
        },
    ),
    ("Llama", {"rope_parameters": None}),
    ("Llama", {"rope_parameters": MISSING, "rope_theta": 500}),
    ("Qwen3", {"rope_parameters": MISSING, "rope_theta": 500.5, "rope_scaling": None}),
    (
        "Llama",
        {
            "rope_parameters": MISSING,
            "rope_theta": 777,
            "rope_scaling": {"type": "linear", "factor": 2},
        },
    ),
    (
        "Llama",
        {
            "rope_parameters": {
                "type": "yarn",
                "factor": None,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    ("Llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": None}}),
    ("Llama", {"eos_token_id": [EOS, 7]}),
    ("Llama", {"eos_token_id": None, "bos_token_id": None, "pad_token_id": -1}),
]


@needs_5
@pytest.mark.parametrize(("family", "fields"), RUN, ids=str)
def test_a_config_runs_as_in_transformers(
    bases: Any, tmp_path: Path, family: str, fields: Any
) -> None:
    folder = changed(bases[family], tmp_path / "m", "config.json", fields)
    assert tokens(make(folder)) == of_transformers(folder)


def test_fields_that_transformers_fails_over_and_that_say_nothing_are_passed_by(
    bases: Any, tmp_path: Path
) -> None:
    """auto_map, head_dim and rope_theta of null are what a missing field is."""
    for number, fields in enumerate(
        (
            {"auto_map": None},
            {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
            {"rope_parameters": MISSING, "rope_theta": None, "rope_scaling": {"type": None}},
        )
    ):
        folder = changed(bases["Llama"], tmp_path / str(number), "config.json", fields)
        assert tokens(make(folder)) == of_transformers(bases["Llama"])


REFUSED = [
    ("Llama", "architectures", 64),
    ("Llama", "architectures", ["GPT9LMHeadModel"]),
    ("Llama", "architectures", [4]),
    ("Llama", "model_type", MISSING),
    ("Llama", "model_type", None),
    ("Llama", "model_type", []),
    ("Llama", "model_type", "nonsense"),
    ("Llama", "vocab_size", None),
    ("Llama", "vocab_size", MISSING),
    ("Llama", "vocab_size", "300"),
    ("Llama", "hidden_size", 64.0),
    ("Llama", "intermediate_size", True),
    ("Llama", "num_hidden_layers", 0),
    ("Llama", "num_hidden_layers", 3),
    ("Llama", "num_attention_heads", 0),
    ("Llama", "num_key_value_heads", 3),
    ("Llama", "num_key_value_heads", None),
    ("Llama", "head_dim", 0),
    ("Llama", "head_dim", "auto"),
    ("Qwen2", "head_dim", 1.5),
    ("Llama", "hidden_act", "gelu"),
    ("Llama", "hidden_act", None),
    ("Llama", "rms_norm_eps", "1e-6"),
    ("Llama", "rms_norm_eps", -1.0),
    ("Llama", "max_position_embeddings", 0),
    ("Llama", "max_position_embeddings", None),
    ("Llama", "tie_word_embeddings", "true"),
    ("Llama", "attention_bias", True),
    ("Llama", "mlp_bias", True),
    ("Mistral", "sliding_window", 0),
    ("Mistral", "sliding_window", -1),
    ("Mistral", "sliding_window", "64"),
    ("Llama", "layer_types", 5),
    ("Qwen3", "layer_types", ["full_attention"]),
    ("Llama", "rope_parameters", "linear"),
    ("Llama", "rope_parameters", {"rope_type": "linear"}),
    ("Llama", "rope_parameters", {"rope_type": "linear", "factor": "2"}),
    ("Llama", "rope_parameters", {"rope_type": "linear", "factor": 0.0}),
    ("Llama", "rope_parameters", {"rope_type": "nonsense", "factor": 2.0}),
    ("Llama", "rope_parameters", {"rope_type": "default", "rope_theta": "500"}),
    ("Llama", "rope_parameters", {"rope_type": "default", "rope_theta": 0}),
    ("Qwen3", "rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 500.0}}),
    ("Llama", "eos_token_id", "257"),
    ("Llama", "eos_token_id", {}),
    ("Llama", "id2label", 5),
    ("Llama", "quantization_config", {"quant_method": "awq", "bits": 4}),
    ("Llama", "quantization_config", {"quant_method": "fp8"}),
    ("Llama", "quantization_config", {"load_in_4bit": True}),
    ("Llama", "quantization_config", "gptq"),
    ("Llama", "compression_config", {"quant_method": "compressed-tensors"}),
]


@needs_5
@pytest.mark.parametrize(("family", "name", "value"), REFUSED, ids=str)
def test_a_config_that_cannot_run_is_a_sentence(
    bases: Any, tmp_path: Path, family: str, name: str, value: Any
) -> None:
    folder = changed(bases[family], tmp_path / "m", "config.json", {name: value})
    with pytest.raises(ValueError, match=rf"config\.json.*{name}|{name}.*config\.json") as refused:
        make(folder)
    assert "\n" not in str(refused.value)


@needs_5
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("value", [None, "auto", -1, True, [4]], ids=str)
def test_any_field_of_any_type_runs_as_in_transformers_or_is_a_sentence(
    bases: Any, tmp_path: Path, family: str, value: Any
) -> None:
    for name in json.loads(Path(bases[family], "config.json").read_text()):
        folder = changed(bases[family], tmp_path / name, "config.json", {name: value})
        found, error = outcome(lambda folder=folder: tokens(make(folder)))
        if found is None:
            assert isinstance(error, ValueError), name
            assert "config.json" in str(error), name
            assert name in str(error)
            continue
        expected, error = outcome(lambda folder=folder: of_transformers(folder))
        # transformers reads fields that this engine has no use for
        assert found == expected or (
            error and name in ("initializer_range", "use_cache", "pad_token_id")
        ), name


def test_quantised_weights_are_refused_before_they_are_read(bases: Any, tmp_path: Path) -> None:
    folder = changed(
        bases["Llama"],
        tmp_path / "m",
        "config.json",
        {"quantization_config": {"quant_method": "gptq"}},
    )
    Path(folder, "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(
        ValueError, match=r"config\.json: quantization_config: quant_method is 'gptq'"
    ):
        make(folder)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int32]
)
@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"]
)
def test_weights_that_are_no_floats_are_refused(
    bases: Any, tmp_path: Path, dtype: torch.dtype, name: str
) -> None:
    folder = changed(bases["Llama"], tmp_path / "m", "config.json", {})
    weights = load_file(Path(folder, "model.safetensors"))
    weights[name] = weights[name].mul(8).to(dtype)
    save_file(weights, Path(folder, "model.safetensors"))
    with pytest.raises(
        ValueError, match=f"tensor {name} is stored as {str(dtype)[6:]}; accepted are float32"
    ):
        make(folder)


@pytest.mark.parametrize("dtype", ["int8", "64", 5, [4], "float8_e4m3fn"], ids=str)
def test_a_dtype_that_is_none_is_a_sentence_unless_another_is_asked_for(
    bases: Any, tmp_path: Path, dtype: Any
) -> None:
    folder = changed(bases["Llama"], tmp_path / "m", "config.json", {"dtype": dtype})
    assert len(tokens(make(folder))) == 6
    with pytest.raises(ValueError, match=r"config\.json: dtype"):
        make(folder, dtype="auto")


# Tied embeddings


def save_tied(base: str, folder: Path, weights: dict[str, torch.Tensor]) -> str:
    changed(base, folder, "config.json", {"tie_word_embeddings": True})
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@needs_5
@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight", "both"])
def test_a_tied_model_takes_its_matrix_from_either_name(
    bases: Any, tmp_path: Path, kept: str, caplog: pytest.LogCaptureFixture
) -> None:
    weights = load_file(Path(bases["Llama"], "model.safetensors"))
    matrix = weights.pop("lm_head.weight")
    del weights["model.embed_tokens.weight"]
    names = ["lm_head.weight", "model.embed_tokens.weight"] if kept == "both" else [kept]
    folder = save_tied(
        bases["Llama"], tmp_path / "m", {**weights, **{name: matrix.clone() for name in names}}
    )
    assert tokens(make(folder)) == of_transformers(folder)
    assert not caplog.records


def test_a_tied_model_with_another_head_is_what_transformers_makes_of_it(
    bases: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = load_file(Path(bases["Llama"], "model.safetensors"))
    folder = save_tied(bases["Llama"], tmp_path / "m", weights)
    with caplog.at_level(logging.WARNING, "nanovllm"):
        found = tokens(make(folder))
    assert "tie_word_embeddings" in caplog.text
    assert "lm_head.weight" in caplog.text
    if IS_5:  # 4 used the embedding for both
        assert found == of_transformers(folder)


# generation_config.json

SCRIPT = (97, 98, 99, 100, 101, 102, 103)  # after 97 comes 98, and so on


@pytest.fixture
def scripted(tmp_path: Path) -> Path:
    """A model that says its script, with an EOS in its generation_config.json that no other file knows."""
    folder = shutil.copytree(scripted_model(SCRIPT), tmp_path / "scripted")
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [EOS, 100], "temperature": 0.5})
    )
    return folder


def said(llm: LLM) -> list[int]:
    return (
        llm.generate([[97]], SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)[0]
        .outputs[0]
        .token_ids
    )


def test_vllms_sampling_keeps_the_end_tokens(scripted: Path) -> None:
    llm = make(scripted, generation_config="vllm")
    assert said(llm) == [98, 99, 100]
    assert llm.get_default_sampling_params() == SamplingParams()
    assert make(scripted).get_default_sampling_params() == SamplingParams(temperature=0.5)


@pytest.mark.parametrize("end", [[99], 101])
def test_the_generation_config_of_another_folder(scripted: Path, tmp_path: Path, end: Any) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ValueError, match=r"generation_config=.*other.*no generation_config\.json"):
        make(scripted, generation_config=str(other))
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": end, "top_k": 5}))
    llm = make(scripted, generation_config=str(other))
    assert said(llm)[-1] == (end if isinstance(end, int) else end[0])
    assert llm.get_default_sampling_params() == SamplingParams(top_k=5)
    with pytest.raises(ValueError, match="generation_config='/no/such' is no folder here"):
        make(scripted, generation_config="/no/such")


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.6}),
        ({"do_sample": False}, {}),
        ({"do_sample": "false", "num_beams": "4", "max_length": None}, {}),
        (
            {
                "temperature": None,
                "top_p": None,
                "top_k": None,
                "max_new_tokens": None,
                "eos_token_id": None,
            },
            {},
        ),
        (
            {"temperature": 1, "top_k": 0, "min_p": 0, "max_new_tokens": 3},
            {"top_k": 0, "max_tokens": 3},
        ),
    ],
    ids=str,
)
def test_generation_configs_that_mean_what_they_mean_to_vllm(
    bases: Any, tmp_path: Path, fields: Any, params: Any
) -> None:
    folder = changed(bases["Llama"], tmp_path / "m", "generation_config.json", fields)
    assert make(folder).get_default_sampling_params() == SamplingParams(**params)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, value)
            for name in ("temperature", "top_p", "min_p")
            for value in ("0.7", True, [1], -1)
        ),
        *(("top_k", value) for value in ("auto", 2.5, True, {})),
        *(("repetition_penalty", value) for value in ("1.1", 0, [])),
        *(("max_new_tokens", value) for value in ("7", 0, 2.0, True)),
        *(("eos_token_id", value) for value in ("257", "auto", 1.5, True, {}, [1, None], ["a"])),
    ],
    ids=str,
)
def test_a_generation_config_with_a_wrong_value_is_a_sentence(
    bases: Any, tmp_path: Path, name: str, value: Any
) -> None:
    folder = changed(bases["Llama"], tmp_path / "m", "generation_config.json", {name: value})
    with pytest.raises(ValueError, match=rf"generation_config\.json: {name}"):
        make(folder).get_default_sampling_params()


def test_end_tokens_that_cannot_be_sampled_end_nothing_and_break_nothing(
    bases: Any, tmp_path: Path
) -> None:
    ends = {"eos_token_id": [-1, 7, 300, 10**12]}
    llm = make(changed(bases["Llama"], tmp_path / "m", "generation_config.json", ends))
    assert llm.llm_engine.eos_token_ids == {7, EOS}
    assert len(tokens(llm, SamplingParams(temperature=0, min_tokens=4, max_tokens=4))) == 4


@pytest.mark.parametrize(
    "content", ["[]", "null", "5", '"x"', "{", "", "\ufeff{}", "[" * 100_000, "\xff"]
)
@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "model.safetensors.index.json",
    ],
)
def test_a_file_that_holds_no_object_is_a_sentence_that_names_it(
    bases: Any, tmp_path: Path, file: str, content: str
) -> None:
    folder = Path(changed(bases["Llama"], tmp_path / "m", file, {}))
    if file == "model.safetensors.index.json":
        (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / file).write_bytes(content.encode("latin-1" if content == "\xff" else "utf-8"))
    with pytest.raises(ValueError, match=f"{file}.*accepted is one JSON object") as refused:
        make(folder)
    assert "\n" not in str(refused.value)


# tokenizer_config.json


@pytest.mark.parametrize(
    "fields",
    [
        {"bos_token": None},
        {"tokenizer_class": MISSING},
        {"tokenizer_class": "auto"},
        {"model_max_length": None},
        {"model_max_length": "auto"},
        {"eos_token": {"__type": "AddedToken", "content": "</s>"}},
        {"chat_template": None},
        {"padding_side": None},
        {"added_tokens_decoder": {}},
    ],
    ids=str,
)
def test_a_tokenizer_config_works_as_in_transformers(
    bases: Any, tmp_path: Path, fields: Any
) -> None:
    folder = changed(bases["Llama"], tmp_path / "m", "tokenizer_config.json", fields)
    try:
        theirs = AutoTokenizer.from_pretrained(folder)
        theirs("the hi")
    except Exception:  # other versions of transformers take other values
        with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
            make(folder)
        return
    out = make(folder).generate(["the hi"], GREEDY, use_tqdm=False)[0]
    assert out.prompt_token_ids == theirs("the hi").input_ids
    assert out.outputs[0].text == theirs.decode(out.outputs[0].token_ids, skip_special_tokens=True)


@needs_5
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer_class", 64),
        ("bos_token", 5),
        ("eos_token", ["</s>"]),
        ("model_input_names", True),
    ],
    ids=str,
)
def test_a_tokenizer_config_with_a_wrong_value_is_a_sentence(
    bases: Any, tmp_path: Path, name: str, value: Any
) -> None:
    folder = changed(bases["Llama"], tmp_path / "m", "tokenizer_config.json", {name: value})
    with pytest.raises(ValueError, match=rf"tokenizer=.*tokenizer_config\.json: {name}="):
        make(folder)


def test_a_tilde_in_tokenizer_and_download_dir_is_the_home(
    bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    llm = make(bases["Llama"], tokenizer="~/plain")
    assert llm.get_tokenizer().encode("the") == tiny_tokenizer().encode("the")
    snapshot = tmp_path / "cache" / "models--org--tiny" / "snapshots" / "abc"
    shutil.copytree(bases["Llama"], snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert loader.resolve("org/tiny", download_dir="~/cache").folder == snapshot


# GGUF

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [
    "' t",
    "1 2",
    "12 3",
    "123 4",
    "1234 5",
    "4 5",
    "45 6",
    "! !",
    "$ 5",
    "Ġ Ġ",
    "Ġ 1",
    "Ċ Ċ",
    "a T",
    ". x",
]
WORDS = [*ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]


def write_gguf(
    path: Path,
    *,
    specials: dict[str, Any] | None = None,
    pre: str | None = "gpt-2",
    numbers: dict[str, Any] | None = None,
    bias: str = "",
    arch: str = "llama",
) -> Any:
    """A GGUF file of a random model, and the transformers model that it was made from.

    specials: tokens after the words, by name, with their kind; the first is EOS. numbers: metadata of the architecture
    with other values. bias: the stems that have biases in the file, such as "attn_q attn_k"; others are zero.
    """
    specials = specials or {"<end>": Kind.CONTROL}
    family = {"llama": "Llama", "qwen2": "Qwen2"}[arch]
    sizes = {
        "vocab_size": len(WORDS) + len(specials),
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
    }
    with_bias = {"attention_bias": bool(bias), "mlp_bias": "ffn" in bias} if arch == "llama" else {}
    _, model = tiny_model(path.parent / "source", family, **sizes, **with_bias)
    config = model.config
    fields = {
        "context_length": 64,
        "embedding_length": 64,
        "feed_forward_length": config.intermediate_size,
        "block_count": 2,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        **(numbers or {}),
    }
    writer = gguf.GGUFWriter(path, arch)
    for name, value in fields.items():
        key = f"{arch}.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list([*WORDS, *specials])
    writer.add_token_types([Kind.NORMAL] * len(WORDS) + list(specials.values()))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(len(WORDS))
    add_tensors(writer, model, arch, bias.split())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def add_tensors(writer: Any, model: Any, arch: str, biased: list[str]) -> None:
    """The model's weights as llama.cpp converts them. Biases of other stems become zero, in the model too."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], 2)
    for name, tensor in model.state_dict().items():
        stored = names.get_name(name, (".weight", ".bias"))
        if stored.endswith(".bias") and stored.split(".")[-2] not in biased:
            tensor.zero_()  # the model's own memory
            continue
        array = tensor.numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = 4 if "q_proj" in name else 2
            array = (
                array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
            )
        writer.add_tensor(stored, np.ascontiguousarray(array))


@pytest.mark.parametrize("name", ["m.gguf", "m.GGUF", "sha256-9999d473", "model.bin", "gguf"])
def test_a_gguf_file_is_known_by_its_first_bytes(tmp_path: Path, name: str) -> None:
    path = tmp_path / "blobs" / name
    path.parent.mkdir()
    model = write_gguf(path)
    shutil.rmtree(path.parent / "source")
    expected = greedy(model, PROMPT, 6)
    for arguments in ({}, {"load_format": "gguf"}, {"tokenizer": str(path)}):
        llm = make(path, **arguments)
        assert tokens(llm) == expected
        assert llm.get_tokenizer().decode(llm.get_tokenizer().encode("a'tx")) == "a'tx"
    assert tokens(make(path.parent)) == expected  # alone in its folder
    assert make(path.parent, tokenizer=str(path.parent)).get_tokenizer().eos_token == "<end>"
    with pytest.raises(
        ValueError, match="is a GGUF file; with load_format='safetensors' give a folder"
    ):
        make(path, load_format="safetensors")


def test_a_file_of_another_format_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"ggml" * 20)
    with pytest.raises(ValueError, match="is one file and no GGUF"):
        make(tmp_path / "weights")
    (tmp_path / "weights.GGUF").write_bytes(b"ggml" * 20)
    with pytest.raises(ValueError, match=r"weights\.GGUF.*cannot be read as GGUF"):
        make(tmp_path / "weights.GGUF")


C, U, N = Kind.CONTROL, Kind.USER_DEFINED, Kind.NORMAL


@pytest.mark.parametrize(
    ("specials", "ends"),
    [
        ({"<eos>": C, "<|eot_id|>": C}, ["<eos>", "<|eot_id|>"]),
        (
            {"<|end_of_text|>": C, "<|eom_id|>": C, "<|start|>": C},
            ["<|end_of_text|>", "<|eom_id|>"],
        ),
        ({"<|endoftext|>": C, "<|im_start|>": C, "<|im_end|>": C}, ["<|endoftext|>", "<|im_end|>"]),
        ({"</s>": C, "<end_of_turn>": C, "[INST]": C}, ["</s>", "<end_of_turn>"]),
        ({"<x>": C, "<|im_end|>": U}, ["<x>", "<|im_end|>"]),
        ({"<x>": C, "<|end|>": C, "<|endoftext|>": C}, ["<x>", "<|end|>", "<|endoftext|>"]),
        (
            {"<x>": C, "<|end|>": C, "<|return|>": C, "<|call|>": C},
            ["<x>", "<|return|>", "<|call|>"],
        ),
        (
            {"<x>": C, "<|end|>": C, "<|flush|>": C, "<|calls|>": C},
            ["<x>", "<|flush|>", "<|calls|>"],
        ),
        (
            {"<x>": C, "<|fim_pad|>": C, "<|file_sep|>": C, "<|fim_middle|>": C},
            ["<x>", "<|fim_pad|>", "<|file_sep|>"],
        ),
    ],
    ids=str,
)
def test_a_gguf_answer_ends_where_llama_cpp_ends_it(
    tmp_path: Path, specials: Any, ends: list[str]
) -> None:
    write_gguf(tmp_path / "m.gguf", specials=specials)
    llm = make(tmp_path / "m.gguf")
    names = [*WORDS, *specials]
    assert {names[token] for token in llm.llm_engine.eos_token_ids} == set(ends)
    for end in ends:  # a bias makes the model say it
        params = SamplingParams(temperature=0, max_tokens=3, logit_bias={names.index(end): 100.0})
        assert tokens(llm, params) == [names.index(end)]


def test_a_plain_word_that_looks_like_an_end_is_none(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", specials={"<x>": C, "<|im_end|>": N})
    assert make(tmp_path / "m.gguf").llm_engine.eos_token_ids == {len(WORDS)}


@pytest.mark.parametrize(
    "numbers",
    [
        {"attention.head_count": [4]},
        {"attention.head_count": [4, 4], "attention.head_count_kv": [2, 2]},
        {"feed_forward_length": [96, 96], "attention.head_count_kv": [2]},
    ],
    ids=str,
)
def test_gguf_numbers_that_are_equal_for_all_layers(tmp_path: Path, numbers: Any) -> None:
    model = write_gguf(tmp_path / "m.gguf", numbers=numbers)
    assert tokens(make(tmp_path / "m.gguf")) == greedy(model, PROMPT, 6)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (
            {"attention.head_count": [4, 2]},
            r"llama\.attention\.head_count is \[4, 2\]; accepted is one value",
        ),
        ({"feed_forward_length": [96, 48]}, r"llama\.feed_forward_length is \[96, 48\]"),
        ({"attention.head_count": None}, r"attention\.head_count is missing"),
        ({"block_count": None}, r"block_count is missing"),
        (
            {"attention.head_count": 0},
            r"attention\.head_count is 0; accepted is an integer of at least 1",
        ),
        ({"context_length": 0}, r"context_length is 0"),
        ({"embedding_length": 2.5}, r"embedding_length is 2\.5"),
    ],
    ids=str,
)
def test_gguf_numbers_that_cannot_be_used_are_a_sentence(
    tmp_path: Path, numbers: Any, message: str
) -> None:
    write_gguf(tmp_path / "m.gguf", numbers=numbers)
    with pytest.raises(ValueError, match=rf"m\.gguf.*{message}"):
        make(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("arch", "bias"),
    [
        ("llama", "attn_q attn_k attn_v"),
        ("llama", "attn_q attn_k attn_v attn_output"),
        ("llama", "attn_output"),
        ("llama", "attn_v ffn_down"),
        ("qwen2", "attn_q attn_k attn_v"),
        ("qwen2", ""),
    ],
)
def test_gguf_projections_have_the_biases_that_the_file_holds(
    tmp_path: Path, arch: str, bias: str
) -> None:
    model = write_gguf(tmp_path / "m.gguf", arch=arch, bias=bias)
    assert tokens(make(tmp_path / "m.gguf")) == greedy(model, PROMPT, 6)


TEXT = "don't 123456 !!$5  aT\n\n.x12"
CUTS = {
    "default": "d|o|n|'|t| |123|456| |!!|$|5| | |aT|\n\n|.|x|12",
    None: "d|o|n|'|t| |123|456| |!!|$|5| | |aT|\n\n|.|x|12",
    "gpt-2": "d|o|n|'t| |12345|6| |!!|$|5| | |aT|\n|\n|.|x|12",
    "a.x-4.0": "d|o|n|'t| |12345|6| |!!|$|5| | |aT|\n|\n|.|x|12",
    "pixtral": "d|o|n|'t| |123|456| |!!|$|5| | |aT|\n\n|.x|12",
    "dbrx": "d|o|n|'t| |123|456| |!!|$|5| | |aT|\n\n|.x|12",
    "megrez": "d|o|n|'t| |1|2|3|4|5|6| |!!|$|5| | |aT|\n\n|.x|1|2",
    "seed-coder": "d|o|n|'t| |1|2|3|4|5|6| |!!|$|5| | |aT|\n\n|.x|1|2",
    "llama4": "d|o|n|'t| |123|456| |!!|$|5| | |a|T|\n\n|.x|12",
    "deepseek-v3": "d|o|n|'t| |123|456| |!!|$|5| | |aT|\n\n|.x|12",
    "deepseek-coder": "d|o|n|'|t| |1|2|3|4|5|6| |!!|$|5| | |aT|\n|\n|.|x|1|2",
    "smollm": "d|o|n|'t| |1|2|3|4|5|6| |!!|$|5| | |aT|\n|\n|.|x|1|2",
}


@pytest.mark.parametrize("pre", CUTS)
def test_gguf_text_is_cut_as_llama_cpp_cuts_it(
    tmp_path: Path, pre: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    write_gguf(tmp_path / "m.gguf", pre=pre)
    with caplog.at_level(logging.WARNING, "nanovllm"):
        tokenizer = loader.load_tokenizer(str(tmp_path / "m.gguf")).to_transformers()
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert "|".join(tokenizer.decode([token]) for token in ids) == CUTS[pre]
    assert ("tokenizer.ggml.pre" in caplog.text) == (pre in (None, "default"))


def test_an_unknown_rule_of_cutting_text_is_a_sentence(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", pre="mistral-bpe")
    with pytest.raises(ValueError, match=r"cuts text as 'mistral-bpe' does.*pass tokenizer="):
        make(tmp_path / "m.gguf")


# Compiled kernels


def spoil_empty(content: bytes) -> bytes:
    return b""


def spoil_cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def spoil_end(content: bytes) -> bytes:
    return content[:-1]


def spoil_middle(content: bytes) -> bytes:
    return content[:2000] + b"\0" * 64 + content[2064:]


def spoil_other(content: bytes) -> bytes:
    return b"no library at all"


def signed(content: bytes) -> bytes:
    return content + hashlib.sha256(content).digest()


def spoil_machine(content: bytes) -> bytes:
    """The two bytes of an ELF file that name the machine say AArch64."""
    return signed(content[:18] + b"\xb7\0" + content[20:-32])


def spoil_text(content: bytes) -> bytes:
    return signed(b"no library, and whole")


@pytest.fixture(scope="module")
def small(tmp_path_factory: Any) -> Path:
    """A source that builds at once, unlike that of the kernels."""
    source = tmp_path_factory.mktemp("source") / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    return source


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    "spoil",
    [spoil_empty, spoil_cut, spoil_end, spoil_middle, spoil_other, spoil_machine, spoil_text],
)
def test_a_damaged_kernel_library_is_built_again(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = library.build(small)
    whole, time_built = built.read_bytes(), built.stat().st_mtime_ns
    assert library.build(small) == built
    assert built.stat().st_mtime_ns == time_built  # the second time it is found
    built.write_bytes(spoil(whole))
    loaded = library.load.__wrapped__(small)
    assert loaded is not None
    assert loaded.answer() == 42
    assert built.read_bytes() == whole
