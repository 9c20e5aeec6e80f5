"""The socket of a lane: whole pieces in and out, messages of the handshake, and an end from any thread."""

import contextlib
import functools
import json
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

from joinwise.actors.kv.lanes.lane import LaneClosedError, LaneRefusedError

LANE_VERSION = 1
_ENVELOPE = struct.Struct("<4sHHI")  # magic, version, zero, bytes of JSON that follow
_MAGIC = b"JWLN"
_MAX_MESSAGE = 4096
_MAX_PIECES = 1024  # IOV_MAX of Linux
_SAME_HOST_BUFFERS = 512 << 10, 1 << 20
"""SO_SNDBUF and SO_RCVBUF within a host: what is under way stays near the cores, where the kernel's own choice grows
to tens of megabytes."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[host]:port`."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _ends(operation: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """What ends the connection ends the lane; the cause stays known."""

    @functools.wraps(operation)
    def ending(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return operation(*args, **kwargs)
        except LaneClosedError:
            raise
        except OSError as error:
            raise LaneClosedError(f"the lane has ended: {error or type(error).__name__}") from error

    return ending


class GarbageError(ValueError):
    """What came is no message of a lane's handshake."""


class Wire:
    """A connected stream socket, perhaps under TLS.

    One thread at a time sends and receives, and closes in the end; `interrupt` may come from any.

    Args:
        connected: the socket; the wire's from now on.
        buffer_bytes: see `LaneOptions.socket_buffer_bytes`.
    """

    def __init__(self, connected: socket.socket, buffer_bytes: int = 0) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        same_host = connected.getpeername()[0] == connected.getsockname()[0]
        if same_host:  # nothing is ever congested; a host's BBR would pace the lane all the same, to half its speed
            with contextlib.suppress(OSError):  # a sandbox may know no other
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        if buffer_bytes or same_host:
            sending, receiving = (buffer_bytes, buffer_bytes) if buffer_bytes else _SAME_HOST_BUFFERS
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sending)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receiving)
        self._socket = connected
        self._tls = isinstance(connected, ssl.SSLSocket)
        self._all = 0 if self._tls else socket.MSG_WAITALL
        self._deadline: float | None = None
        self._ending = threading.Lock()
        self._closed = False
        self.interrupted = False

    @property
    def local_host(self) -> str:
        """This end's address, as the peer sees it when nobody translates addresses."""
        return str(self._socket.getsockname()[0])

    def limit(self, deadline: float | None) -> None:
        """From now on waiting ends at this monotonic time; None: never."""
        self._deadline = deadline
        if deadline is None:
            self._socket.settimeout(None)

    @_ends
    def secure(self) -> None:
        """Do the TLS handshake, where there is TLS.

        Raises:
            LaneClosedError: it failed; the cause says how.
        """
        if isinstance(self._socket, ssl.SSLSocket):
            self._arm()
            self._socket.do_handshake()

    @_ends
    def send(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Send everything, in order.

        Raises:
            LaneClosedError: the connection has ended; part of it may have gone.
        """
        if self._tls:
            for piece in pieces:
                self._arm()
                self._socket.sendall(piece)
            return
        for start in range(0, len(pieces), _MAX_PIECES):
            rest = pieces[start : start + _MAX_PIECES]
            while rest:
                self._arm()
                rest = _after(rest, self._socket.sendmsg(rest))

    @_ends
    def receive_into(self, views: Sequence[memoryview]) -> None:
        """Fill these views, in order.

        Raises:
            LaneClosedError: the connection has ended; part of them may have been written.
        """
        for start in range(0, len(views), _MAX_PIECES):
            rest = _after(views[start : start + _MAX_PIECES], 0)
            while rest:
                self._arm()
                if self._tls or len(rest) == 1:
                    count = self._socket.recv_into(rest[0], 0, self._all)
                else:
                    count = self._socket.recvmsg_into(rest, 0, self._all)[0]
                rest = _after(rest, _some(count))

    @_ends
    def receive(self, size: int) -> bytes:
        """The next `size` bytes; errors as for `receive_into`."""
        data = b""
        while len(data) < size:
            self._arm()
            more = self._socket.recv(size - len(data), self._all)
            _some(len(more))
            data += more
        return data

    @_ends
    def receive_some(self, most: int) -> bytes:
        """What there is, at least one byte; errors as for `receive_into`."""
        self._arm()
        data = self._socket.recv(most)
        _some(len(data))
        return data

    def drain(self, most: int = 4096) -> bytes:
        """What there is, without waiting; empty when there is nothing.

        Raises:
            LaneClosedError: the peer has ended the connection.
        """
        if self._closed:
            raise LaneClosedError("this end has closed the lane")
        self._socket.setblocking(False)
        try:
            return self.receive_some(most)
        except LaneClosedError as error:
            if isinstance(error.__cause__, (BlockingIOError, ssl.SSLWantReadError)):
                return b""
            raise
        finally:
            self._socket.setblocking(True)

    def ended(self) -> bool:
        """Whether either end has ended the connection; looks without waiting, and reads nothing."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return self.interrupted or bool(poll.poll(0))

    def send_message(self, message: dict[str, Any]) -> None:
        """Send one message of the handshake; errors as for `send`."""
        body = json.dumps(message, separators=(",", ":")).encode()
        if len(body) > _MAX_MESSAGE:
            raise ValueError(f"a message of {len(body)} bytes, {_MAX_MESSAGE} is the most")
        self.send([_ENVELOPE.pack(_MAGIC, LANE_VERSION, 0, len(body)) + body])

    def receive_message(self) -> dict[str, Any]:
        """Wait for one message of the handshake.

        Raises:
            LaneClosedError: none came.
            LaneRefusedError: the peer says no, or speaks another version.
            GarbageError: something else came.
        """
        magic, version, _, size = _ENVELOPE.unpack(self.receive(_ENVELOPE.size))
        if magic != _MAGIC or size > _MAX_MESSAGE:
            raise GarbageError("no message of a lane")
        body = self.receive(size)
        try:
            message = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise GarbageError("no message of a lane") from error
        if not isinstance(message, dict):
            raise GarbageError("no message of a lane")
        if "refused" in message:  # understood whatever the version
            raise LaneRefusedError(str(message["refused"]), str(message.get("detail", "")))
        if version != LANE_VERSION:
            raise LaneRefusedError("version", f"the peer speaks version {version} of lanes, this end {LANE_VERSION}")
        return message

    def interrupt(self) -> None:
        """End the connection from any thread; whoever waits in it gets `LaneClosedError`."""
        with self._ending:
            self.interrupted = True
            if not self._closed:
                try:
                    # Of the socket below TLS: an SSLSocket's own would go on without TLS.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
                except OSError:
                    pass  # the peer was faster

    def close(self) -> None:
        """End the connection and free the socket; only when no thread uses it. Idempotent."""
        self.interrupt()
        with self._ending:
            self._closed = True
            self._socket.close()

    def _arm(self) -> None:
        """Before each wait: the rest of the time, and no more data once this end has been interrupted."""
        if self.interrupted:
            raise LaneClosedError("the lane was interrupted")
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            self._socket.settimeout(left)


def _some(count: int) -> int:
    """A count of bytes received; none means that the peer has closed the connection."""
    if not count:
        raise LaneClosedError("the peer has closed the lane")
    return count


def _after(views: Sequence[Any], count: int) -> Sequence[Any]:
    """The views without their first `count` bytes, the first of them not empty; nothing when no byte is left."""
    if sum(map(len, views)) == count:
        return ()
    for index, view in enumerate(views):
        if len(view) > count:
            rest = list(views[index:])
            rest[0] = memoryview(view)[count:]
            return rest
        count -= len(view)
    return ()
