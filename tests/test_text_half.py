"""The text half of multimodal checkpoints answers as transformers' whole model does."""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_families import make_llm
from tiny import SIZES, greedy, random_prompts, session_folder, tiny_tokenizer

from nanovllm import LLM, SamplingParams
from nanovllm.loader.text_half import text_name
from nanovllm.models.registry import MULTIMODAL

if not hasattr(transformers, "Qwen3VLConfig"):
    pytest.skip("transformers is too old for some of the models", allow_module_level=True)

ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
# Name of transformers' classes -> (text_config, vision_config, further fields).
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Gemma3": (
        {
            "head_dim": 16,
            "sliding_window": 24,
            "query_pre_attn_scalar": 20,
            "num_hidden_layers": 6,
            "tie_word_embeddings": True,
        },
        ENCODER,
        {"mm_tokens_per_image": 4},
    ),
    "InternVL": (
        {"model_type": "qwen2"},
        {**ENCODER, "image_size": [28, 28], "patch_size": [14, 14]},
        {},
    ),
    "Llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model", **ENCODER}, {}),
    "Mistral3": ({"model_type": "mistral", "head_dim": 16}, ENCODER, {}),
    "Qwen2VL": (
        {"rope_parameters": MROPE},
        {"depth": 1, "embed_dim": 16, "hidden_size": 64, "num_heads": 2},
        {},
    ),
    "Qwen2_5_VL": ({"rope_parameters": MROPE}, {**QWEN, "out_hidden_size": 64}, {}),
    "Qwen3VL": (
        {"head_dim": 16, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        {
            **QWEN,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        {"tie_word_embeddings": True},
    ),
}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS = random_prompts([5, 60])


@cache
def multimodal(name: str) -> tuple[Path, Any]:
    """(folder, transformers' model): random weights, also of norms and biases."""
    own, vision, further = MODELS[name]
    text = {**SIZES, **own}
    config_class = getattr(transformers, f"{name}Config")
    config = config_class(text_config=text, vision_config=vision, **further)
    torch.manual_seed(len(name))
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).float().eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(1.0 if "norm" in parameter_name else 0.0, 0.2)
    folder = session_folder() / f"multimodal-{name}"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder, model


def tokens_of(llm: LLM) -> list[list[int]]:
    return [out.outputs[0].token_ids for out in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def renamed(folder: Path, into: Path, layout: dict[str, str], **further: torch.Tensor) -> Path:
    """The same checkpoint with other prefixes. Keys of `layout`: prefixes of a model's names."""
    _, model = multimodal("Gemma3")
    tensors = {}
    for name, tensor in model.state_dict().items():
        old = next((prefix for prefix in layout if name.startswith(prefix)), "")
        tensors[layout.get(old, old) + name.removeprefix(old)] = tensor.contiguous()
    del tensors[layout["lm_head."] + "weight"]  # it is the embedding
    into.mkdir()
    save_file({**tensors, **further}, into / "model.safetensors", {"format": "pt"})
    (into / "config.json").write_text((folder / "config.json").read_text())
    return into


@pytest.mark.parametrize("name", MODELS)
def test_text_runs_as_in_transformers_and_the_towers_are_skipped(name, caplog):
    folder, model = multimodal(name)
    with caplog.at_level(logging.INFO, "nanovllm"):
        llm = make_llm(str(folder))
    assert tokens_of(llm) == [greedy(model, prompt, 8) for prompt in PROMPTS]
    towers = [n for n in model.state_dict() if "language_model" not in n and "lm_head" not in n]
    assert f"{len(towers)} tensors for images are skipped" in caplog.text


HEAD = {"lm_head.": "lm_head."}
LAYOUTS = {
    "transformers 4": {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.": "",
    },
    "transformers 5": {"model.language_model.": "model.language_model.", **HEAD},
    "Qwen-VL": {"model.language_model.": "model.", "model.": "", **HEAD},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_orders_of_the_prefixes_are_read(tmp_path, layout):
    folder, _ = multimodal("Gemma3")
    other = renamed(folder, tmp_path / "model", LAYOUTS[layout])
    assert tokens_of(make_llm(str(other))) == tokens_of(make_llm(str(folder)))


def test_unknown_tensors_are_errors(tmp_path):
    folder, _ = multimodal("Gemma3")
    name = "language_model.model.layers.0.self_attn.sinks"
    unknown = renamed(folder, tmp_path / "a", LAYOUTS["transformers 5"], **{name: torch.zeros(4)})
    with pytest.raises(ValueError, match=f"no parameter for {name}"):
        make_llm(str(unknown))
    # A config that reads no images has no towers.
    text = renamed(folder, tmp_path / "b", LAYOUTS["transformers 5"])
    config = json.loads((folder / "config.json").read_text())["text_config"]
    config["architectures"] = ["Gemma3ForCausalLM"]
    (text / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no parameter for .*multi_modal_projector"):
        make_llm(str(text))


def test_a_text_model_of_no_native_family_is_an_error_that_names_its_type(tmp_path):
    config = json.loads((multimodal("Llava")[0] / "config.json").read_text())
    config["text_config"] = {"model_type": "gpt_neo"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: text_config: model_type is 'gpt_neo'"):
        make_llm(str(tmp_path), load_format="dummy", model_impl="vllm")


def test_a_decoder_saved_alone_lacks_the_prefix(tmp_path):
    folder, model = multimodal("Gemma3")
    model.model.language_model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert "norm.weight" in names
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "Gemma3TextModel"
    ]
    assert tokens_of(make_llm(str(tmp_path))) == tokens_of(make_llm(str(folder)))


def test_prompts_with_images_are_refused():
    llm = make_llm(str(multimodal("Qwen2VL")[0]), skip_tokenizer_init=False)
    with pytest.raises(ValueError, match=r"multi_modal_data.* not supported"):
        llm.generate({"prompt": "a", "multi_modal_data": {"image": object()}})
    image = {"type": "image_url", "image_url": {"url": "file:///a.png"}}
    for part in (image, {"type": "image"}, {"type": "video"}):
        with pytest.raises(ValueError, match="type"):
            llm.chat([{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}])


def test_fields_of_text_config_can_be_overridden():
    folder, _ = multimodal("Gemma3")
    llm = make_llm(
        str(folder),
        hf_overrides={"text_config": {"max_position_embeddings": 64}},
        max_model_len=None,
    )
    assert llm.llm_engine.setup.max_model_len == 64


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("normal.weight", "normal.weight"),
    ],
)
def test_names(name, expected):
    assert text_name(name) == expected


def test_every_architecture_is_one_of_transformers():
    assert all(hasattr(transformers, name) for name in MULTIMODAL)
