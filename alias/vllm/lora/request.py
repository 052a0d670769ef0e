from nanovllm.lora.request import LoRARequest

__all__ = ["LoRARequest"]
