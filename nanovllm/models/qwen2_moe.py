"""Qwen2-MoE (Yang et al., 2024): Qwen2 with experts, and one expert that every token uses."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from nanovllm.kernels import moe
from nanovllm.layers.linear import ColumnParallelLinear
from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.loader.experts import split_experts
from nanovllm.loader.fields import Fields
from nanovllm.loader.source import LazyTensor
from nanovllm.models.config import read_sizes
from nanovllm.models.decoder import MLP, Attention, CausalLM
from nanovllm.models.experts import (
    MoeConfig,
    layers_without_experts,
    mixture_of_experts,
    with_experts,
)
from nanovllm.models.qwen2 import switched_windows
from nanovllm.parallel import TensorParallel


class SharedExpertMoe(nn.Module):
    """experts(x) + sigmoid(shared_expert_gate(x)) * shared_expert(x)."""

    def __init__(self, config: MoeConfig, tp: TensorParallel) -> None:
        super().__init__()
        chosen = mixture_of_experts(config, tp)
        self.gate = chosen.gate
        self.experts = chosen.experts
        self.shared_expert = MLP(config, tp, config.shared_size)
        # Every rank has the whole gate.
        pieces = {"shared_expert_gate": 1}
        self.shared_expert_gate = ColumnParallelLinear(
            config.hidden_size, pieces, False, TensorParallel()
        )

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        out = self.experts(x, self.gate.route(x))
        return moe.add_gated(out, self.shared_expert(x), self.shared_expert_gate(x))


class Qwen2MoeForCausalLM(CausalLM):
    config: MoeConfig

    @classmethod
    def read_config(cls, fields: Fields) -> MoeConfig:
        given = fields.get("qkv_bias")
        return with_experts(
            read_sizes(
                fields,
                attention_bias=given is None or fields.flag("qkv_bias"),
                sliding_windows=switched_windows(fields),
            ),
            fields,
            count="num_experts",
            size="moe_intermediate_size",
            renormalise=fields.flag("norm_topk_prob"),
            dense_layers=layers_without_experts(fields),
            shared_size=fields.integer("shared_expert_intermediate_size"),
        )

    def attention(self, layer: int, rotary_emb: RotaryEmbedding) -> Attention:
        bias = self.config.attention_bias
        return Attention(self.config, layer, rotary_emb, self.tp, qkv_bias=bias, o_bias=False)

    def mlp(self, layer: int) -> nn.Module:
        if layer in self.config.dense_layers:
            return super().mlp(layer)
        return SharedExpertMoe(self.config, self.tp)

    def checkpoint_tensors(
        self, weights: Iterable[tuple[str, LazyTensor]]
    ) -> Iterable[tuple[str, LazyTensor]]:
        return split_experts(weights)
