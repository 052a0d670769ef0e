"""Products with matrices that stay in the blocks of GGUF files. The oracle is gguf.dequantize.

The bound of a product. An input x of a group of 32 becomes a multiple of max|x| / 32767, so its
error is at most half of that, and 1 % more for the float32 rounding of the quotient. The error of
a sum over groups is at most

    sum over groups of 0.505 * max|x| / 32767 * sum |w|.

Sums of integers are exact. Each of the two or four float32 terms of a group (scale * sum of codes,
bias * sum of inputs) is rounded a few times, and so is the running sum. A code stands for the
weight plus a zero point, so a term may be larger than the weights: at most 8 times max|w| * sum |x|
with random blocks, in which most codes occur in every group. This adds

    (4 * groups + 8) * 2^-24 * sum over groups of 8 * max|w| * sum |x|.

Matrices of floats keep their inputs: depth * 2^-24 * sum |w x|. A half-precision result is rounded
once more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from gguf_files import SCALES, Q, dequantise, gguf, random_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovllm.kernels import blocks, library

pytestmark = pytest.mark.skipif(
    blocks.load() is None, reason="blocks.cpp does not build here (no C++ compiler)"
)
FLAGS = library.cpu_features().split()
# A machine with AVX-512 runs what a machine without it runs, too. A run with
# NANOVLLM_CPU_ISA in the environment tests that level alone: portable, avxvnni or avx512.
GIVEN = os.environ.get("NANOVLLM_CPU_ISA")
LEVELS = [GIVEN] if GIVEN else ["native", "avx2"] if "avx512f" in FLAGS else ["native"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The types that the gguf package writes too.
WRITTEN = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"]
HALF_STEP = 0.505 / 32767
EPS = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
GROUP = 32
DEPTH = 512


def forget_the_library() -> None:
    for cached in (library.load, blocks.load, blocks.kernel):
        cached.cache_clear()


@pytest.fixture(scope="module", params=LEVELS, autouse=True)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels may use these instructions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOVLLM_CPU_ISA", request.param)
        forget_the_library()
        MATRICES.clear()
        assert blocks.load() is not None
        yield request.param
    forget_the_library()
    MATRICES.clear()


class Matrix(NamedTuple):
    """A matrix in panels, and as the gguf package reads it: float64 [features, depth]."""

    packed: Tensor
    segments: Tensor
    weights: Tensor

    @property
    def features(self) -> int:
        return len(self.weights)

    @property
    def depth(self) -> int:
        return self.weights.shape[1]

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return blocks.linear(x, self.packed, self.segments, bias, self.features)

    def embedding(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return blocks.embedding(ids, self.packed, self.segments, self.depth, dtype)


MATRICES: dict[object, Matrix] = {}


def make(types: list[tuple[str, int]], depth: int = DEPTH) -> Matrix:
    """Segments of these types and numbers of features, one after the other."""
    key = (tuple(types), depth)
    if key in MATRICES:
        return MATRICES[key]
    parts, table, weights, size = [], [], [], 0
    for number, (name, features) in enumerate(types):
        kind = Q[name]
        rows = random_blocks(kind, features, depth, seed=number)
        packed = torch.zeros(blocks.packed_bytes(kind, features, depth), dtype=torch.uint8)
        blocks.pack(int(kind), rows, np.arange(features), depth, packed)
        padded = torch.nn.functional.pad(packed, (0, -len(packed) % blocks.CACHE_LINE))
        table.append([int(kind), size, sum(map(len, weights)), features])
        parts.append(padded)
        size += len(padded)
        weights.append(dequantise(rows, kind, depth))
    made = Matrix(torch.cat(parts), torch.tensor(table), torch.cat(weights))
    MATRICES[key] = made
    return made


def inputs(rows: int, depth: int = DEPTH, dtype: torch.dtype = torch.float32) -> Tensor:
    """Groups of different sizes, and one group of zeros."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, depth, generator=generator)
    x[:, GROUP : 2 * GROUP] *= 100
    x[:, 2 * GROUP : 3 * GROUP] *= 0.001
    x[: rows // 2, -GROUP:] = 0
    return x.to(dtype)


def grouped(x: Tensor) -> Tensor:
    return x.abs().double().view(len(x), -1, GROUP)


def bound(x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
    """The largest error of a product in float32, [rows, features]: see the top of this file."""
    xs, ws = grouped(x), grouped(matrix.weights)
    groups = xs.shape[1]
    rounding = HALF_STEP * xs.amax(-1) @ ws.sum(-1).T
    sums = (4 * groups + 8) * 2**-24 * 8 * xs.sum(-1) @ ws.amax(-1).T
    floats = matrix.depth * 2**-24 * (x.double().abs() @ matrix.weights.abs().T)
    added = 0 if bias is None else 2**-23 * bias.double().abs()
    return rounding + sums + floats + added


def assert_product(x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> None:
    actual = matrix.linear(x, bias)
    expected = x.double() @ matrix.weights.T
    if bias is not None:
        expected = expected + bias.double()
    most = bound(x, matrix, bias)
    if x.dtype != torch.float32:
        most = most * 1.01 + EPS[x.dtype] * expected.abs()
    assert actual.dtype == x.dtype
    error = (actual.double() - expected).abs()
    assert bool((error <= most).all()), f"{(error / most).max():.2f} of the bound"


# One type


@pytest.mark.parametrize("name", blocks.TYPES)
def test_rows_are_those_of_the_package(name: str) -> None:
    matrix = make([(name, 37)])
    ids = torch.tensor([36, 0, 5, 16, 15, 5, 31])
    for dtype in DTYPES:
        assert torch.equal(matrix.embedding(ids, dtype), matrix.weights[ids].to(dtype))


@pytest.mark.parametrize("name", WRITTEN)
def test_blocks_of_the_quantiser_are_those_of_the_package(name: str) -> None:
    kind = Q[name]
    array = np.random.default_rng(0).normal(size=(20, DEPTH)).astype(np.float32)
    rows = gguf.quants.quantize(array, kind).view(np.uint8).reshape(20, -1)
    packed = torch.zeros(blocks.packed_bytes(kind, 20, DEPTH), dtype=torch.uint8)
    turned = np.arange(20)[::-1].copy()  # features in reverse to the rows of the file
    blocks.pack(int(kind), rows, turned, DEPTH, packed)
    found = Matrix(packed, torch.tensor([[int(kind), 0, 0, 20]]), torch.empty(20, DEPTH))
    expected = dequantise(rows, kind, DEPTH).flip(0)
    assert torch.equal(found.embedding(torch.arange(20)).double(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", blocks.TYPES)
def test_a_product_is_within_the_rounding_of_its_inputs(name: str, dtype: torch.dtype) -> None:
    matrix = make([(name, 37)])
    for rows in (1, 2, 3, 4, 5, 12, 13, 27):
        assert_product(inputs(rows, dtype=dtype), matrix)


@pytest.mark.parametrize("name", [name for name in SCALES if name in blocks.TYPES])
def test_the_largest_codes_do_not_overflow(name: str) -> None:
    """Blocks with every bit set, and with none. Float scales are 1."""
    kind = Q[name]
    rows = random_blocks(kind, 2, DEPTH)
    by_block = rows.reshape(2, -1, gguf.GGML_QUANT_SIZES[kind][1])
    by_block[0, :, name == "MXFP4" :] = 255
    by_block[1, :, name == "MXFP4" :] = 0
    for at in SCALES[name]:
        by_block[:, :, at : at + 2] = np.array([1], np.float16).view(np.uint8)
    packed = torch.zeros(blocks.packed_bytes(kind, 2, DEPTH), dtype=torch.uint8)
    blocks.pack(int(kind), rows, np.arange(2), DEPTH, packed)
    weights = dequantise(rows, kind, DEPTH)
    matrix = Matrix(packed, torch.tensor([[int(kind), 0, 0, 2]]), weights)
    assert torch.equal(matrix.embedding(torch.arange(2)).double(), weights)
    for x in (torch.ones(6, DEPTH), -torch.ones(1, DEPTH)):
        error = (matrix.linear(x).double() - x.double() @ weights.T).abs().max()
        # An overflow of 32 bits is an error of 2^32 / 32767 at least.
        assert error <= 2**-20 * DEPTH * (256 + weights.abs().max())


# Rows and threads


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", blocks.TYPES)
def test_bits_of_a_row_do_not_depend_on_other_rows_or_threads(
    name: str, dtype: torch.dtype
) -> None:
    matrix = make([(name, 77)])  # large enough for two threads
    x = inputs(29, dtype=dtype)
    torch.set_num_threads(1)
    alone = torch.cat([matrix.linear(x[i : i + 1]) for i in range(29)])
    for number in (1, 2):
        torch.set_num_threads(number)
        for size in (1, 2, 3, 4, 5, 7, 11, 12, 13, 25, 29):
            assert torch.equal(matrix.linear(x[:size]), alone[:size])
            assert torch.equal(matrix.linear(x[29 - size :]), alone[29 - size :])


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_split_of_the_rows_gives_the_same_bits(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(list(blocks.TYPES)), min_size=1, max_size=2))
    matrix = make([(name, 19) for name in names], 256)
    x = inputs(30, 256)
    cuts = sorted(data.draw(st.sets(st.integers(1, 29), max_size=5)))
    parts = [matrix.linear(part) for part in torch.tensor_split(x, cuts)]
    assert torch.equal(torch.cat(parts), matrix.linear(x))


# Several pieces

MIXTURES = [
    [("Q4_K", 16), ("Q6_K", 3), ("Q5_K", 29)],
    [("F32", 5), ("Q8_0", 17), ("BF16", 1), ("Q3_K", 33), ("F16", 2), ("MXFP4", 15)],
    [("IQ4_XS", 1)],
    [("Q2_K", 31), ("Q4_1", 32), ("IQ4_NL", 33)],
]
FLOATS = [("F32", 7), ("BF16", 20), ("F16", 16)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("types", [*MIXTURES, FLOATS])
def test_pieces_of_several_types_and_odd_numbers_of_features(
    types: list[tuple[str, int]], dtype: torch.dtype
) -> None:
    matrix = make(types)
    bias = torch.linspace(-3, 3, matrix.features).to(dtype)
    for rows in (1, 4, 5, 14):
        assert_product(inputs(rows, dtype=dtype), matrix)
        assert_product(inputs(rows, dtype=dtype), matrix, bias)
    ids = torch.randperm(matrix.features)
    assert torch.equal(matrix.embedding(ids, dtype), matrix.weights[ids].to(dtype))


def test_floats_alone_have_any_depth() -> None:
    matrix = make(FLOATS, 45)
    x = torch.randn(6, 45)
    error = (matrix.linear(x).double() - x.double() @ matrix.weights.T).abs()
    assert bool((error <= 45 * 2**-24 * (x.double().abs() @ matrix.weights.abs().T)).all())
    assert torch.equal(matrix.embedding(torch.tensor([42])).double(), matrix.weights[42:])


@pytest.mark.parametrize("types", MIXTURES)
def test_rows_of_inputs_may_lie_apart(types: list[tuple[str, int]]) -> None:
    matrix = make(types)
    for rows in (2, 6, 13):
        x = inputs(rows)
        wide = torch.full((rows, DEPTH + 24), torch.nan)
        wide[:, 8 : 8 + DEPTH] = x
        assert torch.equal(matrix.linear(wide[:, 8 : 8 + DEPTH]), matrix.linear(x))
        columns = x.T.contiguous().T  # neighbours in depth lie apart
        assert torch.equal(matrix.linear(columns), matrix.linear(x))


def test_no_rows_give_no_rows() -> None:
    matrix = make(MIXTURES[0])
    assert matrix.linear(torch.empty(0, DEPTH)).shape == (0, matrix.features)
    assert matrix.embedding(torch.empty(0, dtype=torch.int64)).shape == (0, DEPTH)


def test_ids_outside_the_matrix_give_zeros() -> None:
    matrix = make(MIXTURES[1])
    ids = torch.tensor([-1, 3, matrix.features, 72, -(2**40), 2**40])
    rows = matrix.embedding(ids)
    assert torch.equal(rows[[1, 3]].double(), matrix.weights[[3, 72]])
    assert not rows[[0, 2, 4, 5]].any()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("types", [*MIXTURES, FLOATS])
def test_a_number_that_is_none_spoils_its_own_row(
    types: list[tuple[str, int]], broken: float
) -> None:
    matrix = make(types)
    for rows in (2, 4, 9, 26):
        x = inputs(rows)
        expected = matrix.linear(x)
        x[1, 70] = broken
        found = matrix.linear(x)
        assert not found[1].isfinite().any()
        others = torch.arange(rows) != 1
        assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e30])
def test_inputs_of_any_size(size: float) -> None:
    """Numbers below the normal ones may become zero."""
    matrix = make(MIXTURES[3])
    x = torch.randn(5, DEPTH) * size
    expected = x.double() @ matrix.weights.T
    error = (matrix.linear(x).double() - expected).abs()
    assert bool((error <= bound(x, matrix) + DEPTH * 2**-126).all())


@pytest.mark.parametrize("name", blocks.TYPES)
def test_panels_take_the_memory_of_the_file(name: str) -> None:
    """At most 5 % more: 6-bit scales take 8 bits."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[Q[name]]
    assert blocks.packed_bytes(Q[name], 64, 2048) <= 1.05 * 64 * 2048 / block * block_bytes
