"""The readouts that requests may ask for. A new readout is a file and a line here.

An engine makes one of each for its host half, and each rank one for its device half.
"""

from __future__ import annotations

from nanovllm.runner.readouts.prompt_logprobs import PromptLogprobs

READOUTS = {"prompt_logprobs": PromptLogprobs}
