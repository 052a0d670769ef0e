"""EngineArgs on the command line. Python's argparse is the reader, so the tests state names and types."""

from __future__ import annotations

import argparse
from dataclasses import fields

import pytest

from nanovllm import AsyncEngineArgs, EngineArgs


def read(*arguments: str) -> EngineArgs:
    parser = EngineArgs.add_cli_args(argparse.ArgumentParser())
    return EngineArgs.from_cli_args(parser.parse_args(arguments))


def test_without_options_every_argument_has_its_default() -> None:
    assert vars(read("--model", "m")) == vars(EngineArgs("m"))


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--max-model-len", "100"], "max_model_len", 100),
        (["--gpu-memory-utilization", "0.5"], "gpu_memory_utilization", 0.5),
        (["--dtype", "half"], "dtype", "float16"),
        (["--no-enable-prefix-caching"], "enable_prefix_caching", False),
        (["--enforce-eager"], "enforce_eager", True),
        (["--async-scheduling"], "async_scheduling", True),
        (["-tp", "2"], "tensor_parallel_size", 2),
        (["-dp", "3"], "data_parallel_size", 3),
        (["--hf-token"], "hf_token", True),
        (["--hf-token", "abc"], "hf_token", "abc"),
        (["--logits-processors", "m:A", "m:B"], "logits_processors", ["m:A", "m:B"]),
        (["--hf-overrides", '{"a": 1}'], "hf_overrides", {"a": 1}),
    ],
)
def test_options(arguments: list[str], name: str, value: object) -> None:
    assert getattr(read("--model", "m", *arguments), name) == value


def test_every_field_has_an_option() -> None:
    parser = EngineArgs.add_cli_args(argparse.ArgumentParser())
    for field in fields(EngineArgs):
        assert f"--{field.name.replace('_', '-')}" in parser.format_help()


def test_vllms_other_arguments_keep_their_rules() -> None:
    read("--model", "m", "--swap-space", "4", "--disable-custom-all-reduce")
    read("--model", "m", "--pipeline-parallel-size", "1")
    with pytest.raises(ValueError, match="pipeline_parallel_size=2"):
        read("--model", "m", "--pipeline-parallel-size", "2")
    with pytest.raises(SystemExit):
        read("--model", "m", "--no-such-argument", "1")


def test_options_of_the_script_are_left_out() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompt", default="p")
    args = AsyncEngineArgs.add_cli_args(parser).parse_args(["--model", "m"])
    found = AsyncEngineArgs.from_cli_args(args)
    assert isinstance(found, AsyncEngineArgs)
    assert not hasattr(found, "prompt")
