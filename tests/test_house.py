"""The limits of the house: imports, density, length of functions, types, words. docs/house.py measures.

python docs/house.py -v    # every file and every finding
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType, ModuleType

import pytest

ROOT = Path(__file__).parent.parent
KERNEL_LINES = (
    75  # a Triton kernel is straight-line code over one tile: a call would hide what it loads
)
# Imports modules of the package without nanovllm/__init__.py, which imports LLM and so torch.
IMPORTS_ALONE = """
import sys, types
package = types.ModuleType("nanovllm")
package.__path__ = ["nanovllm"]
sys.modules["nanovllm"] = package
for name in sys.argv[1:]:
    __import__(name)
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def load_house() -> ModuleType:
    spec = importlib.util.spec_from_file_location("house", ROOT / "docs" / "house.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["house"] = module
    spec.loader.exec_module(module)
    return module


house = load_house()
FILES = house.package_files()
GRAPH = house.import_graph(FILES)


# -- the limits ------------------------------------------------------------------------------------


def test_files_import_in_no_circle() -> None:
    assert house.circles(GRAPH) == []


def test_imports_go_down() -> None:
    assert house.wrong_imports(GRAPH) == []


def test_the_host_half_imports_no_torch() -> None:
    names = [
        house.module_name(file.path)
        for file in FILES
        if file.path.parent.name in ("core", "engine")
    ]
    alone = sorted(set(names) - {"nanovllm.engine.llm_engine", "nanovllm.engine.arg_utils"})
    assert {"nanovllm.engine.scheduler", "nanovllm.engine.block_manager"} < set(alone)
    command = [sys.executable, "-c", IMPORTS_ALONE, *alone]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "numpy" in result.stdout.split()
    assert {"torch", "transformers", "triton"}.isdisjoint(result.stdout.split())


def test_code_is_not_dense() -> None:
    assert house.total_density(FILES) <= 9.0
    dense = {file.name: round(file.density, 1) for file in house.walk_files() if file.density > 11}
    assert dense == {}


def test_any_stands_only_at_the_borders_to_untyped_libraries() -> None:
    assert sum(file.any_count for file in FILES) < 60
    inside = [
        file.name
        for file in FILES
        if file.path.parent.name in ("core", "engine", "runner") and file.any_count
    ]
    assert inside == []


def test_functions_fit_on_a_page() -> None:
    long = []
    for file in FILES:
        for function in file.functions:
            name = f"{file.name}: {function.name}"
            limit = KERNEL_LINES if function.kernel else 50
            if function.lines > limit and name not in house.LONG_FUNCTIONS:
                long.append(f"{name} has {function.lines} lines")
    assert long == []


def test_lines_fit_into_100_columns() -> None:
    assert [str(finding) for file in FILES for finding in file.long_lines(100)] == []


def test_the_words_are_those_of_the_field() -> None:
    assert list(map(str, house.all_words())) == []


def test_the_walk_lists_every_file_that_a_plain_prompt_runs_through() -> None:
    from tiny import make_llm

    from nanovllm import SamplingParams

    llm = make_llm(attention_backend="torch")
    reached: set[str] = set()

    def trace(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        # Every request asks each optional ability whether it is used, and calls nothing else of it.
        is_question = frame.f_code.co_name in ("prepare", "needs_previous_token", "clear")
        if event == "call" and house.PACKAGE in path.parents and not is_question:
            reached.add(path.relative_to(house.PACKAGE).as_posix())

    threading.setprofile(trace)
    sys.setprofile(trace)
    try:
        llm.generate(["the sea is"], SamplingParams(temperature=0.7, max_tokens=8))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert reached - {*house.WALK, *house.WALK_KERNELS} == set(), "missing in WALK of docs/house.py"
    for file in house.walk_files(
        tuple(set(house.WALK) - reached)
    ):  # Python makes the functions of a record
        assert any(isinstance(node, ast.ClassDef) for node in file.tree.body), (
            f"{file.name} does not run"
        )
        assert not any(isinstance(node, ast.FunctionDef) for node in file.tree.body), (
            f"{file.name} does not run"
        )


# -- the measure itself ----------------------------------------------------------------------------

EXAMPLE = '''
"""Docstring of the module."""

# a comment
from __future__ import annotations
from typing import Any


class Box:
    """Holds a value."""

    value: Any = 1

    def show(self, name: str) -> str:
        """Shows it."""
        text = (
            f"{name}: {self.value:{3}d}"
        )
        return text  # what nobody sees
'''


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(house, "ROOT", tmp_path)
    return tmp_path


def written(folder: Path, sources: dict[str, str]) -> list:
    """The files of these sources; names are paths in the package."""
    files = []
    for name, source in sources.items():
        path = folder / "nanovllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        files.append(house.File(path))
    return files


def test_tokens_lines_and_functions_of_an_example(example: Path) -> None:
    (file,) = written(example, {"box.py": EXAMPLE})
    # 4 + 4, then class Box: 3, value: Any = 1: 5, def: 12, text = ( f-string ): 5, return text: 2
    assert file.tokens == 4 + 4 + 3 + 5 + 12 + 5 + 2
    assert file.lines == 2 + 1 + 1 + 1 + 3 + 1
    assert file.any_count == 1
    assert file.functions == [house.Function("Box.show", 6, False)]
    assert [(f.line, f.text) for f in file.words()] == [(19, "nobody")]


def test_circles_and_directions_of_an_example(example: Path) -> None:
    sources = {
        "core/__init__.py": "from . import batch\n",
        "core/batch.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..engine import scheduler\n",
        "engine/scheduler.py": "from __future__ import annotations\nfrom nanovllm import core\n",
        "engine/plan.py": "from nanovllm.runner import ranks\n",
        "runner/ranks.py": "import torch\n",
        "llm.py": "def f():\n    from nanovllm.engine.scheduler import Scheduler\n",
    }
    files = written(example, sources)
    graph = house.import_graph(files)
    assert graph["nanovllm.engine.scheduler"] == {"nanovllm.core"}
    assert house.circles(graph) == [
        ["nanovllm.core", "nanovllm.core.batch", "nanovllm.engine.scheduler"]
    ]
    assert house.wrong_imports(graph) == [
        "nanovllm.core.batch imports nanovllm.engine.scheduler, which is above it",
        "nanovllm.engine.plan imports nanovllm.runner.ranks; only nanovllm.engine.llm_engine may",
    ]


def test_words_of_the_field_pass_and_private_synonyms_do_not(example: Path) -> None:
    source = (
        "root = 1\nrow_order = 2  # in this order\nn = -(-root // 3)\nprobability_sum = 'so many'\n"
    )
    (file,) = written(example, {"mass.py": source})
    assert [(f.line, f.text) for f in file.words()] == [
        (0, "mass"),
        (1, "root"),
        (3, "-(-root //"),
        (3, "root"),
        (4, "so many"),
    ]
