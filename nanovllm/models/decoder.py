"""The decoder that all families share.

The file of each family says what differs. Modules have the names of checkpoints.
Projections that read the same input are one product (qkv_proj, gate_up_proj). The model
knows tokens and an attention backend. It knows neither sequences nor ranks nor pages.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor, nn

from nanovllm.attention.base import AttentionBackend
from nanovllm.cache.spec import CacheSpec, PagedKV
from nanovllm.kernels.rope import Rope
from nanovllm.layers.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    swiglu,
)
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.loader.fields import Fields
from nanovllm.loader.source import LazyTensor
from nanovllm.loader.text_half import without_towers
from nanovllm.models.base import LanguageModel
from nanovllm.models.config import ModelConfig, read_sizes
from nanovllm.parallel import TensorParallel


class Attention(nn.Module):
    """Grouped-query self-attention.

    QKV product, QK-norm and RoPE, paged attention, output product.
    """

    projection: ClassVar[type[ColumnParallelLinear]] = ColumnParallelLinear

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
    ) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.layer = layer  # index among the layers that have pages
        self.num_heads = len(tp.split(heads))
        self.num_kv_heads = len(tp.split(kv_heads))
        self.head_dim = head_dim
        self.window = config.sliding_windows[layer]
        pieces = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
        self.qkv_proj = self.projection(config.hidden_size, pieces, qkv_bias, tp, unit=head_dim)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if qk_norm else None
        self.rotary_emb = rotary_emb
        self.o_proj = RowParallelLinear(heads * head_dim, config.hidden_size, o_bias, tp)

    def forward(self, x: Tensor, attention: AttentionBackend) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        qkv = self.qkv_proj(x)  # [T, (Hq + 2 Hkv) D]
        q = attention.write(self.layer, qkv, self.rope())  # [T, Hq, D]
        return self.o_proj(attention.attend(self.layer, q))

    def rope(self) -> Rope:
        sizes = (self.num_heads, self.num_kv_heads, self.head_dim)
        cos_sin = self.rotary_emb.cos_sin
        if self.q_norm is None or self.k_norm is None:
            return Rope(*sizes, cos_sin)
        norms = (self.q_norm.weight, self.k_norm.weight)
        norm = self.q_norm
        return Rope(*sizes, cos_sin, *norms, norm.eps, norm.offset, norm.round_once)

    def cache_spec(self) -> CacheSpec:
        return PagedKV(self.num_heads, self.num_kv_heads, self.head_dim, self.window)


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    projection: ClassVar[type[ColumnParallelLinear]] = ColumnParallelLinear

    def __init__(self, config: ModelConfig, tp: TensorParallel, size: int | None = None) -> None:
        """size: the intermediate size, if it is not that of the config."""
        super().__init__()
        size = config.intermediate_size if size is None else size
        pieces = {"gate_proj": size, "up_proj": size}
        self.gate_up_proj = self.projection(config.hidden_size, pieces, config.mlp_bias, tp)
        self.down_proj = RowParallelLinear(size, config.hidden_size, config.mlp_bias, tp)

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        activated = swiglu(self.gate_up_proj, x)  # [T, intermediate]
        return self.down_proj(activated)


class DecoderLayer(nn.Module):
    """Attention, then MLP. Each has an RMSNorm before it and a residual connection around it."""

    def __init__(self, model: CausalLM, self_attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = model.norm()
        self.self_attn = self_attn
        self.post_attention_layernorm = model.norm()
        self.mlp = mlp

    def forward(
        self, x: Tensor, residual: Tensor | None, attention: AttentionBackend
    ) -> tuple[Tensor, Tensor]:
        """(output of the MLP, residual stream without it), both [T, hidden].

        x [T, hidden] is the output of the MLP before, not yet added to the residual
        stream. `residual` is None before the first layer.
        """
        if residual is None:
            residual = x
            x = self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm.add(x, residual)
        x = self.self_attn(x, attention)
        x, residual = self.post_attention_layernorm.add(x, residual)
        return self.mlp(x), residual


class Decoder(nn.Module):
    """Embedding, layers and the last norm: token ids [T] -> hidden states [T, hidden]."""

    def __init__(
        self, embed_tokens: VocabParallelEmbedding, layers: list[nn.Module], norm: RMSNorm
    ) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, input_ids: Tensor, attention: AttentionBackend) -> Tensor:
        x: Tensor = self.embed_tokens(input_ids)
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, attention)
        assert residual is not None
        hidden, _ = self.norm.add(x, residual)
        return hidden


class CausalLM(LanguageModel):
    """A decoder with its output head. A family's class says what its attention is."""

    def __init__(self, config: ModelConfig, max_model_len: int, tp: TensorParallel) -> None:
        super().__init__(config, max_model_len, tp)
        rotary_embs = self.rotary_embeddings(max_model_len)
        layers = [
            self.decoder_layer(self.attention(layer, rotary_embs[layer]), self.mlp(layer))
            for layer in range(config.num_layers)
        ]
        self.model = Decoder(self.embedding(), layers, self.norm())
        if config.tie_embeddings:
            self.lm_head = self.model.embed_tokens
        else:
            self.lm_head = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        """The config of the family. A family whose config has more than sizes overrides this."""
        return read_sizes(fields)

    def embedding(self) -> VocabParallelEmbedding:
        """The token embedding, and the output head where the two are tied."""
        return VocabParallelEmbedding(self.config.vocab_size, self.config.hidden_size, self.tp)

    def norm(self) -> RMSNorm:
        """A norm of hidden states. The layers have some, and the decoder ends with one."""
        return RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)

    @abstractmethod
    def attention(self, layer: int, rotary_emb: RotaryEmbedding) -> Attention:
        """The attention of one layer."""

    def mlp(self, layer: int) -> nn.Module:
        """The feed-forward part of one layer."""
        return MLP(self.config, self.tp)

    def decoder_layer(self, self_attn: nn.Module, mlp: nn.Module) -> nn.Module:
        """One layer of these two parts. It is called as a `DecoderLayer` is."""
        return DecoderLayer(self, self_attn, mlp)

    def rotary_embeddings(self, max_model_len: int) -> list[RotaryEmbedding]:
        """The rotary embedding of each layer.

        Layers share one, or those with a window share another one.
        """
        config = self.config
        sizes = (config.head_dim, config.max_position, max_model_len)
        table = RotaryEmbedding(config.rope, *sizes)
        if config.sliding_rope is None:
            return [table] * config.num_layers
        sliding = RotaryEmbedding(config.sliding_rope, *sizes)
        return [table if window is None else sliding for window in config.sliding_windows]

    @property
    def head(self) -> VocabParallelEmbedding:
        return self.lm_head

    def cache_specs(self) -> list[CacheSpec]:
        """What each layer remembers of a sequence."""
        return [module.cache_spec() for module in self.modules() if isinstance(module, Attention)]

    def forward(self, input_ids: Tensor, attention: AttentionBackend) -> Tensor:
        """input_ids [T] -> hidden states [T, hidden]. Positions are in the backend's metadata."""
        return self.model(input_ids, attention)

    def logits(self, hidden: Tensor) -> Tensor:
        """[K, hidden] -> [K, vocabulary]."""
        return self.lm_head.logits(hidden)

    def checkpoint_tensors(
        self, weights: Iterable[tuple[str, LazyTensor]]
    ) -> Iterable[tuple[str, LazyTensor]]:
        """The tensors of the text half."""
        return without_towers(weights) if self.config.is_multimodal else weights
