"""The exception for refused values. It is a ValueError, because clients catch that."""


class ValidationError(ValueError):
    """A refused value. The message names parameter, value and accepted values.

    parameter, value: for programs. They are None if several parameters are the cause.
    """

    def __init__(self, message: str, *, parameter: str | None = None, value: object = None) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.value = value


VLLMValidationError = ValidationError
