"""What a lane is: a connection that carries frames from one worker to another, for one transfer at a time.

The receiver connects (`pool.LanePool`), the sender listens (`server.LaneServer`). A frame is a header
of `HEADER_BYTES`, which lanes do not read, and a payload whose size both ends know (the receiver from
the header). Kinds differ only in how a payload travels: `tcp`, `shm` (main memory that both ends map) and
`nccl` (torch.distributed between two ranks).

No operation on a lane has a timeout of its own: whoever watches for stalls calls `interrupt`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

HEADER_BYTES = 64
MAX_RING_BYTES = 1 << 30


class LaneClosedError(ConnectionError):
    """The lane is gone: its peer ended or cannot be reached, or it was interrupted. It must not be used again."""


class LaneRefusedError(ConnectionError):
    """The peer does not want this lane, or cannot have it; another kind may do. `reason` says why."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"lane refused ({reason}): {detail}")
        self.reason = reason
        """One word: token, version, kind, full, host, device."""
        self.detail = detail


def fits(slots: int, slot_bytes: int) -> bool:
    """Whether a ring may be so large: its memory is taken when the lane is made, whatever there is."""
    return slots > 0 and slot_bytes > 0 and slots * slot_bytes <= MAX_RING_BYTES


@dataclass(frozen=True)
class LaneOptions:
    """How lanes are made at this end.

    Raises:
        ValueError: a ring that is empty or larger than `MAX_RING_BYTES`.

    Attributes:
        socket_buffer_bytes: SO_SNDBUF and SO_RCVBUF; 0 leaves them to the kernel, which fits them to the distance,
            but for peers on the same host.
        slots, slot_bytes: the ring of an `shm` lane, made by the receiver; a slot holds one payload.
        device: where this end's KV is, "cpu" or "cuda:<index>"; an `nccl` lane sends from and to it.
    """

    socket_buffer_bytes: int = 0
    slots: int = 4
    slot_bytes: int = 2 << 20
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not fits(self.slots, self.slot_bytes):
            raise ValueError(f"{self.slots} slots of {self.slot_bytes} bytes: at most {MAX_RING_BYTES} bytes together")


class Lane(Protocol):
    """Either end."""

    kind: str
    lane_id: int
    """Chosen by the sender's end, at random; unique there. 0 until the handshake is over."""
    payload_bytes: int
    """Bytes of payload that have passed since it was made."""

    def healthy(self) -> bool:
        """Whether an idle lane can be used: its peer is there, and nothing is on it that nobody asked for."""

    def interrupt(self) -> None:
        """End it from any thread: whoever waits in it, at either end, gets `LaneClosedError`. Idempotent."""

    def close(self) -> None:
        """Free what it holds; by the thread that uses it, or when none does. Idempotent."""


class SendLane(Lane, Protocol):
    """The sender's end."""

    most_bytes: int | None
    """Larger payloads would be sent more slowly than two of half the size; None: there is no such size."""

    def load(self, payload: Sequence[memoryview]) -> int:
        """Read the payload that is sent next, and tell its xxh3-64.

        A kind that copies payloads does so now; then the bytes that `send` is given in the same list are not read
        again. Waits while the peer does not read.

        Raises:
            LaneClosedError, ValueError: as for `send`.
        """

    def send(self, header: bytes, payload: Sequence[memoryview]) -> None:
        """Send one frame; when this returns the payload's memory may change. Waits while the peer does not read.

        Args:
            header: `HEADER_BYTES` bytes.
            payload: contiguous views of bytes, in order; none for a frame without payload.

        Raises:
            LaneClosedError: the frame may have gone in part.
            ValueError: a payload that this kind of lane cannot carry; nothing was sent.
        """


class ReceiveLane(Lane, Protocol):
    """The receiver's end."""

    instance: str
    """Names the sender's process; another after a restart."""

    def receive_header(self) -> bytes:
        """Wait for the next frame; its header. `receive` must follow if the frame has a payload.

        Raises:
            LaneClosedError: no frame will come.
        """

    def receive(self, into: Sequence[memoryview]) -> int:
        """Wait for the frame's payload and put it into these contiguous, writable views of bytes, in order.

        Nothing is written to them once this has returned or raised.

        Args:
            into: views of as many bytes together as the payload has.

        Returns:
            xxh3-64 of what has been put there.

        Raises:
            LaneClosedError: some of it may have been written.
            ValueError: a payload that this kind of lane cannot carry.
        """
