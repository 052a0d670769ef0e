"""TRL's GRPOTrainer with vLLM in its own process: logprobs equal the trainer's own model's."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from tiny import shared_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

TOLERANCE = 1e-3  # nats; both run in float32


class Checked(GRPOTrainer):
    """Compares the engine's logprobs of each batch with the logprobs of the model in training."""

    differences: list[float] = []

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        length = output["completion_ids"].shape[1]
        with torch.no_grad():
            logits = self.model(ids, attention_mask=mask).logits[:, -length - 1 : -1]
        logprobs = (logits.float() / self.temperature).log_softmax(-1)
        own = logprobs.gather(2, output["completion_ids"][..., None])[..., 0]
        kept = output["completion_mask"].bool()
        difference = (own - output["sampling_per_token_logps"])[kept].abs().max()
        self.differences.append(float(difference))
        return output


def reward(completions: list[str], **_: object) -> list[float]:
    return [float(text.count("th")) for text in completions]


def main() -> None:
    folder = shared_model()[0]
    with tempfile.TemporaryDirectory() as output:
        config = GRPOConfig(
            output_dir=output,
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=128,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=12,
            temperature=0.7,
            learning_rate=1e-2,
            max_steps=3,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
        )
        trainer = Checked(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(folder, pad_token="</s>"),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["the other", "in here"] * 4}),
        )
        trainer.train()
    print("largest difference of logprobs in each step:", trainer.differences)
    assert len(trainer.differences) == 3
    assert max(trainer.differences) < TOLERANCE


if __name__ == "__main__":
    main()
