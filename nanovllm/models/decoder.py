"""The decoder that Llama, Mistral, Qwen2 and Qwen3 share, top to bottom. Each family's own file says what differs.

Module names are the checkpoints' own; projections that read the same input are one product (qkv_proj, gate_up_proj).
The model knows tokens and an attention backend; it knows neither sequences nor ranks nor pages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nanovllm import kernels
from nanovllm.attention.base import AttentionBackend
from nanovllm.cache.spec import CacheSpec, PagedKV
from nanovllm.kernels.rope import Rope
from nanovllm.layers.linear import ColumnParallelLinear, Matrix, RowParallelLinear, VocabParallelEmbedding
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.loader.source import fill
from nanovllm.models.config import ModelConfig
from nanovllm.parallel import TensorParallel


class Attention(nn.Module):
    """Grouped-query self-attention: QKV product, QK-norm and RoPE, paged attention, output product."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        rotary_emb: RotaryEmbedding,
        tp: TensorParallel,
        *,
        qkv_bias: bool,
        o_bias: bool,
        qk_norm: bool = False,
        window: int | None = None,
    ) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.layer = layer  # its number among the layers that have pages
        self.num_heads = len(tp.split(heads))
        self.num_kv_heads = len(tp.split(kv_heads))
        self.head_dim = head_dim
        self.window = window
        pieces = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
        self.qkv_proj = ColumnParallelLinear(config.hidden_size, pieces, qkv_bias, tp, unit=head_dim)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if qk_norm else None
        self.rotary_emb = rotary_emb
        self.o_proj = RowParallelLinear(heads * head_dim, config.hidden_size, o_bias, tp)

    def forward(self, x: Tensor, attention: AttentionBackend) -> Tensor:
        q = attention.write(self.layer, self.qkv_proj(x), self.rope())
        return self.o_proj(attention.attend(self.layer, q))

    def rope(self) -> Rope:
        sizes = self.num_heads, self.num_kv_heads, self.head_dim
        if self.q_norm is None or self.k_norm is None:
            return Rope(*sizes, self.rotary_emb.cos_sin)
        return Rope(*sizes, self.rotary_emb.cos_sin, self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)

    def cache_spec(self) -> CacheSpec:
        return PagedKV(self.num_kv_heads, self.head_dim, self.window)


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        size = config.intermediate_size
        pieces = {"gate_proj": size, "up_proj": size}
        self.gate_up_proj = ColumnParallelLinear(config.hidden_size, pieces, config.mlp_bias, tp)
        self.down_proj = RowParallelLinear(size, config.hidden_size, config.mlp_bias, tp)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(kernels.silu_and_mul(self.gate_up_proj(x)))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, self_attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp

    def forward(self, x: Tensor, residual: Tensor | None, attention: AttentionBackend) -> tuple[Tensor, Tensor]:
        """x is the last sublayer's output, not yet added to the residual stream (None before the first layer)."""
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm.add(x, residual)
        x = self.self_attn(x, attention)
        x, residual = self.post_attention_layernorm.add(x, residual)
        return self.mlp(x), residual


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, layers: list[DecoderLayer], tp: TensorParallel) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, attention: AttentionBackend) -> Tensor:
        x: Tensor = self.embed_tokens(input_ids)
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, attention)
        assert residual is not None
        return self.norm.add(x, residual)[0]


class CausalLM(nn.Module, ABC):
    """A decoder with its output head. A family's class says what its attention is."""

    def __init__(self, config: ModelConfig, max_model_len: int, tp: TensorParallel) -> None:
        super().__init__()
        self.config, self.tp = config, tp
        rotary_emb = RotaryEmbedding(config.rope, config.head_dim, config.max_position, max_model_len)
        layers = [
            DecoderLayer(config, self.attention(layer, rotary_emb), MLP(config, tp))
            for layer in range(config.num_layers)
        ]
        self.model = Decoder(config, layers, tp)
        tied = config.tie_embeddings
        self.lm_head = (
            self.model.embed_tokens if tied else VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)
        )

    @abstractmethod
    def attention(self, layer: int, rotary_emb: RotaryEmbedding) -> Attention:
        """The attention of one layer."""

    def window(self, layer: int) -> int | None:
        """The sliding window of one layer; None where it sees all keys."""
        kinds = self.config.layer_types
        if kinds and kinds[layer] != "sliding_attention":
            return None
        return self.config.sliding_window

    def cache_specs(self) -> list[CacheSpec]:
        """What each layer remembers of a sequence."""
        return [module.cache_spec() for module in self.modules() if isinstance(module, Attention)]

    def forward(self, input_ids: Tensor, attention: AttentionBackend) -> Tensor:
        """input_ids [T] -> hidden states [T, hidden]. Positions are in the backend's metadata."""
        return self.model(input_ids, attention)

    def logits(self, hidden: Tensor) -> Tensor:
        """[K, hidden] -> [K, vocabulary]."""
        return self.lm_head.logits(hidden)

    # -- weights ---------------------------------------------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, Any]]) -> set[str]:
        """Writes new weights, under checkpoint names, into the running model; returns the names that were given.

        Reset the prefix cache after it. Raises ValueError for a name or a shape that the model does not have.
        """
        with self.unpacked():
            return fill(self, weights)

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """Weights are as checkpoints have them meanwhile, to be read or written."""
        matrices = [module for module in self.modules() if isinstance(module, Matrix)]
        for matrix in matrices:
            matrix.begin_loading()
        try:
            yield
        finally:
            for matrix in matrices:
                matrix.finish_loading()
