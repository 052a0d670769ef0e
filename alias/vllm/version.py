"""The version of vLLM whose offline API nanovllm mirrors. "+nanovllm" says whose code this is."""

__version__ = "0.33.0+nanovllm"
__version_tuple__ = (0, 33, 0, "nanovllm")
