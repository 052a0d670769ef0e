"""Copies between host and device, and the device's free memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nanovllm.core.batch import Batch, pack, unpack


def to_host(x: Tensor) -> Tensor:
    """A copy on the host. From a GPU it goes to pinned memory and does not wait for the device."""
    if not x.is_cuda:
        return x.cpu()
    host = torch.empty_like(x, device="cpu", pin_memory=True)
    return host.copy_(x, non_blocking=True)


def to_device(batch: Batch[np.ndarray], device: torch.device) -> Batch[Tensor]:
    """The batch as tensors. A GPU gets all arrays in one copy."""
    if device.type == "cpu":
        return batch.map(torch.from_numpy)
    packed, layout = pack(batch)
    pinned = torch.from_numpy(packed).pin_memory()
    # The pinned block may be dropped here, because torch uses it again only when the copy
    # is done.
    buffer = pinned.to(device, non_blocking=True)
    return unpack(layout, buffer, torch.float32)


def free_gpu_memory(device: torch.device) -> int:
    """Bytes of the GPU that no process uses. 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free


def free_pinned_memory(device: torch.device) -> None:
    """Gives back the pinned memory of the host that torch keeps for later."""
    if device.type != "cuda":
        return
    torch.cuda.synchronize(device)  # a copy under way still needs its memory
    torch._C._host_emptyCache()


def current(device: torch.device) -> torch.cuda.device:
    """Makes a GPU the current device inside the `with`, because Triton launches on that one."""
    return torch.cuda.device(device.index if device.type == "cuda" else -1)
