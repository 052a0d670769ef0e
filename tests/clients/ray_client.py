"""Ray Data's map_batches with one LLM in an actor: tokens equal transformers'."""

from __future__ import annotations

import os
from typing import Any

import ray
from tiny import greedy, random_prompts, shared_model

PROMPTS = random_prompts([5, 33, 12, 7, 64, 20], seed=3)
OBJECT_STORE = 100 * 2**20  # bytes; Ray takes 30 % of the memory by default


class Generate:
    def __init__(self, folder: str) -> None:
        from vllm import LLM, SamplingParams

        self.llm = LLM(folder, dtype="float32", num_gpu_blocks_override=64)
        self.params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        prompts = [{"prompt_token_ids": list(map(int, ids))} for ids in batch["ids"]]
        outputs = self.llm.generate(prompts, self.params, use_tqdm=False)
        found = [output.outputs[0].token_ids for output in outputs]
        process = [os.getpid()] * len(found)
        return {"number": batch["number"], "found": found, "process": process}


def main() -> None:
    folder, oracle = shared_model()
    ray.init(num_cpus=2, object_store_memory=OBJECT_STORE, include_dashboard=False)
    try:
        rows = [{"number": i, "ids": prompt} for i, prompt in enumerate(PROMPTS)]
        dataset = ray.data.from_items(rows).map_batches(
            Generate,
            fn_constructor_args=(folder,),
            batch_size=3,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        answers = dataset.take_all()
    finally:
        ray.shutdown()
    found = {row["number"]: list(row["found"]) for row in answers}
    assert found == {i: greedy(oracle, prompt, 8) for i, prompt in enumerate(PROMPTS)}
    assert os.getpid() not in {row["process"] for row in answers}
    print(f"{len(found)} answers equal")


if __name__ == "__main__":
    main()
