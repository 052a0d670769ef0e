"""The text half of a multimodal checkpoint: the names of its tensors, and what to skip.

Knows names. Does not know what the tensors are for.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from typing import TypeVar

logger = logging.getLogger("nanovllm")
T = TypeVar("T")

# Both orders of the two prefixes are in use.
INSIDE = re.compile(r"(model\.)?language_model\.(model\.)?")
# A checkpoint of the decoder alone (`Gemma3TextModel`) lacks the prefix.
BARE = re.compile(r"(embed_tokens|layers|norm)\.")
TOWERS = re.compile(
    r"(model\.)?(visual|vision_tower|vision_model|multi_modal_projector|image_newline)(\.|$)"
)


def text_name(name: str) -> str:
    """The name of a tensor in a checkpoint without images. Such a name stays as it is.

    Examples: language_model.model.norm.weight and model.language_model.norm.weight are
    model.norm.weight.
    """
    inside = INSIDE.match(name)
    if inside is None:
        return f"model.{name}" if BARE.match(name) else name
    rest = name[inside.end() :]
    return rest if rest.startswith("lm_head.") else f"model.{rest}"


def without_towers(weights: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """Leaves out the tensors of vision towers and projectors. Logs how many there are."""
    skipped = 0
    for name, tensor in weights:
        if TOWERS.match(name):
            skipped += 1
        else:
            yield name, tensor
    if skipped:
        logger.info("checkpoint: %d tensors for images are skipped: prompts are text", skipped)
