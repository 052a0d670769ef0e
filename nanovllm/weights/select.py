"""Chooses the storage format of a matrix. Layers call this and name no format."""

from __future__ import annotations

import torch
from torch import nn

from nanovllm.kernels import cpu
from nanovllm.weights.base import Weight
from nanovllm.weights.dense import DenseWeight
from nanovllm.weights.panels import PanelWeight

FORMATS = {"dense": DenseWeight, "panels": PanelWeight}


def new_weight(layer: nn.Module, out_features: int, in_features: int) -> Weight:
    """A matrix [out_features, in_features].

    It has torch's default dtype and lies on torch's default device. The tensors become
    parameters of `layer`.
    """
    on_cpu = torch.get_default_device().type == "cpu"
    panels = on_cpu and cpu.fits_panels(in_features, torch.get_default_dtype())
    storage = FORMATS["panels" if panels else "dense"]
    return storage(layer, out_features, in_features)
