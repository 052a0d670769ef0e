"""The decoder that Llama, Mistral, Qwen2 and Qwen3 share, top to bottom. `ModelConfig` says what differs.

Module names are the checkpoints' own; projections that read the same input are one product (qkv_proj, gate_up_proj).
The model knows tokens, positions and an attention backend; it knows neither sequences nor ranks nor pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nanovllm import kernels
from nanovllm.attention import AttentionBackend
from nanovllm.layers.linear import ColumnParallelLinear, Matrix, RowParallelLinear, VocabParallelEmbedding
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.rotary import QKNormRope
from nanovllm.layers.source import fill
from nanovllm.models.config import ModelConfig
from nanovllm.parallel import TensorParallel


class Attention(nn.Module):
    """Grouped-query self-attention: QKV product, QK-norm and RoPE, paged attention, output product."""

    def __init__(self, config: ModelConfig, layer: int, cos_sin: Tensor, tp: TensorParallel) -> None:
        super().__init__()
        self.layer, dim = layer, config.head_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads
        pieces = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
        self.qkv_proj = ColumnParallelLinear(config.hidden_size, pieces, config.qkv_bias, tp, unit=dim)
        eps = config.rms_norm_eps if config.qk_norm else None
        self.rope = QKNormRope(len(tp.split(heads)), len(tp.split(kv_heads)), dim, cos_sin, eps)
        self.o_proj = RowParallelLinear(heads * dim, config.hidden_size, config.o_bias, tp)

    def forward(self, x: Tensor, attention: AttentionBackend) -> Tensor:
        q = attention.write(self.layer, self.qkv_proj(x), self.rope)
        return self.o_proj(attention.attend(self.layer, q))


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
    def __init__(self, config: ModelConfig, layer: int, cos_sin: Tensor, tp: TensorParallel) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, cos_sin, tp)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, tp)

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
    def __init__(self, config: ModelConfig, cos_sin: Tensor, tp: TensorParallel) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)
        self.layers = nn.ModuleList(DecoderLayer(config, i, cos_sin, tp) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, attention: AttentionBackend) -> Tensor:
        x: Tensor = self.embed_tokens(input_ids)
        if (both := attention.run_layers(self.layers, x)) is not None:
            return self.norm.add(*both)[0]
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, attention)
        assert residual is not None
        return self.norm.add(x, residual)[0]


class CausalLM(nn.Module):
    """A decoder with its output head."""

    def __init__(self, config: ModelConfig, cos_sin: Tensor, tp: TensorParallel) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, cos_sin, tp)
        tied = config.tie_embeddings
        self.lm_head = (
            self.model.embed_tokens if tied else VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)
        )

    def forward(self, input_ids: Tensor, attention: AttentionBackend) -> Tensor:
        """input_ids [T] -> hidden states [T, hidden]. Positions are in the backend's metadata."""
        return self.model(input_ids, attention)

    def load_weights(self, weights: Iterable[tuple[str, Any]]) -> set[str]:
        """Writes new weights, under checkpoint names, into the running model; returns the names that were given.

        Reset the prefix cache after it. Raises ValueError for a name or a shape that the model does not have.
        """
        with self.unpacked():
            return fill(self, weights)

    def pack(self) -> None:
        """Puts the weights, once they are there, into the order that the CPU's products read."""
        for module in self.modules():
            if isinstance(module, Matrix):
                module.pack()

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """Weights are as checkpoints have them meanwhile, to be read or written."""
        packed = [module for module in self.modules() if isinstance(module, Matrix) and module.packed]
        for module in packed:
            module.unpack()
        try:
            yield
        finally:
            for module in packed:
                module.pack()

    def logits(self, hidden: Tensor) -> Tensor:
        """[K, hidden] -> [K, vocabulary]."""
        return self.lm_head.logits(hidden)
