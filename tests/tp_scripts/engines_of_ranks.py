"""Two engines of two ranks each, with an adapter: argv is the model's folder and the adapter's."""

from __future__ import annotations

import json
import sys
from typing import Any

from nanovllm import LLM, SamplingParams
from nanovllm.lora.request import LoRARequest


def ranks_of(worker: Any) -> tuple[int, int]:
    return worker.rank, worker.model_runner.tp.size


def same(output_ids: list[int], logits: Any) -> Any:
    return logits


def main(folder: str, adapter: str) -> None:
    llm = LLM(
        folder,
        dtype="float32",
        device="cpu",
        tensor_parallel_size=2,
        data_parallel_size=2,
        enable_lora=True,
        skip_tokenizer_init=True,
        num_gpu_blocks_override=64,
    )
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logits_processors=[same])
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
    lora = LoRARequest("a", 1, adapter)
    outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=[lora, None, lora, None])
    print(
        json.dumps(
            {
                "tokens": [output.outputs[0].token_ids for output in outputs],
                "ranks": llm.collective_rpc(ranks_of),
                "world": llm.get_world_size(),
                "loras": sorted(llm.llm_engine.list_loras()),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
