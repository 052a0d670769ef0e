"""Everything that an engine queues on a GPU, on a device that checks it and computes nothing (tests/fake_cuda.py).

A step must not wait for the device, mix devices, or hand a kernel what the kernel does not take.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_moe import FAMILIES
from tiny import MORE_FAMILIES, WAYS, random_prompts, shared_model, tiny_model
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

pytest.importorskip("triton", reason="no triton for this platform")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tests/gpu checks the same on a real device"
)

from fake_cuda import fake_cuda  # noqa: E402

from nanovllm import LLM, SamplingParams, kernels  # noqa: E402
from nanovllm.attention import flash_backend  # noqa: E402
from nanovllm.attention.flash_backend import FLASH_2, FLASH_3, FLASH_4  # noqa: E402
from nanovllm.kernels import triton_ops  # noqa: E402
from nanovllm.runner.device import to_host  # noqa: E402
from nanovllm.runner.memory import profile_step  # noqa: E402

PROMPTS = random_prompts([1, 15, 40, 70, 3, 9, 5, 17, 2])
SAMPLING = {"_tile_sum_kernel", "_threshold_kernel", "_draw_kernel"}
LAYERS = {"_rms_norm_kernel", "_activation_and_mul_kernel"}
ATTENTION = {"_write_kernel", "_plan_kernel", "_decode_kernel", "_prefill_kernel"}
EXPERTS = {"_route_kernel", "_group_kernel", "_grouped_kernel", "_combine_kernel"}


def make_llm(folder: str, **kwargs: Any) -> LLM:
    defaults: dict[str, Any] = {
        "device": "cuda",
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 20,
        "num_gpu_blocks_override": 80,
        "compilation_config": 0,  # torch.compile needs tensors with contents
    }
    return LLM(folder, **{**defaults, **kwargs})


def generate(llm: LLM, ways: list[dict[str, Any]], max_tokens: int = 3) -> None:
    """A prompt for each way. The later it comes, the more tokens it gets."""
    params = [
        SamplingParams(max_tokens=max_tokens + i // 2, ignore_eos=True, **way)
        for i, way in enumerate(ways)
    ]
    outs = llm.generate(PROMPTS[: len(ways)], params, use_tqdm=False)
    assert [len(out.outputs[0].token_ids) for out in outs] == [p.max_tokens for p in params]


@pytest.mark.parametrize("graphs", [True, False])
def test_every_way_of_sampling(monkeypatch, graphs):
    """Alone and together; prompts, steps of prompts and decodes, and decodes alone."""
    folder, _ = shared_model()
    with fake_cuda(monkeypatch) as gpu:
        llm = make_llm(folder, enforce_eager=not graphs)
        runner = llm.llm_engine.executor.runner
        assert (runner.graphs is not None) == graphs
        for way in WAYS:
            generate(llm, [way, way])
        generate(llm, WAYS)
        assert gpu.launched >= SAMPLING | LAYERS | ATTENTION
        assert gpu.num_copies > 20


def test_a_greedy_step_runs_the_kernel_and_nothing_that_would_be_compiled(monkeypatch):
    """The first greedy request would wait for torch.compile."""
    folder, _ = shared_model()
    used: list[str] = []
    monkeypatch.setattr(kernels, "_argmax", lambda logits: used.append("_argmax"))
    with fake_cuda(monkeypatch) as gpu:
        generate(make_llm(folder, enforce_eager=True), WAYS[1:2])
        assert "_draw_kernel" in gpu.launched
    assert not used


def test_the_step_that_measures_memory(monkeypatch):
    folder, _ = shared_model()
    with fake_cuda(monkeypatch):
        profile_step(make_llm(folder, enforce_eager=True).llm_engine.executor.runner)


@pytest.mark.parametrize(
    ("family", "shape", "arguments"),
    [
        ("Qwen3", {}, {"kv_cache_dtype": "fp8"}),
        ("Mistral", {"sliding_window": 24}, {"dtype": "float32", "block_size": 16}),
        ("Qwen2", {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1}, {}),
        ("Gemma2", MORE_FAMILIES["Gemma2"], {}),
        ("Qwen3Moe", FAMILIES["Qwen3Moe"], {}),
        ("Qwen3", {}, {"attention_backend": "varlen", "block_size": 256}),
        ("Qwen3", {}, {"model_impl": "transformers"}),
    ],
    ids=str,
)
def test_every_kind_of_model(monkeypatch, tmp_path, family, shape, arguments):
    folder, _ = tiny_model(tmp_path, family, **shape)
    with fake_cuda(monkeypatch) as gpu:
        generate(make_llm(folder, **arguments), WAYS[:4])
        assert gpu.launched >= SAMPLING
        if "attention_backend" not in arguments:
            assert gpu.launched >= ATTENTION
        if family == "Qwen3Moe":
            assert gpu.launched >= EXPERTS


def some_attention(q: Tensor, *pages: Tensor, **words: Any) -> Tensor:
    """Stands for the functions of flash-attn."""
    tensors = [x for x in (q, *pages, *words.values()) if isinstance(x, Tensor)]
    assert {x.device for x in tensors} == {q.device}
    assert words["causal"]
    return torch.empty_like(q)


@pytest.mark.parametrize("package", [FLASH_2, FLASH_3, FLASH_4], ids=lambda package: package.name)
def test_every_flash_attn(monkeypatch, package):
    returns_two = package is FLASH_4
    module = SimpleNamespace(
        flash_attn_with_kvcache=some_attention,
        flash_attn_varlen_func=lambda *args, **words: (
            (some_attention(*args, **words), None)
            if returns_two
            else some_attention(*args, **words)
        ),
    )
    monkeypatch.setattr(flash_backend, "choose", lambda packages, spec: (package, "installed"))
    monkeypatch.setattr(flash_backend, "import_module", lambda name: module)
    folder, _ = shared_model()
    with fake_cuda(monkeypatch) as gpu:
        generate(make_llm(folder, attention_backend="flash", block_size=256), WAYS[:4])
        assert "_write_kernel" in gpu.launched
        assert "_decode_kernel" not in gpu.launched


def few_rows_llm(folder: str, **kwargs: Any) -> LLM:
    """An engine with all kernels, the unmeasured ones too."""
    return make_llm(folder, compilation_config={"mode": 0, "custom_ops": ["all"]}, **kwargs)


def test_products_of_few_rows_run_only_on_request(monkeypatch):
    folder, _ = shared_model()
    with fake_cuda(monkeypatch) as gpu:
        generate(few_rows_llm(folder), WAYS[:4])
        assert gpu.launched >= {"_linear_kernel", "_swiglu_kernel"}
        assert "_activation_and_mul_kernel" not in gpu.launched
    with fake_cuda(monkeypatch) as gpu:
        generate(make_llm(folder), WAYS[:4])
        assert gpu.launched.isdisjoint({"_linear_kernel", "_swiglu_kernel"})


class Seen(torch.nn.Module):
    """A layer around a projection that notes the width of its product."""

    def __init__(self, projection: torch.nn.Module, widths: set[int]) -> None:
        super().__init__()
        self.projection = projection
        self.widths = widths

    def forward(self, x: Tensor) -> Tensor:
        product = self.projection(x)
        self.widths.add(product.shape[1])
        return product


@pytest.mark.parametrize("how", ["hook", "forward", "layer"])
def test_what_reads_the_product_of_gate_up_gets_it(monkeypatch, how):
    """SwiGLU in the epilogue has no such product, so these layers run without it."""
    folder, _ = shared_model()
    widths: set[int] = set()
    with fake_cuda(monkeypatch) as gpu:
        llm = few_rows_llm(folder, enforce_eager=True)
        for layer in llm.llm_engine.executor.runner.model.model.layers:
            projection = layer.mlp.gate_up_proj
            if how == "hook":
                projection.register_forward_hook(lambda layer, args, out: widths.add(out.shape[1]))
            elif how == "forward":
                product = type(projection).forward
                projection.forward = Seen(partial(product, projection), widths).forward
            else:
                layer.mlp.gate_up_proj = Seen(projection, widths)
        generate(llm, WAYS[:2])
        assert widths == {len(projection.weight)}
        assert "_swiglu_kernel" not in gpu.launched
        assert "_linear_kernel" in gpu.launched


# -- what stands for the device --------------------------------------------------------------------


def waits_by_reading(x: Tensor) -> object:
    return x.sum().item()


def waits_by_a_mask(x: Tensor) -> object:
    return x[x > 0]


def waits_by_a_list(x: Tensor) -> object:
    return torch.tensor([1.0, 2.0], device=x.device)


def waits_by_pageable_memory(x: Tensor) -> object:
    return torch.zeros(4).to(x.device, non_blocking=True)


def waits_for_a_result(x: Tensor) -> object:
    return x.cpu()


def mixes_devices(x: Tensor) -> object:
    return x + torch.zeros(8, 8)


def launches_an_unaligned_pointer(x: Tensor) -> object:
    return triton_ops.silu_and_mul(x.view(-1)[1:9].view(1, 8))


def launches_strided_memory(x: Tensor) -> object:
    return triton_ops.silu_and_mul(x.t())


@pytest.mark.parametrize(
    "mistake",
    [
        waits_by_reading,
        waits_by_a_mask,
        waits_by_a_list,
        waits_by_pageable_memory,
        waits_for_a_result,
        mixes_devices,
        launches_an_unaligned_pointer,
        launches_strided_memory,
    ],
)
def test_the_device_finds_a_mistake(monkeypatch, mistake):
    with fake_cuda(monkeypatch) as gpu:
        x = torch.zeros(8, 8, device="cuda:0")
        with gpu.watch(), pytest.raises((AssertionError, DataDependentOutputException)):
            mistake(x)


def test_the_device_takes_what_is_right(monkeypatch):
    with fake_cuda(monkeypatch) as gpu, gpu.watch():
        x = torch.zeros(4).pin_memory().to("cuda:0", non_blocking=True)
        x[1:3] = 5
        rows = x.view(2, 2)[:, None, ...][torch.zeros(3, dtype=torch.int64, device=x.device)]
        assert rows.shape == (3, 1, 2)
        assert to_host(rows).shape == (3, 1, 2)
