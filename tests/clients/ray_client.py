"""Ray Data's map_batches with one LLM in an actor: tokens equal transformers'."""

from __future__ import annotations

from typing import Any

import ray
from tiny import greedy, random_prompts, shared_model

PROMPTS = random_prompts([5, 33, 12, 7, 64, 20], seed=3)


class Generate:
    def __init__(self, folder: str) -> None:
        from vllm import LLM, SamplingParams

        self.llm = LLM(folder, dtype="float32", num_gpu_blocks_override=64)
        self.params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        prompts = [{"prompt_token_ids": list(map(int, ids))} for ids in batch["ids"]]
        outputs = self.llm.generate(prompts, self.params, use_tqdm=False)
        return {"number": batch["number"], "found": [o.outputs[0].token_ids for o in outputs]}


def main() -> None:
    folder, oracle = shared_model()
    ray.init(num_cpus=2, include_dashboard=False)
    rows = [{"number": i, "ids": prompt} for i, prompt in enumerate(PROMPTS)]
    dataset = ray.data.from_items(rows).map_batches(
        Generate, fn_constructor_args=(folder,), batch_size=3, concurrency=1
    )
    found = {row["number"]: list(row["found"]) for row in dataset.take_all()}
    assert found == {i: greedy(oracle, prompt, 8) for i, prompt in enumerate(PROMPTS)}
    print(f"{len(found)} answers equal")


if __name__ == "__main__":
    main()
