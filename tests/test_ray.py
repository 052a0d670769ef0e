"""`LLMPredictor` on batches as Ray Data passes them, and the parts of a job over a cluster.

tests/clients/ray_cluster.py runs a cluster and kills a node; it takes longer than a test may.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batch_files import expected
from tiny import shared_model

from nanovllm.batch import rows
from nanovllm.ray import LLMPredictor

ENGINE = {"model": shared_model()[0], "dtype": "float32", "num_gpu_blocks_override": 128}


@pytest.fixture(scope="module")
def predictor() -> LLMPredictor:
    return LLMPredictor(ENGINE, {"temperature": 0, "max_tokens": 6, "ignore_eos": True})


def objects(values: list[Any]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def test_rows_keep_their_place_and_their_columns(predictor: LLMPredictor) -> None:
    texts = ["the sea", "in", "there is"]
    batch = {"prompt": objects(texts), "number": np.array([7, 8, 9])}
    found = predictor(batch)
    assert found["number"] is batch["number"]
    assert list(found["generated_text"]) == [expected(text) for text in texts]
    assert list(found["finish_reason"]) == ["length"] * 3
    assert found["num_generated_tokens"].tolist() == [6, 6, 6]
    assert list(found["error"]) == [None] * 3


def test_a_row_that_fails_has_a_sentence(predictor: LLMPredictor) -> None:
    params = objects([{"max_tokens": 2}, {"temperature": -1}, {"heat": 1}])
    found = predictor({"prompt": objects(["in", "in", "in"]), "sampling_params": params})
    assert list(found["generated_text"]) == [expected("in", 2), None, None]
    assert found["num_generated_tokens"].tolist() == [2, 0, 0]
    first, second, third = found["error"]
    assert first is None
    assert second.startswith("temperature must be")
    assert third.startswith("sampling_params: heat is not known")


def test_conversations_are_arrays_of_messages(predictor: LLMPredictor) -> None:
    messages = objects([objects([{"role": "user", "content": "in the sea"}])])
    found = predictor({"messages": messages})
    assert list(found["generated_text"]) == [expected("[user] in the sea</s>[assistant] ")]


def test_a_missing_or_reserved_column_ends_the_job(predictor: LLMPredictor) -> None:
    with pytest.raises(ValueError, match="'prompt' or 'messages'; its columns are text"):
        predictor({"text": objects(["a"])})
    with pytest.raises(ValueError, match="'error' is reserved"):
        predictor({"prompt": objects(["a"]), "error": objects(["a"])})


def test_an_empty_batch_has_an_empty_answer(predictor: LLMPredictor) -> None:
    found = predictor({"prompt": objects([])})
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(
        ("prompt", *("generated_text", "finish_reason", "num_prompt_tokens")), 0
    ) | {"num_generated_tokens": 0, "error": 0}


lines = st.sampled_from([b"", b"  ", b'{"a": 1}', b"{bad", b"\xff", b"x" * 40])


@settings(deadline=None)
@given(st.lists(lines, max_size=12), st.integers(1, 5), st.booleans())
def test_the_parts_of_a_file_are_the_file(
    tmp_path_factory: pytest.TempPathFactory, content: list[bytes], size: int, has_end: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "parts.jsonl"
    path.write_bytes(b"\n".join(content) + (b"\n" if has_end else b""))
    source = rows.scan(path, size)
    whole = list(rows.read(path))
    assert [row for part in source.parts for row in rows.read(path, part)] == whole
    assert source.num_rows == len(whole) == sum(part.num_rows for part in source.parts)
    assert all(part.num_lines <= size for part in source.parts)


def test_row_groups_are_the_parts_of_a_parquet_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "in.parquet"
    parquet.write_table(pyarrow.table({"prompt": list("abcde")}), path, row_group_size=2)
    source = rows.scan(path)
    found = [[(row.number, row.record) for row in rows.read(path, part)] for part in source.parts]
    records = [{"prompt": letter} for letter in "abcde"]
    assert found == [
        [(1, records[0]), (2, records[1])],
        [(3, records[2]), (4, records[3])],
        [(5, records[4])],
    ]
    assert source.num_rows == 5
