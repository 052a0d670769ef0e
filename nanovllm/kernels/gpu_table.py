"""What our GPU kernels choose on each kind of GPU: one table, and the shapes that follow from it.

A shape is a dict of launch options: sizes of tiles, warps, stages of the pipeline and a
bound for registers. The compiler says that the shapes fit, and spill nothing but for the
exceptions in docs/benchmarks.md (tests/gpu/compile_matrix.py). No GPU has measured the
entries marked "not measured".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.core.batch import ceil_div


@dataclass(frozen=True)
class GPUKind:
    """The choices for GPUs of one compute capability. Memory is shared memory, in KB.

    Tiles of attention are for half precision and heads of up to 128 numbers; the functions
    below derive the others. rows: of a query tile. tile: keys of a key tile. stages: of the
    pipeline; 1 loads a tile when it is needed.
    """

    gpus: str  # examples
    memory: int  # of one multiprocessor
    program_memory: int  # that one program may use
    prefill_rows: int = 128
    prefill_tile: int = 32
    prefill_stages: int = 3
    decode_tile: int = 64
    decode_stages: int = 3
    has_pdl: bool = False  # programmatic dependent launch; not measured
    few_rows: bool = True  # our products of few rows, see `linear_triton`; not measured


# A key tile of 64 in prefill needs the matrix instructions of 9.x and 10.x (wgmma, tcgen05),
# because others keep it in registers. Two stages in decode let two programs share 100 KB.
TABLE: dict[tuple[int, int], GPUKind] = {
    (7, 5): GPUKind(
        "T4, RTX 20",
        64,
        64,
        prefill_rows=64,
        prefill_tile=16,
        prefill_stages=1,
        decode_tile=16,
        decode_stages=1,
        few_rows=False,
    ),
    (8, 0): GPUKind("A100, A30", 164, 163),
    (8, 6): GPUKind("A10, A40, RTX 30", 100, 99, decode_stages=2),
    (8, 7): GPUKind("Jetson Orin", 164, 163),
    (8, 9): GPUKind("L4, L40S, RTX 40", 100, 99, decode_stages=2),
    (9, 0): GPUKind("H100, H200", 228, 227, prefill_tile=64, has_pdl=True),
    (10, 0): GPUKind("B200, B300", 228, 227, prefill_tile=64, has_pdl=True),
    (12, 0): GPUKind("RTX 50, RTX PRO 6000", 100, 99, decode_stages=2, has_pdl=True),
}
AMD = GPUKind("MI300", 64, 64, prefill_stages=2, decode_tile=32, decode_stages=2, few_rows=False)
OLDEST = min(TABLE)


def gpu_kind(capability: tuple[int, int]) -> GPUKind:
    """The row of the table: of this compute capability, or of the next lower one.

    GPUs older than the table get its first row.
    """
    if torch.version.hip:
        return AMD
    known = [each for each in TABLE if each <= capability]
    return TABLE[max(known, default=OLDEST)]


@dataclass(frozen=True)
class DeviceProperties:
    """The properties of a GPU that launches depend on."""

    capability: tuple[int, int]  # compute capability
    multiprocessors: int

    @property
    def kind(self) -> GPUKind:
        return gpu_kind(self.capability)


def device_properties(device: torch.device) -> DeviceProperties:
    """The properties of a GPU. Under the interpreter: a small Hopper GPU."""
    if device.type != "cuda":
        return DeviceProperties((9, 0), 2)
    found = torch.cuda.get_device_properties(device)
    return DeviceProperties((found.major, found.minor), found.multi_processor_count)


Shape = dict[str, int]  # launch options


def registers(count: int) -> Shape:
    """The launch option that bounds a thread's registers. Triton has it for NVIDIA's GPUs only."""
    return {} if torch.version.hip else {"maxnreg": count}


def power_of_2(n: int) -> int:
    """The least power of two that is not below n.

    triton.next_power_of_2 is slower, because it can also be called inside a kernel.
    """
    return 1 << (n - 1).bit_length()


def prefill_shape(
    kind: GPUKind, group: int, head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> Shape:
    """Launch options of prefill that compile without spilling registers.

    group: query heads of a KV head. BLOCK_M: rows of a query tile, at least one for each
    head of a group. TILE: keys of a key tile.
    """
    group_rows = power_of_2(group)
    if dtype == torch.float32:  # tensor cores would round float32 to TF32
        rows = max(16, group_rows)
        return {"BLOCK_M": rows, "TILE": 16, "num_warps": 4, "num_stages": 2}
    if head_dim > 128:
        rows = kind.prefill_rows // 2
        if cache_dtype != dtype:
            rows //= 2  # the conversion needs registers
        tile = min(kind.prefill_tile, 32)
        stages = min(kind.prefill_stages, 2)
    else:
        rows = kind.prefill_rows
        tile = kind.prefill_tile
        stages = kind.prefill_stages
    rows = max(rows, group_rows)
    return {"BLOCK_M": rows, "TILE": tile, "num_warps": 8, "num_stages": stages}


def decode_shape(
    kind: GPUKind,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    page: int,
) -> Shape:
    """Launch options of decode, with a bound for the registers of a thread.

    group and BLOCK_M: as in `prefill_shape`. page: tokens of a page. The registers bound
    how many programs run at once.
    """
    rows = max(16, power_of_2(group))  # matrix instructions take at least 16
    if dtype == torch.float32:
        return {"BLOCK_M": rows, "TILE": 16, "num_warps": 4, "num_stages": 2, **registers(128)}
    tile = kind.decode_tile if head_dim <= 128 else min(kind.decode_tile, 32)
    if head_dim > 128 or rows > 16:
        count = 240
    elif cache_dtype != dtype and page % tile:
        count = 240  # the conversion and the addresses of many pages need registers
    elif head_dim > 64:
        count = 168
    else:
        count = 128
    stages = kind.decode_stages
    if cache_dtype != dtype:
        stages += 1  # tiles of half the bytes
    return {"BLOCK_M": rows, "TILE": tile, "num_warps": 4, "num_stages": stages, **registers(count)}


def decode_programs(
    gpu: DeviceProperties, shape: Shape, head_dim: int, cache_dtype: torch.dtype
) -> int:
    """Programs of a decode launch: all that the GPU runs at once, so that none waits.

    Each multiprocessor has 65536 registers.
    """
    row_bytes = power_of_2(head_dim) * cache_dtype.itemsize
    stages = shape["num_stages"]
    tiles = 2 * (stages - 1) if stages > 1 else 3
    buffers = tiles * shape["TILE"] * row_bytes
    by_registers = 65536 // (shape.get("maxnreg", 255) * 32 * shape["num_warps"])
    by_memory = gpu.kind.memory * 1024 // (buffers + 11 * 1024)
    return gpu.multiprocessors * max(1, min(by_registers, by_memory))


FEW_ROWS = 256  # rows of a product: more are not few


def few_rows_pay(gpu: DeviceProperties, rows: int, features: int) -> bool:
    """Whether our product of few rows should run for [rows, K] x [K, features].

    It should where a library's tiles of 128 x 128 numbers leave multiprocessors idle. Not
    measured.
    """
    library_tiles = ceil_div(rows, 128) * ceil_div(features, 128)
    return gpu.kind.few_rows and 0 < rows <= FEW_ROWS and library_tiles < gpu.multiprocessors


def few_rows_shape(kind: GPUKind, rows: int, columns: int) -> Shape:
    """Launch options of a product of few rows. columns: of an output tile, BLOCK_N.

    Few rows read much of the matrix for each number of x, so their tiles are long in K.
    """
    block = min(max(power_of_2(rows), 16), 128)  # matrix instructions take at least 16
    depth = 128 if block <= 32 else 64
    warps = 8 if block == 128 else 4
    shape = {"BLOCK_M": block, "BLOCK_N": columns, "BLOCK_K": depth}
    return {**shape, "num_warps": warps, "num_stages": 4 if kind.memory > 100 else 3}


def split_depth(gpu: DeviceProperties, tiles: int, blocks: int) -> tuple[int, int]:
    """(programs of a tile, blocks of K that each multiplies), for one program a multiprocessor.

    blocks: of K in all. A program gets at least two, because a part costs time to add.
    """
    wanted = min(gpu.multiprocessors // tiles, blocks // 2)
    share = ceil_div(blocks, max(wanted, 1))
    return ceil_div(blocks, share), share
