"""What torchrun runs: every rank generates the same prompts and writes its tokens to a file.

It ends without closing the engine, and another file gets the ends of graphs and group.
"""

import json
import os
import sys

from ends import note_ends

from nanovllm import LLM, SamplingParams

folder, out, size, prompts = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
llm = LLM(
    folder,
    skip_tokenizer_init=True,
    dtype="float32",
    device="cpu",
    tensor_parallel_size=size,
    distributed_executor_backend="external_launcher",
    num_gpu_blocks_override=64,
)
greedy = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
drawn = SamplingParams(temperature=1, max_tokens=10, ignore_eos=True, logprobs=2)
results = []
for params in (greedy, drawn):
    for output in llm.generate(prompts, params, use_tqdm=False):
        completion = output.outputs[0]
        results.append([completion.token_ids, completion.cumulative_logprob])
with open(f"{out}/{os.environ['RANK']}.json", "w") as file:
    json.dump(results, file)


def note(end):
    with open(f"{out}/ends {os.environ['RANK']}", "a") as file:
        print(end, file=file)


if int(size) > 1:
    note_ends(llm.llm_engine.executor.runner, note)
