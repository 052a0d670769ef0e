"""Plain rows with a column `prompt` or `messages`. All columns are carried through."""

from __future__ import annotations

from collections.abc import Mapping

from nanovllm.batch.rows import Row
from nanovllm.batch.work import Chat, JsonObject, ParamsMaker, Result, Work
from nanovllm.errors import ValidationError
from nanovllm.sampling_params import SamplingParams

PROMPT = "prompt"
MESSAGES = "messages"
SAMPLING = "sampling_params"  # a dict; its fields replace fields of the whole run
# The columns of the output besides the columns of the input.
NUMBER = "row_number"
RESULTS = (
    "generated_text",
    "finish_reason",
    "num_prompt_tokens",
    "num_generated_tokens",
    NUMBER,
    "error",
)


class Columns:
    """The format of plain rows.

    With n > 1, `generated_text` and `finish_reason` are lists.
    """

    def __init__(self, defaults: Mapping[str, object]) -> None:
        """defaults: fields of SamplingParams for all rows."""
        self.defaults = defaults
        self.params = ParamsMaker()

    def read(self, row: Row) -> Work:
        """Raises ValueError or TypeError for a row without a prompt, or with bad parameters."""
        record = row.record
        reserved = sorted(record.keys() & set(RESULTS))
        if reserved:
            raise ValidationError(
                f"the columns {', '.join(reserved)} are reserved for results; rename them"
            )
        prompt = record.get(PROMPT)
        messages = record.get(MESSAGES)
        if (prompt is None) == (messages is None):
            raise ValidationError(
                f"a row needs either {PROMPT!r} or {MESSAGES!r}; its columns are "
                f"{', '.join(sorted(record)) or 'none'}"
            )
        own = record.get(SAMPLING) or {}
        if not isinstance(own, Mapping):
            raise TypeError(f"{SAMPLING} must be a dict; got {own!r}")
        check_names(own)
        params = self.params.make({**self.defaults, **own})
        prompts = [Chat(messages) if prompt is None else prompt]
        return Work(row.number, prompts, params, record)

    def answer(self, result: Result) -> JsonObject:
        """The output's row for an answer."""
        (output,) = result.outputs
        completions = output.outputs
        texts = [completion.text for completion in completions]
        reasons = [completion.finish_reason for completion in completions]
        is_one = len(completions) == 1
        return {
            **result.work.row,
            "generated_text": texts[0] if is_one else texts,
            "finish_reason": reasons[0] if is_one else reasons,
            "num_prompt_tokens": len(output.prompt_token_ids),
            "num_generated_tokens": sum(len(each.token_ids) for each in completions),
            NUMBER: result.work.number,
            "error": None,
        }

    def error(self, row: Row, error: str, is_refused: bool) -> JsonObject:
        """The output's row for a row that has no answer."""
        results: JsonObject = dict.fromkeys(RESULTS)
        return {**row.record, **results, NUMBER: row.number, "error": f"row {row.number}: {error}"}

    def number(self, line: JsonObject) -> int | None:
        """The number of the input's row that a line of the output answers."""
        number = line.get(NUMBER)
        return number if isinstance(number, int) else None


def check_names(given: Mapping[str, object]) -> None:
    """Raises ValueError for names that are no fields of SamplingParams."""
    unknown = sorted(set(map(str, given)) - set(SamplingParams.__struct_fields__))
    if unknown:
        accepted = ", ".join(SamplingParams.__struct_fields__)
        raise ValidationError(
            f"{SAMPLING}: {', '.join(unknown)} is not known; accepted are {accepted}"
        )
