class Counter:
    """Counts up from `start`: next(counter) is the next number."""

    def __init__(self, start: int = 0) -> None:
        self.counter = start

    def __next__(self) -> int:
        number = self.counter
        self.counter += 1
        return number

    def reset(self) -> None:
        self.counter = 0
