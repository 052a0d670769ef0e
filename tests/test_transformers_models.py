"""Decoders that run as transformers' own code over our pages: greedy tokens are transformers' own.

A dozen architectures by default, and every one with --all-architectures. Each of them gives the
tokens of transformers' `generate`, or is refused by a sentence. --write-architectures writes the
table of docs/models.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny import greedy, random_prompts
from tiny_decoders import VOCAB_SIZE, all_architectures, tiny_decoder

from nanovllm import LLM, SamplingParams

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- table of architectures -->", "<!-- end of the table -->"
# Of different shapes: layer norms, learned positions, fused projections, experts, latent attention,
# windows, softcaps, sinks.
DOZEN = (
    "Qwen3ForCausalLM",
    "GPT2LMHeadModel",
    "OPTForCausalLM",
    "GPTNeoXForCausalLM",
    "PhiForCausalLM",
    "Phi3ForCausalLM",
    "Gemma2ForCausalLM",
    "CohereForCausalLM",
    "DeepseekV3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "GptOssForCausalLM",
    "GraniteForCausalLM",
)
LENGTHS = [1, 8, 61, 17, 40, 33]
NUM_TOKENS = 16
REFUSED = re.compile(r"cannot run as transformers' own code over pages: (.*); accepted are")


def make_llm(folder: str, **kwargs: Any) -> LLM:
    """Prompts are cut into chunks, and sequences are preempted."""
    defaults: dict[str, Any] = {
        "model_impl": "transformers",
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "block_size": 8,
        "max_num_batched_tokens": 24,
        "max_num_seqs": 8,
        "max_model_len": 96,
        "num_gpu_blocks_override": 16,
    }
    return LLM(folder, **{**defaults, **kwargs})


def tokens_of(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    return [out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)]


def result_of(folder: Path, architecture: str) -> str:
    """ "runs", or why the architecture is refused. Fails for other tokens."""
    try:
        path, model = tiny_decoder(folder, architecture)
    except Exception as err:  # a config that the rules of tiny_decoders.py cannot shrink
        return f"not tested: no tiny model can be made ({type(err).__name__})"
    prompts = random_prompts(LENGTHS, VOCAB_SIZE)
    try:
        llm = make_llm(path)
    except ValueError as err:
        refused = REFUSED.search(str(err))
        if refused is None:
            raise
        return refused[1]
    expected = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    assert tokens_of(llm, prompts) == expected
    assert llm.llm_engine.scheduler.stats.num_preemptions > 0
    assert tokens_of(llm, prompts) == expected, "on prefix hits"
    return "runs"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "architecture" in metafunc.fixturenames:
        wants_all = metafunc.config.getoption("--all-architectures")
        metafunc.parametrize("architecture", all_architectures() if wants_all else DOZEN)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """Architecture -> its result. Written into the document at the end, if asked."""
    found: dict[str, str] = {}
    yield found
    if request.config.getoption("--write-architectures"):
        write_table(found)


def table_rows(results: dict[str, str]) -> Iterator[str]:
    yield f"With transformers {transformers.__version__}: "
    yield "| architecture | result |"
    yield "|---|---|"
    for name, result in sorted(results.items()):
        yield f"| {name} | {result} |"


def write_table(results: dict[str, str]) -> None:
    runs = [name for name, result in results.items() if result == "runs"]
    first, *rows = table_rows(results)
    table = "\n".join([first + f"{len(runs)} of {len(results)} run.", "", *rows])
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")


def documented() -> dict[str, str]:
    """The table of docs/models.md. Empty if another transformers made it."""
    text = DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0]
    if f"With transformers {transformers.__version__}:" not in text:
        return {}
    return dict(re.findall(r"^\| (\w+) \| (.*) \|$", text, re.MULTILINE))


def test_greedy_tokens_equal_transformers_or_the_model_is_refused(
    tmp_path, architecture, results, request
):
    results[architecture] = result_of(tmp_path, architecture)
    if request.config.getoption("--write-architectures"):
        return
    if architecture in DOZEN:
        assert results[architecture] == "runs"
    assert results[architecture] == documented().get(architecture, results[architecture])


def test_most_decoders_of_transformers_run():
    table = documented()
    if not table:
        pytest.skip("the table was made with another transformers")
    assert table.keys() == set(all_architectures())
    assert sum(result == "runs" for result in table.values()) >= 90
