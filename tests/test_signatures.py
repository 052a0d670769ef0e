"""The names of vLLM 0.33's LLM methods: each argument is accepted where it is neutral, and a
lacking method says why.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_llm, nothing_is_left, random_prompts, shared_llm, shared_model  # noqa: F401

import nanovllm
from nanovllm import LLM, AsyncLLM, BeamSearchParams, EngineArgs, LLMEngine, SamplingParams
from nanovllm.lora.request import LoRARequest

# Read off the released wheel, in order; positional ones first, then "*", then those by name only.
REQUEST = "lora_request priority"
TEMPLATE = "chat_template chat_template_content_format add_generation_prompt continue_final_message tools chat_template_kwargs"
KWARGS = "tokenization_kwargs mm_processor_kwargs"
VLLM = {
    "from_engine_args": "engine_args",
    "get_tokenizer": "",
    "get_world_size": "include_dp",
    "reset_mm_cache": "",
    "get_default_sampling_params": "",
    "generate": f"prompts sampling_params * use_tqdm {REQUEST} {KWARGS}",
    "chat": f"messages sampling_params use_tqdm {REQUEST} {TEMPLATE} {KWARGS}",
    "beam_search": "prompts params lora_request use_tqdm concurrency_limit priority",
    "enqueue": f"prompts sampling_params {REQUEST} use_tqdm {KWARGS}",
    "enqueue_chat": f"messages sampling_params use_tqdm {REQUEST} {TEMPLATE} {KWARGS}",
    "wait_for_completion": "output_type * use_tqdm",
    "collective_rpc": "method timeout args kwargs",
    "apply_model": "func",
    "reset_prefix_cache": "reset_running_requests reset_connector",
    "sleep": "level mode",
    "wake_up": "tags",
    "get_metrics": "",
}
LACKING = {
    "encode": "pooling model",
    "embed": "pooling model",
    "classify": "pooling model",
    "score": "pooling model",
    "start_profile": "torch.profiler",
    "stop_profile": "torch.profiler",
    "release_kv_cache_memory": "sleep",
    "init_weight_transfer_engine": "load_weights",
    "shutdown_weight_transfer_engine": "load_weights",
    "start_weight_update": "load_weights",
    "start_draft_weight_update": "load_weights",
    "update_weights": "load_weights",
    "finish_weight_update": "load_weights",
    "update_weight_version": "load_weights",
    "get_weight_version": "load_weights",
}
PROMPTS = random_prompts([3, 5], seed=91)
GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
MESSAGES = [{"role": "user", "content": "the"}]
NEUTRAL: dict[str, list[Any]] = {
    "lora_request": [None, [], [None, None]],
    "priority": [None, 0, [0, 0]],
    "tokenization_kwargs": [None, {}, {"padding": False, "truncation": None}],
    "mm_processor_kwargs": [None, {}],
    "concurrency_limit": [None, 1, 4],
}
REFUSED: dict[str, Any] = {
    "lora_request": object(),
    "priority": 1,
    "tokenization_kwargs": {"return_tensors": "pt"},
    "mm_processor_kwargs": {"fps": 1},
    "concurrency_limit": 0,
}


def call(method: str, **kwargs: Any) -> Any:
    llm = shared_llm()
    if method == "chat":
        out = llm.chat([MESSAGES, MESSAGES], GREEDY, use_tqdm=False, **kwargs)
    elif method == "beam_search":
        return [
            beam.tokens
            for out in llm.beam_search(PROMPTS, BeamSearchParams(2, 3), **kwargs)
            for beam in out.sequences
        ]
    else:
        out = llm.generate(PROMPTS, GREEDY, use_tqdm=False, **kwargs)
    return [o.outputs[0].token_ids for o in out]


@pytest.mark.parametrize("method", VLLM)
def test_every_name_of_vllm_stands_where_vllm_has_it(method):
    positional, _, by_name = VLLM[method].partition("*")
    found = list(inspect.signature(getattr(shared_llm(), method)).parameters)
    assert found[: len(positional.split())] == positional.split()
    assert set(by_name.split()) <= set(found)


# vLLM 0.32's, up to the arguments that no client passes by place.
OTHERS = {
    (LLMEngine, "add_request"): "request_id prompt params arrival_time lora_request "
    "tokenization_kwargs trace_headers priority",
    (LLMEngine, "abort_request"): "request_ids internal",
    (LLMEngine, "collective_rpc"): "method timeout args kwargs",
    (LLMEngine, "reset_prefix_cache"): "reset_running_requests reset_connector",
    (LLMEngine, "add_lora"): "lora_request",
    (LLMEngine, "remove_lora"): "lora_id",
    (LLMEngine, "pin_lora"): "lora_id",
    (AsyncLLM, "generate"): "prompt sampling_params request_id prompt_text lora_request "
    "tokenization_kwargs trace_headers priority data_parallel_rank session_id kv_hints "
    "reasoning_ended reasoning_parser_kwargs",
    (AsyncLLM, "abort"): "request_id internal",
    (AsyncLLM, "collective_rpc"): "method timeout args kwargs",
    (AsyncLLM, "reset_prefix_cache"): "reset_running_requests reset_connector",
    (AsyncLLM, "sleep"): "level mode",
    (AsyncLLM, "wake_up"): "tags",
    (AsyncLLM, "shutdown"): "timeout",
    (AsyncLLM, "add_lora"): "lora_request",
    (AsyncLLM, "remove_lora"): "lora_id",
    (AsyncLLM, "list_loras"): "",
    (AsyncLLM, "pin_lora"): "lora_id",
    (LoRARequest, "__init__"): "lora_name lora_int_id lora_path base_model_name load_inplace "
    "is_3d_lora_weight",
}


@pytest.mark.parametrize(("owner", "method"), OTHERS)
def test_every_name_of_engines_stands_where_vllm_has_it(owner, method):
    wanted = OTHERS[owner, method].split()
    found = list(inspect.signature(getattr(owner, method)).parameters)
    assert found[1 : 1 + len(wanted)] == wanted


def test_prompt_embeds_are_refused_by_a_sentence():
    with pytest.raises(ValueError, match="prompt_embeds are not supported"):
        shared_llm().generate({"prompt_embeds": torch.zeros(3, 64)}, use_tqdm=False)


@pytest.mark.parametrize("method", LACKING)
def test_a_method_that_is_lacking_says_why(method):
    with pytest.raises(ValueError, match=LACKING[method]):
        getattr(shared_llm(), method)("anything", option=1)


@pytest.mark.parametrize("method", ["generate", "chat", "beam_search"])
def test_options_are_accepted_where_they_ask_for_nothing_and_refused_elsewhere(method):
    names = inspect.signature(getattr(LLM, method)).parameters.keys() & NEUTRAL.keys()
    assert len(names) >= 3
    expected = call(method)
    for name in names:
        for value in NEUTRAL[name]:
            assert call(method, **{name: value}) == expected
        with pytest.raises(ValueError, match=name.removesuffix("s")):
            call(method, **{name: REFUSED[name]})


def test_what_scripts_inspect_of_engine_args():
    parameters = inspect.signature(EngineArgs).parameters
    assert next(iter(parameters)) == "model"
    assert parameters["max_num_seqs"].default is None
    assert parameters["gpu_memory_utilization"].default == 0.92
    assert {"enable_chunked_prefill", "swap_space", "enable_lora"} < parameters.keys()
    llm_arguments = inspect.signature(LLM).parameters.keys() - {"others"}
    assert llm_arguments <= parameters.keys()
    for name, parameter in parameters.items():
        if name != "model":
            EngineArgs("model", **{name: parameter.default})


def test_the_version_is_that_of_the_package():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert 'version = { attr = "nanovllm.__version__" }' in text
    assert re.fullmatch(r"\d+\.\d+\.\d+", nanovllm.__version__)


def test_enqueued_requests_run_when_they_are_waited_for():
    llm = shared_llm()
    longer = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)
    first = llm.enqueue(PROMPTS, GREEDY, use_tqdm=False)
    second = llm.enqueue_chat([MESSAGES], longer, use_tqdm=False)
    between = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    with pytest.raises(ValueError, match="output_type"):
        llm.wait_for_completion(int)
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [output.request_id for output in outputs] == first + second
    assert [out["token_ids"] for out in outputs[:2]] == [out["token_ids"] for out in between]
    (chat,) = llm.chat(MESSAGES, longer, use_tqdm=False)
    assert outputs[2]["token_ids"] == chat["token_ids"]
    assert llm.wait_for_completion(use_tqdm=False) == []


def test_what_scripts_read_of_an_llm():
    llm = LLM.from_engine_args(
        EngineArgs(shared_model()[0], dtype="float32", num_gpu_blocks_override=64)
    )
    assert llm.model_config is llm.llm_engine.model_config
    assert llm.model_config.max_model_len == llm.model_config.max_seq_len_to_capture == 512
    assert llm.model_config.tokenizer == llm.model_config.model == shared_model()[0]
    assert llm.get_world_size() == llm.get_world_size(include_dp=False) == 1
    assert llm.reset_mm_cache() is None
    assert llm.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    for mode in ("abort", "wait", "keep"):
        llm.sleep(1, mode=mode)
        llm.wake_up()
    with pytest.raises(ValueError, match="mode='now'"):
        llm.sleep(mode="now")
    stream = llm.stream(PROMPTS, GREEDY)
    with pytest.raises(ValueError, match="reset_running_requests"):
        llm.reset_prefix_cache(reset_running_requests=True)
    stream.close()
