"""Process groups of two ranks for `nccl` lanes: Gloo between CPUs, NCCL between GPUs, met over the lane's socket."""

import contextlib
import time
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from joinwise.actors.kv.lanes.lane import LaneRefusedError
from joinwise.actors.kv.lanes.wire import GarbageError, Wire

SENDER, RECEIVER = 0, 1
_FOREVER = timedelta(days=3650)
_SETUP_S = 5.0
_POLL_S = 2e-5


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
        (self.send if rank == SENDER else self.receive)(first)

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


def meet(wire: Wire, rank: int, device: torch.device) -> Group:
    """The group of a lane; both ends call this at once.

    Args:
        wire: the lane's socket, on which they find each other.
        rank: `SENDER` or `RECEIVER`.
        device: where payloads are.

    Raises:
        LaneRefusedError: they have not found each other.
    """
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
