"""One engine in one process, for bench.py, which writes lines of JSON to its stdin and reads lines of JSON back.

The first line says which engine and model; it is answered after the first token of a small prompt. Every further line is a
batch of prompts to complete, answered with the seconds that took. Needs the standard library and the engine alone: a
peer runs in an environment of its own, without nanovllm.
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
    """nanovllm and vLLM: the same calls."""

    def __init__(self, job: dict[str, Any]) -> None:
        api = importlib.import_module(job["engine"])
        dummy = {"load_format": "dummy", "skip_tokenizer_init": True} if job["dummy"] else {}
        self.make_params = api.SamplingParams
        self.llm = api.LLM(job["model"], dtype=job["dtype"], **{**dummy, **job["args"]})

    def generate(self, prompts: list[list[int]], outputs: list[int], temperature: float) -> None:
        params = [self.make_params(temperature=temperature, max_tokens=n, ignore_eos=True) for n in outputs]
        self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


class NanoVLLM(LLMApi):
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
    """While entered, wraps functions (owner, name, label) and sums by label the time spent in them, less that in each other."""

    def __init__(self, targets: list[tuple[Any, str, str]]) -> None:
        self.targets = targets
        self.seconds = {label: 0.0 for _, _, label in targets}
        self.calls = dict.fromkeys(self.seconds, 0)
        self.inner = [0.0]  # time of the wrapped calls below each wrapped call under way

    def __enter__(self) -> Parts:
        self.before = [(owner, name, vars(owner).get(name, MISSING)) for owner, name, _ in self.targets]
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
    """transformers' generate over one static batch, padded on the left."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        self.torch, dtype = torch, getattr(torch, job["dtype"])
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if job["dummy"]:
            torch.set_default_dtype(dtype)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job["model"]))
        else:
            model = AutoModelForCausalLM.from_pretrained(job["model"], torch_dtype=dtype)
        self.tokenizer = None if job["dummy"] else AutoTokenizer.from_pretrained(job["model"])
        self.model = model.to(self.device).eval()
        self.model.generation_config.eos_token_id = None

    def generate(self, prompts: list[list[int]], outputs: list[int], temperature: float) -> None:
        longest = max(map(len, prompts))
        ids = self.torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = self.torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        how = how or {"do_sample": False}
        out = self.model.generate(ids, attention_mask=mask, max_new_tokens=max(outputs), pad_token_id=0, **how)
        if self.tokenizer is not None:
            self.tokenizer.batch_decode([row[longest : longest + n] for row, n in zip(out, outputs)])


class LlamaCpp:
    """All requests at once through llama.cpp's own batches; a prefix that all share is computed once and copied."""

    BATCH = 2048

    def __init__(self, job: dict[str, Any]) -> None:
        self.api = api = importlib.import_module("llama_cpp")
        self.quiet = api.llama_log_callback(lambda *_: None)  # kept: llama.cpp holds the bare pointer
        api.llama_log_set(self.quiet, None)
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(job["gguf"].encode(), api.llama_model_default_params())
        self.threads, self.text = job["threads"], not job["dummy"]

    def make_context(self, count: int, length: int, shared: bool) -> Any:
        params = self.api.llama_context_default_params()
        params.n_ctx = count * ((length + 255) // 256 * 256)
        params.n_batch, params.n_seq_max, params.kv_unified = self.BATCH, count, shared
        params.n_threads = params.n_threads_batch = self.threads
        return self.api.llama_init_from_model(self.model, params)

    def generate(self, prompts: list[list[int]], outputs: list[int], temperature: float) -> float:
        """Returns the seconds it took, without the time to make the context, which a server makes once."""
        api = self.api
        shared = common_prefix(prompts) if len(prompts) > 1 else 0
        shared = (
            shared if shared >= 64 else 0
        )  # llama.cpp is faster with a cache for each sequence than with one for all
        context = self.make_context(len(prompts), max(map(len, prompts)) + max(outputs), shared > 0)
        batch = api.llama_batch_init(self.BATCH, 0, 1)
        sampler = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        if temperature:
            api.llama_sampler_chain_add(sampler, api.llama_sampler_init_temp(temperature))
            api.llama_sampler_chain_add(sampler, api.llama_sampler_init_dist(0))
        else:
            api.llama_sampler_chain_add(sampler, api.llama_sampler_init_greedy())
        generated: list[list[int]] = [[] for _ in prompts]

        def compute(entries: list[tuple[int, int, int, bool]]) -> None:
            """entries: (token, position, sequence, whether to sample what follows)."""
            for start in range(0, len(entries), self.BATCH):
                part = entries[start : start + self.BATCH]
                batch.n_tokens = len(part)
                for i, (token, position, seq, last) in enumerate(part):
                    batch.token[i], batch.pos[i], batch.logits[i] = token, position, last
                    batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
                if api.llama_decode(context, batch):
                    raise RuntimeError("llama_decode failed")
                for i, (_, _, seq, last) in enumerate(part):
                    if last:
                        generated[seq].append(api.llama_sampler_sample(sampler, context, i))

        start = time.perf_counter()
        if shared:
            compute([(token, i, 0, False) for i, token in enumerate(prompts[0][:shared])])
            for seq in range(1, len(prompts)):
                api.llama_memory_seq_cp(api.llama_get_memory(context), 0, seq, -1, -1)
        compute([(p[i], i, seq, i == len(p) - 1) for seq, p in enumerate(prompts) for i in range(shared, len(p))])
        while running := [seq for seq, done in enumerate(generated) if len(done) < outputs[seq]]:
            compute([(generated[s][-1], len(prompts[s]) + len(generated[s]) - 1, s, True) for s in running])
        if self.text:
            vocab, buffer = api.llama_model_get_vocab(self.model), ctypes.create_string_buffer(1 << 16)
            for tokens in generated:
                ids = (api.llama_token * len(tokens))(*tokens)
                api.llama_detokenize(vocab, ids, len(tokens), buffer, len(buffer), True, False)
        elapsed = time.perf_counter() - start
        api.llama_sampler_free(sampler)
        api.llama_batch_free(batch)
        api.llama_free(context)
        return elapsed


def common_prefix(prompts: list[list[int]]) -> int:
    return next((i for i, column in enumerate(zip(*prompts)) if len(set(column)) > 1), min(map(len, prompts)))


ENGINES: dict[str, Any] = {"nanovllm": NanoVLLM, "vllm": LLMApi, "hf": HuggingFace, "llama.cpp": LlamaCpp}


def rss() -> int:
    """Bytes of this process that are in memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    # What engines print to stdout goes to stderr; stdout is for JSON alone.
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
        reply["rss"] = rss()
        if isinstance(engine, NanoVLLM):
            reply["memory"] = engine.memory()
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
