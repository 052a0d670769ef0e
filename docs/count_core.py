"""Counts the core's lines of code: the files that one `generate` walks through, less blanks, comments and docstrings."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

CORE = [
    "llm.py",
    "prompts.py",
    "engine/llm_engine.py",
    "engine/scheduler.py",
    "engine/block_manager.py",
    "engine/sequence.py",
    "engine/batch.py",
    "engine/output_processor.py",
    "runner/model_runner.py",
    "models/decoder.py",
    "layers/linear.py",
    "layers/norm.py",
    "layers/rotary.py",
    "layers/sampler.py",
    "weights/dense.py",
    "attention/base.py",
    "attention/torch_backend.py",
    "kernels/__init__.py",
]
SKIPPED = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER
}  # fmt: skip


def lines_of_code(source: str) -> int:
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            docstrings.update(range(body[0].lineno, (body[0].end_lineno or 0) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SKIPPED:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


if __name__ == "__main__":
    package = Path(__file__).parent.parent / "nanovllm"
    counts = {name: lines_of_code((package / name).read_text()) for name in CORE}
    for name, count in counts.items():
        print(f"{count:5} {name}")
    print(f"{sum(counts.values()):5} in all")
