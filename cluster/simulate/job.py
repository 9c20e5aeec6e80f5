"""A request under way."""

from __future__ import annotations

from joinwise.cluster.simulate.trace import Arrival


class Job:
    """One request of the trace, with what has become of it.

    Attributes:
        index: its number in the trace.
        at: seconds at which it arrived.
        prompt, output: tokens.
        cached, there: prompt tokens that the worker of its prompt, and that of its answer, had already.
        began: when its prompt was begun; -1 before.
        first: when its first token was out; -1 before.
        end: when its last token was out; -1 before, and for one that was refused.
        kv: tokens of KV cache that it holds where it runs (kept by the engine).
        told: 1 once the router knows of the first token, 2 once it knows of the end.
        preempted: times that it lost its KV cache to others.
    """

    __slots__ = (
        "arrival",
        "at",
        "began",
        "cached",
        "end",
        "first",
        "index",
        "kv",
        "output",
        "preempted",
        "prompt",
        "there",
        "told",
    )

    def __init__(self, index: int, arrival: Arrival) -> None:
        self.index = index
        self.arrival = arrival
        self.at = arrival.at
        self.prompt = arrival.prompt
        self.output = arrival.output
        self.cached = self.there = 0
        self.began = self.first = self.end = -1.0
        self.kv = 0
        self.told = 0
        self.preempted = 0

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.first - self.at

    @property
    def e2e(self) -> float:
        """Seconds to the last token."""
        return self.end - self.at
