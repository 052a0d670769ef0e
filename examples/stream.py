"""Prints text while the model produces it: `python examples/stream.py [model]`."""

from model_argument import model_argument

from nanovllm import LLM, RequestOutputKind, SamplingParams

llm = LLM(model_argument(), max_model_len=512)
# DELTA: each output has the new text only. CUMULATIVE, the default, has all text.
params = SamplingParams(temperature=0, max_tokens=64, output_kind=RequestOutputKind.DELTA)

for output in llm.stream("The sea is", params):
    print(output.outputs[0].text, end="", flush=True)
print()

# Several requests run at once. Their outputs are mixed: request_id names the request.
prompts = ["One, two, three,", "Red, green, blue,"]
params = SamplingParams(temperature=0, max_tokens=8)
for output in llm.stream(prompts, params):
    print(f"request {output.request_id}: {output.outputs[0].text!r}")
