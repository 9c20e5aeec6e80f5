"""What a worker tells of its KV cache: the writing end of `prefix_index`."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable

from redis.asyncio import Redis

from joinwise.cluster.errors import JoinwiseError
from joinwise.cluster.router.prefix_index import encode_blocks
from joinwise.cluster.store.client import Scripts, store_errors
from joinwise.cluster.store.keys import Keys

_GATHER_S = 0.01  # what a few steps say goes out together


class PrefixLog:
    """Publishes the blocks of one worker. `note` may be called on any thread, `flush` on one event loop.

    Args:
        client: from `store.client.connect`.
        cluster: the cluster's name.
        kept: events that the stream keeps, about.
    """

    def __init__(self, client: Redis, cluster: str, kept: int) -> None:
        self._scripts = Scripts(client, Keys(cluster).base)
        self._kept = kept
        self._wake: Callable[[], object] = lambda: None
        self._lock = threading.Lock()
        self._blocks: set[int] = set()
        self._told: set[int] = set()
        self._changed: set[int] = set()
        self._epoch = 0
        self._sequence = 0
        self._snapshot = False

    def note(self, present: Iterable[int], absent: Iterable[int], cleared: bool = False) -> None:
        """The cache now holds these blocks, and not those; `cleared`: it held none before."""
        with self._lock:
            quiet = not self._changed
            if cleared:
                self._changed |= self._blocks
                self._blocks.clear()
            gone, come = set(absent), set(present)
            self._blocks -= gone
            self._blocks |= come
            self._changed |= gone | come
            call = quiet and bool(self._changed)
        if call:
            self._wake()

    async def tell(self, who: Callable[[], tuple[str, int]], every_s: float) -> None:
        """Flush whenever something has changed, and every so often, for ever; a Redis that is away is waited for.

        Args:
            who: the worker's id and its epoch now.
            every_s: seconds after which a gateway that asks for a snapshot is heard at the latest.
        """
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(changed.set)
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(every_s):
                    await changed.wait()
                    await asyncio.sleep(_GATHER_S)
            changed.clear()
            with contextlib.suppress(JoinwiseError):
                await self.flush(*who())

    async def flush(self, worker_id: str, epoch: int) -> None:
        """Publish what has changed, or everything where a gateway has asked for that or an event was lost.

        Raises:
            StoreUnavailableError: Redis does not answer; the next flush publishes everything.
        """
        for _ in range(2):  # the answer may ask for a snapshot
            if epoch != self._epoch:
                self._epoch, self._sequence, self._snapshot = epoch, 0, True
            with self._lock:
                snapshot, changed = self._snapshot, self._changed
                self._changed = set()
                stored = self._blocks.copy() if snapshot else {block for block in changed if block in self._blocks}
            told = set() if snapshot else self._told
            removed = {block for block in changed if block not in stored and block in told}
            stored -= told
            if snapshot or stored or removed:
                self._sequence += 1
            self._snapshot = True  # until it is known to have arrived
            with store_errors(f"publishing the blocks of worker {worker_id}"):
                answer = await self._scripts.run(
                    "publish",
                    worker_id,
                    epoch,
                    self._sequence,
                    int(snapshot),
                    encode_blocks(stored),
                    encode_blocks(removed),
                    self._kept,
                )
            self._told = (told | stored) - removed
            self._snapshot = answer == 1
            if answer != 1:
                return
