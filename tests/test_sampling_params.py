"""Every rule of SamplingParams: what is accepted and what it becomes, what is refused and how; and
what clients do with it.
"""

import inspect
import logging
import pickle
from dataclasses import asdict
from math import inf, nan

import numpy as np
import pytest

from nanovllm.errors import ValidationError, VLLMValidationError
from nanovllm.sampling_params import (
    BeamSearchParams,
    GuidedDecodingParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)

GREEDY = {"temperature": 0.0}
ACCEPTED = [  # arguments, then the fields that differ from what was given
    ({"n": 3}, {}),
    ({"n": np.int64(2)}, {"n": 2}),
    ({"n": 1, **GREEDY}, {}),
    ({"temperature": 2.5}, {}),
    ({"temperature": 1}, {"temperature": 1.0}),
    ({"temperature": np.float32(0.5)}, {"temperature": 0.5}),
    (
        {"temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1},
        {**GREEDY, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
    ),
    ({"temperature": 9e-6, "top_k": 7}, {**GREEDY, "top_k": 0}),
    ({"temperature": 1e-5}, {"temperature": 0.01}),
    ({"temperature": 0.009}, {"temperature": 0.01}),
    ({"temperature": 0.01}, {}),
    ({"top_p": 1e-3}, {}),
    ({"top_p": 1}, {}),
    ({"top_k": 50}, {}),
    ({"top_k": 0}, {}),
    ({"top_k": -1}, {"top_k": 0}),
    ({"min_p": 0.0}, {}),
    ({"min_p": 1.0}, {}),
    ({"presence_penalty": -2, "frequency_penalty": 2}, {}),
    ({"repetition_penalty": 0.5}, {}),
    ({"repetition_penalty": 7.0}, {}),
    ({"seed": 0}, {}),
    ({"seed": 2**64 - 1}, {}),
    ({"seed": -7}, {}),
    ({"seed": -1}, {"seed": None}),
    ({"stop": "END"}, {"stop": ["END"]}),
    ({"stop": ("a", "b")}, {"stop": ["a", "b"]}),
    ({"stop": None}, {"stop": []}),
    ({"stop": [], "detokenize": False}, {}),
    ({"stop_token_ids": (np.int32(1), 2)}, {"stop_token_ids": [1, 2]}),
    ({"stop_token_ids": np.array([3, 4])}, {"stop_token_ids": [3, 4]}),
    ({"stop_token_ids": None}, {"stop_token_ids": []}),
    ({"include_stop_str_in_output": True}, {}),
    ({"ignore_eos": True}, {}),
    ({"max_tokens": None, "min_tokens": 100}, {}),
    ({"max_tokens": 4, "min_tokens": 4}, {}),
    ({"logprobs": 0}, {}),
    ({"logprobs": 5, "prompt_logprobs": 3}, {}),
    ({"logprobs": -1, "prompt_logprobs": -1}, {}),
    ({"logprobs": True, "prompt_logprobs": True}, {"logprobs": 1, "prompt_logprobs": 1}),
    ({"logprobs": False, "prompt_logprobs": False}, {"logprobs": None, "prompt_logprobs": None}),
    (
        {"detokenize": False, "skip_special_tokens": False, "spaces_between_special_tokens": False},
        {},
    ),
    ({"logit_bias": {3: -inf, np.int64(4): 2}}, {"logit_bias": {3: -inf, 4: 2.0}}),
    ({"allowed_token_ids": {5}}, {"allowed_token_ids": [5]}),
    ({"bad_words": ["bad", "very bad"]}, {}),
    ({"bad_words": None}, {"bad_words": []}),
    ({"output_kind": RequestOutputKind.DELTA}, {}),
    ({"skip_reading_prefix_cache": True}, {}),
    # what this engine does not do, at the values that ask for nothing
    ({"best_of": None}, {}),
    ({"best_of": 4, "n": 4}, {}),
    ({"use_beam_search": False, "length_penalty": 1.0, "early_stopping": False}, {}),
    ({"logits_processors": None}, {}),
    ({"logits_processors": []}, {}),
    ({"guided_decoding": None, "structured_outputs": None}, {}),
    ({"extra_args": None}, {}),
]


def number_text(arguments):
    return ",".join(f"{name}={value!r}" for name, value in arguments.items())


@pytest.mark.parametrize(
    ("given", "becomes"), ACCEPTED, ids=[number_text(given) for given, _ in ACCEPTED]
)
def test_accepted(given, becomes):
    params = SamplingParams(**given)
    once = asdict(params)
    for name, value in {**given, **becomes}.items():
        assert getattr(params, name) == value
    for name, default in asdict(SamplingParams()).items():
        assert None in (default, once[name]) or type(once[name]) is type(default)
    params.verify()
    assert asdict(params) == once


REFUSED = [  # the field that the sentence names, arguments, the type of error
    ("n", {"n": 0}, ValueError),
    ("n", {"n": -1}, ValueError),
    ("n", {"n": 1.0}, TypeError),
    ("n", {"n": True}, TypeError),
    ("n", {"n": None}, TypeError),
    ("n", {"n": 2, "temperature": 0.0}, ValueError),
    ("temperature", {"temperature": -0.1}, ValueError),
    ("temperature", {"temperature": nan}, ValueError),
    ("temperature", {"temperature": inf}, ValueError),
    ("temperature", {"temperature": "0.5"}, TypeError),
    ("temperature", {"temperature": True}, TypeError),
    ("top_p", {"top_p": 0.0}, ValueError),
    ("top_p", {"top_p": 1.01}, ValueError),
    ("top_p", {"top_p": nan}, ValueError),
    ("top_p", {"top_p": 0.0, "temperature": 0.0}, ValueError),
    ("top_k", {"top_k": -2}, ValueError),
    ("top_k", {"top_k": 50.0}, TypeError),
    ("top_k", {"top_k": True}, TypeError),
    ("min_p", {"min_p": -0.1}, ValueError),
    ("min_p", {"min_p": 1.1}, ValueError),
    ("presence_penalty", {"presence_penalty": 2.1}, ValueError),
    ("presence_penalty", {"presence_penalty": nan}, ValueError),
    ("frequency_penalty", {"frequency_penalty": -2.1}, ValueError),
    ("repetition_penalty", {"repetition_penalty": 0.0}, ValueError),
    ("repetition_penalty", {"repetition_penalty": -1.0}, ValueError),
    ("repetition_penalty", {"repetition_penalty": inf}, ValueError),
    ("seed", {"seed": 1.5}, TypeError),
    ("seed", {"seed": True}, TypeError),
    ("seed", {"seed": 2**64}, ValueError),
    ("stop", {"stop": ""}, ValueError),
    ("stop", {"stop": ["a", ""]}, ValueError),
    ("stop", {"stop": [1]}, TypeError),
    ("stop", {"stop": 1}, TypeError),
    ("stop", {"stop": "a", "detokenize": False}, ValueError),
    ("stop_token_ids", {"stop_token_ids": 0}, TypeError),
    ("stop_token_ids", {"stop_token_ids": ["2"]}, TypeError),
    ("stop_token_ids", {"stop_token_ids": "2"}, TypeError),
    ("stop_token_ids", {"stop_token_ids": [True]}, TypeError),
    ("ignore_eos", {"ignore_eos": "false"}, TypeError),
    ("detokenize", {"detokenize": None}, TypeError),
    ("skip_special_tokens", {"skip_special_tokens": 1}, TypeError),
    ("spaces_between_special_tokens", {"spaces_between_special_tokens": 0}, TypeError),
    ("include_stop_str_in_output", {"include_stop_str_in_output": "yes"}, TypeError),
    ("skip_reading_prefix_cache", {"skip_reading_prefix_cache": 1}, TypeError),
    ("max_tokens", {"max_tokens": 0}, ValueError),
    ("max_tokens", {"max_tokens": 1.5}, TypeError),
    ("min_tokens", {"min_tokens": -1}, ValueError),
    ("min_tokens", {"min_tokens": 5, "max_tokens": 4}, ValueError),
    ("min_tokens", {"min_tokens": None}, TypeError),
    ("logprobs", {"logprobs": -2}, ValueError),
    ("logprobs", {"logprobs": 1.0}, TypeError),
    ("prompt_logprobs", {"prompt_logprobs": -2}, ValueError),
    ("logit_bias", {"logit_bias": [1]}, TypeError),
    ("logit_bias", {"logit_bias": {"1": 0.5}}, TypeError),
    ("logit_bias", {"logit_bias": {1: "0.5"}}, TypeError),
    ("logit_bias", {"logit_bias": {1: nan}}, ValueError),
    ("logit_bias", {"logit_bias": {1: inf}}, ValueError),
    ("allowed_token_ids", {"allowed_token_ids": []}, ValueError),
    ("allowed_token_ids", {"allowed_token_ids": [1.0]}, TypeError),
    ("bad_words", {"bad_words": "bad"}, TypeError),
    ("bad_words", {"bad_words": [""]}, ValueError),
    ("output_kind", {"output_kind": 1}, TypeError),
    ("structured_outputs", {"structured_outputs": StructuredOutputsParams(regex="a+")}, ValueError),
    ("guided_decoding", {"guided_decoding": {"json": "{}"}}, ValueError),
    ("best_of", {"best_of": 3, "n": 2}, ValueError),
    ("use_beam_search", {"use_beam_search": True}, ValueError),
    ("length_penalty", {"length_penalty": 0.9}, ValueError),
    ("early_stopping", {"early_stopping": True}, ValueError),
    ("logits_processors", {"logits_processors": ["mine"]}, TypeError),
    ("truncate_prompt_tokens", {"truncate_prompt_tokens": 0}, ValueError),
    ("truncate_prompt_tokens", {"truncate_prompt_tokens": -2}, ValueError),
    ("truncate_prompt_tokens", {"truncate_prompt_tokens": 1.5}, TypeError),
    ("extra_args", {"extra_args": ["a"]}, TypeError),
]


@pytest.mark.parametrize(
    ("name", "given", "error"), REFUSED, ids=[number_text(given) for _, given, _ in REFUSED]
)
def test_refused_by_a_sentence(name, given, error):
    with pytest.raises(error) as caught:
        SamplingParams(**given)
    assert str(caught.value).startswith(f"{name} must be ")
    assert "; got " in str(caught.value)
    if error is ValueError:
        assert isinstance(caught.value, VLLMValidationError)
        assert caught.value.parameter == name
    params = SamplingParams()  # the same rules hold for a field that is changed later
    vars(params).update(given)
    with pytest.raises(error):
        params.verify()


def test_unknown_name_is_a_type_error():
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.5)


def test_low_temperature_is_raised_with_one_warning(caplog):
    with caplog.at_level(logging.WARNING):
        params = SamplingParams(temperature=0.002)
        params.verify()
    assert [record.getMessage().split(" ")[0] for record in caplog.records] == ["temperature=0.002"]


# What depends on the model


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stop_token_ids", [3, 100], r"\[100\]"),
        ("stop_token_ids", [-1], r"\[-1\]"),
        ("allowed_token_ids", [0, 100], r"\[100\]"),
        ("logit_bias", {-5: 1.0}, r"\[-5\]"),
        ("logprobs", 21, "max_logprobs=20"),
        ("logprobs", -1, "max_logprobs=20.* -1 stands for 100"),
        ("prompt_logprobs", 21, "max_logprobs=20"),
    ],
)
def test_refused_for_the_model(name, value, message):
    params = SamplingParams(**{name: value})
    with pytest.raises(ValidationError, match=f"^{name} must be .*{message}"):
        params.verify_for_model(vocab_size=100, max_logprobs=20, has_tokenizer=True)


def test_accepted_for_the_model():
    params = SamplingParams(
        stop_token_ids=[99], allowed_token_ids=[0, 99], logit_bias={99: 1.0}, logprobs=20, top_k=99
    )
    before = asdict(params)
    params.verify_for_model(vocab_size=100, max_logprobs=20, has_tokenizer=True)
    assert asdict(params) == before


@pytest.mark.parametrize("max_logprobs", [-1, 100, 200])
def test_all_logprobs_become_the_vocabulary(max_logprobs):
    params = SamplingParams(logprobs=-1, prompt_logprobs=100)
    params.verify_for_model(vocab_size=100, max_logprobs=max_logprobs, has_tokenizer=True)
    assert (params.logprobs, params.prompt_logprobs) == (100, 100)


def test_top_k_of_the_whole_vocabulary_is_off():
    params = SamplingParams(top_k=100)
    params.verify_for_model(vocab_size=100, max_logprobs=20, has_tokenizer=True)
    assert params.top_k == 0


@pytest.mark.parametrize("given", [{"stop": "a"}, {"bad_words": ["a"]}])
def test_text_needs_a_tokenizer(given):
    with pytest.raises(ValidationError, match="no tokenizer"):
        SamplingParams(**given).verify_for_model(
            vocab_size=100, max_logprobs=20, has_tokenizer=False
        )
    params = SamplingParams()
    params.verify_for_model(vocab_size=100, max_logprobs=20, has_tokenizer=False)
    assert params.detokenize is False


@pytest.mark.parametrize(
    ("given", "reads"),
    [({}, True), ({"skip_reading_prefix_cache": True}, False), ({"prompt_logprobs": 0}, False)],
)
def test_prompt_logprobs_do_not_read_the_prefix_cache(given, reads):
    assert SamplingParams(**given).reads_prefix_cache is reads


# Client idioms


def test_nano_vllm_arguments():
    params = SamplingParams(temperature=0.6, max_tokens=256, ignore_eos=True)
    assert (params.temperature, params.max_tokens, params.ignore_eos) == (0.6, 256, True)


def test_positional_order():
    params = SamplingParams(2, 0.1, 0.2, 1.1, 0.5, 0.9, 40, 0.05, 7, ["x"], [3])
    assert (params.n, params.temperature, params.top_k, params.seed) == (2, 0.5, 40, 7)
    assert (params.stop, params.stop_token_ids) == (["x"], [3])


def test_signature_annotations_and_struct_fields_name_the_fields():
    names = list(inspect.signature(SamplingParams.__init__).parameters)[1:]
    assert names == list(SamplingParams.__annotations__) == list(SamplingParams.__struct_fields__)
    assert inspect.signature(SamplingParams).parameters["max_tokens"].default == 16
    assert names[:3] == ["n", "presence_penalty", "frequency_penalty"]


def test_from_optional_takes_none_as_the_default():
    params = SamplingParams.from_optional(
        n=None, temperature=None, top_p=0.5, stop=None, logit_bias={"3": 1}
    )
    assert params == SamplingParams(top_p=0.5, logit_bias={3: 1.0})
    assert SamplingParams.from_optional(max_tokens=None).max_tokens is None
    assert SamplingParams.from_optional() == SamplingParams()
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams.from_optional(temprature=1)


def test_clone_shares_nothing():
    params = SamplingParams(stop=["a"], logit_bias={1: 1.0}, allowed_token_ids=[1])
    clone = params.clone()
    assert clone == params
    clone.stop.append("b")
    clone.logit_bias[2] = 1.0
    clone.temperature = 0.5
    assert params == SamplingParams(stop=["a"], logit_bias={1: 1.0}, allowed_token_ids=[1])


def test_changed_after_construction_is_normalised_by_verify():
    params = SamplingParams()
    params.stop, params.temperature, params.logprobs, params.seed = "END", 0, True, -1
    params.verify()
    assert params == SamplingParams(stop="END", temperature=0, logprobs=True, seed=-1)
    assert params.is_greedy


def test_is_greedy():
    assert SamplingParams(temperature=0).is_greedy
    assert not SamplingParams(temperature=0.02).is_greedy


def test_repr_shows_what_was_set_and_evaluates():
    params = SamplingParams(temperature=0.5, stop="a", logprobs=0)
    assert repr(params) == "SamplingParams(temperature=0.5, stop=['a'], logprobs=0)"
    assert eval(repr(params)) == params


def test_pickle():
    params = SamplingParams(temperature=0.5, stop="a", output_kind=RequestOutputKind.DELTA)
    assert pickle.loads(pickle.dumps(params)) == params


# The other records


def test_beam_search_params():
    params = BeamSearchParams(4, 32)
    assert (params.beam_width, params.max_tokens, params.temperature, params.length_penalty) == (
        4,
        32,
        0.0,
        1.0,
    )
    assert (
        BeamSearchParams(
            beam_width=1, max_tokens=1, length_penalty=-1, ignore_eos=True
        ).length_penalty
        == -1.0
    )


@pytest.mark.parametrize(
    ("name", "given", "error"),
    [
        ("beam_width", {"beam_width": 0}, ValueError),
        ("beam_width", {"beam_width": True}, TypeError),
        ("max_tokens", {"max_tokens": 0}, ValueError),
        ("max_tokens", {"max_tokens": None}, TypeError),
        ("temperature", {"temperature": -1}, ValueError),
        ("length_penalty", {"length_penalty": inf}, ValueError),
        ("ignore_eos", {"ignore_eos": 1}, TypeError),
        (
            "structured_outputs",
            {"structured_outputs": StructuredOutputsParams(regex="a")},
            ValueError,
        ),
    ],
)
def test_beam_search_params_refused(name, given, error):
    with pytest.raises(error, match=f"^{name} must be "):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 8, **given})


def test_structured_outputs_params_take_exactly_one():
    assert StructuredOutputsParams(choice=["a", "b"]).choice == ["a", "b"]
    with pytest.raises(ValidationError, match="got none"):
        StructuredOutputsParams()
    with pytest.raises(ValidationError, match="got json and regex"):
        StructuredOutputsParams(json="{}", regex="a")


def test_the_refusal_of_a_constraint_does_not_print_the_schema():
    schema = {"properties": {f"field {i}": {"type": "string"} for i in range(100)}}
    for name, constraint in (
        ("structured_outputs", StructuredOutputsParams(json=schema)),
        ("guided_decoding", GuidedDecodingParams(json=schema, backend="xgrammar")),
    ):
        with pytest.raises(ValidationError, match=f"{name} .* with json") as caught:
            SamplingParams(**{name: constraint})
        assert "field 1" not in str(caught.value)
    assert GuidedDecodingParams.from_optional(json=None, regex=None) is None
    assert GuidedDecodingParams.from_optional(regex="a+").regex == "a+"


def test_error_carries_parameter_and_value():
    with pytest.raises(ValueError) as caught:
        SamplingParams(top_p=1.5)
    assert str(caught.value) == "top_p must be a number above 0 and at most 1; got 1.5."
    assert (caught.value.parameter, caught.value.value) == ("top_p", 1.5)
