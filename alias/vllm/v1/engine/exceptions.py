from nanovllm.runner.executor import EngineDeadError

__all__ = ["EngineDeadError"]
