from uuid import uuid4


def random_uuid() -> str:
    """32 random hexadecimal digits, such as for the id of a request."""
    return uuid4().hex
