"""Network cards: KV caches on their way from machine to machine."""

from __future__ import annotations

from dataclasses import dataclass

from joinwise.cluster.simulate.engine import Engine
from joinwise.cluster.simulate.job import Job


@dataclass
class Links:
    """All of a cluster's cards.

    Attributes:
        bytes_s: of every card; None takes that of the machines, the slower of the two.
        contended: a card sends, and receives, one cache after another; else every cache has a link to itself.
        overlap: layers are sent as they are computed; else all of them after the last.
    """

    bytes_s: float | None = None
    contended: bool = True
    overlap: bool = True

    def __post_init__(self) -> None:
        self._free: dict[tuple[str, str], float] = {}
        self.sent_bytes = 0.0

    def arrival(self, job: Job, sender: Engine, receiver: Engine, now: float) -> float:
        """When the last byte of a prompt's KV arrives, which is computed since `now`; takes the cards until then."""
        size = (job.prompt - job.there) * sender.kind.kv_bytes
        self.sent_bytes += size
        speed = self.bytes_s or min(sender.kind.link_bytes_s, receiver.kind.link_bytes_s)
        seconds, begin, least = size / speed, now, now
        if self.overlap:
            layers = sender.kind.layers
            begin = job.began + (now - job.began) / layers
            least = now + seconds / layers  # the last layer goes when it is there
        out, into = (sender.worker_id, "out"), (receiver.worker_id, "in")
        if self.contended:
            begin = max(begin, self._free.get(out, 0.0), self._free.get(into, 0.0))
        end = max(least, begin + seconds)
        if self.contended:
            self._free[out] = self._free[into] = end
        return end
