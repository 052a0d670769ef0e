"""Records a run: `LLM(trace="run.html")`. Imported only by engines that record.

docs/trace.md describes the records.
"""
