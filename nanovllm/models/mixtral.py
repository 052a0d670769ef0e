"""Mixtral (Jiang et al., 2024): Mistral with experts in every layer."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from nanovllm.loader.experts import split_experts
from nanovllm.loader.fields import Fields
from nanovllm.loader.source import LazyTensor
from nanovllm.models.experts import MoeConfig, mixture_of_experts, with_experts
from nanovllm.models.mistral import MistralForCausalLM

# Checkpoints have names of their own. transformers 5 gives the block our name in memory.
BLOCK = {".block_sparse_moe.": ".mlp."}
MATRICES = {".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}


class MixtralForCausalLM(MistralForCausalLM):
    config: MoeConfig

    @classmethod
    def read_config(cls, fields: Fields) -> MoeConfig:
        return with_experts(
            super().read_config(fields),
            fields,
            count="num_local_experts",
            size="intermediate_size",
            renormalise=True,
        )

    def mlp(self, layer: int) -> nn.Module:
        return mixture_of_experts(self.config, self.tp)

    def checkpoint_tensors(
        self, weights: Iterable[tuple[str, LazyTensor]]
    ) -> Iterable[tuple[str, LazyTensor]]:
        return ((our_name(name), tensor) for name, tensor in split_experts(weights))


def our_name(name: str) -> str:
    """ "...block_sparse_moe.experts.0.w1.weight" -> "...mlp.experts.0.gate_proj.weight"."""
    for theirs, ours in {**BLOCK, **MATRICES}.items():
        name = name.replace(theirs, ours)
    return name
