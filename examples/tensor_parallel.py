"""One model in several processes. python examples/tensor_parallel.py [model] [processes]

Each process holds a part of each matrix. With GPUs each process has one of them. On a CPU
this is for development, because the processes share the cores. The number of processes
must divide the number of attention heads: SmolLM2 has 9, so the default is 3.
"""

import sys

from model_argument import model_argument

from nanovllm import LLM, SamplingParams

processes = int(sys.argv[2]) if len(sys.argv) > 2 else 3
llm = LLM(model_argument(), tensor_parallel_size=processes, device="cpu", max_model_len=512)
params = SamplingParams(temperature=0, max_tokens=16)
for output in llm.generate(["The sea is", "One, two,"], params, use_tqdm=False):
    print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
