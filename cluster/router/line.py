"""Requests of one gateway that wait for their turn. The order among all gateways is Redis' (`queue.lua`); here only the
first of each line asks for it, so that a thousand waiting requests cost as much as one."""

from __future__ import annotations

import asyncio
import heapq
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

_POLL_S = 0.02


@dataclass(order=True)
class Place:
    """A place in a line, in the order in which Redis has it: by score, then by the entry's text."""

    score: int
    entry: str
    first: asyncio.Event = field(default_factory=asyncio.Event, compare=False)
    gone: bool = field(default=False, compare=False)


class Lines:
    """The lines of one gateway. Lives on one event loop."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, ...], list[Place]] = defaultdict(list)
        self._room = asyncio.Event()

    def __len__(self) -> int:
        return sum(not place.gone for line in self._lines.values() for place in line)

    @asynccontextmanager
    async def place(self, line: tuple[str, ...], score: int, entry: str) -> AsyncIterator[Place]:
        """Stand in a line while the context is open."""
        mine = Place(score, entry)
        heapq.heappush(self._lines[line], mine)
        self._call_first(line)
        try:
            yield mine
        finally:
            mine.gone = True
            self._call_first(line)

    async def rest(self, seconds: float = _POLL_S) -> None:
        """Wait a moment, or until this gateway has given something back."""
        self._room.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._room.wait()
        except TimeoutError:
            pass

    def room(self) -> None:
        """Something was given back: ask again at once."""
        self._room.set()

    def _call_first(self, line: tuple[str, ...]) -> None:
        places = self._lines[line]
        while places and places[0].gone:
            heapq.heappop(places)
        if places:
            places[0].first.set()
        else:
            del self._lines[line]
