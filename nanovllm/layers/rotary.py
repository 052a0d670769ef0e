"""What happens to Q and K between the QKV product and attention: an optional RMSNorm of each head, then rotary embedding.

The table of cosines and sines comes from `models/config.py`; this file does not know how frequencies are scaled.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanovllm.layers.norm import RMSNorm


class QKNormRope(nn.Module):
    """QK-norm (Qwen3) and rotary position embedding (Su et al., 2021) in the half-split form that checkpoints use.

    `cos_sin` is float32 [max_position, head_dim]: cosines of the head_dim / 2 angles, then their sines.
    """

    cos_sin: Tensor

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, cos_sin: Tensor, qk_norm_eps: float | None = None
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_norm = RMSNorm(head_dim, qk_norm_eps) if qk_norm_eps is not None else None
        self.k_norm = RMSNorm(head_dim, qk_norm_eps) if qk_norm_eps is not None else None
        self.register_buffer("cos_sin", cos_sin, persistent=False)

    def forward(self, positions: Tensor, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """positions [T], qkv [T, (Hq + 2 Hkv) D] -> q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D]."""
        heads = qkv.view(qkv.shape[0], -1, self.head_dim)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = self.cos_sin[positions.long()].to(qkv.dtype).unsqueeze(1).chunk(2, dim=-1)
        return rotate(q, cos, sin), rotate(k, cos, sin), v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pair (x[i], x[i + D/2]) by the i-th angle; x [T, heads, D], cos and sin [T, 1, D/2]."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
