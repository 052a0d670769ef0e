"""Finds a real vLLM beside this package, because files of the two would mix."""

from importlib.metadata import distributions

OURS = "+nanovllm"


def real_vllm(path: list[str] | None = None) -> str | None:
    """The version of an installed vLLM that is not this package, or None.

    path: folders to search. None stands for sys.path.
    """
    found = distributions(name="vllm") if path is None else distributions(name="vllm", path=path)
    versions = [distribution.version for distribution in found]
    return next((version for version in versions if not version.endswith(OURS)), None)


def check() -> None:
    """Raises ImportError if a real vLLM is installed too."""
    version = real_vllm()
    if version is not None:
        raise ImportError(
            f"vLLM {version} and nanovllm-as-vllm are both installed, and both are the package "
            "'vllm': uninstall nanovllm-as-vllm, or uninstall both and install nanovllm-as-vllm "
            "alone"
        )
