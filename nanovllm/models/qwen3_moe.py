"""Qwen3-MoE (Yang et al., 2025): Qwen3 with experts in most layers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from nanovllm.loader.experts import split_experts
from nanovllm.loader.fields import Fields
from nanovllm.loader.source import LazyTensor
from nanovllm.models.experts import (
    MoeConfig,
    layers_without_experts,
    mixture_of_experts,
    with_experts,
)
from nanovllm.models.qwen3 import Qwen3ForCausalLM


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    config: MoeConfig

    @classmethod
    def read_config(cls, fields: Fields) -> MoeConfig:
        return with_experts(
            super().read_config(fields),
            fields,
            count="num_experts",
            size="moe_intermediate_size",
            renormalise=fields.flag("norm_topk_prob"),
            dense_layers=layers_without_experts(fields),
        )

    def mlp(self, layer: int) -> nn.Module:
        if layer in self.config.dense_layers:
            return super().mlp(layer)
        return mixture_of_experts(self.config, self.tp)

    def checkpoint_tensors(
        self, weights: Iterable[tuple[str, LazyTensor]]
    ) -> Iterable[tuple[str, LazyTensor]]:
        return split_experts(weights)
