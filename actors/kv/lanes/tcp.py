"""The `tcp` kind: the payload follows its header on the socket, from and to the caller's own memory.

The other kinds are this one with another way for the payload.
"""

from collections.abc import Sequence
from typing import Any

from joinwise.actors.kv.lanes.lane import HEADER_BYTES, LaneClosedError, LaneOptions
from joinwise.actors.kv.lanes.wire import Wire
from joinwise.kernels import kv_hash


class TcpLane:
    """What both ends of every kind have in common; see `Lane`."""

    kind = "tcp"

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.lane_id = 0
        self.payload_bytes = 0

    def healthy(self) -> bool:
        """See `Lane`."""
        try:
            healthy = self._expected(self.wire.drain())
        except LaneClosedError:
            healthy = False
        if not healthy:
            self.wire.interrupt()  # what was read of it is gone
        return healthy

    def interrupt(self) -> None:
        """See `Lane`."""
        self.wire.interrupt()

    def close(self) -> None:
        """See `Lane`."""
        self.wire.close()

    def _expected(self, data: bytes) -> bool:
        """Whether an idle lane may hold this."""
        return not data


class TcpSend(TcpLane):
    """The sender's end; see `SendLane`."""

    most_bytes: int | None = 1 << 20  # read twice: the second time it should still be near the core

    def load(self, payload: Sequence[memoryview]) -> int:
        """See `SendLane`."""
        return kv_hash.digest(payload)

    def send(self, header: bytes, payload: Sequence[memoryview]) -> None:
        """See `SendLane`."""
        self.wire.send([header, *payload])
        self.payload_bytes += size_of(payload)


class TcpReceive(TcpLane):
    """The receiver's end; see `ReceiveLane`."""

    instance = ""

    def receive_header(self) -> bytes:
        """See `ReceiveLane`."""
        return self.wire.receive(HEADER_BYTES)

    def receive(self, into: Sequence[memoryview]) -> int:
        """See `ReceiveLane`."""
        self.wire.receive_into(into)
        self.payload_bytes += size_of(into)
        return kv_hash.digest(into)


def size_of(pieces: Sequence[memoryview]) -> int:
    """Bytes in all of them."""
    return sum(map(len, pieces))


def connect(wire: Wire, hello: dict[str, Any], options: LaneOptions) -> TcpReceive:
    """The receiver's part of the handshake, up to the sender's last word."""
    wire.send_message(hello)
    return TcpReceive(wire)


def accept(wire: Wire, hello: dict[str, Any], options: LaneOptions) -> TcpSend:
    """The sender's part of it."""
    return TcpSend(wire)
