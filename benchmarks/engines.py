"""One engine in one process. bench.py and the engine exchange lines of JSON.

The first line names the engine and the model. The answer follows the first token of a
small prompt. Every further line is a batch of prompts, and its answer has the seconds.

Needs only the standard library and the engine, because a peer runs in its own
environment, without nanovllm.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

MISSING = object()


class LLMApi:
    """nanovllm and vLLM: their calls are the same."""

    def __init__(self, job: dict[str, Any]) -> None:
        api = importlib.import_module(job["engine"])
        args: dict[str, Any] = {}
        if job["dummy"]:
            args["load_format"] = "dummy"
        if not job["text"]:
            args["skip_tokenizer_init"] = True
        self.make_params = api.SamplingParams
        self.llm = api.LLM(job["model"], dtype=job["dtype"], **{**args, **job["args"]})

    def generate(self, prompts: list[list[int]], outputs: list[int], temperature: float) -> None:
        params = [
            self.make_params(temperature=temperature, max_tokens=n, ignore_eos=True)
            for n in outputs
        ]
        self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


class NanoVLLM(LLMApi):
    """Adds the memory of nanovllm and the time of its parts to LLMApi."""

    def __init__(self, job: dict[str, Any]) -> None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        super().__init__(job)
        self.ours = importlib.import_module("benchmarks.ours")

    def settle(self) -> None:
        self.ours.settle(self.llm)

    def memory(self) -> dict[str, int]:
        """Bytes of the KV cache."""
        return {"kv_cache": self.ours.kv_cache_bytes(self.llm)}

    def profile(self) -> Parts:
        return Parts(self.ours.profile_targets(self.llm))


class Parts:
    """Measures the time of functions. Use it as a context manager.

    targets: (owner of the function, its name, the label under which its time counts).
    `seconds` has the time by label. The time of a target inside another target counts
    only for the inner one.
    """

    def __init__(self, targets: list[tuple[Any, str, str]]) -> None:
        self.targets = targets
        self.seconds = {label: 0.0 for _, _, label in targets}
        self.calls = dict.fromkeys(self.seconds, 0)
        # Of each call that runs now: the seconds of the targets that it called.
        self.inner = [0.0]

    def __enter__(self) -> Parts:
        self.before = [
            (owner, name, vars(owner).get(name, MISSING)) for owner, name, _ in self.targets
        ]
        for owner, name, label in self.targets:
            setattr(owner, name, self.wrap(getattr(owner, name), label))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, value in self.before:
            if value is MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)

    def wrap(self, function: Any, label: str) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            self.inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - start
                self.seconds[label] += elapsed - self.inner.pop()
                self.calls[label] += 1
                self.inner[-1] += elapsed

        return timed


class HuggingFace:
    """transformers: `generate` with one static batch, padded on the left."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        dtype = getattr(torch, job["dtype"])
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if job["dummy"]:
            torch.set_default_dtype(dtype)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job["model"]))
        else:
            model = AutoModelForCausalLM.from_pretrained(job["model"], torch_dtype=dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(job["model"]) if job["text"] else None
        self.model = model.to(self.device).eval()
        self.model.generation_config.eos_token_id = None

    def generate(self, prompts: list[list[int]], outputs: list[int], temperature: float) -> None:
        longest = max(map(len, prompts))
        padding = [[0] * (longest - len(prompt)) for prompt in prompts]
        rows = [pad + prompt for pad, prompt in zip(padding, prompts)]
        mask = [pad + [1] * len(prompt) for pad, prompt in zip(padding, prompts)]
        how: dict[str, Any] = {"do_sample": False}
        if temperature:
            how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        found = self.model.generate(
            self.torch.tensor(rows, device=self.device),
            attention_mask=self.torch.tensor(mask, device=self.device),
            max_new_tokens=max(outputs),
            pad_token_id=0,
            **how,
        )
        if self.tokenizer is not None:
            answers = [row[longest : longest + n] for row, n in zip(found, outputs)]
            self.tokenizer.batch_decode(answers)


# (token, position, sequence, whether to sample the next token)
Entry = tuple[int, int, int, bool]


class LlamaCpp:
    """llama.cpp: all requests at once in its own batches.

    A prefix that all prompts share is computed once and copied.
    """

    BATCH = 2048  # tokens
    CONTEXT_STEP = 256  # tokens: the length of a context is a multiple
    # Tokens. llama.cpp shares a prefix in one cache for all sequences, and it is slower
    # with that cache than with a cache for each sequence. A short prefix is not shared.
    LEAST_SHARED = 64

    def __init__(self, job: dict[str, Any]) -> None:
        self.api = api = importlib.import_module("llama_cpp")
        # An attribute, because llama.cpp keeps the bare pointer.
        self.quiet = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self.quiet, None)
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(
            job["gguf"].encode(), api.llama_model_default_params()
        )
        self.threads = job["threads"]
        self.text = job["text"]
        # Bytes of the K/V of one token. llama.cpp stores it in float16.
        self.kv_bytes = 2 * job["kv_numbers"]
        # Of the last call, before its context is freed:
        self.context_tokens = 0
        self.resident = 0  # bytes

    def generate(self, prompts: list[list[int]], outputs: list[int], temperature: float) -> float:
        """Returns the seconds.

        They leave out the making of the context, which a server does once.
        """
        api = self.api
        shared = common_prefix(prompts) if len(prompts) > 1 else 0
        if shared < self.LEAST_SHARED:
            shared = 0
        length = max(map(len, prompts)) + max(outputs)
        context = self.make_context(len(prompts), length, shared > 0)
        batch = api.llama_batch_init(self.BATCH, 0, 1)
        sampler = self.make_sampler(temperature)
        start = time.perf_counter()
        tokens = Completion(api, context, batch, sampler).run(prompts, outputs, shared)
        if self.text:
            self.detokenise(tokens)
        elapsed = time.perf_counter() - start
        self.context_tokens = api.llama_n_ctx(context)
        self.resident = rss()
        api.llama_sampler_free(sampler)
        api.llama_batch_free(batch)
        api.llama_free(context)
        return elapsed

    def memory(self) -> dict[str, int]:
        """Bytes of the KV cache."""
        return {"kv_cache": self.kv_bytes * self.context_tokens}

    def make_context(self, count: int, length: int, shared: bool) -> Any:
        """A context for `count` sequences of `length` tokens. shared: one cache for all."""
        params = self.api.llama_context_default_params()
        steps = (length + self.CONTEXT_STEP - 1) // self.CONTEXT_STEP
        params.n_ctx = count * steps * self.CONTEXT_STEP
        params.n_batch = self.BATCH
        params.n_seq_max = count
        params.kv_unified = shared
        params.n_threads = self.threads
        params.n_threads_batch = self.threads
        return self.api.llama_init_from_model(self.model, params)

    def make_sampler(self, temperature: float) -> Any:
        api = self.api
        sampler = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        if temperature:
            api.llama_sampler_chain_add(sampler, api.llama_sampler_init_temp(temperature))
            api.llama_sampler_chain_add(sampler, api.llama_sampler_init_dist(0))
        else:
            api.llama_sampler_chain_add(sampler, api.llama_sampler_init_greedy())
        return sampler

    def detokenise(self, answers: list[list[int]]) -> None:
        api = self.api
        vocab = api.llama_model_get_vocab(self.model)
        buffer = ctypes.create_string_buffer(1 << 16)
        for tokens in answers:
            ids = (api.llama_token * len(tokens))(*tokens)
            api.llama_detokenize(vocab, ids, len(tokens), buffer, len(buffer), True, False)


class Completion:
    """One call of `generate` in a context of llama.cpp."""

    def __init__(self, api: Any, context: Any, batch: Any, sampler: Any) -> None:
        self.api = api
        self.context = context
        self.batch = batch
        self.sampler = sampler
        self.tokens: list[list[int]] = []  # new tokens of each prompt

    def run(self, prompts: list[list[int]], outputs: list[int], shared: int) -> list[list[int]]:
        """Generates outputs[i] tokens after prompts[i]. All prompts share their first
        `shared` tokens.
        """
        self.tokens = [[] for _ in prompts]
        if shared:
            self.compute([(token, i, 0, False) for i, token in enumerate(prompts[0][:shared])])
            for seq in range(1, len(prompts)):
                memory = self.api.llama_get_memory(self.context)
                self.api.llama_memory_seq_cp(memory, 0, seq, -1, -1)
        entries: list[Entry] = []
        for seq, prompt in enumerate(prompts):
            last = len(prompt) - 1
            entries += [(prompt[i], i, seq, i == last) for i in range(shared, len(prompt))]
        while entries:
            self.compute(entries)
            entries = []
            for seq, found in enumerate(self.tokens):
                if len(found) < outputs[seq]:
                    entries.append((found[-1], len(prompts[seq]) + len(found) - 1, seq, True))
        return self.tokens

    def compute(self, entries: list[Entry]) -> None:
        """Runs the model on these tokens, a batch at a time, and samples."""
        batch = self.batch
        for start in range(0, len(entries), LlamaCpp.BATCH):
            part = entries[start : start + LlamaCpp.BATCH]
            batch.n_tokens = len(part)
            for i, (token, position, seq, samples) in enumerate(part):
                batch.token[i] = token
                batch.pos[i] = position
                batch.logits[i] = samples
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = seq
            if self.api.llama_decode(self.context, batch):
                raise RuntimeError("llama_decode failed")
            for i, (_, _, seq, samples) in enumerate(part):
                if samples:
                    token = self.api.llama_sampler_sample(self.sampler, self.context, i)
                    self.tokens[seq].append(token)


def common_prefix(prompts: list[list[int]]) -> int:
    """The number of tokens with which all prompts begin."""
    for i, column in enumerate(zip(*prompts)):
        if len(set(column)) > 1:
            return i
    return min(map(len, prompts))


ENGINES: dict[str, Any] = {
    "nanovllm": NanoVLLM,
    "vllm": LLMApi,
    "hf": HuggingFace,
    "llama.cpp": LlamaCpp,
}


def rss() -> int:
    """Bytes of this process in memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    # Stdout is for JSON alone, so the output of engines goes to stderr.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    engine = ENGINES[job["engine"]](job)
    engine.generate([list(range(1, 9))], [1], job["temperature"])
    replies.write(json.dumps({"first_token_at": time.time()}) + "\n")
    if isinstance(engine, NanoVLLM):
        engine.settle()
    for line in sys.stdin:
        ask = json.loads(line)
        arguments = (ask["prompts"], ask["outputs"], job["temperature"])
        reply: dict[str, Any] = {}
        start = time.perf_counter()
        if ask["profile"]:
            with engine.profile() as parts:
                engine.generate(*arguments)
            reply = {"parts": parts.seconds, "steps": parts.calls["model: the rest"]}
            reply["seconds"] = time.perf_counter() - start
        else:
            seconds = engine.generate(*arguments)
            reply["seconds"] = seconds or time.perf_counter() - start
        reply["rss"] = engine.resident if isinstance(engine, LlamaCpp) else rss()
        if isinstance(engine, NanoVLLM | LlamaCpp):
            reply["memory"] = engine.memory()
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
