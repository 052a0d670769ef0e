"""Where the weights of LoRA adapters lie: in the memory of every rank. No step runs this file."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from nanovllm.config import EngineArgs
from nanovllm.core.adapter import Files
from nanovllm.loader.peft import find_adapter, versions
from nanovllm.lora.request import LoRARequest
from nanovllm.runner.executor import Executor


class RankMemory:
    """Checks adapters on rank 0, because all ranks read the same files."""

    def __init__(self, executor: Executor, args: EngineArgs) -> None:
        self.executor = executor
        self.args = args

    def find(self, request: LoRARequest) -> Files:
        """The adapter's files. Raises ValueError for files that do not suit."""
        folder = find_adapter(request.lora_path, self.args.download_dir, self.args.hf_token)
        adapters = self.executor.runner.lora
        assert adapters is not None, "the engine has enable_lora=True"
        files = self.files(str(folder))
        adapters.read(str(folder))
        return files

    def files(self, folder: str) -> Files:
        """The files in the folder now."""
        return Files(folder, versions(Path(folder)))

    def load(self, number: int, folder: str) -> None:
        """Reads the weights on every rank, or on none."""
        try:
            self.executor.collective_rpc("load_adapter", (number, folder))
        except Exception:
            with suppress(Exception):
                self.unload(number)
            raise

    def unload(self, number: int) -> None:
        """Frees the weights."""
        self.executor.collective_rpc("unload_adapter", (number,))
