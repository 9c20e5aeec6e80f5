"""Which worker holds which KV blocks: each gateway's copy, made of the stream of KV events.

A block is known by a 64-bit number, the first 8 bytes of vLLM's hash of it and of all blocks before it. The copy is
exact up to events that are under way: each worker numbers its events, a gap makes its blocks unknown (none) and asks it
for a snapshot, and another life of a worker begins with nothing. What is wrong all the same costs time, never tokens:
workers look in their own caches.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from array import array
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis

from joinwise.cluster.errors import JoinwiseError
from joinwise.cluster.router.decision import Held
from joinwise.cluster.store.client import store_errors
from joinwise.cluster.store.keys import Keys

_BATCH = 1000
_BLOCK_MS = 500
_GATHER_S = 0.1  # what all workers say meanwhile is read together
_RETRY_S = 0.5


def encode_blocks(blocks: Iterable[int]) -> str:
    """Block numbers as text, 8 bytes each."""
    return base64.b64encode(array("Q", blocks).tobytes()).decode()


def decode_blocks(text: str) -> array[int]:
    """The inverse of `encode_blocks`. Raises ValueError for anything else."""
    blocks = array("Q")
    blocks.frombytes(base64.b64decode(text, validate=True))
    return blocks


@dataclass
class _Worker:
    """One life of a worker. `sequence` is its last event's number; `known` is false from a gap to a snapshot."""

    epoch: int
    sequence: int = 0
    known: bool = True
    blocks: set[int] = field(default_factory=set)


class PrefixIndex:
    """Blocks by worker and workers by block. Lives on one event loop."""

    def __init__(self) -> None:
        self._workers: dict[str, _Worker] = {}
        self._holders: defaultdict[int, set[str]] = defaultdict(set)

    def __len__(self) -> int:
        return len(self._holders)

    def __bool__(self) -> bool:
        return bool(self._holders)

    def held(
        self, blocks: Iterable[int], block_size: int, most: int, among: Collection[str] | None = None
    ) -> dict[str, Held]:
        """The longest prefix that each worker holds.

        Args:
            blocks: numbers of a prompt's full blocks, in order; taken only as far as somebody holds them.
            block_size: tokens of one.
            most: workers to return, those with the longest prefixes.
            among: the only workers that count; None: all do.
        """
        found: dict[str, int] = {}
        holders: set[str] | None = None
        for depth, block in enumerate(blocks, 1):
            here = self._holders.get(block)
            holders = set() if not here else set(here) if holders is None else holders & here
            if not holders:
                break
            for worker in holders:
                found[worker] = depth
        if among is not None:
            found = {worker: depth for worker, depth in found.items() if worker in among}
        longest = sorted(found.items(), key=lambda item: -item[1])[:most]
        return {worker: Held(self._workers[worker].epoch, depth * block_size) for worker, depth in longest}

    def apply(self, event: Mapping[str, str]) -> str | None:
        """Take in one event; returns the worker that must be asked for a snapshot, if there is one.

        Raises:
            ValueError: not an event of this release.
        """
        try:
            name, epoch, sequence, snapshot = event["w"], int(event["e"]), int(event["s"]), event["all"] == "1"
            stored, removed = decode_blocks(event["in"]), decode_blocks(event["out"])
        except KeyError as error:
            raise ValueError(f"a KV event without {error}") from None
        worker = self._workers.get(name)
        if worker is not None and epoch < worker.epoch:
            return None
        if worker is None or epoch > worker.epoch:
            self.forget(name)
            worker = self._workers[name] = _Worker(epoch)
        if snapshot:
            self._remove(name, worker, list(worker.blocks))
            worker.known = True
        elif sequence <= worker.sequence:
            return None
        elif sequence != worker.sequence + 1 or not worker.known:
            worker.sequence, asked = sequence, not worker.known
            self.doubt(name)
            return None if asked else name
        worker.sequence = sequence
        self._remove(name, worker, removed)
        for block in stored:
            self._holders[block].add(name)
        worker.blocks.update(stored)
        return None

    def doubt(self, name: str) -> None:
        """Count a worker's blocks as unknown until its next snapshot."""
        if (worker := self._workers.get(name)) is not None:
            self._remove(name, worker, list(worker.blocks))
            worker.known = False

    def forget(self, name: str) -> None:
        """A worker has gone."""
        if (worker := self._workers.pop(name, None)) is not None:
            self._remove(name, worker, list(worker.blocks))

    def keep(self, lives: Mapping[str, int]) -> None:
        """Forget everyone but these workers, and those of them that were known in an earlier life."""
        for name, worker in list(self._workers.items()):
            if lives.get(name, -1) > worker.epoch or name not in lives:
                self.forget(name)

    @property
    def names(self) -> list[str]:
        """Workers that have been heard of."""
        return list(self._workers)

    def _remove(self, name: str, worker: _Worker, blocks: Iterable[int]) -> None:
        for block in blocks:
            holders = self._holders.get(block)
            if holders is not None:
                holders.discard(name)
                if not holders:
                    del self._holders[block]
            worker.blocks.discard(block)


class PrefixFollower:
    """Keeps an index up to date from Redis."""

    def __init__(self, client: Redis, cluster: str, index: PrefixIndex) -> None:
        self._client = client
        self._keys = Keys(cluster)
        self._index = index
        self._last = "0-0"

    async def follow(self) -> None:
        """Read events for ever; a Redis that is away is waited for."""
        while True:
            try:
                if await self.read(_BLOCK_MS):
                    await asyncio.sleep(_GATHER_S)
            except JoinwiseError:
                await asyncio.sleep(_RETRY_S)

    async def read(self, block_ms: int | None = None) -> int:
        """Take in what there is, waiting up to `block_ms` milliseconds for something; returns how many events.

        Raises:
            StoreUnavailableError: Redis does not answer.
        """
        taken = 0
        with store_errors("reading KV events"):
            while True:
                answer: Any = await self._client.xread({self._keys.blocks: self._last}, count=_BATCH, block=block_ms)
                events = answer[0][1] if answer else []
                if len(events) == _BATCH:
                    await self._look_for_a_gap(events[0][0])
                for number, event in events:
                    await self._take(event)
                    self._last = number
                taken += len(events)
                if len(events) < _BATCH:
                    return taken
                block_ms = None

    async def _take(self, event: Mapping[str, str]) -> None:
        with contextlib.suppress(ValueError):  # of another release: its worker's next one shows as a gap
            wanted = self._index.apply(event)
            if wanted is not None:
                await self._ask(wanted)

    async def _look_for_a_gap(self, first: str) -> None:
        """Far behind: what was dropped from the stream before it was read may be a worker's last word for long."""
        oldest: Any = await self._client.xrange(self._keys.blocks, count=1)
        if self._last != "0-0" and oldest and _order(oldest[0][0]) > _order(self._last):
            for name in self._index.names:
                self._index.doubt(name)
                await self._ask(name)

    async def _ask(self, name: str) -> None:
        await self._client.sadd(self._keys.snapshots, name)


def _order(number: str) -> tuple[int, int]:
    milliseconds, _, count = number.partition("-")
    return int(milliseconds), int(count)
