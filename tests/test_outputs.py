"""The result records as vLLM's and nano-vLLM's clients read them."""

from dataclasses import asdict

import pytest

from nanovllm.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
)


def request_output(**changes):
    completion = CompletionOutput(
        0, " world", [7, 8], -1.5, [{7: Logprob(-1.0, 1, " wor")}, {8: Logprob(-0.5, 2)}], "stop"
    )
    fields = {
        "prompt": "Hello",
        "prompt_token_ids": [1, 2],
        "prompt_logprobs": None,
        "finished": True,
    }
    return RequestOutput(request_id="3", outputs=[completion], **{**fields, **changes})


def test_nano_vllm_scripts_read_keys():
    output = request_output()
    assert (output["text"], output["token_ids"]) == (" world", [7, 8])
    with pytest.raises(KeyError, match="'text' and 'token_ids', not 'logprobs'"):
        output["logprobs"]
    with pytest.raises(KeyError):
        output[0]


def test_finished():
    assert not CompletionOutput(0, "", []).finished()
    assert all(
        CompletionOutput(0, "", [], finish_reason=r).finished() for r in ("stop", "length", "abort")
    )


def test_asdict_reaches_all_the_way_down():
    as_dict = asdict(request_output().outputs[0])
    assert as_dict["logprobs"][0] == {7: {"logprob": -1.0, "rank": 1, "decoded_token": " wor"}}
    assert as_dict["stop_reason"] is None
    metrics = RequestMetrics(arrival_time=1.0)
    assert asdict(request_output(metrics=metrics))["metrics"]["arrival_time"] == 1.0


def test_defaults_of_what_is_not_always_known():
    output = request_output()
    assert (output.metrics, output.lora_request, output.num_cached_tokens) == (None, None, None)


def test_repr_names_the_fields():
    assert repr(Logprob(-1.0, 1, "a")) == "Logprob(logprob=-1.0, rank=1, decoded_token='a')"
    assert repr(request_output()).startswith(
        "RequestOutput(request_id='3', prompt='Hello', prompt_token_ids=[1, 2], "
    )


def test_metrics_answer_to_older_and_newer_names():
    metrics = RequestMetrics(arrival_time=10.0)
    unknown = (
        metrics.scheduled_ts,
        metrics.first_token_ts,
        metrics.time_in_queue,
        metrics.first_token_latency,
    )
    assert unknown == (None, None, None, None)
    metrics = RequestMetrics(
        10.0, first_scheduled_time=11.0, first_token_time=13.0, last_token_time=17.0
    )
    assert (
        metrics.queued_ts,
        metrics.scheduled_ts,
        metrics.first_token_ts,
        metrics.last_token_ts,
    ) == (10, 11, 13, 17)
    assert (metrics.time_in_queue, metrics.first_token_latency) == (1.0, 3.0)


def test_beams():
    output = BeamSearchOutput(
        [BeamSearchSequence(tokens=[1, 2, 3], cum_logprob=-2.0, text="abc", finish_reason="length")]
    )
    assert output.sequences[0].tokens == [1, 2, 3]
    assert (output.sequences[0].logprobs, output.sequences[0].stop_reason) == ([], None)
