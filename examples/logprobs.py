"""How likely the model finds tokens and texts: `python examples/logprobs.py [model]`."""

import math

from model_argument import model_argument

from nanovllm import LLM, SamplingParams

llm = LLM(model_argument(), max_model_len=512)

# The most likely next tokens: `logprobs` gives {token id: Logprob} for each new token.
params = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
(output,) = llm.generate("The capital of France is", params, use_tqdm=False)
logprobs = output.outputs[0].logprobs
assert logprobs is not None
print("After 'The capital of France is':")
for entry in sorted(logprobs[0].values(), key=lambda entry: entry.rank or 0):
    print(f"  {entry.decoded_token!r:12} {math.exp(entry.logprob):.3f}")

# The perplexity of a text: `prompt_logprobs` gives a dict for each token of the prompt.
# The dict of the first token is None, because no token comes before it.
texts = ["The cat sat on the mat.", "Mat the on sat cat the."]
params = SamplingParams(max_tokens=1, prompt_logprobs=0)
for output in llm.generate(texts, params, use_tqdm=False):
    assert output.prompt_token_ids is not None
    assert output.prompt_logprobs is not None
    total = 0.0
    for token, entries in zip(output.prompt_token_ids, output.prompt_logprobs):
        if entries is not None:
            total += entries[token].logprob
    perplexity = math.exp(-total / (len(output.prompt_token_ids) - 1))
    print(f"{output.prompt!r}: perplexity {perplexity:.1f}")
