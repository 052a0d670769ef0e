"""Makes a model on its device and fills it from the checkpoint.

Does not know file formats.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from nanovllm import loader
from nanovllm.attention.base import zeroed
from nanovllm.core.batch import ceil_div
from nanovllm.loader.source import (
    PRESENCE_FIELDS,
    LazyTensor,
    all_sources,
    config_fields,
    expect,
    listing,
)
from nanovllm.models.base import LanguageModel
from nanovllm.models.registry import model_class
from nanovllm.parallel import TensorParallel
from nanovllm.runner.setup import Setup
from nanovllm.weights.blocks import report_dequantised
from nanovllm.weights.select import storage_format

CACHE_LINE = 64  # bytes


def make_model(setup: Setup, tp: TensorParallel) -> LanguageModel:
    """This rank's shard of the model, with its weights.

    Raises ValueError for a checkpoint whose tensors do not fit the model.
    """
    make = model_class(setup.config.architecture)
    default = torch.get_default_dtype()
    torch.set_default_dtype(setup.dtype)
    try:
        with setup.device, storage_format(setup.weight_format):
            model: LanguageModel = make(setup.config, setup.max_model_len, tp).eval()
    finally:
        torch.set_default_dtype(default)
    weights: Iterable[tuple[str, LazyTensor]] = loader.iter_weights(setup.files)
    if setup.weight_format is not None:
        weights = list(weights)
        expect(model, model.checkpoint_tensors(weights))
        report_dequantised(model)
    if setup.device.type == "cpu":
        lay_out(model)
    load_weights(model, setup, tp, weights)
    return model


def lay_out(model: nn.Module) -> None:
    """Moves the weights of a model on a CPU into one piece of memory, before loading.

    Numpy asks the kernel for huge pages for such a piece, because with small pages
    products of one row spend much time on the translation of addresses
    (docs/experiments.md).
    """
    parameters = list(model.parameters())
    sizes = [ceil_div(parameter.nbytes, CACHE_LINE) * CACHE_LINE for parameter in parameters]
    pieces = zeroed((sum(sizes),), torch.uint8, torch.device("cpu")).split(sizes)
    for parameter, piece in zip(parameters, pieces):
        flat = piece[: parameter.nbytes].view(parameter.dtype)
        parameter.data = flat.view(parameter.shape)


def load_weights(
    model: LanguageModel,
    setup: Setup,
    tp: TensorParallel,
    weights: Iterable[tuple[str, LazyTensor]] | None = None,
) -> None:
    """Fills the model from its checkpoint, whose tensors are `weights`.

    Raises ValueError that names the missing tensors.
    """
    if setup.args.load_format == "dummy":
        fill_randomly(model, setup, tp)
        return
    given = model.load_weights(loader.iter_weights(setup.files) if weights is None else weights)
    missing = set(all_sources(model)) - given
    if missing:
        name = setup.args.model
        fields = config_fields(missing, PRESENCE_FIELDS)
        raise ValueError(f"checkpoint: {name} has no tensor for {listing(missing)}{fields}")


def fill_randomly(model: LanguageModel, setup: Setup, tp: TensorParallel) -> None:
    """Random weights for load_format="dummy". They depend on the seed and on the rank."""
    generator = torch.Generator(setup.device).manual_seed(setup.args.seed + tp.rank)
    with model.unpacked():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.02, generator=generator)
            else:
                parameter.data.fill_(1)
