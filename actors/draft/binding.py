"""Keeps an engine pointed at a live draft actor that speaks its vocabulary, and is not far away."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from joinwise.actors.draft.vocabulary import Vocabulary, disagreement
from joinwise.cluster.drafts import DraftInfo, Drafts
from joinwise.cluster.errors import ConfigError, JoinwiseError, StoreUnavailableError

logger = logging.getLogger(__name__)

_MEASURED_FOR_S = 30.0
_CONNECTIONS, _CONNECT_S = 3, 1.0
_UNREACHABLE_MS = 1_000_000


async def round_trip(address: str) -> int:
    """Milliseconds to a port and back, without fractions: less than one is nothing beside a step.

    It is the time of a TCP connection, which the other end's kernel makes, however busy whoever listens is; the least
    of a few. A port that cannot be reached is very far away.
    """
    host, _, port = address.rpartition(":")
    least = _UNREACHABLE_MS
    with contextlib.suppress(OSError, ValueError):  # TimeoutError is an OSError
        for _ in range(_CONNECTIONS):
            begin = time.perf_counter()
            async with asyncio.timeout(_CONNECT_S):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            least = min(least, round(1000 * (time.perf_counter() - begin)))
            writer.close()
    return least


class Binding:
    """One engine's binding to a draft pool.

    Args:
        drafts: the cluster's draft actors.
        pool: the pool to ask.
        worker_id: the engine.
        vocabulary: of the engine's model.
        point: told the address to ask, empty for none, whenever that changes.
        measure: see `round_trip`; tests bring their own.
    """

    def __init__(
        self,
        drafts: Drafts,
        pool: str,
        worker_id: str,
        vocabulary: Vocabulary,
        point: Callable[[str], Awaitable[object]],
        measure: Callable[[str], Awaitable[int]] = round_trip,
    ) -> None:
        self._drafts, self._pool, self._worker_id = drafts, pool, worker_id
        self._vocabulary = vocabulary
        self._point = point
        self._measure = measure
        self._trips: dict[str, tuple[int, float]] = {}
        self._address = ""

    async def renew(self) -> None:
        """Ask for a draft actor, and point the engine at it.

        Raises:
            ConfigError: the pool's actors have another vocabulary than the engine; nobody is asked then.
            StoreUnavailableError: Redis does not answer; the engine goes on with the actor that it has.
        """
        trips = await self._round_trips(await self._drafts.of(self._pool))
        draft = await self._drafts.bind(self._pool, self._worker_id, trips)
        reason = disagreement(self._vocabulary, _vocabulary(draft)) if draft is not None else ""
        address = draft.address if draft is not None and not reason else ""
        if address != self._address:
            await self._point(address)
            self._address = address
            if draft is not None and address:
                logger.info("asks draft actor %s, %d ms away", draft.draft_id, trips.get(draft.draft_id, 0))
        if reason:
            raise ConfigError(f"pool {self._pool!r} cannot draft for worker {self._worker_id!r}: {reason}")

    async def keep(self, every_s: float) -> None:
        """Renew for ever."""
        said = ""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.renew()
                said = ""
            except JoinwiseError as error:
                if str(error) != said and not isinstance(error, StoreUnavailableError):
                    logger.error("%s", error)
                said = str(error)

    async def end(self) -> None:
        """The engine leaves."""
        with contextlib.suppress(JoinwiseError):
            await self._drafts.unbind(self._pool, self._worker_id)

    async def _round_trips(self, drafts: Sequence[DraftInfo]) -> dict[str, int]:
        """To each, in milliseconds, measured now and again; nothing where there is no choice."""
        if len(drafts) < 2:
            return {}
        now, addresses = time.monotonic(), {draft.address for draft in drafts}
        self._trips = {address: trip for address, trip in self._trips.items() if address in addresses}
        stale = [each for each in addresses if each not in self._trips or self._trips[each][1] < now - _MEASURED_FOR_S]
        for address, trip in zip(stale, await asyncio.gather(*map(self._measure, stale)), strict=True):
            self._trips[address] = trip, now
        return {draft.draft_id: self._trips[draft.address][0] for draft in drafts}


def _vocabulary(draft: DraftInfo) -> Vocabulary | None:
    if not draft.vocabulary_digest:
        return None
    return Vocabulary(draft.vocabulary_model, draft.vocabulary_size, draft.vocabulary_digest)
