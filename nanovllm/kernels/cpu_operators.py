"""The CPU's products of panels as operations of compiled code.

torch.compile cannot see into the functions of cpu.cpp. It needs to know the shapes of
their results alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels import cpu


@torch.library.custom_op(
    "nanovllm::linear_panels",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
)
def linear_panels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`cpu.linear_panels`."""
    out = cpu.linear_panels(x, weight, bias)
    assert out is not None, "x has the dtype of the weight"
    return out


@linear_panels.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op(
    "nanovllm::embedding_panels", mutates_args=(), schema="(Tensor ids, Tensor weight) -> Tensor"
)
def embedding_panels(ids: Tensor, weight: Tensor) -> Tensor:
    """`cpu.embedding_panels`."""
    out = cpu.embedding_panels(ids, weight)
    assert out is not None, "ids are int64"
    return out


@embedding_panels.register_fake
def _(ids: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(ids.shape[0], weight.shape[1])
