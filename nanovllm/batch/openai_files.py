"""OpenAI's batch files, as `vllm run-batch` reads and writes them.

The `id` of an output's line holds the number of the input's line.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence

from nanovllm.batch import openai_answer, openai_body
from nanovllm.batch.rows import Row
from nanovllm.batch.work import JsonObject, ParamsMaker, Result, Work
from nanovllm.errors import ValidationError

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"
ID = "nanovllm-"
BAD_REQUEST = 400
SERVER_ERROR = 500


class OpenAIFiles:
    """The format of OpenAI's batch files.

    Invariant: `read` has seen all lines before the current one, because ids must differ.
    """

    def __init__(self, models: Sequence[str], defaults: Mapping[str, object]) -> None:
        """models: names of the model that a body may use. The first stands in responses.

        defaults: fields of SamplingParams for all requests.
        """
        self.models = models
        self.defaults = defaults
        self.ids = Ids()
        self.params = ParamsMaker()

    def read(self, row: Row) -> Work:
        """Raises ValueError or TypeError, whose message says what the line lacks."""
        record = row.record
        custom_id = record.get("custom_id")
        if not isinstance(custom_id, str):
            raise ValidationError(f"custom_id={custom_id!r} must be a text")
        first = self.ids.add(custom_id, row.number)
        if first is not None:
            raise ValidationError(f"custom_id={custom_id!r} is that of line {first} too")
        method = record.get("method", "POST")
        if method != "POST":
            raise ValidationError(f"method={method!r} is not supported; accepted is 'POST'")
        url = record.get("url")
        if url not in (CHAT_URL, COMPLETIONS_URL):
            raise ValidationError(
                f"url={url!r} is not supported; accepted are {CHAT_URL!r} and {COMPLETIONS_URL!r}"
            )
        body = record.get("body")
        if not isinstance(body, dict):
            raise TypeError(f"body={body!r} must be an object")
        self._check_model(body.get("model"))
        return self._work(row, url == CHAT_URL, body)

    def _work(self, row: Row, is_chat: bool, body: JsonObject) -> Work:
        if is_chat:
            openai_body.check_fields(body, openai_body.CHAT)
            prompts = openai_body.chat_prompts(body)
            fields = openai_body.chat_fields(body, self.defaults)
        else:
            openai_body.check_fields(body, ("prompt",))
            prompts = openai_body.completion_prompts(body)
            fields = openai_body.completion_fields(body, self.defaults)
        how = None
        if body.get("add_special_tokens") is not None:
            how = {"add_special_tokens": body["add_special_tokens"]}
        params = self.params.make(fields)
        return Work(row.number, prompts, params, row.record, how, body.get("cache_salt"))

    def _check_model(self, model: object) -> None:
        if model is not None and model not in self.models:
            accepted = ", ".join(map(repr, self.models))
            raise ValidationError(
                f"model={model!r} is not the model of this run; accepted: {accepted}"
            )

    def answer(self, result: Result) -> JsonObject:
        """The output's line for an answer."""
        work = result.work
        body = work.row["body"]
        model = body.get("model") or self.models[0]
        if work.row["url"] == CHAT_URL:
            top = body.get("top_logprobs") or 0
            found = openai_answer.chat_body(work.number, model, result.outputs, top)
        else:
            found = openai_answer.completion_body(work.number, model, result.outputs)
        return self._line(work.number, work.row, 200, found, None)

    def error(self, row: Row, error: str, is_refused: bool) -> JsonObject:
        """The output's line for a line that has no answer.

        is_refused: whether the request is at fault. Else it failed while it ran.
        """
        code = BAD_REQUEST if is_refused else SERVER_ERROR
        details = {
            "message": f"line {row.number}: {error}",
            "type": "BadRequestError" if is_refused else "InternalServerError",
            "param": None,
            "code": code,
        }
        return self._line(row.number, row.record, code, None, {"error": details})

    def _line(
        self,
        number: int,
        record: JsonObject,
        code: int,
        body: JsonObject | None,
        error: JsonObject | None,
    ) -> JsonObject:
        response = {"status_code": code, "request_id": f"{ID}batch-{number}", "body": body}
        return {
            "id": f"{ID}{number}",
            "custom_id": record.get("custom_id"),
            "response": response,
            "error": error,
        }

    def number(self, line: JsonObject) -> int | None:
        """The number of the input's line that a line of the output answers."""
        text = str(line.get("id")).removeprefix(ID)
        return int(text) if text.isdecimal() else None


class Ids:
    """All custom ids so far. SQLite keeps them in a temporary file, so memory stays flat."""

    def __init__(self) -> None:
        self.database = sqlite3.connect("", isolation_level=None)
        self.database.execute("PRAGMA journal_mode = OFF")
        self.database.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, number INT) WITHOUT ROWID")

    def add(self, custom_id: str, number: int) -> int | None:
        """Adds an id. Returns the number of the line that had it already, or None."""
        key = custom_id.encode(errors="surrogatepass")
        insert = "INSERT OR IGNORE INTO ids VALUES (?, ?)"
        if self.database.execute(insert, (key, number)).rowcount:
            return None
        (first,) = self.database.execute("SELECT number FROM ids WHERE id = ?", (key,)).fetchone()
        return int(first)
