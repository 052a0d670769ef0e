"""OLMoE (Muennighoff et al., 2024): experts in every layer, and QK-norm over all heads at once."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from nanovllm.loader.experts import split_experts
from nanovllm.loader.fields import Fields
from nanovllm.loader.source import LazyTensor
from nanovllm.models.decoder import DecoderLayer
from nanovllm.models.experts import MoeConfig, mixture_of_experts, with_experts
from nanovllm.models.olmo2 import Olmo2ForCausalLM


class OlmoeForCausalLM(Olmo2ForCausalLM):
    config: MoeConfig
    round_once = False

    @classmethod
    def read_config(cls, fields: Fields) -> MoeConfig:
        if fields.get("clip_qkv") is not None:
            raise fields.refuse("clip_qkv", "null, because Q, K and V are not clipped here")
        return with_experts(
            super().read_config(fields),
            fields,
            count="num_experts",
            size="intermediate_size",
            renormalise=fields.flag("norm_topk_prob"),
        )

    def mlp(self, layer: int) -> nn.Module:
        return mixture_of_experts(self.config, self.tp)

    def decoder_layer(self, self_attn: nn.Module, mlp: nn.Module) -> nn.Module:
        """Norms come before both parts, other than in OLMo 2."""
        return DecoderLayer(self, self_attn, mlp)

    def checkpoint_tensors(
        self, weights: Iterable[tuple[str, LazyTensor]]
    ) -> Iterable[tuple[str, LazyTensor]]:
        return split_experts(weights)
