"""`nanovllm run-batch`: files of requests -> files of answers, which a killed run loses nothing of.

The oracle of the tokens is transformers. That of a resumed run is a run that nothing interrupted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import greedy, shared_model, tiny_tokenizer

from nanovllm import EngineArgs
from nanovllm.batch import rows
from nanovllm.batch.job import Options, Summary, run_batch
from nanovllm.batch.openai_files import Ids
from nanovllm.batch.output_file import Numbers, OutputFile, json_line
from nanovllm.cli import main, make_parser

ROOT = Path(__file__).parent.parent
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
Lines = list[dict[str, Any]]


def run(source: Path, sampling: dict[str, Any] = GREEDY, **options: Any) -> Lines:
    """The lines of the output beside `source`, after one run."""
    summary(source, sampling, **options)
    return read(output_of(source))


def summary(source: Path, sampling: dict[str, Any] = GREEDY, **options: Any) -> Summary:
    changed = options.pop("engine", {})
    args = EngineArgs(
        shared_model()[0],
        dtype="float32",
        **{"num_gpu_blocks_override": 128, "max_num_seqs": 8, **changed},
    )
    return run_batch(
        Options(source, output_of(source), args, sampling=sampling, shows_progress=False, **options)
    )


def output_of(source: Path) -> Path:
    return source.with_name("output.jsonl")


def read(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def written(path: Path, records: list[Any]) -> Path:
    """A file of JSON lines. Bytes are written as they are."""
    lines = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def request(custom_id: Any, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    body = body or {"prompt": "the sea"}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def chat_request(custom_id: str, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "in the sea"}]
    return request(custom_id, "/v1/chat/completions", **{"messages": messages, **body})


def expected(text: str, num_tokens: int = 6) -> str:
    """transformers' greedy continuation of a text with BOS before it."""
    tokenizer = tiny_tokenizer()
    ids = greedy(shared_model()[1], tokenizer(text)["input_ids"], num_tokens)
    return tokenizer.decode(ids, skip_special_tokens=True)


def by_id(lines: Lines) -> dict[str, dict[str, Any]]:
    """Raises for an id that is there twice."""
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def text(line: dict[str, Any]) -> str | None:
    """The text of an answer. None for an error line."""
    body = line["response"]["body"]
    return body and body["choices"][0]["text"]


def errors(lines: Lines) -> dict[int, str]:
    """The sentences of OpenAI's error lines, by the number of the input's line."""
    found = {}
    for line in lines:
        if line["error"] is not None:
            assert line["response"]["body"] is None
            number = int(line["id"].removeprefix("nanovllm-"))
            found[number] = line["error"]["error"]["message"]
    return found


# -- OpenAI's batch files --------------------------------------------------------------------------


def test_completions_and_chats_are_answered_with_transformers_tokens(tmp_path: Path) -> None:
    source = written(
        tmp_path / "in.jsonl",
        [
            request("one", prompt="the sea"),
            request("two", prompt=["in", "there"], max_tokens=3),
            request("ids", prompt=[5, 9, 77]),
            chat_request("three", max_completion_tokens=4),
        ],
    )
    lines = by_id(run(source))
    assert sorted(lines) == ["ids", "one", "three", "two"]
    one = lines["one"]["response"]
    assert one["status_code"] == 200
    assert one["body"]["object"] == "text_completion"
    (choice,) = one["body"]["choices"]
    assert choice["text"] == expected("the sea")
    assert choice["finish_reason"] == "length"
    usage = {"prompt_tokens": 6, "completion_tokens": 6, "total_tokens": 12}
    assert one["body"]["usage"] == usage
    two = lines["two"]["response"]["body"]["choices"]
    assert [(each["index"], each["text"]) for each in two] == [
        (0, expected("in", 3)),
        (1, expected("there", 3)),
    ]
    three = lines["three"]["response"]["body"]
    assert three["object"] == "chat.completion"
    (choice,) = three["choices"]
    # The template writes <s> itself.
    content = expected("[user] in the sea</s>[assistant] ", 4)
    assert choice["message"] == {"role": "assistant", "content": content}
    ids = greedy(shared_model()[1], [5, 9, 77], 6)
    decoded = tiny_tokenizer().decode(ids, skip_special_tokens=True)
    assert lines["ids"]["response"]["body"]["choices"][0]["text"] == decoded


def test_the_lines_are_what_openais_client_reads(tmp_path: Path) -> None:
    types = pytest.importorskip("openai.types")
    chat = pytest.importorskip("openai.types.chat")
    body = {"logprobs": True, "top_logprobs": 2}
    source = written(
        tmp_path / "in.jsonl",
        [request("text", prompt="the", logprobs=2), chat_request("chat", max_tokens=3, **body)],
    )
    lines = by_id(run(source))
    types.Completion.model_validate(lines["text"]["response"]["body"], strict=True)
    found = chat.ChatCompletion.model_validate(lines["chat"]["response"]["body"])
    assert [len(each.top_logprobs) for each in found.choices[0].logprobs.content] == [2, 2, 2]


def test_logprobs_are_those_of_the_sampled_tokens(tmp_path: Path) -> None:
    source = written(
        tmp_path / "in.jsonl",
        [
            request("text", prompt="the", logprobs=1),
            chat_request("chat", max_tokens=3, logprobs=True, top_logprobs=1),
            chat_request("none", max_tokens=3, logprobs=True),
        ],
    )
    lines = by_id(run(source))
    found = lines["text"]["response"]["body"]["choices"][0]["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["text_offset"]) == 6
    # Greedy tokens are the most probable ones.
    assert [max(each.values()) for each in found["top_logprobs"]] == found["token_logprobs"]
    content = lines["chat"]["response"]["body"]["choices"][0]["logprobs"]["content"]
    for token in content:
        (best,) = token["top_logprobs"]
        assert best["token"] == token["token"]
        assert bytes(best["bytes"]).decode() == best["token"]
    (choice,) = lines["none"]["response"]["body"]["choices"]
    assert [each["top_logprobs"] for each in choice["logprobs"]["content"]] == [[], [], []]


BAD_LINES: list[tuple[Any, str]] = [
    (b"{not json", "no JSON"),
    (b"[" * 100_000, "no JSON"),
    (b'{"custom_id": "\xff"}', "not UTF-8"),
    (b"[1, 2]", "accepted is an object"),
    (b"x" * (rows.MAX_LINE + 5), f"more than {rows.MAX_LINE} bytes"),
    (request("good"), "line 1 too"),
    (request(7), "custom_id=7 must be a text"),
    (request("url", "/v1/embeddings"), "accepted are '/v1/chat/completions'"),
    ({**request("get"), "method": "GET"}, "accepted is 'POST'"),
    ({**request("list"), "body": []}, "body=[] must be an object"),
    (request("heat", prompt="a", temperature=-1), "temperature must be"),
    (request("name", prompt="a", temperatur=1), "did you mean 'temperature'?"),
    (request("stream", prompt="a", stream=True), "stream=True is not supported"),
    (request("model", prompt="a", model="other"), "model='other' is not the model of this run"),
    (request("empty", prompt=[]), "prompt=[] must be text"),
    (request("second", prompt=["a", 3.5]), ""),
    (request("long", prompt=[1] * 600), ""),
    (request("half", prompt="\ud800"), "surrogate"),
    (chat_request("role", messages=[{"content": "a"}]), "'role'"),
    (chat_request("words", messages="hello"), ""),
    (chat_request("top", top_logprobs=3), "needs logprobs=true"),
    (chat_request("form", response_format={"type": "json_object"}), "not supported"),
]


def test_a_bad_line_is_an_error_line_and_the_run_goes_on(tmp_path: Path) -> None:
    records = [request("good"), *(line for line, _ in BAD_LINES), b"", request("last")]
    lines = run(written(tmp_path / "in.jsonl", records))
    found = errors(lines)
    assert sorted(found) == list(range(2, len(BAD_LINES) + 2))
    for number, (_, reason) in enumerate(BAD_LINES, 2):
        assert found[number].startswith(f"line {number}: ")
        assert reason in found[number]
    answered = [line["custom_id"] for line in lines if line["error"] is None]
    assert sorted(answered) == ["good", "last"]
    assert len(lines) == len(BAD_LINES) + 2


def test_an_id_with_half_of_a_surrogate_pair_comes_back(tmp_path: Path) -> None:
    (line,) = run(written(tmp_path / "in.jsonl", [request("\ud800")]))
    assert line["custom_id"] == "\ud800"


# -- columns ---------------------------------------------------------------------------------------


def test_columns_are_carried_through(tmp_path: Path) -> None:
    records = [
        {"prompt": "the sea", "topic": "sea", "tags": [1, None]},
        {"messages": [{"role": "user", "content": "in the sea"}]},
        {"prompt": "in", "sampling_params": {"max_tokens": 2}},
        {"topic": "none"},
        {"prompt": "a", "error": 3},
        {"prompt": "a", "sampling_params": {"heat": 3}},
    ]
    lines = run(written(tmp_path / "in.jsonl", records))
    one, two, three, *bad = sorted(lines, key=lambda line: line["row_number"])
    assert one == {
        **records[0],
        "generated_text": expected("the sea"),
        "finish_reason": "length",
        "num_prompt_tokens": 6,
        "num_generated_tokens": 6,
        "row_number": 1,
        "error": None,
    }
    assert two["generated_text"] == expected("[user] in the sea</s>[assistant] ")
    assert three["generated_text"] == expected("in", 2)
    assert [line["generated_text"] for line in bad] == [None] * 3
    missing, reserved, unknown = (line["error"] for line in bad)
    assert missing == "row 4: a row needs either 'prompt' or 'messages'; its columns are topic"
    assert reserved.startswith("row 5: the columns error are reserved")
    assert unknown.startswith("row 6: sampling_params: heat is not known")
    assert bad[0]["topic"] == "none"


def test_parquet_rows_give_the_same_answers(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    topics = [float("nan"), 2.0] * 50
    table = pyarrow.table({"prompt": ["the sea", "in"] * 50, "topic": topics})
    parquet.write_table(table, tmp_path / "in.parquet")
    lines = run(tmp_path / "in.parquet")
    assert sorted(line["row_number"] for line in lines) == list(range(1, 101))
    for line in lines:
        is_first = line["row_number"] % 2 == 1
        assert line["generated_text"] == expected("the sea" if is_first else "in")
        assert line["topic"] == (None if is_first else 2.0)  # JSON has no NaN
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="'prompt' or 'messages'; its columns are text"):
        run(tmp_path / "other.parquet", overwrite=True)


# -- going on --------------------------------------------------------------------------------------


def test_a_run_goes_on_after_any_byte(tmp_path: Path) -> None:
    requests = [request(f"id {i}", prompt=f"the {i}") for i in range(20)]
    source = written(tmp_path / "in.jsonl", [*requests, b"{bad"])
    output = output_of(source)
    whole = by_id(run(source))
    data = output.read_bytes()
    for size in (len(data) - 1, len(data) - 400, 5, 0):
        output.write_bytes(data[:size])
        lines = by_id(run(source))
        assert lines.keys() == whole.keys()
        assert {each: text(line) for each, line in lines.items()} == {
            each: text(line) for each, line in whole.items()
        }


def test_a_complete_output_starts_no_engine(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [request("one")])
    before = run(source)
    found = summary(source, engine={"device": "no such device"})
    assert (found.num_rows, found.num_done_before) == (1, 1)
    assert read(output_of(source)) == before


def test_samples_of_a_resumed_run_are_those_of_a_whole_run(tmp_path: Path) -> None:
    prompts = [["the", "the"], "the", "the"]
    source = written(
        tmp_path / "in.jsonl", [request(str(i), prompt=p) for i, p in enumerate(prompts)]
    )
    hot = {"temperature": 2.0, "max_tokens": 8}
    whole = by_id(run(source, hot))
    texts = [c["text"] for line in whole.values() for c in line["response"]["body"]["choices"]]
    assert len(set(texts)) == 4  # no two requests share a seed
    output = output_of(source)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(lines[2] + lines[0][:30])
    again = by_id(run(source, hot))
    for custom_id, line in again.items():
        found = line["response"]["body"]["choices"]
        assert found == whole[custom_id]["response"]["body"]["choices"]


def test_another_model_or_other_parameters_are_refused(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [request("one")])
    output = output_of(source)
    run(source)
    before = output.read_bytes()
    with pytest.raises(ValueError, match=r"sampling_params \(was .*, is .*--overwrite"):
        run(source, {**GREEDY, "max_tokens": 7})
    with pytest.raises(ValueError, match=r"seed \(was 0, is 1\)"):
        run(source, engine={"seed": 1})
    run(source, engine={"max_num_seqs": 4, "num_gpu_blocks_override": 64})  # only speed
    assert output.read_bytes() == before
    written(source, [request("one"), request("two")])
    with pytest.raises(ValueError, match="input file"):
        run(source)
    assert len(run(source, overwrite=True)) == 2


def test_files_of_other_programs_are_left_alone(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [request("one")])
    output = output_of(source)
    output.write_text("my thesis")
    with pytest.raises(ValueError, match=r"output\.jsonl\.run\.json.* is missing"):
        run(source)
    assert output.read_text() == "my thesis"
    run(source, overwrite=True)
    output.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="line 1 is none of this command's"):
        run(source)
    with OutputFile(output), pytest.raises(ValueError, match="another process writes"):
        run(source)
    with pytest.raises(ValueError, match="is no file"):
        run(tmp_path / "missing.jsonl")


def test_an_empty_input_has_an_empty_output(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [b"", b"  "])
    assert run(source) == []


def test_two_engines_give_the_same_answers(tmp_path: Path) -> None:
    requests = [request(f"id {i}", prompt=f"the {i}") for i in range(12)]
    source = written(tmp_path / "in.jsonl", requests)
    lines = by_id(run(source, engine={"data_parallel_size": 2, "device": "cpu"}))
    assert len(lines) == 12
    for i in range(12):
        (choice,) = lines[f"id {i}"]["response"]["body"]["choices"]
        assert choice["text"] == expected(f"the {i}")


def test_a_run_survives_kills(tmp_path: Path) -> None:
    requests = [request(f"id {i}", prompt=f"the {i}") for i in range(150)]
    source = written(tmp_path / "in.jsonl", requests)
    command = [sys.executable, str(ROOT / "tests" / "batch_kills.py"), "5", str(source)]
    arguments = ["--model", shared_model()[0], "--sampling-params", json.dumps(GREEDY)]
    result = subprocess.run(
        [*command, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "killed 5 times" in result.stdout
    killed = by_id(read(output_of(source)))
    assert len(killed) == 150
    whole_source = written(tmp_path / "whole.jsonl", requests)
    whole = by_id(run(whole_source, overwrite=True))
    for custom_id, line in killed.items():
        found = line["response"]["body"]["choices"]
        assert found == whole[custom_id]["response"]["body"]["choices"]


# -- parts -----------------------------------------------------------------------------------------


def test_a_number_takes_a_bit() -> None:
    numbers = Numbers()
    for number in (1, 8, 9, 8000, 8):
        numbers.add(number)
    assert [number for number in range(1, 9000) if number in numbers] == [1, 8, 9, 8000]
    assert len(numbers) == 4
    assert len(numbers.bits) == 1001


def test_ids_remember_the_first_line() -> None:
    ids = Ids()
    assert [ids.add(*each) for each in (("a", 1), ("b", 2), ("a", 3), ("\ud800", 4))] == [
        None,
        None,
        1,
        None,
    ]


def test_every_value_has_a_line_of_json() -> None:
    for value in (float("inf"), "\ud800", "ä", {"a": [float("nan")]}):
        line = json_line({"value": value})
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        json.loads(line, parse_constant=pytest.fail)
    assert json_line({"value": "ä"}) == '{"value": "ä"}\n'.encode()


def test_the_command_line_takes_vllms_options() -> None:
    words = ["run-batch", "-i", "a.jsonl", "-o", "b.jsonl", "--model", "m", "-tp", "2"]
    args = make_parser().parse_args([*words, "--sampling-params", '{"top_k": 3}'])
    assert (args.input_file, args.output_file) == (Path("a.jsonl"), Path("b.jsonl"))
    assert EngineArgs.from_cli_args(args).tensor_parallel_size == 2
    assert args.sampling_params == {"top_k": 3}


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run-batch", "-i", "none", "-o", "out"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "nanovllm: error: input_file='none' is no file here\n"
