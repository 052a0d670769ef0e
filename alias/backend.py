"""Builds the distribution nanovllm-as-vllm: a PEP 517 backend of one file.

Setuptools cannot do two things that this wheel needs. It refuses an environment with a
real vLLM. It carries metadata of a distribution named `vllm`, because programs ask
`importlib.metadata.version("vllm")`.
"""

from __future__ import annotations

import base64
import hashlib
import runpy
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAME = "nanovllm_as_vllm"
VERSION = "0.2.0"
METADATA = f"""\
Metadata-Version: 2.1
Name: nanovllm-as-vllm
Version: {VERSION}
Summary: nanovllm under the name vllm, for programs that import vLLM
Requires-Python: >=3.10
Requires-Dist: nanovllm
"""
WHEEL = """\
Wheel-Version: 1.0
Generator: nanovllm-as-vllm
Root-Is-Purelib: true
Tag: py3-none-any
"""


def refuse_real_vllm() -> None:
    """Raises RuntimeError if this Python has a real vLLM.

    pip builds in an environment of its own, but sysconfig names the folders of the Python
    that pip runs in. A --target folder is not known here; vllm/__init__.py checks it.
    """
    # By its file, because `import vllm` would import vllm/__init__.py.
    only_one = runpy.run_path(str(HERE / "vllm" / "only_one.py"))
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    version = only_one["real_vllm"](folders)
    if version is not None:
        raise RuntimeError(
            f"vLLM {version} is installed here, and nanovllm-as-vllm would replace its files: "
            "uninstall vllm first, or use another environment"
        )


def contents() -> dict[str, bytes]:
    """Path in the wheel -> bytes, without RECORD."""
    files = {}
    for path in sorted(HERE.joinpath("vllm").rglob("*.py")):
        files[path.relative_to(HERE).as_posix()] = path.read_bytes()
    # A wheel has one dist-info folder. A second one is data that goes beside the package.
    for path in sorted(HERE.glob("vllm-*.dist-info/*")):
        name = path.relative_to(HERE).as_posix()
        files[f"{NAME}-{VERSION}.data/purelib/{name}"] = path.read_bytes()
    files[f"{NAME}-{VERSION}.dist-info/METADATA"] = METADATA.encode()
    files[f"{NAME}-{VERSION}.dist-info/WHEEL"] = WHEEL.encode()
    return files


def record_line(name: str, data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
    return f"{name},sha256={digest},{len(data)}\n"


# -- the functions that PEP 517 names --------------------------------------------------------------


def build_wheel(
    wheel_directory: str,
    config_settings: dict[str, str] | None = None,
    metadata_directory: str | None = None,
) -> str:
    refuse_real_vllm()
    files = contents()
    record = f"{NAME}-{VERSION}.dist-info/RECORD"
    lines = [record_line(name, data) for name, data in files.items()]
    files[record] = "".join([*lines, f"{record},,\n"]).encode()
    wheel = f"{NAME}-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(Path(wheel_directory, wheel), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return wheel


def build_sdist(sdist_directory: str, config_settings: dict[str, str] | None = None) -> str:
    sdist = f"{NAME}-{VERSION}.tar.gz"
    patterns = ("pyproject.toml", "backend.py", "README.md", "vllm/**/*.py", "*.dist-info/*")
    with tarfile.open(Path(sdist_directory, sdist), "w:gz") as archive:
        for pattern in patterns:
            for path in sorted(HERE.glob(pattern)):
                archive.add(path, f"{NAME}-{VERSION}/{path.relative_to(HERE)}")
    return sdist
