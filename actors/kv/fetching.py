"""One request's import as a whole: what it is told, what its streams do together, and what they have cost."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from joinwise.actors.kv.frames import FrameRefusedError
from joinwise.actors.kv.receiving import FetchSpec, Importer


@dataclass
class FetchReport:
    """What one fetch did. Seconds of the receiver's clock; `exposed_seconds` as DESIGN defines it."""

    request_id: str
    bytes: int = 0
    wire_seconds: float = 0.0
    exposed_seconds: float = 0.0
    import_seconds: float = 0.0
    transport: str = "grpc"
    failure: str = ""
    local_hit_tokens: int = 0

    def merge(self, other: "FetchReport") -> None:
        """Add what another stream or rank did for the same request, at the same time."""
        self.bytes += other.bytes
        self.wire_seconds = max(self.wire_seconds, other.wire_seconds)
        self.exposed_seconds = max(self.exposed_seconds, other.exposed_seconds)
        self.import_seconds = max(self.import_seconds, other.import_seconds)
        if other.transport not in self.transport.split("+"):
            self.transport = f"{self.transport}+{other.transport}"
        self.failure = self.failure or other.failure
        self.local_hit_tokens = max(self.local_hit_tokens, other.local_hit_tokens)


class Fetch:
    """One request's import: a stream for every rank of the sender that has a part of it.

    `stop` may be called from any thread; once it has returned, nothing is written any more.
    """

    def __init__(self, spec: FetchSpec) -> None:
        self.spec = spec
        self.importers: list[Importer] = []
        self._streams: list[Callable[[], None]] = []
        self._stopped = False
        self._lock = threading.Lock()

    @property
    def complete(self) -> bool:
        """Everything is in its blocks."""
        return bool(self.importers) and all(importer.complete for importer in self.importers)

    @property
    def exposed_seconds(self) -> float:
        """Seconds from the last computed layer to the last frame sent, of the slowest stream."""
        return max((importer.exposed_us for importer in self.importers), default=0) / 1e6

    def begin(self, importers: Sequence[Importer]) -> None:
        """The streams to come.

        Raises:
            FrameRefusedError: it has been stopped.
        """
        with self._lock:
            if self._stopped:
                raise FrameRefusedError("fenced", "the transfer was cancelled")
            self.importers, self._streams = list(importers), []

    def attach(self, cancel: Callable[[], None]) -> None:
        """Call `cancel` when this is stopped; at once where it has been."""
        with self._lock:
            self._streams.append(cancel)
            stopped = self._stopped
        if stopped:
            cancel()

    def stop(self) -> None:
        """Fence every stream, end those that are not complete, and let none begin."""
        with self._lock:
            self._stopped = True
        self.end_streams()

    def end_streams(self) -> None:
        """Fence every stream that has begun, and end those that are not complete."""
        with self._lock:
            importers, streams = list(self.importers), list(self._streams)
        for importer in importers:
            importer.fence()
        if not self.complete:
            for cancel in streams:
                cancel()
