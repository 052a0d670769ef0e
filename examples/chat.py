"""A conversation of several turns: `python examples/chat.py [model]`."""

from model_argument import model_argument

from nanovllm import LLM, SamplingParams

llm = LLM(model_argument(), max_model_len=512)
params = SamplingParams(temperature=0.6, max_tokens=64, seed=1)

messages = [{"role": "system", "content": "You answer in one short sentence."}]
for question in ["What is the capital of France?", "And of Italy?"]:
    messages.append({"role": "user", "content": question})
    # The model's chat template makes one prompt of all messages. The prefix cache holds
    # the earlier messages, so that only the new message is computed.
    (output,) = llm.chat(messages, params, use_tqdm=False)
    answer = output.outputs[0].text
    messages.append({"role": "assistant", "content": answer})
    print(f"Q: {question}\nA: {answer}\n")
