"""The `shm` kind: payloads go through a ring of slots in memory that both ends map; the socket carries headers.

The receiver makes the ring, as a sealed memfd: it has no name that could be left behind, and neither end
can shorten it under the other's feet. The sender opens it as `/proc/<pid>/fd/<n>` and looks for a random
nonce in it, so that it finds out by itself whether both are on one host, in one pid namespace and of one user.

Slots are used in turn, one for each payload. The receiver gives a slot back with one byte on the socket, some slots at
a time; a sender without free slots waits for one. Each end passes over the bytes once: what it copies it hashes.
"""

import fcntl
import hmac
import mmap
import os
import secrets
from collections.abc import Sequence
from typing import Any

from joinwise.actors.kv.lanes.lane import LaneClosedError, LaneOptions, LaneRefusedError, fits
from joinwise.actors.kv.lanes.tcp import TcpLane, TcpReceive, TcpSend, size_of
from joinwise.actors.kv.lanes.wire import GarbageError, Wire
from joinwise.kernels import kv_hash

_NAME = "joinwise-lane"
_NONCE_BYTES = 16
_SLOTS_AT = mmap.PAGESIZE
"""Where the slots begin; the nonce is at the beginning of the page before."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_CREDIT = b"\x01"
_CREDITS = 4096
"""As many at once."""


class Ring:
    """Memory that both ends map.

    Args:
        descriptor: of the memfd; stays the caller's.
        slots: payloads that fit.
        slot_bytes: bytes of each.
    """

    def __init__(self, descriptor: int, slots: int, slot_bytes: int) -> None:
        self.slots, self.slot_bytes = slots, slot_bytes
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE  # no page faults while payloads travel
        self._bytes = memoryview(mmap.mmap(descriptor, _SLOTS_AT + slots * slot_bytes, flags))
        self._next = 0

    @property
    def nonce(self) -> bytes:
        """What stands at its beginning."""
        return bytes(self._bytes[:_NONCE_BYTES])

    @nonce.setter
    def nonce(self, value: bytes) -> None:
        self._bytes[:_NONCE_BYTES] = value

    def put(self, pieces: Sequence[memoryview]) -> int:
        """Copy a payload to the slot whose turn it is; its xxh3-64."""
        return kv_hash.gather(pieces, self._slot())

    def take(self, into: Sequence[memoryview]) -> int:
        """Copy the payload of that slot to these views; its xxh3-64."""
        return kv_hash.scatter(self._slot(), into)

    def turn(self) -> None:
        """The next slot's turn."""
        self._next = (self._next + 1) % self.slots

    def close(self) -> None:
        """Unmap it."""
        self._bytes = memoryview(b"")

    def _slot(self) -> memoryview:
        start = _SLOTS_AT + self._next * self.slot_bytes
        return self._bytes[start : start + self.slot_bytes]


class _ShmLane(TcpLane):
    """What both ends have in common."""

    kind = "shm"

    def __init__(self, wire: Wire, ring: Ring) -> None:
        super().__init__(wire)
        self._ring = ring

    def close(self) -> None:
        """See `Lane`."""
        super().close()
        self._ring.close()

    def _check(self, size: int) -> None:
        """Raises what `send` and `receive` raise for a payload of this size, and for a lane that has ended."""
        if size > self._ring.slot_bytes:
            raise ValueError(f"a payload of {size} bytes, a slot of this lane has {self._ring.slot_bytes}")
        if self.wire.interrupted:
            raise LaneClosedError("the lane was interrupted")


class ShmSend(_ShmLane, TcpSend):
    """The sender's end."""

    most_bytes = None

    def __init__(self, wire: Wire, ring: Ring) -> None:
        super().__init__(wire, ring)
        self._free = ring.slots
        self._loaded: Sequence[memoryview] | None = None  # what the slot whose turn it is holds

    def load(self, payload: Sequence[memoryview]) -> int:
        """See `SendLane`."""
        self._loaded = None
        self._check(size_of(payload))
        if not self._free and not self._expected(self.wire.receive_some(_CREDITS)):
            raise LaneClosedError("the peer has given back slots that it did not have")
        checksum = self._ring.put(payload)
        self._loaded = payload
        return checksum

    def send(self, header: bytes, payload: Sequence[memoryview]) -> None:
        """See `SendLane`; ValueError for a payload that is larger than a slot."""
        size = size_of(payload)
        self._check(size)
        if size:
            if self._loaded is not payload:
                self.load(payload)
            self._loaded = None
            self._ring.turn()
            self._free -= 1
        self.wire.send([header])
        self.payload_bytes += size

    def _expected(self, data: bytes) -> bool:
        self._free += len(data)
        return self._free <= self._ring.slots


class ShmReceive(_ShmLane, TcpReceive):
    """The receiver's end."""

    def __init__(self, wire: Wire, ring: Ring) -> None:
        super().__init__(wire, ring)
        self._taken = 0
        self._at_once = max(1, ring.slots // 4)  # fewer wakings, and the sender never runs out of slots for it

    def receive(self, into: Sequence[memoryview]) -> int:
        """See `ReceiveLane`; ValueError for a payload that is larger than a slot."""
        size = size_of(into)
        self._check(size)
        checksum = self._ring.take(into)
        if size:
            self._ring.turn()
            self._taken += 1
            if self._taken == self._at_once:
                self.wire.send([_CREDIT * self._taken])
                self._taken = 0
        self.payload_bytes += size
        return checksum


def connect(wire: Wire, hello: dict[str, Any], options: LaneOptions) -> ShmReceive:
    """The receiver's part of the handshake, up to the sender's last word.

    Raises:
        LaneRefusedError: the sender cannot reach the ring, or there is no memory for it.
    """
    descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        ring = _make(descriptor, options)
        ring.nonce = secrets.token_bytes(_NONCE_BYTES)
        where = {"pid": os.getpid(), "fd": descriptor, "slots": ring.slots, "slot_bytes": ring.slot_bytes}
        wire.send_message({**hello, "ring": {**where, "nonce": ring.nonce.hex()}})
        wire.receive_message()  # the sender has mapped it
    finally:
        os.close(descriptor)
    return ShmReceive(wire, ring)


def _make(descriptor: int, options: LaneOptions) -> Ring:
    try:
        os.posix_fallocate(descriptor, 0, _SLOTS_AT + options.slots * options.slot_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return Ring(descriptor, options.slots, options.slot_bytes)
    except OSError as error:
        raise LaneRefusedError("host", f"no memory for a ring: {error.strerror}") from error


def accept(wire: Wire, hello: dict[str, Any], options: LaneOptions) -> ShmSend:
    """The sender's part of it.

    Raises:
        LaneRefusedError: the ring cannot be reached from here.
        GarbageError: it is not described as a ring is.
    """
    try:
        where = hello["ring"]
        pid, number, slots, slot_bytes = (int(where[name]) for name in ("pid", "fd", "slots", "slot_bytes"))
        nonce = bytes.fromhex(where["nonce"])
    except (KeyError, TypeError, ValueError) as error:
        raise GarbageError("no ring") from error
    if not fits(slots, slot_bytes):
        raise GarbageError("no ring")
    ring = _open(f"/proc/{pid}/fd/{number}", slots, slot_bytes)
    if len(nonce) != _NONCE_BYTES or not hmac.compare_digest(ring.nonce, nonce):
        ring.close()
        raise LaneRefusedError("host", "the ring is another than the receiver's: it is on another host")
    wire.send_message({})
    return ShmSend(wire, ring)


def _open(path: str, slots: int, slot_bytes: int) -> Ring:
    try:
        target = os.readlink(path)
        if not target.startswith(f"/memfd:{_NAME} "):  # looked at before it is opened: to open a device does things
            raise LaneRefusedError("host", f"{path} is no ring: the receiver is on another host")
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except LaneRefusedError:
        raise
    except FileNotFoundError as error:
        raise LaneRefusedError("host", f"no {path}: the receiver is on another host or in another container") from error
    except OSError as error:
        raise LaneRefusedError("host", f"{path} belongs to another user: {error.strerror}") from error
    try:
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise LaneRefusedError("host", f"{path} is not sealed")
        if os.fstat(descriptor).st_size != _SLOTS_AT + slots * slot_bytes:
            raise LaneRefusedError("host", f"{path} has another size than the receiver says")
        return Ring(descriptor, slots, slot_bytes)
    except LaneRefusedError:
        raise
    except OSError as error:
        raise LaneRefusedError("host", f"{path} cannot be mapped: {error.strerror}") from error
    finally:
        os.close(descriptor)
