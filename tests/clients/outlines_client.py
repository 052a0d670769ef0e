"""outlines over an offline LLM: texts equal transformers', with and without a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import outlines
import pytest
from tiny import greedy, session_folder, shared_model, tiny_model, tiny_tokenizer
from vllm import LLM, SamplingParams

PROMPTS = ["the other", "in here", "Whether"]
LENGTH = 8


def plain_model() -> tuple[str, Any]:
    """(folder, transformers model); the tokenizer has no chat template."""
    folder, model = tiny_model(session_folder() / "plain", "Qwen3")
    tiny_tokenizer().save_pretrained(folder)
    Path(folder, "chat_template.jinja").unlink()
    return folder, model


def expected(oracle: Any, prompt: str | list[dict[str, str]]) -> str:
    """transformers' greedy text after a text, or after a conversation."""
    tokenizer = tiny_tokenizer()
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    else:
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
    return str(tokenizer.decode(greedy(oracle, ids, LENGTH), skip_special_tokens=True))


def ask(folder: str) -> tuple[Any, dict[str, Any]]:
    """(model of outlines, arguments of its calls)"""
    llm = LLM(folder, dtype="float32", num_gpu_blocks_override=64)
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    return outlines.from_vllm_offline(llm), {"sampling_params": params, "use_tqdm": False}


def check_texts(model: Any, options: dict[str, Any], texts: list[str], prompts: list[Any]) -> None:
    """texts: what transformers says after each prompt."""
    assert [model(prompt, **options) for prompt in prompts] == texts
    assert model.batch(prompts, **options) == [[text] for text in texts]
    # top_k=1 leaves one token, so that samples are greedy too.
    params = SamplingParams(n=2, top_k=1, max_tokens=LENGTH, ignore_eos=True)
    twice = {**options, "sampling_params": params}
    assert [model(prompt, **twice) for prompt in prompts] == [[text] * 2 for text in texts]


def check_refusal(model: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"structured_outputs.*grammar"):
        model(PROMPTS[0], Literal["yes", "no"], **options)


def main() -> None:
    folder, oracle = plain_model()
    model, options = ask(folder)
    check_texts(model, options, [expected(oracle, prompt) for prompt in PROMPTS], PROMPTS)
    check_refusal(model, options)
    print(f"plain: {len(PROMPTS)} texts equal, alone, in a batch and with n=2")

    folder, oracle = shared_model()
    model, options = ask(folder)
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    texts = [expected(oracle, conversation) for conversation in conversations]
    check_texts(model, options, texts, PROMPTS)  # outlines makes conversations of texts
    chats = [outlines.inputs.Chat(conversation) for conversation in conversations]
    check_texts(model, options, texts, chats)
    check_refusal(model, options)
    print(f"chat template: {len(PROMPTS)} texts equal, alone, in a batch and with n=2")


if __name__ == "__main__":
    main()
