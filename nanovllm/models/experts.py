"""What the configs of families with a mixture of experts share."""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.layers.moe import Experts, ExpertSizes, MixtureOfExperts, Router
from nanovllm.loader.fields import Fields, is_integer
from nanovllm.models.config import ModelConfig
from nanovllm.parallel import TensorParallel


@dataclass(frozen=True)
class MoeConfig(ModelConfig):
    """Sizes of a decoder whose layers, or some of them, are mixtures of experts."""

    num_experts: int = 0
    top_k: int = 0  # experts of a token
    expert_size: int = 0  # intermediate size of one expert
    renormalise: bool = False  # the weights of a token's experts sum to 1
    dense_layers: tuple[int, ...] = ()  # have one MLP of intermediate_size instead of experts
    shared_size: int = 0  # intermediate size of an expert that every token uses; 0: there is none

    @property
    def has_experts(self) -> bool:
        return True

    def sharded_sizes(self) -> dict[str, int]:
        sizes = {"shared expert's intermediate size": self.shared_size}
        if self.dense_layers:
            sizes["intermediate size"] = self.intermediate_size
        if self.expert_parallel:
            sizes["number of experts"] = self.num_experts
        else:
            sizes["experts' intermediate size"] = self.expert_size
        return sizes


def with_experts(
    sizes: ModelConfig,
    fields: Fields,
    *,
    count: str,
    size: str,
    renormalise: bool,
    dense_layers: tuple[int, ...] = (),
    shared_size: int = 0,
) -> MoeConfig:
    """The config with its experts. count, size: fields of their number and intermediate size."""
    num_experts = fields.integer(count)
    top_k = fields.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise fields.refuse("num_experts_per_tok", f"at most {count}, which is {num_experts}")
    return MoeConfig(
        **vars(sizes),
        num_experts=num_experts,
        top_k=top_k,
        expert_size=fields.integer(size),
        renormalise=renormalise,
        dense_layers=dense_layers,
        shared_size=shared_size,
    )


def layers_without_experts(fields: Fields) -> tuple[int, ...]:
    """Qwen's two fields: `mlp_only_layers`, and experts only in every decoder_sparse_step-th."""
    listed = fields.get("mlp_only_layers") or []
    if not isinstance(listed, (list, tuple)) or not all(is_integer(layer) for layer in listed):
        raise fields.refuse("mlp_only_layers", "a list of numbers of layers")
    step = fields.integer("decoder_sparse_step", default=1)
    layers = range(fields.integer("num_hidden_layers"))
    return tuple(layer for layer in layers if layer in listed or (layer + 1) % step)


def mixture_of_experts(config: MoeConfig, tp: TensorParallel) -> MixtureOfExperts:
    """The feed-forward part of one layer."""
    sizes = ExpertSizes(config.num_experts, config.hidden_size, config.expert_size)
    gate = Router(sizes, config.top_k, config.renormalise)
    return MixtureOfExperts(gate, Experts(sizes, tp, config.expert_parallel))
