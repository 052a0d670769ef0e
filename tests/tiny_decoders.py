"""A tiny model of every decoder that the installed transformers has, made from its config class.

No table of families: a config is shrunk by the names of its fields.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE = 128
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48,
    "n_inner": 48,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "d_ff": 48,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "attention_head_dim": 8,
    "global_head_dim": 8,
    "rotary_dim": 4,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "n_ctx": 256,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "moe_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "ffn_hidden_size": 48,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "sliding_window": 24,
    "attention_chunk_size": 16,
    "initializer_range": 0.2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "unpadded_vocab_size": VOCAB_SIZE,
    "laurel_rank": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# What the rules above do not find out.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"mamba_n_heads": 4, "attn_layer_indices": [1]},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "window_size": 24},
    "Dots1ForCausalLM": {"n_shared_experts": 1},
    # As granite-4.0-micro has them. Checkpoints with Mamba layers are refused.
    "GraniteMoeHybridForCausalLM": {"mamba_n_heads": 4, "layer_types": ["attention"] * 2},
    "Llama4ForCausalLM": {"attention_chunk_size": 128},  # no shorter than the sequences
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
    "ZambaForCausalLM": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
    },
    "DbrxForCausalLM": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8}},
    "DoryForCausalLM": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
    },
    "CohereCompassForCausalLM": {
        "text_config": {
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": 10000.0}
                for kind in ("full_attention", "sliding_attention")
            }
        }
    },
    "Gemma4AssistantForCausalLM": {"text_config": {"hidden_size_per_layer_input": 0}},
    "Qwen4ExpForCausalLM": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "Zamba2ForCausalLM": {"layers_block_type": ["mamba", "hybrid"]},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "BailingHybridForCausalLM": {"head_dim": 16},
    "Mistral4ForCausalLM": {"head_dim": 16},
    "Gemma3nForCausalLM": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "intermediate_size": 48,
    },
}


def all_architectures() -> list[str]:
    """The decoders of the installed transformers."""
    names = [name for name in dir(transformers) if name.endswith("ForCausalLM")]
    return [*(name for name in names if not name.startswith("Auto")), "GPT2LMHeadModel"]


# Fields that are None by default, and cannot stay so.
UNSET = (
    "head_dim",
    "num_key_value_heads",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
)


def smaller(config: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config that `SIZES` makes smaller, and the same of the configs inside it.

    There is a layer of each type, and there are two layers at least.
    """
    fields = config.to_dict()
    found: dict[str, Any] = {}
    for name, value in SIZES.items():
        if is_size(fields.get(name)) or (name in UNSET and name in fields):
            found[name] = value
    types = fields.get("layer_types")
    if types and len(types) > 1:
        layers = sorted({types.index(each) for each in types})
        layers = layers if len(layers) > 1 else [0, len(types) - 1]
        for name, value in fields.items():
            if isinstance(value, (list, tuple)) and len(value) == len(types):
                found[name] = [value[layer] for layer in layers]
        found["num_hidden_layers"] = len(layers)
    if "kv_lora_rank" in fields and "num_key_value_heads" in found:
        found["num_key_value_heads"] = SIZES["num_attention_heads"]  # latent attention
    if "is_decoder" in fields and not fields.get("is_encoder_decoder"):
        found["is_decoder"] = True
    for name, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            found[name] = smaller(value, {})
    for name, value in overrides.items():
        inner = found.get(name)
        found[name] = {**inner, **value} if isinstance(inner, dict) else value
    return found


def is_size(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def tiny_config(architecture: str) -> Any:
    config_class = getattr(transformers, architecture).config_class
    return config_class(**smaller(config_class(), EXCEPTIONS.get(architecture, {})))


def tiny_decoder(folder: Path, architecture: str) -> tuple[str, Any]:
    """Saves a random model in float32. Returns (its folder, the transformers model)."""
    torch.manual_seed(len(architecture))
    config = tiny_config(architecture)
    if hasattr(config, "dtype"):  # transformers 4 has torch_dtype
        config.dtype = torch.float32
    model = getattr(transformers, architecture)(config).float().eval()
    for name, parameter in model.named_parameters():
        # Biases and norms begin as 0 and 1, which hides mistakes.
        mean = 1.0 if parameter.dim() == 1 and "norm" in name else 0.0
        parameter.data.normal_(mean, 0.2)
    model.generation_config = transformers.GenerationConfig()
    model.save_pretrained(folder)
    return str(folder), model
