"""Several questions about one text: the engine computes the text once.

python examples/shared_prefix.py [model]
"""

from model_argument import model_argument

from nanovllm import LLM, SamplingParams

STORY = "Anna has a dog. The dog is called Rex. Rex is brown and likes to swim in the lake. " * 3
QUESTIONS = ["The dog is called", "The colour of the dog is", "The dog likes to"]


def cached_tokens(llm: LLM) -> int:
    """Prompt tokens, of all requests so far, whose K/V came from the prefix cache."""
    metrics = {metric.name: metric.value for metric in llm.get_metrics()}
    return int(metrics["vllm:prefix_cache_hits"])


llm = LLM(model_argument(), max_model_len=512)
params = SamplingParams(temperature=0, max_tokens=8)
# The three requests run in one batch. The first computes the story, and the others take
# its pages of the KV cache: a page can be shared as soon as its tokens are scheduled.
outputs = llm.generate([STORY + question for question in QUESTIONS], params, use_tqdm=False)
prompt_tokens = 0
for question, output in zip(QUESTIONS, outputs):
    assert output.prompt_token_ids is not None
    prompt_tokens += len(output.prompt_token_ids)
    print(f"{question}{output.outputs[0].text!r}")
print(f"{cached_tokens(llm)} of {prompt_tokens} prompt tokens came from the prefix cache")
