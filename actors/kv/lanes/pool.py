"""The receiver's end of lanes: leased for one transfer at a time, kept for the next."""

import socket
import ssl
import threading
import time
from collections.abc import Callable

from joinwise.actors.kv.lanes import kinds
from joinwise.actors.kv.lanes.lane import LaneClosedError, LaneOptions
from joinwise.actors.kv.lanes.tcp import TcpReceive
from joinwise.actors.kv.lanes.wire import GarbageError, Wire, split_address

_TICK_S = 10.0


class LanePool:
    """Lanes to all peers; every method from any thread.

    Args:
        token: what to show.
        tls: gives the context for one connection; None for no TLS.
        server_name: name that a peer's certificate must carry; empty checks the address that was dialled.
        connect_timeout_s: seconds that a connection and its handshake may take.
        idle_s: seconds for which a lane is kept; less than the peers' own, so that they need not close it.
        options: see `LaneOptions`.
    """

    def __init__(
        self,
        *,
        token: str = "",
        tls: Callable[[], ssl.SSLContext] | None = None,
        server_name: str = "",
        connect_timeout_s: float = 5.0,
        idle_s: float = 240.0,
        options: LaneOptions | None = None,
    ) -> None:
        self._token, self._tls, self._server_name = token, tls, server_name
        self._connect_timeout_s, self._idle_s = connect_timeout_s, idle_s
        self._options = options or LaneOptions()
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, str], list[tuple[TcpReceive, float]]] = {}  # the latest last
        self._leased: dict[TcpReceive, tuple[str, str]] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sweep_until_closed, name="kv-lane-pool", daemon=True)
        self._thread.start()

    def lease(self, address: str, kind: str) -> TcpReceive:
        """A lane for one transfer: an idle one whose peer is there, or a new one. `give_back` must follow.

        Args:
            address: `LaneServer.address` of the sender.
            kind: one of `kinds.KINDS`.

        Raises:
            LaneRefusedError: the peer does not want it; another kind may do.
            LaneClosedError: the peer cannot be reached, or says nothing; or the pool is closed.
        """
        place = (address, kind)
        while (lane := self._take(place)) is not None:
            if lane.healthy():
                break
            lane.close()
        lane = lane or self._connect(address, kind)
        with self._lock:
            if not self._stopped.is_set():
                self._leased[lane] = place
                return lane
        lane.close()
        raise LaneClosedError("the pool is closed")

    def give_back(self, lane: TcpReceive, *, clean: bool) -> None:
        """The transfer that has leased a lane is done with it.

        Args:
            lane: the lane.
            clean: every frame that its peer has begun has been received whole; otherwise the lane is closed.

        Raises:
            ValueError: the lane is not leased.
        """
        with self._lock:
            place = self._leased.pop(lane, None)
            if place is None:
                raise ValueError("the lane is not leased")
            if clean and not self._stopped.is_set():
                self._idle.setdefault(place, []).append((lane, time.monotonic()))
                return
        lane.close()

    def close(self) -> None:
        """Close idle lanes, and interrupt the leased ones, which `give_back` will close."""
        with self._lock:
            self._stopped.set()
            leased = list(self._leased)
        self._close_idle(lambda place, lane, since: True)
        for lane in leased:
            lane.interrupt()
        self._thread.join()

    def _take(self, place: tuple[str, str]) -> TcpReceive | None:
        with self._lock:
            lanes = self._idle.get(place)
            if not lanes:
                return None
            lane, _ = lanes.pop()
            if not lanes:
                del self._idle[place]
            return lane

    def _sweep_until_closed(self) -> None:
        while not self._stopped.wait(min(_TICK_S, self._idle_s / 2)):
            oldest = time.monotonic() - self._idle_s
            self._close_idle(lambda place, lane, since: since < oldest or not lane.healthy())  # noqa: B023

    def _close_idle(self, ended: Callable[[tuple[str, str], TcpReceive, float], bool]) -> None:
        """Close the idle lanes of which `ended` says so."""
        with self._lock:
            for place, lanes in list(self._idle.items()):
                kept = []
                for lane, since in lanes:
                    if ended(place, lane, since):
                        lane.close()
                    else:
                        kept.append((lane, since))
                self._idle[place] = kept
                if not kept:
                    del self._idle[place]

    def _connect(self, address: str, kind: str) -> TcpReceive:
        way = kinds.load(kind)
        wire = self._dial(address)
        lane = None
        try:
            wire.limit(time.monotonic() + self._connect_timeout_s)
            wire.secure()
            lane = way.connect(wire, {"kind": kind, "token": self._token}, self._options)
            answer = wire.receive_message()
            lane.lane_id, lane.instance = answer.get("lane_id", 0), answer.get("instance", "")
            if not isinstance(lane.lane_id, int) or not isinstance(lane.instance, str) or not lane.instance:
                raise GarbageError("no lane")
            wire.limit(None)
        except BaseException as error:
            (lane or wire).close()
            if isinstance(error, GarbageError):
                raise LaneClosedError(f"{address} does not answer as a worker with lanes") from error
            raise
        # A peer with another name has restarted: what there was to the old one is dead.
        self._close_idle(lambda place, each, since: place[0] == address and each.instance != lane.instance)
        return lane

    def _dial(self, address: str) -> Wire:
        host, port = split_address(address)
        connected = None
        try:
            connected = socket.create_connection((host, port), self._connect_timeout_s)
            if self._tls is not None:
                name = self._server_name or host
                connected = self._tls().wrap_socket(connected, server_hostname=name, do_handshake_on_connect=False)
            return Wire(connected, self._options.socket_buffer_bytes)
        except OSError as error:
            if connected is not None:
                connected.close()
            raise LaneClosedError(f"{address} cannot be reached: {error}") from error
