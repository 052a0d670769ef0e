"""The one exception that a request's own values can raise; TypeErrors are Python's."""

from typing import Any


class ValidationError(ValueError):
    """A value that is refused. The sentence names the parameter, the value and what is accepted; both are attributes too."""

    def __init__(self, message: str, *, parameter: str | None = None, value: Any = None) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.value = value


VLLMValidationError = ValidationError
