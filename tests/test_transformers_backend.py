"""transformers' own code over our pages: choosing it, its weights, adapters, ranks, and refusals.

tests/test_transformers_models.py compares the tokens of all architectures.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_lora import PROMPTS, engine, expected, request
from test_lora import tokens_of as adapted_tokens
from tiny import greedy, random_prompts, tiny_model
from tiny_decoders import VOCAB_SIZE, tiny_config, tiny_decoder

from nanovllm import LLM, SamplingParams
from nanovllm.layers.linear import Matrix
from nanovllm.models.registry import read_config

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
IDS = random_prompts([1, 30, 12, 50], VOCAB_SIZE)


def make_llm(folder: str | Path, **kwargs: Any) -> LLM:
    defaults: dict[str, Any] = {
        "model_impl": "transformers",
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_num_batched_tokens": 64,
        "max_num_seqs": 8,
        "max_model_len": 128,
        "num_gpu_blocks_override": 32,
    }
    return LLM(str(folder), **{**defaults, **kwargs})


def tokens_of(llm: LLM) -> list[list[int]]:
    return [out.outputs[0].token_ids for out in llm.generate(IDS, GREEDY, use_tqdm=False)]


def class_of(llm: LLM) -> str:
    return llm.apply_model(lambda model: type(model).__name__)[0]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("qwen3"), "Qwen3", vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("gpt2"), "GPT2LMHeadModel")


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("olmoe"), "OlmoeForCausalLM")


# -- choosing --------------------------------------------------------------------------------------


def test_auto_prefers_our_own_models_and_else_takes_transformers_code(qwen3, gpt2):
    assert class_of(make_llm(qwen3[0], model_impl="auto")) == "Qwen3ForCausalLM"
    assert class_of(make_llm(qwen3[0], model_impl="nanovllm")) == "Qwen3ForCausalLM"
    assert class_of(make_llm(qwen3[0])) == "TransformersForCausalLM"
    assert class_of(make_llm(gpt2[0], model_impl="auto")) == "TransformersForCausalLM"


def test_only_our_own_models_refuses_other_architectures(gpt2):
    with pytest.raises(ValueError, match="'GPT2LMHeadModel' is not supported; supported are"):
        make_llm(gpt2[0], model_impl="vllm")


def test_an_unknown_choice_is_refused(qwen3):
    with pytest.raises(ValueError, match="model_impl='torch' is not known; accepted are 'auto'"):
        make_llm(qwen3[0], model_impl="torch")


def test_a_gguf_file_needs_a_model_of_ours():
    fields = SimpleNamespace(architectures=["LlamaForCausalLM"])
    with pytest.raises(ValueError, match=r"model\.gguf is a GGUF file; accepted for it are 'auto'"):
        read_config(fields, "model.gguf", "transformers")


def test_two_engines_of_different_models_work_in_turn(qwen3, gpt2):
    folders = (qwen3, gpt2)
    llms = [make_llm(folder) for folder, _ in folders]
    for _ in range(2):
        for llm, (_, model) in zip(llms, folders):
            assert tokens_of(llm) == [greedy(model, ids, 12) for ids in IDS]


# -- modules and weights ---------------------------------------------------------------------------


def test_linear_layers_and_tables_are_matrices_of_ours_with_the_checkpoints_names(qwen3):
    model = make_llm(qwen3[0]).apply_model(lambda model: model)[0]
    ours = {name for name, module in model.named_modules() if isinstance(module, Matrix)}
    linear = {
        name
        for name, module in qwen3[1].named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
    }
    assert ours == linear


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "OlmoeForCausalLM"])
def test_new_weights_are_those_of_another_checkpoint(tmp_path, architecture):
    """A trainer loads tensors under checkpoint names. Tensors of experts are joined on the way."""
    folder, _ = tiny_decoder(tmp_path / "first", architecture)
    other_folder, other = tiny_decoder(tmp_path / "other", architecture)
    for parameter in other.parameters():
        parameter.data.add_(torch.randn_like(parameter) / 10)
    other.save_pretrained(other_folder)
    tensors = load_file(Path(other_folder) / "model.safetensors")
    llm = make_llm(folder)
    tokens_of(llm)
    llm.apply_model(lambda model: model.load_weights(tensors.items()))
    llm.reset_prefix_cache()
    assert tokens_of(llm) == [greedy(other, ids, 12) for ids in IDS]


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_and_wake_up_keep_the_tokens(olmoe, level):
    llm = make_llm(olmoe[0], enable_sleep_mode=True)
    before = tokens_of(llm)
    llm.sleep(level)
    llm.wake_up()
    assert tokens_of(llm) == before


def test_a_hook_takes_effect(qwen3):
    llm = make_llm(qwen3[0])
    before = tokens_of(llm)
    handle = llm.apply_model(
        lambda model: model.model.layers[0].register_forward_hook(lambda *call: call[2] * 0)
    )[0]
    llm.reset_prefix_cache()
    assert tokens_of(llm) != before
    handle.remove()
    llm.reset_prefix_cache()
    assert tokens_of(llm) == before


def test_a_missing_tensor_is_refused_and_an_unknown_one_is_logged(tmp_path, caplog):
    folder, model = tiny_decoder(tmp_path, "GPT2LMHeadModel")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    norm = tensors.pop("transformer.ln_f.weight")
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"no tensor for transformer\.ln_f\.weight"):
        make_llm(folder)
    save_file({**tensors, "transformer.ln_f.weight": norm, "extra.weight": norm.clone()}, file)
    with caplog.at_level(logging.WARNING, "nanovllm"):
        llm = make_llm(folder)
    assert "no parameter for extra.weight" in caplog.text
    assert tokens_of(llm) == [greedy(model, ids, 12) for ids in IDS]


def test_names_without_the_prefix_of_the_body_are_found(tmp_path):
    """GPT-2's own checkpoint was saved from the model without its head."""
    folder, model = tiny_decoder(tmp_path, "GPT2LMHeadModel")
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    save_file(tensors, file)
    assert tokens_of(make_llm(folder)) == [greedy(model, ids, 12) for ids in IDS]


def test_dummy_weights_need_only_a_config(tmp_path):
    config = tiny_config("OlmoeForCausalLM")
    config.architectures = ["OlmoeForCausalLM"]
    config.save_pretrained(tmp_path)
    assert len(tokens_of(make_llm(tmp_path, load_format="dummy"))) == len(IDS)


def test_half_precision_is_near_float32(qwen3):
    """The logprobs of a prompt in bfloat16, because tokens may differ."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    both = []
    for dtype in ("float32", "bfloat16"):
        out = make_llm(qwen3[0], dtype=dtype).generate([IDS[3]], params, use_tqdm=False)[0]
        entries = out.prompt_logprobs[1:]
        both.append(torch.tensor([next(iter(entry.values())).logprob for entry in entries]))
    assert (both[0] - both[1]).abs().mean() < 0.1


# -- adapters and ranks ----------------------------------------------------------------------------


def test_adapters_give_the_tokens_of_peft():
    llm = engine(model_impl="transformers")
    names = ["all", None, "other", "tables"]
    adapters = [None if name is None else request(name) for name in names]
    assert adapted_tokens(llm, adapters) == [
        expected(name, prompt) for name, prompt in zip(names, PROMPTS)
    ]


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Gemma2ForCausalLM"])
def test_two_ranks_give_the_tokens_of_one(tmp_path, architecture):
    folder, model = tiny_decoder(tmp_path, architecture)
    llm = make_llm(folder, tensor_parallel_size=2)
    assert tokens_of(llm) == [greedy(model, ids, 12) for ids in IDS]
    llm.llm_engine.executor.close()


def test_ranks_that_the_plan_does_not_serve_are_refused(gpt2):
    with pytest.raises(ValueError, match="no plan for tensor parallelism"):
        make_llm(gpt2[0], tensor_parallel_size=2)


# -- refusals --------------------------------------------------------------------------------------


def refusal(tmp_path: Path, architecture: str, **kwargs: Any) -> str:
    folder, _ = tiny_decoder(tmp_path, architecture)
    with pytest.raises(ValueError) as caught:
        make_llm(folder, **kwargs)
    return str(caught.value)


def test_state_that_is_not_keys_and_values_is_refused(tmp_path):
    message = refusal(tmp_path, "Lfm2ForCausalLM")
    assert "depends on more than its own position and attention" in message


def test_attention_outside_of_the_interface_is_refused(tmp_path):
    assert "does not pass through the attention interface" in refusal(tmp_path, "MptForCausalLM")


def test_a_rope_that_depends_on_the_longest_position_is_refused_only_where_it_does(tmp_path):
    config = tiny_config("Phi3ForCausalLM")
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config.rope_parameters = {**config.rope_parameters, "rope_type": "longrope", **factors}
    config.original_max_position_embeddings = 64
    config.rope_parameters["original_max_position_embeddings"] = 64
    model = transformers.Phi3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a smaller max_model_len than 128 may help"):
        make_llm(tmp_path)
    llm = make_llm(tmp_path, max_model_len=64)
    assert tokens_of(llm) == [greedy(model, ids, 12) for ids in IDS]


def test_a_mask_that_pages_do_not_have_is_refused(tmp_path):
    config = tiny_config("Llama4ForCausalLM")
    config.attention_chunk_size = 16
    transformers.Llama4ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mask is neither causal nor a sliding window"):
        make_llm(tmp_path)


# -- the checkpoint's own code ---------------------------------------------------------------------

REMOTE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class SketchConfig(PretrainedConfig):
    model_type = "sketch"

    def __init__(self, **kwargs):
        self.vocab_size, self.hidden_size = 128, 32
        self.num_attention_heads, self.num_hidden_layers = 2, 2
        self.max_position_embeddings = 256
        super().__init__(**kwargs)


class SketchAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.qkv = nn.Linear(32, 96)

    def forward(self, x, mask, past):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = past.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, _ = attend(self, q, k, v, mask, scaling=0.3)
        return out.reshape(*x.shape)


class SketchExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(32, 3)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        flat = x.reshape(-1, 32)
        chosen, out = self.router(flat).argmax(-1), torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().flatten()
            out[rows] = expert(flat[rows])
        return out.view_as(x)


class SketchModel(PreTrainedModel):
    config_class, base_model_prefix = SketchConfig, "model"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.tokens, self.positions = nn.Embedding(128, 32), nn.Embedding(256, 32)
        self.attention = nn.ModuleList(SketchAttention(config, i) for i in range(2))
        self.experts = nn.ModuleList(SketchExperts() for _ in range(2))
        self.post_init()

    def get_input_embeddings(self):
        return self.tokens

    def forward(self, input_ids, position_ids=None, attention_mask=None, past_key_values=None, **_):
        x = self.tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None]
        words = dict(config=self.config, attention_mask=attention_mask, position_ids=position_ids)
        names = create_causal_mask.__wrapped__ if hasattr(create_causal_mask, "__wrapped__") else create_causal_mask
        cache = "past_key_values" if "past_key_values" in names.__code__.co_varnames else "cache"
        if "input_embeds" in names.__code__.co_varnames:
            words |= dict(input_embeds=x, cache_position=position_ids[0])
        else:
            words |= dict(inputs_embeds=x)
        mask = create_causal_mask(**words, **{cache: past_key_values})
        x = x + self.positions(position_ids)
        for attention, experts in zip(self.attention, self.experts):
            x = x + attention(x, mask, past_key_values)
            x = x + experts(x)
        return BaseModelOutputWithPast(last_hidden_state=x)


class SketchForCausalLM(PreTrainedModel, GenerationMixin):
    config_class, base_model_prefix = SketchConfig, "model"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.model = SketchModel(config)
        self.lm_head = nn.Linear(32, 128, bias=False)
        self.post_init()

    def forward(self, input_ids, position_ids=None, attention_mask=None, **_):
        out = self.model(input_ids, position_ids=position_ids, attention_mask=attention_mask)
        return CausalLMOutputWithPast(logits=self.lm_head(out.last_hidden_state))
"""


@torch.no_grad()
def without_cache(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy decoding that computes every token again."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_code_beside_the_checkpoint_runs_if_it_is_trusted(tmp_path):
    """Its experts are linear layers, which see some of the tokens of a step only."""
    (tmp_path / "sketch.py").write_text(REMOTE)
    names = {
        "AutoConfig": "sketch.SketchConfig",
        "AutoModelForCausalLM": "sketch.SketchForCausalLM",
    }
    fields = {"model_type": "sketch", "architectures": ["SketchForCausalLM"], "auto_map": names}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, trust_remote_code=True, attn_implementation="sdpa"
    ).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    llm = make_llm(tmp_path, model_impl="auto", trust_remote_code=True)
    assert tokens_of(llm) == [without_cache(model, ids, 12) for ids in IDS]
    with pytest.raises(ValueError, match="cannot be used: ValueError: The repository"):
        make_llm(tmp_path, model_impl="auto")
