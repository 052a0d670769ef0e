"""Set-up of all tests: no network, quiet libraries, and how `pytest -n 2` shares the tests out.

The tests of one file run in one process, because they share models and engines (tests/tiny.py).
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread a process: threads of several processes would wait for each other's cores.
    # tests/test_cpu_kernels.py sets numbers of threads itself.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Patterns of test ids: the tests of each pattern run in one process, and before all other tests.
# They take longest, and a process that runs them last would leave the other without work.
LONG_FIRST = (
    r"test_under_the_interpreter\[attention\]",
    r"test_under_the_interpreter\[rest\]",
    r"test_the_engine_under_the_interpreter",
    r"/test_tensor_parallel\.py",
    r"/test_triton_compile\.py.*\[80",
    r"/test_triton_compile\.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-architectures",
        action="store_true",
        help="tests/test_transformers_models.py: every decoder of transformers, not a dozen",
    )
    parser.addoption(
        "--write-architectures",
        action="store_true",
        help="tests/test_transformers_models.py: write the table of docs/models.md",
    )


def group_of(nodeid: str) -> str:
    """The pattern that a test belongs to, or its file."""
    patterns = (pattern for pattern in LONG_FIRST if re.search(pattern, nodeid))
    return next(patterns, nodeid.partition("::")[0])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        rank = {pattern: i for i, pattern in enumerate(LONG_FIRST)}
        items.sort(key=lambda item: rank.get(group_of(item.nodeid), len(rank)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands out groups of tests one by one, in the order above, to the process that is free."""
    if config.getoption("dist") != "load":
        return None  # the user asks for another way
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return Groups(config, log)
