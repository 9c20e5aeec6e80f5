"""The sender's lanes: which there are, and which transfer has which.

A lane has one user at a time. Its number is bounded, and one that nobody uses is closed when its peer has
gone, when it has been idle for long, and, the one idle for longest first, when there is no room for another.
"""

import secrets
import threading
import time
from dataclasses import dataclass

from joinwise.actors.kv.lanes.lane import LaneClosedError, LaneRefusedError
from joinwise.actors.kv.lanes.tcp import TcpSend


@dataclass
class _Entry:
    lane: TcpSend
    idle_since: float
    claimed: bool = False


class LaneTable:
    """All lanes of one sender; every method from any thread.

    Args:
        max_lanes: lanes at once, those included whose handshake is under way.
        idle_s: seconds for which a lane may be idle.
    """

    def __init__(self, max_lanes: int, idle_s: float) -> None:
        self._max_lanes, self._idle_s = max_lanes, idle_s
        self._changed = threading.Condition()
        self._entries: dict[int, _Entry] = {}
        self._reserved = 0
        self._closed = False

    def __len__(self) -> int:
        """Lanes that there are."""
        return len(self._entries)

    def reserve(self) -> None:
        """Keep room for one lane; `add` or `cancel` must follow.

        Raises:
            LaneRefusedError: all lanes are in use.
        """
        with self._changed:
            if len(self._entries) + self._reserved >= self._max_lanes:
                idle = [entry for entry in self._entries.values() if not entry.claimed]
                if not idle:
                    raise LaneRefusedError("full", f"{self._max_lanes} lanes are in use")
                self._close(min(idle, key=lambda entry: entry.idle_since))
            self._reserved += 1

    def cancel(self) -> None:
        """Give back what `reserve` has kept."""
        with self._changed:
            self._reserved -= 1

    def add(self, lane: TcpSend) -> None:
        """Put a lane where `reserve` has kept room. It gets its `lane_id` and is claimed: `give_back` must follow.

        Raises:
            LaneClosedError: the table was closed meanwhile, and so is the lane.
        """
        with self._changed:
            self._reserved -= 1
            if self._closed:
                lane.close()
                raise LaneClosedError("this worker is stopping")
            while not lane.lane_id or lane.lane_id in self._entries:
                lane.lane_id = secrets.randbits(64)
            self._entries[lane.lane_id] = _Entry(lane, time.monotonic(), claimed=True)

    def claim(self, lane_id: int, timeout_s: float) -> TcpSend:
        """Take a lane for one transfer; waits for the one before to give it back. `give_back` must follow.

        Raises:
            LaneClosedError: it does not exist (any more), or its user keeps it.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while (entry := self._entries.get(lane_id)) is not None and entry.claimed:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise LaneClosedError(f"lane {lane_id} is in use by another transfer")
                self._changed.wait(left)
            if entry is None:
                raise LaneClosedError(f"there is no lane {lane_id}")
            if not entry.lane.healthy():
                self._close(entry)
                raise LaneClosedError(f"the peer of lane {lane_id} has gone")
            entry.claimed = True
            return entry.lane

    def give_back(self, lane: TcpSend, *, clean: bool) -> None:
        """The transfer that has claimed a lane is done with it; one that is not clean is closed.

        Raises:
            ValueError: the lane is not claimed.
        """
        with self._changed:
            entry = self._entries.get(lane.lane_id)
            if entry is None or entry.lane is not lane or not entry.claimed:
                raise ValueError(f"lane {lane.lane_id} is not claimed")
            entry.claimed, entry.idle_since = False, time.monotonic()
            if self._closed or not clean:
                self._close(entry)
            self._changed.notify_all()

    def sweep(self) -> None:
        """Close idle lanes whose peer has gone or whose time is over."""
        oldest = time.monotonic() - self._idle_s
        with self._changed:
            for entry in [entry for entry in self._entries.values() if not entry.claimed]:
                if entry.idle_since < oldest or not entry.lane.healthy():
                    self._close(entry)

    def close(self) -> None:
        """Close idle lanes now, interrupt the others: `give_back` closes them."""
        with self._changed:
            self._closed = True
            for entry in list(self._entries.values()):
                if entry.claimed:
                    entry.lane.interrupt()
                else:
                    self._close(entry)
            self._changed.notify_all()

    def _close(self, entry: _Entry) -> None:
        del self._entries[entry.lane.lane_id]
        entry.lane.close()
