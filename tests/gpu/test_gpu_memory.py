"""The memory of an engine on a GPU. Nothing else may use the GPU while these tests run."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from gpu.engines import PROMPTS, make_llm, tokens_of
from tiny import shared_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def free() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@contextmanager
def taken_by_others(share: float) -> Iterator[None]:
    ballast = torch.empty(
        int(share * torch.cuda.mem_get_info()[1]), dtype=torch.uint8, device="cuda"
    )
    yield
    del ballast


def test_an_engine_takes_its_share_of_the_gpu_beside_other_processes():
    folder, _ = shared_model()
    tokens_of(make_llm(folder), PROMPTS)  # kernels and libraries are loaded
    total = torch.cuda.mem_get_info()[1]
    blocks = []
    for others in (0.0, 0.3):
        with taken_by_others(others):
            before = free()
            llm = make_llm(folder, num_gpu_blocks_override=None, gpu_memory_utilization=0.2)
            tokens_of(llm, PROMPTS)
            used = before - free()
            assert 0.18 * total < used < 0.2 * total + (64 << 20)
            blocks.append(llm.llm_engine.executor.runner.num_blocks)
            del llm
    assert blocks[0] == pytest.approx(blocks[1], rel=0.01)
    with taken_by_others(0.6):
        before = free()
        llm = make_llm(folder, num_gpu_blocks_override=None, gpu_memory_utilization=0.9)
        assert before - free() > 0.8 * before, "all that others leave, where that is less"
        tokens_of(llm, PROMPTS)


def test_too_little_memory_is_an_error_that_says_what_would_fit():
    folder, _ = shared_model()
    with pytest.raises(
        ValueError, match=r"max_model_len=512 needs 32 .*raise gpu_memory_utilization or lower"
    ):
        make_llm(folder, num_gpu_blocks_override=None, gpu_memory_utilization=0.0001)


def test_a_deleted_engine_gives_its_memory_back():
    folder, _ = shared_model()
    tokens_of(make_llm(folder), PROMPTS)
    before = free()
    llm = make_llm(folder, num_gpu_blocks_override=None, gpu_memory_utilization=0.3)
    tokens_of(llm, PROMPTS)
    assert free() < before - (1 << 30)
    allocated = torch.cuda.memory_allocated()
    gc.disable()
    try:
        del llm
        assert torch.cuda.memory_allocated() < allocated - (1 << 30), (
            "freed without the garbage collector"
        )
    finally:
        gc.enable()
    assert free() > before - (64 << 20)


def test_sleeping_weights_pin_no_more_memory_than_they_have():
    def pinned() -> int:
        return torch.cuda.host_memory_stats()["allocated_bytes.current"]

    folder, _ = shared_model()
    llm = make_llm(folder, enable_sleep_mode=True)
    parameters = llm.llm_engine.executor.runner.model.parameters()
    size = sum(parameter.nbytes for parameter in parameters)
    torch.cuda.synchronize()
    torch._C._host_emptyCache()
    before = pinned()
    llm.sleep(1)
    assert size <= pinned() - before <= 1.01 * size
    llm.wake_up()
    assert pinned() <= before
