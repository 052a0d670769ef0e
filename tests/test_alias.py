"""alias/: programs that import `vllm` and nothing else run on nanovllm, and never beside a real vLLM."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from tiny import greedy, shared_llm, shared_model

ALIAS = Path(__file__).parent.parent / "alias"
ROOT = ALIAS.parent
VERSION = "0.33.0+nanovllm"

# A program for vLLM: nothing in it names nanovllm.
PROGRAM = """
import gc, importlib.metadata, json, sys
import vllm
from vllm import LLM, EngineArgs, SamplingParams
from vllm.distributed.parallel_state import destroy_model_parallel
from vllm.lora.request import LoRARequest
from vllm.utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
parser.add_argument("--prompt", type=json.loads)
EngineArgs.add_cli_args(parser)
args = parser.parse_args()
llm = LLM(**vars(EngineArgs.from_cli_args(args)))
params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
(output,) = llm.generate([args.prompt], params, use_tqdm=False)
print(json.dumps({
    "module": vllm.__file__,
    "version": vllm.__version__,
    "metadata": importlib.metadata.version("vllm"),
    "is_output": isinstance(output, vllm.RequestOutput),
    "token_ids": output.outputs[0].token_ids,
}))
del llm
gc.collect()
destroy_model_parallel()
"""

# What the clients of docs/compatibility.md and vLLM's own examples import.
NAMES = {
    "vllm": "LLM SamplingParams EngineArgs AsyncEngineArgs LLMEngine AsyncLLMEngine RequestOutput "
    "CompletionOutput TextPrompt TokensPrompt PromptType",
    "vllm.beam_search": "BeamSearchSequence BeamSearchOutput",
    "vllm.config": "CompilationConfig ModelConfig",
    "vllm.distributed": "cleanup_dist_env_and_memory destroy_model_parallel "
    "destroy_distributed_environment",
    "vllm.distributed.parallel_state": "cleanup_dist_env_and_memory destroy_model_parallel "
    "destroy_distributed_environment",
    "vllm.distributed.weight_transfer.nccl_common": "trainer_init",
    "vllm.distributed.weight_transfer.nccl_engine": "NCCLWeightTransferEngine "
    "NCCLTrainerSendWeightsArgs",
    "vllm.distributed.weight_transfer.packed_tensor": "packed_nccl_broadcast_producer",
    "vllm.engine.arg_utils": "EngineArgs AsyncEngineArgs",
    "vllm.engine.async_llm_engine": "AsyncLLMEngine",
    "vllm.engine.llm_engine": "LLMEngine",
    "vllm.entrypoints.chat_utils": "resolve_hf_chat_template ChatCompletionMessageParam",
    "vllm.entrypoints.llm": "LLM",
    "vllm.envs": "VLLM_USE_V1",
    "vllm.exceptions": "VLLMValidationError",
    "vllm.inputs": "TextPrompt TokensPrompt PromptType",
    "vllm.inputs.data": "TextPrompt TokensPrompt",
    "vllm.logger": "init_logger",
    "vllm.logprobs": "Logprob",
    "vllm.lora.request": "LoRARequest",
    "vllm.outputs": "RequestOutput CompletionOutput",
    "vllm.platforms": "current_platform",
    "vllm.renderers.hf": "resolve_chat_template",
    "vllm.sampling_params": "SamplingParams BeamSearchParams RequestOutputKind "
    "StructuredOutputsParams GuidedDecodingParams",
    "vllm.sequence": "Logprob RequestMetrics",
    "vllm.tokenizers": "get_tokenizer AnyTokenizer",
    "vllm.transformers_utils.tokenizer": "get_tokenizer AnyTokenizer",
    "vllm.utils": "Counter FlexibleArgumentParser get_ip get_open_port random_uuid",
    "vllm.utils.argparse_utils": "FlexibleArgumentParser",
    "vllm.utils.network_utils": "get_ip get_open_port",
    "vllm.v1.engine.async_llm": "AsyncLLM AsyncEngineArgs",
    "vllm.v1.engine.exceptions": "EngineDeadError",
    "vllm.v1.sample.logits_processor": "LogitsProcessor AdapterLogitsProcessor BatchUpdate "
    "MoveDirectionality",
    "vllm.version": "__version__",
}


@pytest.fixture
def alias(monkeypatch: pytest.MonkeyPatch):
    """alias/ on sys.path for one test."""
    monkeypatch.syspath_prepend(str(ALIAS))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


def python(*arguments: str, path: list[Path]) -> subprocess.CompletedProcess[str]:
    """Runs Python outside the repository, with these folders on its path."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, *arguments], env=env, cwd="/", capture_output=True, text=True, check=False
    )


def fake_vllm(folder: Path) -> Path:
    """A folder with the metadata of a real vLLM."""
    info = folder / "vllm-0.33.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n")
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed alias/."""
    target = tmp_path_factory.mktemp("site")
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    result = python(*pip, "--no-compile", "--target", str(target), str(ALIAS), path=[])
    assert result.returncode == 0, result.stderr
    return target


def test_a_program_for_vllm_runs_unchanged(installed: Path) -> None:
    folder, model = shared_model()
    prompt = [5, 6, 7, 8]
    options = ["--model", folder, "--dtype=float32", "--max_num_seqs", "4"]
    options += ["--num-gpu-blocks-override=32", "--no-enable-prefix-caching", "--swap_space", "4"]
    options += ["--prompt", json.dumps(prompt)]
    result = python("-c", PROGRAM, *options, path=[installed, ROOT])
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found == {
        "module": str(installed / "vllm" / "__init__.py"),
        "version": VERSION,
        "metadata": VERSION,
        "is_output": True,
        "token_ids": greedy(model, prompt, 8),
    }


def test_the_installation_has_the_files_of_the_folder(installed: Path) -> None:
    for path in ALIAS.rglob("*.py"):
        if "vllm" in path.relative_to(ALIAS).parts:
            assert (installed / path.relative_to(ALIAS)).read_bytes() == path.read_bytes()
    names = {path.name.partition("-")[0] for path in installed.glob("*.dist-info")}
    assert names == {"vllm", "nanovllm_as_vllm"}


def test_it_is_not_built_where_a_real_vllm_is_installed(tmp_path: Path) -> None:
    code = f"import backend; backend.build_wheel({str(tmp_path)!r})"
    result = python("-c", code, path=[ALIAS, fake_vllm(tmp_path / "site")])
    assert result.returncode == 1
    assert "vLLM 0.33.0 is installed here" in result.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_it_is_not_imported_beside_a_real_vllm(tmp_path: Path) -> None:
    result = python("-c", "import vllm", path=[ALIAS, ROOT, fake_vllm(tmp_path)])
    assert result.returncode == 1
    assert "ImportError: vLLM 0.33.0 and nanovllm-as-vllm are both installed" in result.stderr


@pytest.mark.parametrize("module", NAMES)
def test_names_that_clients_import(alias: None, module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


def test_the_names_are_nanovllms_own(alias: None) -> None:
    import vllm

    import nanovllm

    for name in ("LLM", "SamplingParams", "EngineArgs", "AsyncLLMEngine", "RequestOutput"):
        assert getattr(vllm, name) is getattr(nanovllm, name)
    assert version("vllm") == VERSION == vllm.__version__
    with pytest.raises(ImportError, match="ModelRegistry"):
        exec("from vllm import ModelRegistry")


def test_the_tokenizer_and_its_chat_template(alias: None) -> None:
    from vllm.entrypoints.chat_utils import resolve_hf_chat_template
    from vllm.renderers.hf import resolve_chat_template
    from vllm.tokenizers import get_tokenizer

    own = shared_llm().get_tokenizer()
    tokenizer = get_tokenizer(shared_model()[0], tokenizer_mode="auto", trust_remote_code=False)
    assert tokenizer.encode("the other") == own.encode("the other")
    found = resolve_chat_template(tokenizer, None, None, model_config=None)
    assert found == own.chat_template == resolve_hf_chat_template(tokenizer)
    assert resolve_chat_template(tokenizer, "{{ messages }}") == "{{ messages }}"
    tokenizer.chat_template = None
    assert resolve_chat_template(tokenizer) is None


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("nccl_common", "trainer_init"),
        ("nccl_engine", "NCCLTrainerSendWeightsArgs"),
        ("nccl_engine", "NCCLWeightTransferEngine"),
        ("packed_tensor", "packed_nccl_broadcast_producer"),
    ],
)
def test_weight_transfer_to_a_server_is_refused(alias: None, module: str, name: str) -> None:
    found = importlib.import_module(f"vllm.distributed.weight_transfer.{module}")
    with pytest.raises(ValueError, match=f"^{name} is not supported.*load_weights"):
        getattr(found, name)("host", port=1)


def test_utilities(alias: None) -> None:
    import socket

    from vllm.utils import Counter, get_ip, get_open_port, random_uuid

    counter = Counter(3)
    assert [next(counter), next(counter)] == [3, 4]
    socket.inet_aton(get_ip())
    socket.create_server(("", get_open_port())).close()
    assert random_uuid() != random_uuid()


def test_both_spellings_of_an_option(alias: None) -> None:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    parser.add_argument("--two-words")
    parser.add_argument("--other_words", type=int)
    args = parser.parse_args(["--two_words", "a_b", "--other-words=3"])
    assert (args.two_words, args.other_words) == ("a_b", 3)
