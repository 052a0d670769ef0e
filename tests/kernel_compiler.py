"""Compiles Triton kernels as their callers launch them, for GPUs that are not here.

A driver without a device stands in for CUDA's, and launches stop after the compilation. Triton
brings ptxas and cuobjdump, which say how many registers a kernel takes and whether it spills.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
from attention_reference import make_case
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from nanovllm.attention import triton_backend
from nanovllm.core.batch import ceil_div
from nanovllm.kernels import gpu_table
from nanovllm.kernels.gpu_table import DeviceProperties, GPUKind

RESOURCES = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MULTIPROCESSORS = 132  # of the GPU that stands for all
REGISTERS = 65536  # of a multiprocessor
# Warps that a multiprocessor holds, by its KB of shared memory.
WARPS = {64: 32, 100: 48, 164: 64, 228: 64}
RESERVED = 1024  # bytes of shared memory that each program takes beside its own


class NoDevice:
    """What `JITFunction.run` asks of a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class NoInstinct(NoDevice):
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", "gfx942", 64)


@contextmanager
def compiling_for(device: NoDevice) -> Iterator[list]:
    """Inside the `with` every launch compiles its kernel for `device` and adds it to the list."""
    kernels: list = []
    run = triton.JITFunction.run
    properties = DeviceProperties(divmod(device.capability, 10), MULTIPROCESSORS)
    active = dict(vars(driver))

    def compile_only(*args, warmup, **kwargs):
        kernels.append(run(*args, warmup=True, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", compile_only)
        patch.setattr(gpu_table, "device_properties", lambda device: properties)
        driver.set_active(device)
        try:
            yield kernels
        finally:
            vars(driver).update(active)


@dataclass(frozen=True)
class Usage:
    """What a kernel of NVIDIA's takes. Bytes, but for `registers` of a thread."""

    name: str
    registers: int
    spilled: int  # of the stack and of local memory, a thread
    shared: int
    warps: int

    def programs(self, kind: GPUKind) -> int:
        """Programs that one multiprocessor runs at once."""
        registers = ceil_div(self.registers, 8) * 8  # the GPU gives eight at a time
        by_registers = REGISTERS // (registers * 32 * self.warps)
        by_memory = kind.memory * 1024 // (self.shared + RESERVED)
        by_warps = WARPS[kind.memory] // self.warps
        return min(by_registers, by_memory, by_warps)


def usage(kernel) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [RESOURCES, "--dump-resource-usage", cubin.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", report.stdout)}
    metadata = kernel.metadata
    spilled = found["STACK"] + found["LOCAL"]
    return Usage(metadata.name, found["REG"], spilled, metadata.shared, metadata.num_warps)


def attend_once(heads, dim, page, window, dtype, cache="auto", **words):
    """Launches plan, decode and prefill of attention once. Returns the backend."""
    lens = ([3, 1], [70, 80])
    shape = {"heads": heads, "head_dim": dim, "block_size": page, "windows": (window,)}
    case = make_case(*lens, dtype=dtype, **shape, **words)
    backend = triton_backend.TritonAttention(case.spec, cache)
    backend.allocate(case.num_blocks)
    backend.begin(case.metadata([67, 79], [70, 80]))
    backend.attend(0, torch.cat(case.q), case.sinks)
    return backend
