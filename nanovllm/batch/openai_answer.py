"""Outputs of the engine -> the body of OpenAI's response. Knows no requests."""

from __future__ import annotations

import time
from itertools import chain

from nanovllm.batch.work import JsonObject
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput

LOWEST = -9999.0  # for -inf, which JSON lacks; vLLM writes the same number


def chat_body(number: int, model: str, outputs: list[RequestOutput], top: int) -> JsonObject:
    """top: how many alternatives `logprobs` shows for each token."""
    choices = []
    for completion in outputs[0].outputs:
        choice = {
            "index": completion.index,
            "message": {"role": "assistant", "content": completion.text},
            "logprobs": chat_logprobs(completion, top),
            **finish(completion),
        }
        choices.append(choice)
    return {"object": "chat.completion", **common(f"chatcmpl-{number}", model, choices, outputs)}


def completion_body(number: int, model: str, outputs: list[RequestOutput]) -> JsonObject:
    choices: list[JsonObject] = []
    for output in outputs:
        for completion in output.outputs:
            choice = {
                "index": len(choices),
                "text": completion.text,
                "logprobs": completion_logprobs(completion),
                **finish(completion),
                "prompt_logprobs": prompt_logprobs(output),
            }
            choices.append(choice)
    return {"object": "text_completion", **common(f"cmpl-{number}", model, choices, outputs)}


def common(
    response_id: str, model: str, choices: list[JsonObject], outputs: list[RequestOutput]
) -> JsonObject:
    """What both kinds of responses have."""
    completions = chain.from_iterable(output.outputs for output in outputs)
    num_generated = sum(len(completion.token_ids) for completion in completions)
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    usage = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
    }
    return {
        "id": response_id,
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": usage,
    }


def finish(completion: CompletionOutput) -> JsonObject:
    return {"finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}


def number_of(logprob: Logprob) -> float:
    return max(logprob.logprob, LOWEST)


def chat_logprobs(completion: CompletionOutput, top: int) -> JsonObject | None:
    if completion.logprobs is None:
        return None
    content = []
    for logprobs in completion.logprobs:
        sampled, *_ = logprobs.values()
        best = sorted(logprobs.values(), key=lambda each: each.rank or 0)[:top]
        content.append({**chat_token(sampled), "top_logprobs": [chat_token(each) for each in best]})
    return {"content": content, "refusal": None}


def chat_token(logprob: Logprob) -> JsonObject:
    token = logprob.decoded_token or ""
    return {"token": token, "logprob": number_of(logprob), "bytes": list(token.encode())}


def completion_logprobs(completion: CompletionOutput) -> JsonObject | None:
    if completion.logprobs is None:
        return None
    tokens = []
    offsets = []
    offset = 0
    for logprobs in completion.logprobs:
        sampled, *_ = logprobs.values()
        token = sampled.decoded_token or ""
        tokens.append(token)
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [number_of(next(iter(each.values()))) for each in completion.logprobs],
        "top_logprobs": [by_token(each) for each in completion.logprobs],
        "text_offset": offsets,
    }


def by_token(logprobs: dict[int, Logprob]) -> JsonObject:
    return {each.decoded_token or "": number_of(each) for each in logprobs.values()}


def prompt_logprobs(output: RequestOutput) -> list[JsonObject | None] | None:
    """As vLLM writes them: by token id."""
    if output.prompt_logprobs is None:
        return None
    found: list[JsonObject | None] = []
    for logprobs in output.prompt_logprobs:
        if logprobs is None:
            found.append(None)
            continue
        entry = {}
        for token_id, each in logprobs.items():
            entry[str(token_id)] = {
                "logprob": number_of(each),
                "rank": each.rank,
                "decoded_token": each.decoded_token,
            }
        found.append(entry)
    return found
