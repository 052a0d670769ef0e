from typing import NoReturn

from vllm.distributed.weight_transfer import refuse


class NCCLWeightTransferEngine:
    def __init__(self, *_: object, **__: object) -> NoReturn:
        refuse("NCCLWeightTransferEngine")


class NCCLTrainerSendWeightsArgs:
    """Arguments of the same transfer."""

    def __init__(self, *_: object, **__: object) -> NoReturn:
        refuse("NCCLTrainerSendWeightsArgs")


__all__ = ["NCCLTrainerSendWeightsArgs", "NCCLWeightTransferEngine"]
