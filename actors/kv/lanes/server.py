"""The sender's end of lanes: a port where receivers connect, and the lanes that have come of it.

Whoever connects has to show the cluster's token within a few seconds. Each handshake has a thread of its
own, so none can hold up another; when too many strangers say nothing, the one who came first has to go.
"""

import hmac
import logging
import secrets
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Collection
from typing import Any

from joinwise.actors.kv.lanes import kinds as lane_kinds
from joinwise.actors.kv.lanes.lane import LaneClosedError, LaneOptions, LaneRefusedError
from joinwise.actors.kv.lanes.table import LaneTable
from joinwise.actors.kv.lanes.tcp import TcpSend
from joinwise.actors.kv.lanes.wire import GarbageError, Wire, split_address

logger = logging.getLogger(__name__)

_TICK_S = 1.0
_BACKLOG = 128


class LaneServer:
    """Listens for lanes.

    Args:
        bind: address to listen on, `host:0` for a free port.
        token: what receivers must show; empty lets everybody in.
        tls: for TLS on every lane's socket; asks for client certificates where it says so.
        kinds: kinds of lanes to offer.
        max_lanes: lanes at once; beyond it the lane idle for longest is closed, or the new one refused.
        max_strangers: connections at once that have not shown the token.
        handshake_timeout_s: seconds that a handshake may take.
        idle_s: seconds for which a lane may be idle.
        options: see `LaneOptions`.

    Raises:
        OSError: the address cannot be listened on.
    """

    def __init__(
        self,
        bind: str,
        *,
        token: str = "",
        tls: ssl.SSLContext | None = None,
        kinds: Collection[str] = lane_kinds.KINDS,
        max_lanes: int = 1024,
        max_strangers: int = 64,
        handshake_timeout_s: float = 5.0,
        idle_s: float = 300.0,
        options: LaneOptions | None = None,
    ) -> None:
        self._token, self._tls = token.encode(), tls
        self._kinds = {kind: lane_kinds.load(kind) for kind in kinds}
        self._options = options or LaneOptions()
        self._max_strangers, self._handshake_timeout_s = max_strangers, handshake_timeout_s
        self._table = LaneTable(max_lanes, idle_s)
        self._tick_s = min(_TICK_S, idle_s / 2)
        self.instance = secrets.token_hex(8)
        """Names this server; a restarted one has another."""
        self.refused: Counter[str] = Counter()
        """Connections that did not become lanes, by reason."""
        self._lock = threading.Lock()
        self._strangers: dict[Wire, None] = {}  # in the order of their coming
        self._handshakes: dict[threading.Thread, Wire] = {}
        self._stopped = threading.Event()
        host, port = split_address(bind)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        self._listener.settimeout(self._tick_s)
        self.address = f"{bind.rsplit(':', 1)[0]}:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._listen, name="kv-lanes", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Lanes that there are, in use or idle."""
        return len(self._table)

    def claim(self, lane_id: int, timeout_s: float) -> TcpSend:
        """Take a lane for one transfer; waits for the one before to give it back. `give_back` must follow.

        Raises:
            LaneClosedError: it does not exist (any more), or its user keeps it.
        """
        return self._table.claim(lane_id, timeout_s)

    def give_back(self, lane: TcpSend, *, clean: bool) -> None:
        """The transfer that has claimed a lane is done with it.

        Args:
            lane: the lane.
            clean: every frame that was begun has been sent whole; otherwise the lane is closed.

        Raises:
            ValueError: the lane is not claimed.
        """
        self._table.give_back(lane, clean=clean)

    def stop(self) -> None:
        """End the listener, handshakes and idle lanes; interrupt lanes in use, for `give_back` to close. Idempotent."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes its thread
        self._thread.join()
        self._listener.close()
        self._table.close()
        with self._lock:
            handshakes = dict(self._handshakes)
        for thread, wire in handshakes.items():
            wire.interrupt()
            thread.join()

    def _listen(self) -> None:
        swept = time.monotonic()
        while not self._stopped.is_set():
            try:
                connected, _ = self._listener.accept()
            except TimeoutError:
                pass
            except OSError as error:
                if not self._stopped.is_set():
                    logger.warning("no lane can be accepted: %s", error)
                    self._stopped.wait(self._tick_s / 10)  # out of descriptors, perhaps: do not spin
            else:
                self._greet(connected)
            if time.monotonic() - swept >= self._tick_s:
                self._table.sweep()
                swept = time.monotonic()

    def _greet(self, connected: socket.socket) -> None:
        """Begin a handshake on a thread of its own."""
        try:
            if self._tls is not None:
                connected = self._tls.wrap_socket(connected, server_side=True, do_handshake_on_connect=False)
            wire = Wire(connected, self._options.socket_buffer_bytes)
        except OSError:
            connected.close()
            self._count("gone")
            return
        wire.limit(time.monotonic() + self._handshake_timeout_s)
        thread = threading.Thread(target=self._handshake, args=(wire,), name="kv-lane-handshake", daemon=True)
        with self._lock:
            if len(self._strangers) >= self._max_strangers:
                first = next(iter(self._strangers))
                del self._strangers[first]
                first.interrupt()
            self._strangers[wire] = None
            self._handshakes[thread] = wire
            try:
                thread.start()
            except RuntimeError:  # no more threads
                del self._strangers[wire], self._handshakes[thread]
                self.refused["threads"] += 1
                wire.close()

    def _handshake(self, wire: Wire) -> None:
        opened = False
        try:
            wire.secure()
            hello = wire.receive_message()
            self._admit(hello)
            with self._lock:
                self._strangers.pop(wire, None)
            self._open(wire, hello)
            opened = True
        except LaneRefusedError as refusal:
            self._refuse(wire, refusal)
        except GarbageError:
            self._count("garbage")
        except LaneClosedError as error:
            causes = {TimeoutError: "timeout", ssl.SSLError: "tls"}
            self._count(next((reason for kind, reason in causes.items() if isinstance(error.__cause__, kind)), "gone"))
        finally:
            if not opened:
                wire.close()
            with self._lock:
                self._strangers.pop(wire, None)
                del self._handshakes[threading.current_thread()]

    def _open(self, wire: Wire, hello: dict[str, Any]) -> None:
        """Make a lane of a connection that may have one; its peer hears of it before any transfer can."""
        self._table.reserve()
        try:
            lane = self._kinds[hello["kind"]].accept(wire, hello, self._options)
        except BaseException:
            self._table.cancel()
            raise
        self._table.add(lane)
        told = False
        try:
            wire.send_message({"lane_id": lane.lane_id, "instance": self.instance})
            wire.limit(None)
            told = True
        finally:
            self._table.give_back(lane, clean=told)

    def _admit(self, hello: dict[str, Any]) -> None:
        kind, token = hello.get("kind"), hello.get("token")
        if not isinstance(kind, str) or not isinstance(token, str):
            raise GarbageError("no greeting")
        if self._token and not hmac.compare_digest(token.encode(), self._token):
            raise LaneRefusedError("token", "no token, or one that is not known")
        if kind not in self._kinds:
            raise LaneRefusedError("kind", f"no lanes of kind {kind!r} here, only {', '.join(sorted(self._kinds))}")

    def _refuse(self, wire: Wire, refusal: LaneRefusedError) -> None:
        self._count(refusal.reason)
        logger.warning("%s", str(refusal))  # a log that keeps the error keeps its frames
        try:
            wire.send_message({"refused": refusal.reason, "detail": refusal.detail})
        except LaneClosedError:
            pass  # it has not waited for the answer

    def _count(self, reason: str) -> None:
        with self._lock:
            self.refused[reason] += 1
