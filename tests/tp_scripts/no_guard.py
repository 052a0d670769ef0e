"""A user's script without a __main__ guard: prints a JSON line of tokens, then what apply_model makes of a function in it."""

import json
import sys

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
