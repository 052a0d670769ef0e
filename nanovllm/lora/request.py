"""vLLM's record of a LoRA adapter, so that scripts import it. `LLM` refuses requests with one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LoRARequest:
    """An adapter by name, number and folder."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
