"""Records that scripts pass to `LLM` or name in annotations. The engine reads none of them."""

from types import SimpleNamespace


class CompilationConfig(SimpleNamespace):
    """Any fields. `LLM(compilation_config=...)` has no effect."""


class ModelConfig(SimpleNamespace):
    """A name for annotations: the engine's own record has another class."""


class VllmConfig(SimpleNamespace):
    """A name for annotations."""


__all__ = ["CompilationConfig", "ModelConfig", "VllmConfig"]
