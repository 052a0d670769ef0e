"""Names that trainers import for vLLM's server. There is no server here, so none can be made."""

from typing import NoReturn


class NCCLWeightTransferEngine:
    def __init__(self, *_: object, **__: object) -> NoReturn:
        raise ValueError(
            "NCCLWeightTransferEngine is not supported: it sends weights to a vLLM server; give "
            "(name, tensor) pairs to the model's load_weights instead (in TRL: "
            "vllm_mode='colocate')"
        )


class NCCLTrainerSendWeightsArgs(NCCLWeightTransferEngine):
    """Arguments of the same transfer."""


__all__ = ["NCCLTrainerSendWeightsArgs", "NCCLWeightTransferEngine"]
