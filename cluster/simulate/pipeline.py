"""Many coroutines talk to one Redis over one connection, without an event loop: a command is sent when it is awaited.

Replies come in the order of the commands, so whoever drives the coroutines may read one whenever it is needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Coroutine, Generator, Iterable, Sequence
from typing import Any

import redis
from redis.asyncio import Redis

from joinwise.cluster.errors import NoWorkerError, ObjectiveError, OverloadedError, StoreUnavailableError

_EPOCH_MS = 1_700_000_000_000
_AT_ONCE = 16  # commands sent together, so that Redis works while the next ones are made


class _Command:
    """What a coroutine awaits: one command to Redis."""

    __slots__ = ("packed",)

    def __init__(self, packed: bytes) -> None:
        self.packed = packed

    def __await__(self) -> Generator[_Command, Any, Any]:
        return (yield self)


class Recorder(Redis):
    """A client whose commands are handed to whoever drives the coroutine, instead of being sent."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        return await _Command(_packed((*args[0].split(), *args[1:])))  # redis-py names some commands with two words


def _packed(words: Sequence[Any]) -> bytes:
    """A command in Redis' protocol."""
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        data = word if word.__class__ is bytes else str(word).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)


class Pipeline:
    """Drives coroutines that talk to Redis through a `Recorder`, any number of them at once.

    What one awaits is sent at once, in the order of `begin`; `finish` reads the replies in the same order.
    """

    def __init__(self, url: str) -> None:
        self._pool = redis.ConnectionPool.from_url(url, decode_responses=True)
        self._connection = self._pool.get_connection()
        self._open: deque[tuple[Any, Coroutine[Any, Any, Any]]] = deque()
        self._early: deque[Any] = deque()  # replies that were read before their turn

    def __len__(self) -> int:
        """Calls that have begun and not finished."""
        return len(self._open)

    def close(self) -> None:
        """Disconnect."""
        self._pool.disconnect()

    def one(self, call: Coroutine[Any, Any, Any]) -> Any:
        """Run a single coroutine, while no other is under way; raises what it raises."""
        self._send([call.send(None)])
        return self._resume(call, self._reply())

    def begin(self, calls: Iterable[tuple[float, Any, Coroutine[Any, Any, Any]]], clock: VirtualClock) -> None:
        """Start coroutines, each at its own time, and with a name for `finish`."""
        unsent: list[_Command] = []
        for now, name, call in calls:
            clock.now = now
            unsent.append(call.send(None))
            self._open.append((name, call))
            if len(unsent) == _AT_ONCE:
                self._send(unsent)
                unsent = []
        if unsent:
            self._send(unsent)

    def finish(self) -> tuple[Any, Any]:
        """Wait for the oldest call. Returns its name, and its result or the error of joinwise that it raised."""
        reply = self._reply()
        name, call = self._open.popleft()
        try:
            return name, self._resume(call, reply)
        except (NoWorkerError, OverloadedError, ObjectiveError) as error:
            return name, error

    def _reply(self) -> Any:
        return self._early.popleft() if self._early else self._read()

    def _read(self) -> Any:
        try:
            return self._connection.read_response()
        except redis.ResponseError as error:
            return error
        except redis.ConnectionError as error:
            raise StoreUnavailableError("the simulator's Redis is gone") from error

    def _send(self, commands: Iterable[_Command]) -> None:
        packed = b"".join(command.packed for command in commands)
        try:
            self._connection.send_packed_command([packed])  # type: ignore[no-untyped-call]
        except redis.ConnectionError as error:
            raise StoreUnavailableError("the simulator's Redis is gone") from error

    def _resume(self, call: Coroutine[Any, Any, Any], reply: Any) -> Any:
        """Go on with a reply; what it asks further is sent at once, and answered after all that was sent before."""
        while True:
            try:
                command = call.throw(reply) if isinstance(reply, Exception) else call.send(reply)
            except StopIteration as done:
                return done.value
            self._early.extend(self._read() for _ in range(len(self._open) - len(self._early)))
            self._send([command])
            reply = self._read()


class VirtualClock:
    """Milliseconds of the simulation, as the router asks for them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> int:
        return _EPOCH_MS + int(self.now * 1000)
