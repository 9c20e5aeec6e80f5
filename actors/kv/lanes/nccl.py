"""The `nccl` kind: payloads travel by torch.distributed, between the two ranks of a process group of the lane's own.

Gloo between CPUs, NCCL between GPUs; the default process group, which belongs to the engine, is never
touched. The group's rendezvous goes over the lane's socket (`groups.SocketStore`), behind its token and its TLS,
so nothing else listens for it. The payloads themselves go over connections that Gloo and NCCL open between
the same two addresses, neither encrypted nor authenticated: use this kind in networks that are trusted.
"""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from joinwise.actors.kv.lanes.groups import RECEIVER, SENDER, Group, meet
from joinwise.actors.kv.lanes.lane import HEADER_BYTES, LaneClosedError, LaneOptions, LaneRefusedError
from joinwise.actors.kv.lanes.tcp import TcpLane, TcpReceive, TcpSend, size_of
from joinwise.actors.kv.lanes.wire import Wire
from joinwise.kernels import kv_hash

_SIZE = struct.Struct("<Q")
"""The payload's size, behind the header: ranks that disagree about it would end their processes."""


class _NcclLane(TcpLane):
    """What both ends have in common."""

    kind = "nccl"

    def __init__(self, wire: Wire, group: Group, device: torch.device) -> None:
        super().__init__(wire)
        self._group: Group | None = group
        self._device = device
        self._staging = np.empty(0, np.uint8)

    def interrupt(self) -> None:
        """See `Lane`."""
        super().interrupt()
        if (group := self._group) is not None:
            group.interrupt()

    def close(self) -> None:
        """See `Lane`."""
        super().close()
        group, self._group = self._group, None
        if group is not None:
            group.close()

    def _open_group(self) -> Group:
        if self._group is None or self.wire.interrupted:
            raise LaneClosedError("the lane was interrupted")
        return self._group

    def _host(self, size: int) -> np.ndarray:
        """This many bytes of main memory; it grows to the largest payload."""
        if self._staging.size < size:
            self._staging = np.empty(size, np.uint8)
        return self._staging[:size]


class NcclSend(_NcclLane, TcpSend):
    """The sender's end."""

    def send(self, header: bytes, payload: Sequence[memoryview]) -> None:
        """See `SendLane`; a payload in several pieces, or in read-only memory, is copied once."""
        if len(payload) == 1 and not payload[0].readonly and payload[0].nbytes:
            gathered = np.frombuffer(payload[0], np.uint8)
        else:
            gathered = self._host(size_of(payload))
            kv_hash.gather(payload, gathered.data)
        self.send_tensor(header, torch.from_numpy(gathered).to(self._device))

    def send_tensor(self, header: bytes, payload: torch.Tensor) -> None:
        """`send` for a payload of one contiguous uint8 tensor on the lane's device; maybe an empty one."""
        group = self._open_group()
        self.wire.send([header, _SIZE.pack(payload.numel())])
        if payload.numel():
            if self.wire.ended():  # Gloo may miss that nobody is there any more
                raise LaneClosedError("the peer has closed the lane")
            try:
                group.send(payload)
            except RuntimeError as error:
                raise LaneClosedError(f"the lane has ended: {error}") from error
        self.payload_bytes += payload.numel()


class NcclReceive(_NcclLane, TcpReceive):
    """The receiver's end."""

    _announced = 0

    def receive_header(self) -> bytes:
        """See `ReceiveLane`."""
        header = self.wire.receive(HEADER_BYTES + _SIZE.size)
        (self._announced,) = _SIZE.unpack_from(header, HEADER_BYTES)
        return header[:HEADER_BYTES]

    def receive(self, into: Sequence[memoryview]) -> int:
        """See `ReceiveLane`; a payload for several views is copied once."""
        pieces = [piece for piece in into if piece.nbytes]
        whole = len(pieces) == 1
        gathered = np.frombuffer(pieces[0], np.uint8) if whole else self._host(size_of(pieces))
        host = torch.from_numpy(gathered)
        tensor = host.to(self._device)
        self.receive_tensor(tensor)
        if tensor is not host:
            host.copy_(tensor)
        return kv_hash.digest(pieces) if whole else kv_hash.scatter(gathered.data, pieces)

    def receive_tensor(self, into: torch.Tensor) -> None:
        """`receive` into one contiguous uint8 tensor on the lane's device."""
        group = self._open_group()
        if into.numel() != self._announced:
            raise ValueError(f"room for {into.numel()} bytes, the payload has {self._announced}")
        self._announced = 0
        if into.numel():
            try:
                group.receive(into)
            except RuntimeError as error:
                raise LaneClosedError(f"the lane has ended: {error}") from error
        self.payload_bytes += into.numel()


def connect(wire: Wire, hello: dict[str, Any], options: LaneOptions) -> NcclReceive:
    """The receiver's part of the handshake, up to the sender's last word."""
    device = torch.device(options.device)
    wire.send_message({**hello, "device": _identity(device)})
    wire.receive_message()  # the sender agrees to meet
    return NcclReceive(wire, meet(wire, RECEIVER, device), device)


def accept(wire: Wire, hello: dict[str, Any], options: LaneOptions) -> NcclSend:
    """The sender's part of it.

    Raises:
        LaneRefusedError: nothing connects the two devices.
    """
    device = torch.device(options.device)
    mine, theirs = _identity(device), str(hello.get("device"))
    if mine.split(":")[0] != theirs.split(":")[0]:
        raise LaneRefusedError("device", f"the KV is on {mine} here and on {theirs} there")
    if mine == theirs != "cpu":
        raise LaneRefusedError("device", "NCCL does not connect a GPU with itself")
    wire.send_message({})
    return NcclSend(wire, meet(wire, SENDER, device), device)


def _identity(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return f"cuda:{torch.cuda.get_device_properties(device).uuid}"
