"""GGUF files of mixtures of experts: experts stay in the file's blocks, whole and sharded.

The oracle is transformers with the weights that the gguf package reads back.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import greedy, make_llm, random_prompts, session_folder, tiny_model

from nanovllm import LLM, SamplingParams
from nanovllm.kernels import blocks

pytest.importorskip("gguf")

from gguf_files import Q, finish, gguf, numbers_of, pack, start_gguf, swap_rows

pytestmark = pytest.mark.skipif(
    blocks.load() is None, reason="blocks.cpp does not build here (no C++ compiler)"
)
SIZES = {"vocab_size": 96, "hidden_size": 64, "bos_token_id": 1, "eos_token_id": 2}
QWEN = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
# architecture of the file -> (family, overrides)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3moe": ("Qwen3Moe", {**QWEN, "head_dim": 32, "norm_topk_prob": True}),
    "qwen2moe": ("Qwen2Moe", {**QWEN, "shared_expert_intermediate_size": 96}),
    "llama": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 2}),
}
# A type for each kind of matrix; others are Q8_0.
TYPES = {"ffn_gate_exps": Q.Q4_0, "ffn_up_exps": Q.Q5_1, "ffn_down_exps": Q.Q8_0}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = random_prompts([1, 15, 33, 7], vocab_size=90, seed=4)


def file_name(name: str) -> str:
    """The name of a parameter of transformers in the file."""
    fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module, _, kind = name.rpartition(".")
    if module in fixed:
        return f"{fixed[module]}.{kind}"
    _, _, layer, rest = name.split(".", 3)
    stems = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate": "ffn_gate_inp",
        "mlp.experts.gate_proj": "ffn_gate_exps",
        "mlp.experts.up_proj": "ffn_up_exps",
        "mlp.experts.down_proj": "ffn_down_exps",
        "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
        "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
        "mlp.shared_expert.up_proj": "ffn_up_shexp",
        "mlp.shared_expert.down_proj": "ffn_down_shexp",
    }
    stem, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{stems[stem]}.{kind}"


def parameters(model: Any) -> dict[str, torch.Tensor]:
    """The parameters of transformers' model: gate and up of experts apart, as views."""
    found = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            found[name.replace("gate_up_proj", "gate_proj.weight")] = gate
            found[name.replace("gate_up_proj", "up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            found[f"{name}.weight"] = tensor
        else:
            found[name] = tensor
    return found


def heads_of(arch: str, name: str, config: Any) -> int:
    """The heads of a matrix whose rows llama.cpp reorders. 0 for other matrices."""
    if arch != "llama":
        return 0
    if "q_proj" in name:
        return config.num_attention_heads
    return config.num_key_value_heads if "k_proj" in name else 0


def quantised(array: np.ndarray, stem: str) -> tuple[np.ndarray, Any]:
    """(the array as the file stores it, its type)."""
    if array.ndim < 2 or "norm" in stem or "gate_inp" in stem:
        return array, Q.F32
    kind = TYPES.get(stem, Q.Q8_0)
    rows = pack(np.ascontiguousarray(array.reshape(-1, array.shape[-1])), kind)
    return rows.reshape(*array.shape[:-1], -1), kind


@torch.no_grad()
def write(path: Path, arch: str, model: Any, further: dict[str, Any] | None = None) -> Path:
    """The model as llama.cpp would convert it. The model gets the weights of the file.

    further: fields of the architecture.
    """
    config = model.config
    writer = start_gguf(path, config, arch, config.rope_parameters)
    count = getattr(config, "num_experts", None) or config.num_local_experts
    writer.add_expert_count(count)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if arch.startswith("qwen"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if arch == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    for key, value in (further or {}).items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"{arch}.{key}", value)
    for name, tensor in parameters(model).items():
        array = tensor.numpy()
        heads = heads_of(arch, name, config)
        if heads:
            array = swap_rows(array, heads, 2, -1)
        if name.endswith("shared_expert_gate.weight"):
            array = array[0]
        stored, kind = quantised(array, file_name(name).split(".")[-2])
        writer.add_tensor(file_name(name), np.ascontiguousarray(stored), raw_dtype=kind)
    finish(writer)
    stored_tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, tensor in parameters(model).items():
        array = numbers_of(stored_tensors[file_name(name)]).reshape(tensor.shape)
        heads = heads_of(arch, name, config)
        if heads:
            array = swap_rows(array, heads, -1, 2)
        tensor.copy_(torch.from_numpy(array.astype(np.float32)))
    return path


@cache
def file_of(arch: str) -> tuple[str, list[list[int]]]:
    """(file, the greedy tokens of transformers)."""
    family, overrides = FAMILIES[arch]
    folder = session_folder() / f"gguf-{arch}"
    _, model = tiny_model(folder, family, **{**SIZES, "intermediate_size": 64, **overrides})
    path = write(folder / "model.gguf", arch, model)
    return str(path), [greedy(model, prompt, 12) for prompt in PROMPTS]


def engine(arch: str, **kwargs: Any) -> LLM:
    return make_llm(file_of(arch)[0], skip_tokenizer_init=True, device="cpu", **kwargs)


def tokens_of(llm: LLM, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return [out.outputs[0].token_ids for out in llm.generate(prompts, GREEDY, use_tqdm=False)]


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_file_answers_as_transformers_does(arch: str) -> None:
    llm = engine(arch, max_num_batched_tokens=16, max_num_seqs=8)
    assert tokens_of(llm) == file_of(arch)[1]
    assert [tokens_of(llm, [prompt])[0] for prompt in PROMPTS] == file_of(arch)[1]
    model = llm.llm_engine.executor.runner.model
    experts = model.model.layers[1].mlp.experts
    pieces = {piece.type for piece in experts.gate_up_proj.storage.pieces.values()}
    assert pieces == {"Q4_0", "Q5_1"}
    assert len(llm.llm_engine.executor.runner.programs.programs) > 0
    floats = engine(arch, quantization="none")
    assert tokens_of(floats) == file_of(arch)[1]


@pytest.mark.parametrize(
    ("arch", "kwargs"), [("qwen2moe", {}), ("qwen3moe", {"enable_expert_parallel": True})]
)
def test_two_ranks_share_a_file(arch: str, kwargs: dict[str, Any]) -> None:
    llm = engine(arch, tensor_parallel_size=2, **kwargs)
    try:
        assert tokens_of(llm) == file_of(arch)[1]
    finally:
        llm.llm_engine.executor.close()


def test_new_weights_replace_blocks() -> None:
    """A trainer sends floats, under the names of the hub or of transformers 5."""
    llm = engine("qwen3moe")
    model = llm.llm_engine.executor.runner.model
    zeros = torch.zeros(6, 128, 64)
    model.load_weights([("model.layers.1.mlp.experts.gate_up_proj", zeros)])
    one = [("model.layers.0.mlp.experts.3.down_proj.weight", torch.zeros(64, 64))]
    model.load_weights(one)
    llm.reset_prefix_cache()
    assert tokens_of(llm) != file_of("qwen3moe")[1]


@pytest.mark.parametrize(
    ("key", "value"), [("expert_gating_func", 2), ("expert_weights_scale", 2.5)]
)
def test_a_router_of_another_kind_is_a_sentence(tmp_path: Path, key: str, value: Any) -> None:
    family, overrides = FAMILIES["qwen2moe"]
    sizes = {**SIZES, "intermediate_size": 64, **overrides, "num_hidden_layers": 1}
    _, model = tiny_model(tmp_path, family, **sizes)
    path = write(tmp_path / "model.gguf", "qwen2moe", model, {key: value})
    with pytest.raises(ValueError, match=f"{key} is {value}; accepted is 1"):
        make_llm(str(path), skip_tokenizer_init=True, device="cpu")
