"""New weights for a running engine, as in reinforcement learning.

    python examples/weight_update.py [model]

The search is the simplest that can work: change one weight at random, keep the change if
the reward grows. A real trainer sends all weights, under the names of the checkpoint.
"""

import torch
from model_argument import model_argument

from nanovllm import LLM, SamplingParams

PROMPTS = ["The sea is", "My name is", "In the morning"]
NAME = "model.norm.weight"  # [hidden_size]: the weight of the last norm

llm = LLM(model_argument(), max_model_len=512)
params = SamplingParams(temperature=0, max_tokens=24)


def load(weight: torch.Tensor) -> None:
    """Writes the weight into the running model.

    With tensor_parallel_size > 1 the function is sent to other processes: there it must
    be a function at the top level of a module, because a lambda cannot be sent.
    """
    llm.apply_model(lambda model: model.load_weights([(NAME, weight)]))
    # The cache holds K/V that the old weights made.
    llm.reset_prefix_cache()


def reward() -> float:
    """How many different characters an answer has, on average."""
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return sum(len(set(output.outputs[0].text)) for output in outputs) / len(outputs)


(best,) = llm.apply_model(lambda model: model.get_parameter(NAME).detach().clone())
best_reward = reward()
print(f"before: reward {best_reward:.2f}")
generator = torch.Generator().manual_seed(0)
for step in range(5):
    noise = torch.randn(best.shape, generator=generator).to(best)
    candidate = best * (1 + 0.3 * noise)
    load(candidate)
    found = reward()
    print(f"step {step}: reward {found:.2f}")
    if found > best_reward:
        best, best_reward = candidate, found
load(best)
print(f"after: reward {reward():.2f}")
