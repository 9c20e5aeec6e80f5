"""Something to call in a process of its own."""

import os


class Counter:
    """Counts from `start` on; refuses to begin below zero."""

    def __init__(self, start: int) -> None:
        if start < 0:
            raise ValueError("no such count")
        self.count = start

    def add(self, more: int) -> int:
        self.count += more
        return self.count

    def pid(self) -> int:
        return os.getpid()

    def die(self) -> None:
        os._exit(3)
