"""A row of an input file as work for the engine, and the loop that keeps the engine full.

Knows neither files nor formats.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import xxhash

from nanovllm.chat import render
from nanovllm.control import default_sampling_params
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import ValidationError
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams

JsonObject = dict[str, Any]

# What a bad row can raise before it runs. Any other exception ends the job.
BAD_ROW = (ValueError, TypeError, ArithmeticError, LookupError, RecursionError)
FULL = 2  # unfinished requests for each sequence that can run: a freed row finds the next one


@dataclass(frozen=True)
class Chat:
    """A conversation. The model's chat template turns it into a prompt.

    arguments: for the template, such as add_generation_prompt and tools.
    """

    messages: object
    template: str | None = None
    arguments: Mapping[str, object] = field(default_factory=dict)
    template_kwargs: Mapping[str, object] | None = None


@dataclass
class Work:
    """One row that the engine is to answer.

    prompts: a `Chat`, or prompts of any form that `add_request` takes. A row of OpenAI's
    completions may have several.
    row: the whole row, for the answer.
    """

    number: int  # of the row in the input, from 1
    prompts: list[object]
    params: SamplingParams
    row: JsonObject
    tokenization: Mapping[str, object] | None = None
    cache_salt: str | None = None


@dataclass
class Result:
    """What came of one row: an output for each prompt, or the sentence of an error."""

    work: Work
    outputs: list[RequestOutput]
    error: str | None = None
    is_refused: bool = False  # the row is at fault: the engine never began it


@dataclass
class Unfinished:
    """A row in the engine. `outputs` has None for each prompt without an answer so far."""

    work: Work
    outputs: list[RequestOutput | None]

    def result(self) -> Result:
        """Called when all outputs are there."""
        outputs = [output for output in self.outputs if output is not None]
        for output in outputs:
            for completion in output.outputs:
                if completion.finish_reason not in ("stop", "length"):
                    error = f"{completion.finish_reason}: {completion.stop_reason}"
                    return Result(self.work, outputs, error)
        return Result(self.work, outputs)


class Answers:
    """An iterator over the results of `works`, in the order in which they finish.

    Takes the next work only when the engine has place for it. When the iteration ends,
    by exhaustion, error or `close`, no request is left.
    """

    def __init__(self, engine: LLMEngine, works: Iterator[Work]) -> None:
        self.engine = engine
        self.works = works
        self.is_exhausted = False
        self.limit = FULL * engine.setup.max_num_seqs * engine.args.data_parallel_size
        self.queue: deque[RequestOutput] = deque()
        self.open: dict[str, tuple[Unfinished, int]] = {}  # by request id; index of the prompt
        self.results: deque[Result] = deque()

    def __iter__(self) -> Answers:
        return self

    def __next__(self) -> Result:
        while not self.results:
            self._fill()
            if self.results:
                break
            if not self.open:
                raise StopIteration
            self.engine.run_step()
            while self.queue:
                self._take(self.queue.popleft())
        return self.results.popleft()

    def close(self) -> None:
        self.engine.abort_request(list(self.open))
        self.open.clear()

    def _fill(self) -> None:
        while not self.is_exhausted and len(self.open) < self.limit:
            work = next(self.works, None)
            if work is None:
                self.is_exhausted = True
                return
            try:
                self._add(work)
            except BAD_ROW as error:
                self.results.append(Result(work, [], sentence(error), is_refused=True))

    def _add(self, work: Work) -> None:
        unfinished = Unfinished(work, [None] * len(work.prompts))
        added: list[str] = []
        try:
            for index, prompt in enumerate(work.prompts):
                request_id = self.engine.new_request_id()
                self._add_prompt(request_id, work, index, prompt)
                added.append(request_id)
                self.open[request_id] = (unfinished, index)
        except BaseException:
            self.engine.abort_request(added)
            for request_id in added:
                del self.open[request_id]
            raise

    def _add_prompt(self, request_id: str, work: Work, index: int, prompt: object) -> None:
        how = work.tokenization
        if isinstance(prompt, Chat):
            prompt = chat_text(self.engine, prompt)
            how = {"add_special_tokens": False, **(how or {})}  # the template writes them
        if work.cache_salt is not None:
            key = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
            prompt = {key: prompt, "cache_salt": work.cache_salt}
        params = seeded(work.params, self.engine.args.seed, work.number, index)
        self.engine.add_request(
            request_id,
            prompt,
            params,
            tokenization_kwargs=how,
            output_kind=RequestOutputKind.FINAL_ONLY,
            queue=self.queue,
        )

    def _take(self, output: RequestOutput) -> None:
        unfinished, index = self.open.pop(output.request_id)
        unfinished.outputs[index] = output
        if None not in unfinished.outputs:
            self.results.append(unfinished.result())


def chat_text(engine: LLMEngine, chat: Chat) -> str:
    """The prompt of a conversation. Raises ValueError or TypeError for a bad one."""
    if engine.tokenizer is None:
        raise ValidationError("chat needs a tokenizer; skip_tokenizer_init=True leaves none")
    (text,) = render(
        engine.tokenizer,
        [chat.messages],
        chat_template=chat.template or engine.args.chat_template,
        content_format="auto",
        arguments={"add_generation_prompt": True, **chat.arguments},
        chat_template_kwargs=chat.template_kwargs,
    )
    return text


def seeded(params: SamplingParams, seed: int, number: int, index: int) -> SamplingParams:
    """The params with a seed. A resumed run so draws the tokens of an uninterrupted one."""
    if params.seed is not None or params.is_greedy:
        return params
    params = copy.copy(params)
    params.seed = xxhash.xxh3_64_intdigest(f"{seed} {number} {index}".encode()) >> 1
    return params


def sampling_defaults(engine: LLMEngine, given: Mapping[str, object]) -> dict[str, object]:
    """Fields of SamplingParams for rows that do not say otherwise.

    given: the user's. They replace equal names of the model's generation_config.json.
    """
    plain = vars(SamplingParams())
    recommended = vars(default_sampling_params(engine))
    differing = {name: value for name, value in recommended.items() if value != plain[name]}
    return {**differing, **given}


class ParamsMaker:
    """Makes SamplingParams. Rows with the fields of the row before share its params."""

    def __init__(self) -> None:
        self.fields = ""
        self.params: SamplingParams | None = None

    def make(self, fields: JsonObject) -> SamplingParams:
        """Raises ValueError or TypeError for a refused value."""
        text = repr(fields)  # because True == 1, and some rules tell them apart
        if self.params is None or text != self.fields:
            self.params = SamplingParams.from_optional(**fields)
            self.fields = text
        return self.params


def sentence(error: BaseException) -> str:
    """The message of an exception that a row has caused."""
    if isinstance(error, (ValidationError, ValueError, TypeError)):
        return str(error)
    return f"{type(error).__name__}: {error}"
