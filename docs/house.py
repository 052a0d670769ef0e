"""The house in figures: how the code of nanovllm is arranged, how dense it is, which words it uses.

    python docs/house.py           # the figures
    python docs/house.py -v        # the figures of each file, and every finding
    python docs/house.py --walk    # the files that one plain prompt runs through, in order

tests/test_house.py holds the limits. A line of code is a line with a token that is neither a
comment nor part of a docstring. An f-string counts as one token, in every version of Python.
"""

from __future__ import annotations

import argparse
import ast
import io
import keyword
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nanovllm"

# The folders and files at the top of the package, from the bottom up. A file imports files of its
# own level and of levels below. Circles of files are found apart from this.
LEVELS = (
    (
        "errors",
        "outputs",
        "sampling_params",
        "inputs",
        "config",
        "cli_args",
        "compat",
        "compilation",
        "lora",
    ),
    ("core",),
    ("kernels", "loader", "parallel"),
    ("weights", "cache", "attention"),
    ("layers", "sampling"),
    ("models",),
    ("runner",),
    ("engine",),
    (
        "llm",
        "async_llm",
        "data_parallel",
        "adapters_of_engines",
        "control",
        "stream",
        "beam_search",
        "chat",
        "chat_format",
        "messages",
        "progress",
        "trace",
    ),
    ("batch", "terminal_chat", "ray"),
    ("cli",),
    ("__init__", "__main__"),
)
# Imports that would go down, but are not allowed: (importing folder, imported folder, exception).
SEPARATE = (
    ("engine", "runner", "nanovllm.engine.llm_engine"),
    ("engine", "sampling", "nanovllm.engine.llm_engine"),
)

# Every file that runs while one plain prompt is answered on one device, in the order in which the
# prompt reaches the file. A plain prompt is text with temperature, max_tokens and nothing else.
# The attention backend is the simplest one. test_house.py traces a prompt and compares.
WALK = (
    "sampling_params.py",
    "llm.py",
    "stream.py",
    "progress.py",
    "inputs.py",
    "engine/input_processor.py",
    "core/ability.py",
    "core/request.py",
    "core/sequence.py",
    "engine/llm_engine.py",
    "engine/fair_lock.py",
    "engine/scheduler.py",
    "engine/block_manager.py",
    "engine/batch_builder.py",
    "core/batch.py",
    "runner/executor.py",
    "runner/model_runner.py",
    "runner/device.py",
    "models/decoder.py",
    "layers/linear.py",
    "layers/norm.py",
    "weights/panels.py",
    "weights/dense.py",
    "cache/spec.py",
    "attention/base.py",
    "attention/torch_backend.py",
    "runner/readouts/next_tokens.py",
    "sampling/sampler.py",
    "parallel.py",
    "engine/output_processor.py",
    "engine/detokenizer.py",
    "outputs.py",
)
# Kernels are counted apart: a reader of the walk reads what they compute, not how.
WALK_KERNELS = ("kernels/__init__.py", "kernels/choice.py", "kernels/cpu.py")

# Functions that may be longer than the limit, and why.
LONG_FUNCTIONS: dict[str, str] = {
    "nanovllm/llm.py: LLM.__init__": "one line for each argument, so that editors complete them",
}

# Where only the field's words may stand: Python files, and documents in prose.
WORDS_IN = (
    "nanovllm/**/*.py",
    "bench.py",
    "benchmarks/*.py",
    "examples/*.py",
    "example.py",
    "tests/**/*.py",
)
WORDS_NOT_IN = ("tests/test_house.py",)  # its examples are forbidden words
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/*.md")
# Private synonyms of the field's words: a pattern of whole identifiers, and the word to use.
IDENTIFIERS = {
    r"order": "running",
    r"(.*_)?root(_.*)?": "hash seed, cache salt",
    r"_?(hold|holds|held|blank|blanks|forget)": "acquire, free blocks, unregister",
    r"(.*_)?news": "new tokens",
    r"(.*_)?watched": "streams tokens",
    r"looked_at": "checks every token",
    r"waits": "needs the previous token",
    r"(.*_)?edits?": "logits processors",
    r"Launch": "pending step",
    r"(.*_)?cards?(_.*)?": "device properties",
    r"room|pitch": "padded length, stride",
    r"turns?": "transpose; a lock for threads",
    r"(.*_)?mass(es)?": "probability sum",
    r"gone|asleep": "freed, sleeping",
    r"(.*_)?(kin|anew|nobody|somebody|everybody|whoever)": "the name of the thing",
}
# The same in comments, docstrings and sentences in strings, without regard to case.
PROSE = {
    r"\b(nobody|somebody|everybody|whoever|anybody)\b": "the name of the thing: people are no data",
    r"\b(anew|its kin|so many|the first of several)\b": "plain English, without riddles",
    r"\bthose (that|who|which|of)\b": "the name of the thing",
    r"\bnews\b": "new tokens",
    r"\b(un)?watched\b": "streams tokens",
    r"\blooked at\b": "checked",
    r"\bedits\b": "logits processors",
    r"\b(graphics )?cards?('s)?\b": "GPU, device properties",
    r"\bpitch\b": "stride",
    r"\bmass(es)?\b": "probability sum",
    r"\basleep\b": "sleeping",
    r"\b(is|are|was|were) gone\b": "freed",
}
# The same in code, on any line.
CODE = {r"-\(-.*//": "ceil_div(a, b)"}

NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
STRING_START = {getattr(tokenize, f"{kind}_START", -1) for kind in ("FSTRING", "TSTRING")}
STRING_END = {getattr(tokenize, f"{kind}_END", -1) for kind in ("FSTRING", "TSTRING")}


# -- one file ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Function:
    """`lines` counts all lines of the function, from `def` on; `kernel`: Triton compiles it."""

    name: str
    lines: int
    kernel: bool


@dataclass(frozen=True)
class Finding:
    """A forbidden word, or a line that is too long."""

    path: str
    line: int
    text: str
    instead: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text!r}: write {self.instead}"


def finding(where: tuple[str, int], text: str, table: dict[str, str]) -> Finding | None:
    """The first pattern of the table that is in the text. An identifier must match as a whole."""
    match = re.fullmatch if table is IDENTIFIERS else re.search
    flags = re.IGNORECASE if table is PROSE else 0
    for pattern, instead in table.items():
        hit = match(pattern, text, flags)
        if hit:
            return Finding(*where, hit.group(), instead)
    return None


class File:
    """A source file and what is measured of it. `name` is its path in the repository."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.relative_to(ROOT).as_posix()
        self.source = path.read_text()
        self.tree = ast.parse(self.source)
        self.docstrings = docstring_lines(self.tree)
        code = list(self.code_tokens())
        self.tokens = len(code)
        self.code_lines = {line for start, end in code for line in range(start, end + 1)}
        self.lines = len(self.code_lines)
        self.any_count = sum(names_any(node) for node in ast.walk(self.tree))
        self.functions = list(functions(self.tree))

    @property
    def density(self) -> float:
        """Tokens a line of code."""
        return self.tokens / max(self.lines, 1)

    def code_tokens(self) -> Iterator[tuple[int, int]]:
        """(first line, last line) of every token of code."""
        nested = 0  # f-strings around the token
        began = 0
        for token in tokenize.generate_tokens(io.StringIO(self.source).readline):
            if token.type in NO_CODE or token.start[0] in self.docstrings:
                continue
            if token.type in STRING_START:
                nested += 1
                if nested == 1:
                    began = token.start[0]
            elif token.type in STRING_END:
                nested -= 1
                if nested == 0:
                    yield began, token.end[0]
            elif nested == 0:
                yield token.start[0], token.end[0]

    def longest_function(self) -> Function:
        return max(self.functions, key=lambda f: f.lines, default=Function("", 0, False))

    def long_lines(self, columns: int) -> list[Finding]:
        """Lines of code, comment or docstring with more than `columns` columns."""
        lines = enumerate(self.source.splitlines(), 1)
        instead = f"at most {columns} columns"
        return [Finding(self.name, i, s.strip(), instead) for i, s in lines if len(s) > columns]

    def words(self) -> list[Finding]:
        """Private synonyms in the file's name, identifiers, comments, docstrings and sentences."""
        found = [finding((self.name, 0), self.path.stem, IDENTIFIERS)]
        for line, name in self.identifiers():
            found.append(finding((self.name, line), name, IDENTIFIERS))
        for line, text in self.prose():
            found.append(finding((self.name, line), text, PROSE))
        for line, text in enumerate(self.source.splitlines(), 1):
            if line in self.code_lines:
                found.append(finding((self.name, line), text, CODE))
        return sorted({f for f in found if f is not None}, key=lambda f: (f.line, f.text))

    def identifiers(self) -> Iterator[tuple[int, str]]:
        for token in tokenize.generate_tokens(io.StringIO(self.source).readline):
            if token.type == tokenize.NAME and not keyword.iskeyword(token.string):
                yield token.start[0], token.string

    def prose(self) -> Iterator[tuple[int, str]]:
        """(line, text) of comments, docstrings and other strings that hold a sentence."""
        for token in tokenize.generate_tokens(io.StringIO(self.source).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                for offset, text in enumerate(node.value.splitlines()):
                    yield node.lineno + offset, text


def docstring_lines(tree: ast.AST) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        first = node.body[0] if node.body else None
        if first is not None and ast.get_docstring(node, clean=False) is not None:
            lines.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def names_any(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == "Any"
    return isinstance(node, ast.Name) and node.id == "Any"


def functions(tree: ast.AST, prefix: str = "") -> Iterator[Function]:
    """Every function under its qualified name, nested functions too."""
    for node in ast.iter_child_nodes(tree):
        name = prefix
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = f"{prefix}{node.name}."
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            kernel = any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
            yield Function(name[:-1], lines, kernel)
        yield from functions(node, name)


# -- imports -----------------------------------------------------------------------------------

Graph = dict[str, set[str]]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_graph(files: list[File]) -> Graph:
    """Of each module the modules of the package that it names in an import, anywhere in it.

    Imports inside functions and below TYPE_CHECKING count. `from package import module` is an
    import of the module, not of the package.
    """
    modules = {module_name(file.path) for file in files}
    return {module_name(file.path): imports(file, modules) for file in files}


def imports(file: File, modules: set[str]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, file)
            for alias in node.names:
                deep = f"{base}.{alias.name}"
                found.update({deep if deep in modules else base} & modules)
    return found - {module_name(file.path)}


def absolute(node: ast.ImportFrom, file: File) -> str:
    """The module that `from ...module import` names."""
    if node.level == 0:
        return node.module or ""
    package = file.path.parent.relative_to(ROOT).parts
    above = package[: len(package) - node.level + 1]
    return ".".join([*above, *([node.module] if node.module else [])])


def reachable(graph: Graph, start: str) -> set[str]:
    """Modules at the end of a path of at least one import."""
    found: set[str] = set()
    ahead = [start]
    while ahead:
        for module in graph[ahead.pop()]:
            if module not in found:
                found.add(module)
                ahead.append(module)
    return found


def circles(graph: Graph) -> list[list[str]]:
    """Sets of modules of which each reaches each other."""
    reach = {module: reachable(graph, module) for module in graph}
    found = set()
    for module in graph:
        if module in reach[module]:
            found.add(tuple(sorted(m for m in reach[module] if module in reach[m])))
    return [list(circle) for circle in sorted(found)]


def folder_of(module: str) -> str:
    """The folder, or the file at the top of the package, that a module belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def wrong_imports(graph: Graph) -> list[str]:
    """Imports that go up, that LEVELS does not know, or that SEPARATE forbids; as sentences."""
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    found = []
    for module, imported in sorted(graph.items()):
        here = folder_of(module)
        if here not in level:
            found.append(f"{module} has no level in docs/house.py")
        for other in sorted(imported):
            there = folder_of(other)
            if level.get(here, 0) < level.get(there, 0):
                found.append(f"{module} imports {other}, which is above it")
            for importer, forbidden, exception in SEPARATE:
                if (here, there) == (importer, forbidden) and module != exception:
                    found.append(f"{module} imports {other}; only {exception} may")
    return found


# -- the report --------------------------------------------------------------------------------


def all_words() -> list[Finding]:
    """Private synonyms in every file that WORDS_IN and DOCUMENTS name."""
    found: list[Finding | None] = []
    for pattern in WORDS_IN:
        for path in sorted(ROOT.glob(pattern)):
            if path.relative_to(ROOT).as_posix() not in WORDS_NOT_IN:
                found += File(path).words()
    for pattern in DOCUMENTS:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            for line, text in enumerate(path.read_text().splitlines(), 1):
                found.append(finding((name, line), text, PROSE))
    return [f for f in found if f is not None]


def package_files() -> list[File]:
    return [File(path) for path in sorted(PACKAGE.rglob("*.py"))]


def walk_files(names: tuple[str, ...] = WALK) -> list[File]:
    return [File(PACKAGE / name) for name in names]


def total_density(files: list[File]) -> float:
    return sum(file.tokens for file in files) / sum(file.lines for file in files)


def report(verbose: bool) -> None:
    files = package_files()
    graph = import_graph(files)
    findings = all_words()
    if verbose:
        for file in files:
            longest = file.longest_function()
            print(
                f"{file.lines:5} lines {file.tokens:6} tokens {file.density:5.1f} a line "
                f"{file.any_count:3} Any  longest {longest.lines:3} {longest.name:32} {file.name}"
            )
        print(*map(str, findings), sep="\n")
        print(*wrong_imports(graph), sep="\n")
        print(*(f"circle: {', '.join(circle)}" for circle in circles(graph)), sep="\n")
    longest = max((file.longest_function() for file in files), key=lambda f: f.lines)
    walk = walk_files()
    print(f"{len(circles(graph)):6} circles of files")
    print(f"{len(wrong_imports(graph)):6} imports that do not go down")
    print(f"{sum(file.lines for file in files):6} lines of code")
    print(f"{sum(file.tokens for file in files):6} tokens")
    print(f"{total_density(files):6.1f} tokens a line")
    print(
        f"{max(file.density for file in walk):6.1f} tokens a line in the densest file of the walk"
    )
    print(f"{sum(file.any_count for file in files):6} Any")
    print(f"{longest.lines:6} lines in the longest function, {longest.name}")
    print(f"{sum(len(file.long_lines(100)) for file in files):6} lines of more than 100 columns")
    print(f"{len(findings):6} private synonyms")


def report_walk() -> None:
    for title, names in (("The walk", WALK), ("Kernels, apart", WALK_KERNELS)):
        files = walk_files(names)
        print(f"{title}: lines of code, tokens, file")
        for file in files:
            print(f"{file.lines:5} {file.tokens:6} {file.name}")
        lines, tokens = sum(f.lines for f in files), sum(f.tokens for f in files)
        print(f"{lines:5} {tokens:6} in all, {tokens / lines:.1f} tokens a line\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="each file and finding")
    parser.add_argument(
        "--walk", action="store_true", help="the files that one prompt runs through"
    )
    options = parser.parse_args()
    if options.walk:
        report_walk()
    else:
        report(options.verbose)


if __name__ == "__main__":
    main()
