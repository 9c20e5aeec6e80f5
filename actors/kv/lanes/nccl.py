"""The `nccl` kind: payloads travel by torch.distributed, between the two ranks of a process group of the lane's own.

Gloo between CPUs, NCCL between GPUs; the default process group, which belongs to the engine, is never
touched. The group's rendezvous goes over the lane's socket (`SocketStore`), behind its token and its TLS,
so nothing else listens for it. The payloads themselves go over connections that Gloo and NCCL open between
the same two addresses, neither encrypted nor authenticated: use this kind in networks that are trusted.
"""

import contextlib
import struct
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from joinwise.actors.kv.lanes.lane import HEADER_BYTES, LaneClosedError, LaneOptions, LaneRefusedError
from joinwise.actors.kv.lanes.tcp import TcpLane, TcpReceive, TcpSend, size_of
from joinwise.actors.kv.lanes.wire import GarbageError, Wire
from joinwise.kernels import kv_hash

_SENDER, _RECEIVER = 0, 1
_FOREVER = timedelta(days=3650)
_SETUP_S = 5.0
_POLL_S = 2e-5
_SIZE = struct.Struct("<Q")
"""The payload's size, behind the header: ranks that disagree about it would end their processes."""


class Group(Protocol):
    """Two ranks. RuntimeError from `send` and `receive`: the peer has gone, or the lane was interrupted."""

    def send(self, tensor: torch.Tensor) -> None:
        """Send one tensor; it may change when this returns."""

    def receive(self, tensor: torch.Tensor) -> None:
        """Fill one tensor; nothing writes to it when this has returned or raised."""

    def interrupt(self) -> None:
        """From any thread, when the lane's socket has ended: end what waits in `send` or `receive`."""

    def close(self) -> None:
        """When nobody uses it."""


class SocketStore(dist.Store):
    """The rendezvous of two ranks over the lane's socket: what one sets, the other reads."""

    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self._wire = wire
        self._values: dict[str, bytes] = {}
        self._peer_done = False

    def set(self, key: str, value: bytes) -> None:
        """Tell both ends."""
        self._values[key] = bytes(value)
        self._wire.send_message({"key": key, "value": bytes(value).hex()})

    def get(self, key: str) -> bytes:
        """The value, once either end has set it."""
        while key not in self._values:
            self._read()
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Until all are set; the socket's own limit holds, not `timeout`."""
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        """Whether all are set."""
        return all(key in self._values for key in keys)

    def finish(self) -> None:
        """Leave the socket clean: both ends have said all they had to say."""
        self._wire.send_message({"done": True})
        while not self._peer_done:
            self._read()

    def _read(self) -> None:
        message = self._wire.receive_message()
        if message.get("done"):
            self._peer_done = True
            return
        try:
            self._values[message["key"]] = bytes.fromhex(message["value"])
        except (KeyError, TypeError, ValueError) as error:
            raise GarbageError("no value for the store") from error


class GlooGroup:
    """Between CPUs. Gloo notices by itself that its peer's process has ended."""

    def __init__(self, store: dist.Store, rank: int, local_host: str) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=local_host)]
        options._threads = 1
        options._timeout = timedelta(seconds=_SETUP_S)
        self._peer = 1 - rank
        self._group = dist.ProcessGroupGloo(store, rank, 2, options)

    def send(self, tensor: torch.Tensor) -> None:
        """See `Group`."""
        self._group.send([tensor], self._peer, 0).wait(_FOREVER)

    def receive(self, tensor: torch.Tensor) -> None:
        """See `Group`."""
        self._group.recv([tensor], self._peer, 0).wait(_FOREVER)

    def interrupt(self) -> None:
        """Gloo has no abort, but a wait that runs into its timeout closes the connection under all others."""
        with contextlib.suppress(RuntimeError):
            self._group.recv([torch.empty(1, dtype=torch.uint8)], self._peer, 1).wait(timedelta(milliseconds=1))

    def close(self) -> None:
        """Nothing but the last reference ends a Gloo group."""


class NcclGroup:
    """Between GPUs. NCCL does not say that its peer has gone, so whoever waits for it looks at the lane's socket.

    Processes with such lanes want `TORCH_NCCL_ASYNC_ERROR_HANDLING=0`: otherwise torch's watchdog ends the
    process if it is the first to see that the peer has died.
    """

    def __init__(self, store: dist.Store, rank: int, wire: Wire, device: torch.device) -> None:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _FOREVER
        self._wire, self._device, self._peer = wire, device, 1 - rank
        self._stream = torch.cuda.Stream(device)
        self._group = dist.ProcessGroupNCCL(store, rank, 2, options)
        first = torch.zeros(1, dtype=torch.uint8, device=device)  # its first use makes the communicator
        (self.send if rank == _SENDER else self.receive)(first)

    def send(self, tensor: torch.Tensor) -> None:
        """See `Group`; sends what the device's current stream will have written."""
        self._run(self._group.send, tensor)

    def receive(self, tensor: torch.Tensor) -> None:
        """See `Group`."""
        self._run(self._group.recv, tensor)

    def interrupt(self) -> None:
        """The thread that waits sees the socket end."""

    def close(self) -> None:
        """Free the communicator without a word to the peer, who may be gone."""
        self._group.abort()

    def _run(self, operation: Any, tensor: torch.Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            operation([tensor], self._peer, 0).wait()  # orders streams, and returns at once
            done = torch.cuda.Event()
            done.record(self._stream)
        while not done.query():
            if self._wire.ended():
                self._group.abort()
                self._stream.synchronize()  # its kernels end, so that nothing is written any more
                raise RuntimeError("the peer has gone, or the lane was interrupted")
            time.sleep(_POLL_S)


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
    return NcclReceive(wire, _meet(wire, _RECEIVER, device), device)


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
    return NcclSend(wire, _meet(wire, _SENDER, device), device)


def _identity(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return f"cuda:{torch.cuda.get_device_properties(device).uuid}"


def _meet(wire: Wire, rank: int, device: torch.device) -> Group:
    store = SocketStore(wire)
    try:
        group: Group
        if device.type == "cpu":
            group = GlooGroup(store, rank, wire.local_host)
        else:
            group = NcclGroup(store, rank, wire, device)
        store.finish()
        return group
    except RuntimeError as error:
        raise LaneRefusedError("device", f"no process group: {error}") from error
