"""What QK-norm and rotary embedding need to know: tensors and numbers, no module."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rope(NamedTuple):
    """Heads are counted on this rank. A model without QK-norm leaves the norms' weights None."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    # float32 [positions, R]: cosines of the R / 2 angles, then their sines. R is head_dim,
    # or less where the model turns only the first R numbers of a head.
    cos_sin: Tensor
    q_norm: Tensor | None = None  # [head_dim]
    k_norm: Tensor | None = None  # [head_dim]
    eps: float = 0.0  # of both norms
    norm_offset: float = 0.0  # of both norms, added to their weights
    norm_round_once: bool = False  # see `kernels.rms_norm`
