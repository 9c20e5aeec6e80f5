"""Both ends of lanes in one process: a server, a pool, threads that wait in them, and what must not leak."""

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from joinwise.actors.kv.lanes.lane import HEADER_BYTES
from joinwise.actors.kv.lanes.pool import LanePool
from joinwise.actors.kv.lanes.server import LaneServer
from joinwise.actors.kv.lanes.tcp import TcpReceive, TcpSend

if TYPE_CHECKING:
    from joinwise.actors.tls import Certificates

TOKEN = "a token"


def header(number: int) -> bytes:
    """The header of one frame, that can be told from all others."""
    return number.to_bytes(8, "little") * (HEADER_BYTES // 8)


def eventually(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Wait for a condition that other threads make true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.002)


class Call:
    """A call on a thread of its own.

    Args:
        function: what to call.
        arguments: with what.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._function, self._arguments = function, arguments
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def result(self, seconds: float = 10.0) -> Any:
        """What it returned or raised; it must end within these seconds."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"{self._function} does not end"
        if self._error is not None:
            raise self._error
        return self._result

    def error(self, seconds: float = 10.0) -> BaseException:
        """What it raised; it must end within these seconds, and badly."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"{self._function} does not end"
        assert self._error is not None, f"{self._function} ended well"
        return self._error

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._thread.is_alive()

    def wait_until_stuck(self) -> None:
        """Until the thread sleeps, and has slept each time for a while, or has ended."""
        asleep = 0

        def stuck() -> bool:
            nonlocal asleep
            asleep = asleep + 1 if self._asleep() else 0
            return asleep >= 10 or not self.running

        eventually(stuck, f"{self._function} waits for something")

    def _asleep(self) -> bool:
        frame = sys._current_frames().get(self._thread.ident or 0)
        if frame is None or frame.f_code is Call._run.__code__:
            return False
        try:
            state = Path(f"/proc/self/task/{self._thread.native_id}/stat").read_text().rsplit(") ", 1)[1][0]
        except FileNotFoundError:
            return False
        return state == "S"

    def _run(self) -> None:
        try:
            self._result = self._function(*self._arguments)
        except BaseException as error:
            self._error = error


class Rig:
    """A server and a pool that may talk to each other.

    Args:
        kind: of the lanes to make.
        certificates: for TLS on both ends.
        server: changes to the server's arguments.
        pool: changes to the pool's.
    """

    def __init__(
        self,
        kind: str,
        *,
        certificates: "Certificates | None" = None,
        server: dict[str, Any] | None = None,
        pool: dict[str, Any] | None = None,
    ) -> None:
        self.kind = kind
        ours: dict[str, Any] = {"token": TOKEN}
        theirs: dict[str, Any] = {"token": TOKEN}
        if certificates is not None:
            ours["tls"] = certificates.server_context()
            theirs.update(tls=certificates.client_context, server_name=certificates.server_name)
        self.server = LaneServer("127.0.0.1:0", **{**ours, **(server or {})})
        self.pool = LanePool(**{**theirs, **(pool or {})})

    def lease(self) -> TcpReceive:
        """The receiver's end of a lane."""
        return self.pool.lease(self.server.address, self.kind)

    def pair(self) -> tuple[TcpSend, TcpReceive]:
        """Both ends of a lane, claimed and leased."""
        receive = self.lease()
        return self.server.claim(receive.lane_id, 5.0), receive

    def give_back(self, send: TcpSend, receive: TcpReceive, *, clean: bool = True) -> None:
        """Both ends of a lane."""
        self.server.give_back(send, clean=clean)
        self.pool.give_back(receive, clean=clean)

    def close(self) -> None:
        """Both."""
        self.pool.close()
        self.server.stop()


def send_header_only(lane: TcpSend, number: int, size: int) -> None:
    """What a sender that stalls in the middle of a frame has sent."""
    announced = size.to_bytes(8, "little") if lane.kind == "nccl" else b""
    lane.wire.send([header(number), announced])


@contextmanager
def nothing_leaks() -> Iterator[None]:
    """Threads, descriptors and rings are as many afterwards as before."""

    def held() -> tuple[int, int, int]:
        rings = Path("/proc/self/maps").read_text().count("memfd:joinwise-lane")
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), rings

    before = held()
    yield
    waits = 0

    def free() -> bool:
        nonlocal waits
        waits += 1
        if waits == 20:
            gc.collect()  # it takes its time, and is seldom needed
        return all(now <= then for now, then in zip(held(), before, strict=True))

    eventually(free, "what was held is free")
