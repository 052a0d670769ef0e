"""Records three runs of the engine and writes them as one page with a guided tour.

python examples/tour.py [model] [page]

The page is tour.html by default. Open it in a browser, and choose "Guided tour".
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from model_argument import model_argument

from nanovllm import LLM, SamplingParams
from nanovllm.trace.page import Run, read_records, write_runs

MODEL = model_argument()
PAGE = Path(sys.argv[2] if len(sys.argv) > 2 else "tour.html")
STORY = "Anna has a dog. The dog is called Rex. Rex is brown and likes to swim in the lake. " * 3
WATER = "Water moves between the sea, the air and the land. " * 7


def answer(llm: LLM, max_tokens: dict[str, int]) -> None:
    """Answers prompts together. max_tokens: prompt -> the length of its answer."""
    params = [SamplingParams(temperature=0, max_tokens=n) for n in max_tokens.values()]
    for output in llm.generate(list(max_tokens), params, use_tqdm=False):
        print(f"{output.prompt}{output.outputs[0].text!r}")


def continuous_batching(trace: str) -> None:
    """Six requests. Three run at once, and a step computes at most 48 tokens."""
    llm = LLM(
        MODEL,
        trace=trace,
        block_size=16,
        num_gpu_blocks_override=40,
        max_model_len=512,
        max_num_seqs=3,
        max_num_batched_tokens=48,
    )
    prompts = {
        "Once upon a time, a small robot": 40,
        "The three primary colours are": 30,
        WATER + "In one sentence, water": 24,
        "My favourite season is": 20,
        "The capital of France is": 14,
        "Water boils at": 10,
    }
    answer(llm, prompts)


def shared_prefix(trace: str) -> None:
    """Eight questions about one story. Four run at once."""
    llm = LLM(
        MODEL,
        trace=trace,
        block_size=16,
        num_gpu_blocks_override=40,
        max_model_len=512,
        max_num_seqs=4,
        max_num_batched_tokens=96,
    )
    questions = {
        "The dog is called": 18,
        "The colour of the dog is": 16,
        "The dog likes to": 14,
        "Anna has": 12,
        "Rex is": 10,
        "In the lake": 8,
        "Every morning Anna": 8,
        "The name of the dog": 6,
    }
    answer(llm, {STORY + question: length for question, length in questions.items()})


def small_cache(trace: str) -> None:
    """Four requests in ten blocks. Their answers do not fit beside each other."""
    llm = LLM(
        MODEL,
        trace=trace,
        block_size=16,
        num_gpu_blocks_override=10,
        max_model_len=128,
        max_num_batched_tokens=64,
    )
    prompts = {
        "Once upon a time": 60,
        "A list of fruits:": 56,
        "One, two, three,": 52,
        "The sea is": 48,
    }
    answer(llm, prompts)


STOPS = {
    continuous_batching: (
        "start",
        "prefill",
        "chunk",
        "token",
        "mixed",
        "decode",
        "waiting",
        "join",
        "end",
    ),
    shared_prefix: ("registered", "hit", "shared", "release", "cached", "end"),
    small_cache: ("start", "preemption", "cached", "eviction", "return", "times", "end"),
}

runs = []
with TemporaryDirectory() as folder:
    for number, (function, stops) in enumerate(STOPS.items()):
        path = Path(folder) / f"{number}.jsonl"
        function(str(path))
        name = function.__name__.replace("_", " ").capitalize()
        runs.append(Run(read_records(path), name, function.__doc__ or "", stops))
write_runs(runs, PAGE)
print(f"{PAGE} is written: open it in a browser")
