"""TRL's GRPOTrainer with vLLM in its own process: logprobs equal the trainer's own model's.

TRL pushes the weights into the engine before each step. It takes logprobs of the tempered
distribution, and trains on their ratio to its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import session_folder, shared_model, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

TWO = "--one-of-two-processes"  # an argument of this script
STEPS = 3
TOLERANCE = 1e-3  # nats; both run in float32
STALE = 1e-2  # nats; the initial weights are at least this wrong after a step


@dataclass
class Differences:
    """Largest differences of logprobs in each step, in nats."""

    trained: list[float] = field(default_factory=list)  # with the model in training
    initial: list[float] = field(default_factory=list)  # with the model before training


class Checked(GRPOTrainer):
    """Compares the engine's logprobs of each batch with the logprobs of the model in training."""

    initial_model: Any
    differences: Differences

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        self.differences.trained.append(self.difference(self.model, output))
        self.differences.initial.append(self.difference(self.initial_model, output))
        return output

    @torch.no_grad()
    def difference(self, model: Any, output: dict[str, torch.Tensor]) -> float:
        completion = output["completion_ids"]  # [number of answers, length]
        ids = torch.cat([output["prompt_ids"], completion], 1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        logits = model(ids, attention_mask=mask).logits[:, -completion.shape[1] - 1 : -1]
        logprobs = (logits.float() / self.temperature).log_softmax(-1)
        own = logprobs.gather(2, completion[..., None])[..., 0]
        kept = output["completion_mask"].bool()
        return float((own - output["sampling_per_token_logps"])[kept].abs().max())


def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
    """Differs from answer to answer, so that every step changes the weights."""
    return [float(sum(ids) % 97) for ids in completion_ids]


def train(folder: str, peft_config: LoraConfig | None = None, **options: Any) -> Differences:
    model, initial = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2)
    )
    with tempfile.TemporaryDirectory() as output:
        config = GRPOConfig(
            output_dir=output,
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=128,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=12,
            learning_rate=1e-2,
            max_steps=STEPS,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **options,
        )
        trainer = Checked(
            model=model,
            processing_class=AutoTokenizer.from_pretrained(folder, pad_token="</s>"),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["the other", "in here"] * 4}),
            peft_config=peft_config,
        )
        trainer.initial_model = initial
        trainer.differences = Differences()
        trainer.train()
    return trainer.differences


def check(name: str, found: Differences) -> None:
    initial = ", ".join(f"{difference:.1e}" for difference in found.initial)
    print(
        f"{name}: largest difference {max(found.trained):.1e} nats over {STEPS} steps; "
        f"initial weights: {initial}"
    )
    assert len(found.trained) == STEPS
    assert max(found.trained) < TOLERANCE, found
    assert min(found.initial[1:]) > STALE, found


def one_process() -> None:
    folder = shared_model()[0]
    tied = tiny_model(session_folder() / "tied", "Llama", tie_word_embeddings=True)[0]
    tiny_tokenizer().save_pretrained(tied)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    check("temperature 1", train(folder, temperature=1.0))
    check("temperature 0.6", train(folder, temperature=0.6))
    check("tied embeddings", train(tied, temperature=0.6))
    check("sleep mode", train(folder, temperature=0.6, vllm_enable_sleep_mode=True))
    check("PEFT", train(folder, lora, temperature=0.6))


def one_of_two_processes() -> None:
    """Each process trains on its own prompts. The two hold halves of the engine's weights."""
    options = {"temperature": 0.6, "vllm_tensor_parallel_size": 2, "ddp_backend": "gloo"}
    folder = shared_model()[0]
    rank = os.environ["RANK"]
    check(f"rank {rank} of 2", train(folder, **options))
    sleeping = train(folder, **options, vllm_enable_sleep_mode=True)
    check(f"rank {rank} of 2, sleep mode", sleeping)


def main() -> None:
    if sys.argv[1:] == [TWO]:
        one_of_two_processes()
        return
    launch = "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
    subprocess.run([sys.executable, "-m", *launch, __file__, TWO], check=True)
    one_process()


if __name__ == "__main__":
    main()
