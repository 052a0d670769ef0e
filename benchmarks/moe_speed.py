"""Decode steps of a mixture of experts: python -m benchmarks.moe_speed MODEL.

Prints, for one request and for a batch of 16, the bytes that a step reads and the share of
the machine's copy bandwidth. A step reads the head, all matrices that are no experts, and
the experts that the batch uses; these are counted in a run of their own.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

from benchmarks.limit import probe
from nanovllm import LLM, SamplingParams
from nanovllm.kernels import moe

PROMPT = 8  # tokens
VOCABULARY = 10000
BATCHES = {1: 24, 16: 12}  # requests -> tokens of each


def generate(llm: LLM, batch: int, num_tokens: int) -> float:
    """Seconds for `batch` random prompts. Sampled tokens, so that experts are used alike."""
    llm.reset_prefix_cache()
    params = SamplingParams(temperature=1.0, max_tokens=num_tokens, ignore_eos=True)
    prompts: Any = [
        {"prompt_token_ids": [random.randrange(5, VOCABULARY) for _ in range(PROMPT)]}
        for _ in range(batch)
    ]
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


def used_experts(llm: LLM, batch: int) -> float:
    """The mean number of different experts in a layer of a step."""
    seen: list[int] = []
    plain = moe.route

    def spy(logits: Any, top_k: int, renormalise: bool) -> moe.Routes:
        routes = plain(logits, top_k, renormalise)
        if len(logits) == batch:
            seen.append(len(routes.experts.unique()))
        return routes

    moe.route = spy
    try:
        generate(llm, batch, 8)
    finally:
        moe.route = plain
    return sum(seen) / len(seen)


def step_seconds(llm: LLM, batch: int, num_tokens: int) -> float:
    """Seconds of a decode step: the shortest long run minus the shortest short run."""
    generate(llm, batch, 4)
    short = min(generate(llm, batch, 2) for _ in range(3))
    long = min(generate(llm, batch, 2 + num_tokens) for _ in range(4))
    return (long - short) / num_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dummy", action="store_true", help="random weights of a config.json")
    args = parser.parse_args()
    load_format = "dummy" if args.dummy else "auto"
    sizes = {"max_model_len": 1024, "num_gpu_blocks_override": 200, "block_size": 16}
    kwargs: dict[str, Any] = {**sizes, "dtype": "bfloat16", "load_format": load_format}
    llm = LLM(args.model, device="cpu", skip_tokenizer_init=True, **kwargs)
    model: Any = llm.llm_engine.executor.runner.model
    experts, rest = 0, 0
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            experts += parameter.nbytes
        elif "embed_tokens" not in name:
            rest += parameter.nbytes
    for batch, num_tokens in BATCHES.items():
        step = step_seconds(llm, batch, num_tokens)
        bandwidth = probe("cpu", "bfloat16").bandwidth
        used = used_experts(llm, batch)
        size = rest + experts * used / model.config.num_experts
        print(
            f"{batch} requests: {batch / step:.1f} tok/s, {used:.1f} experts a layer, "
            f"{size / 1e6:.0f} MB a step, {size / step / 1e9:.1f} GB/s, "
            f"{size / step / bandwidth:.2f} of copy {bandwidth / 1e9:.1f} GB/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
