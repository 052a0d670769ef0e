"""A user's script without a __main__ guard, and without an end of the engine.

Prints a JSON line of tokens, then the answer of apply_model to a function of the script.
argv: the model's folder, the file for the ends of graphs and group.
"""

import json
import sys

from ends import note_ends

from nanovllm import LLM, SamplingParams


def layers(model):
    return len(model.model.layers)


llm = LLM(
    sys.argv[1],
    skip_tokenizer_init=True,
    dtype="float32",
    device="cpu",
    tensor_parallel_size=2,
    num_gpu_blocks_override=32,
)
(out,) = llm.generate(
    [5, 6, 7], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False
)
print(json.dumps(out.outputs[0].token_ids))
try:
    print(llm.apply_model(layers))
except RuntimeError as err:
    print(str(err).splitlines()[-1])


def note(end):
    with open(sys.argv[2], "a") as file:
        print(end, file=file)


note_ends(llm.llm_engine.executor.runner, note)
