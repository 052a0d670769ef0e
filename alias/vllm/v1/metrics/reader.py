from nanovllm.engine.stats import Metric

__all__ = ["Metric"]
