"""outlines over an offline LLM: texts equal transformers'."""

from __future__ import annotations

import outlines
from tiny import greedy, shared_model, tiny_tokenizer
from vllm import LLM, SamplingParams

PROMPTS = ["the other", "in here", "Whether"]


def main() -> None:
    folder, oracle = shared_model()
    tokenizer = tiny_tokenizer()
    model = outlines.from_vllm_offline(LLM(folder, dtype="float32", num_gpu_blocks_override=64))
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for prompt in PROMPTS:
        expected = tokenizer.decode(
            greedy(oracle, tokenizer.encode(prompt), 8), skip_special_tokens=True
        )
        assert model(prompt, sampling_params=params) == expected
    print(f"{len(PROMPTS)} texts equal")


if __name__ == "__main__":
    main()
