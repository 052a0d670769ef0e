"""Chooses the storage format of a matrix. Layers call this and name no format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from nanovllm.kernels import cpu
from nanovllm.weights.base import Weight
from nanovllm.weights.blocks import BlockWeight
from nanovllm.weights.dense import DenseWeight
from nanovllm.weights.panels import PanelWeight

FORMATS: dict[str, Callable[[nn.Module, int, int, int], Weight]] = {
    "dense": DenseWeight,
    "panels": PanelWeight,
    "blocks": BlockWeight,
}
# Stores matrices of several groups (experts) in blocks, and quantises no other matrix.
MXFP4 = "mxfp4"
# The format of the matrices of the model that is being made. None: no quantised format.
CHOSEN: ContextVar[str | None] = ContextVar("CHOSEN", default=None)


@contextmanager
def storage_format(name: str | None) -> Iterator[None]:
    """Matrices that are made inside the `with` have this format of FORMATS, or MXFP4."""
    token = CHOSEN.set(name)
    try:
        yield
    finally:
        CHOSEN.reset(token)


def new_weight(
    layer: nn.Module, out_features: int, in_features: int, num_groups: int = 1
) -> Weight:
    """A matrix [out_features, in_features].

    It has torch's default dtype and lies on torch's default device. The tensors become
    parameters of `layer`. num_groups: of matrices that lie one below the other.
    """
    name = CHOSEN.get()
    if name == MXFP4:
        name = "blocks" if num_groups > 1 else None
    if name is None:
        on_cpu = torch.get_default_device().type == "cpu"
        panels = on_cpu and cpu.fits_panels(in_features, torch.get_default_dtype())
        name = "panels" if panels else "dense"
    return FORMATS[name](layer, out_features, in_features, num_groups)
