"""`nanovllm chat`: a conversation in the terminal. The answer appears as tokens come."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import closing

from nanovllm.batch.columns import check_names
from nanovllm.batch.work import Chat, JsonObject, chat_text, sampling_defaults
from nanovllm.config import EngineArgs
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.inputs import Tokenization
from nanovllm.llm import make_engine
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.stream import Stream

RESET = "/reset"
QUIT = "/quit"
HELP = f"{RESET} begins a new conversation, Ctrl-C stops an answer, {QUIT} or Ctrl-D ends."


class Conversation:
    """The messages so far. Invariant: questions and answers alternate."""

    def __init__(self, engine: LLMEngine, system_prompt: str | None, params: SamplingParams):
        self.engine = engine
        self.params = params
        self.first: list[JsonObject] = []
        if system_prompt:
            self.first.append({"role": "system", "content": system_prompt})
        self.messages = list(self.first)

    def reset(self) -> None:
        self.messages = list(self.first)

    def ask(self, question: str) -> None:
        """Prints the answer. A question that is refused leaves no message.

        Raises ValueError for a conversation that the model cannot take.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        text = chat_text(self.engine, Chat(messages))
        prompt = self.engine.tokenized(text, Tokenization(add_special_tokens=False))
        answer = self._stream(prompt)
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _stream(self, prompt: object) -> str:
        """Prints the text as it comes. Ctrl-C ends the answer. Returns the text."""
        text = ""
        num_tokens = 0
        start = first = time.perf_counter()
        with closing(Stream(self.engine, [(prompt, self.params)])) as stream:
            try:
                for output in stream:
                    completion = output.outputs[0]
                    if not num_tokens:
                        first = time.perf_counter()
                    num_tokens += len(completion.token_ids)
                    text += completion.text
                    print(completion.text, end="", flush=True)
            except KeyboardInterrupt:
                pass
        seconds = time.perf_counter() - first
        print(f"\n[{speed(num_tokens, seconds, first - start)}]", file=sys.stderr)
        return text


def speed(num_tokens: int, seconds: float, first: float) -> str:
    """seconds: after the first token."""
    rate = (num_tokens - 1) / seconds if num_tokens > 1 and seconds > 0 else 0.0
    return f"{num_tokens} tokens, first after {first:.2f} s, then {rate:.1f} tokens/s"


def run(args: EngineArgs, system_prompt: str | None, sampling: Mapping[str, object]) -> None:
    """Asks for lines until the end of the input. sampling: fields of SamplingParams."""
    check_names(sampling)
    enable_line_editing()
    engine = make_engine(args)
    try:
        fields = {"max_tokens": None, **sampling_defaults(engine, sampling)}
        params = SamplingParams.from_optional(**fields, output_kind=RequestOutputKind.DELTA)
        print(HELP, file=sys.stderr)
        converse(Conversation(engine, system_prompt, params))
    finally:
        engine.close()


def converse(conversation: Conversation) -> None:
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return
        if line == QUIT:
            return
        if line == RESET:
            conversation.reset()
            print("A new conversation.", file=sys.stderr)
        elif line.startswith("/"):
            print(HELP, file=sys.stderr)
        elif line:
            try:
                conversation.ask(line)
            except (ValueError, TypeError) as error:
                print(f"{error}\n{RESET} begins a new conversation.", file=sys.stderr)


def enable_line_editing() -> None:
    """Arrow keys and history in `input`, where Python has readline."""
    try:
        import readline  # noqa: F401  # its import changes `input`
    except ImportError:
        return
