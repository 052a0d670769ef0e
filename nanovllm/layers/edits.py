"""Edits of logits that few requests ask for: allowed ids, biases and bans, penalties. `engine/edits.py` says which."""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.engine.batch import Batch


def edit(logits: Tensor, batch: Batch, last_tokens: Tensor) -> Tensor:
    """Allowed ids, biases, bans, and penalties (Keskar et al., 2019; presence and frequency as OpenAI defines them)."""
    vocab_size = logits.shape[1]
    if len(batch.allow_at):
        banned = torch.ones(len(batch.allow_at), vocab_size, dtype=torch.bool, device=logits.device)
        allowed = (owners(batch.allow_start, len(batch.allow_ids)), batch.allow_ids)
        banned[allowed] = banned.new_zeros(())  # a Python False would be copied to the device, and waited for
        logits[batch.allow_at] = logits[batch.allow_at].masked_fill(banned, float("-inf"))
    if len(batch.bias_at):
        logits.index_put_((batch.bias_at, batch.bias_ids), batch.bias_values, accumulate=True)
    if len(batch.penalty_at):
        owner = owners(batch.history_start, len(batch.history))
        row = batch.sample_rows[batch.penalty_at]
        ids = torch.where(batch.history < 0, last_tokens[row[owner]].to(batch.history.dtype), batch.history)
        place = torch.arange(len(ids), device=ids.device) - batch.history_start[owner]
        is_output = (place >= batch.history_prompt[owner]).float()
        at = (owner, ids.long())
        zeros = torch.zeros(len(batch.penalty_at), vocab_size, device=logits.device)
        seen = zeros.index_put(at, torch.ones_like(is_output), accumulate=True) > 0
        counts = zeros.index_put(at, is_output, accumulate=True)
        x = logits[batch.penalty_at]
        repetition = batch.repetition[:, None]
        x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
        x = x - batch.frequency[:, None] * counts - batch.presence[:, None] * (counts > 0)
        logits[batch.penalty_at] = x
    return logits


def owners(starts: Tensor, total: int) -> Tensor:
    """[0, 2, 5] -> [0, 0, 1, 1, 1]: which piece each of `total` items of a ragged array belongs to."""
    pieces = torch.arange(len(starts) - 1, device=starts.device)
    return torch.repeat_interleave(pieces, starts.diff(), output_size=total)  # else the host would wait for the sum
