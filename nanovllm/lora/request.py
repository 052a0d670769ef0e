"""vLLM's record of a LoRA adapter: what a request says of the adapter that it uses."""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.errors import ValidationError


@dataclass(eq=False)
class LoRARequest:
    """An adapter by name, number and place.

    lora_int_id: at least 1. Requests with equal numbers use the same adapter.
    lora_path: a folder with PEFT's adapter_config.json and adapter_model.safetensors, or
    a name on the Hugging Face hub.
    base_model_name: no effect.
    load_inplace: reads the files again, though an adapter of this number is known.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False
    is_3d_lora_weight: bool = False
    tensorizer_config_dict: dict[str, object] | None = None

    def __post_init__(self) -> None:
        number = self.lora_int_id
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"lora_int_id={number!r} must be an int")
        if number < 1:
            raise ValidationError(f"lora_int_id={number} must be at least 1")
        if self.tensorizer_config_dict is not None or self.is_3d_lora_weight:
            raise ValidationError(
                "tensorizer_config_dict and is_3d_lora_weight are not supported; accepted are "
                "None and False, because adapters are read from PEFT's safetensors"
            )

    @property
    def adapter_id(self) -> int:
        return self.lora_int_id

    @property
    def name(self) -> str:
        return self.lora_name

    @property
    def path(self) -> str:
        return self.lora_path


def as_lora_requests(lora_request: object, count: int) -> list[LoRARequest | None]:
    """The adapter of each of `count` prompts. None stands for the model without adapter.

    lora_request: one for all prompts, a list with one for each, None or []. Raises
    ValidationError for anything else.
    """
    if not isinstance(lora_request, (list, tuple)):
        given = [lora_request] * count
    elif lora_request:
        given = list(lora_request)
    else:
        given = [None] * count
    if len(given) != count:
        raise ValidationError(
            f"lora_request has {len(given)} items for {count} prompts; the numbers must be equal"
        )
    found: list[LoRARequest | None] = []
    for each in given:
        if each is not None and not isinstance(each, LoRARequest):
            raise ValidationError(
                f"lora_request={each!r} is not supported; accepted are a LoRARequest, None, or a "
                "list of these with one for each prompt"
            )
        found.append(each)
    return found
