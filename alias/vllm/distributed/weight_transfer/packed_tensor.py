from typing import NoReturn

from vllm.distributed.weight_transfer import refuse


def packed_nccl_broadcast_producer(*_: object, **__: object) -> NoReturn:
    refuse("packed_nccl_broadcast_producer")


__all__ = ["packed_nccl_broadcast_producer"]
