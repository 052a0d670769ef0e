"""Quantises a GGUF file with llama.cpp: python quantise.py FROM TO FORMAT.

Needs only the standard library and llama-cpp-python, because a peer runs in its own
environment, without nanovllm.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

# llama.cpp's file format MXFP4_MOE keeps the matrices of a dense model in Q8_0. Under this
# name all matrices are in MXFP4.
MXFP4 = "MXFP4"
MXFP4_TYPE = 39  # ggml's number of the tensor type


def formats(api: Any) -> dict[str, int]:
    """The name of each file format of llama.cpp, such as Q4_K_M -> its number."""
    start = "LLAMA_FTYPE_MOSTLY_"
    names = [name.removeprefix(start) for name in dir(api) if name.startswith(start)]
    return {name: getattr(api, start + name) for name in names}


def main() -> None:
    source, target, name = sys.argv[1:]
    api = importlib.import_module("llama_cpp")
    # A variable, because llama.cpp keeps the bare pointer.
    quiet = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(quiet, None)
    known = formats(api)
    if name not in known and name != MXFP4:
        accepted = ", ".join([*known, MXFP4])
        raise SystemExit(f"{name} is not known to llama.cpp; accepted are {accepted}")
    params = api.llama_model_quantize_default_params()
    params.nthread = os.cpu_count() or 1
    if name == MXFP4:
        params.ftype = known["Q8_0"]
        overrides = (api.llama_model_tensor_override * 2)()
        overrides[0].pattern = b".*"
        overrides[0].type = MXFP4_TYPE
        params.tt_overrides = overrides
    else:
        params.ftype = known[name]
    failed = api.llama_model_quantize(source.encode(), target.encode(), params)
    if failed:
        raise SystemExit(f"llama.cpp cannot quantise {source} to {name}")


if __name__ == "__main__":
    main()
