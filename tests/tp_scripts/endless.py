"""Generates until Ctrl-C, then once more; says when it has begun. With a guard, so a function in it can go to the ranks."""

import json
import sys

from nanovllm import LLM, SamplingParams


def layers(model):
    return len(model.model.layers)


def main():
    llm = LLM(
        sys.argv[1],
        skip_tokenizer_init=True,
        dtype="float32",
        device="cpu",
        tensor_parallel_size=2,
        num_gpu_blocks_override=32,
    )
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    print(llm.apply_model(layers), flush=True)
    try:
        while True:
            llm.generate([[1, 2, 3]] * 4, params, use_tqdm=False)
    except KeyboardInterrupt:
        (out,) = llm.generate([5, 6, 7], params, use_tqdm=False)
        print(json.dumps(out.outputs[0].token_ids), flush=True)


if __name__ == "__main__":
    main()
