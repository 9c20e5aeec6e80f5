"""Keeps an engine pointed at a live draft actor that speaks its vocabulary."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from joinwise.actors.draft.vocabulary import Vocabulary, disagreement
from joinwise.cluster.drafts import DraftInfo, Drafts
from joinwise.cluster.errors import ConfigError, JoinwiseError, StoreUnavailableError

logger = logging.getLogger(__name__)


class Binding:
    """One engine's binding to a draft pool.

    Args:
        drafts: the cluster's draft actors.
        pool: the pool to ask.
        worker_id: the engine.
        vocabulary: of the engine's model.
        point: told the address to ask, empty for none, whenever that changes.
    """

    def __init__(
        self,
        drafts: Drafts,
        pool: str,
        worker_id: str,
        vocabulary: Vocabulary,
        point: Callable[[str], Awaitable[object]],
    ) -> None:
        self._drafts, self._pool, self._worker_id = drafts, pool, worker_id
        self._vocabulary = vocabulary
        self._point = point
        self._address = ""

    async def renew(self) -> None:
        """Ask for a draft actor, and point the engine at it.

        Raises:
            ConfigError: the pool's actors have another vocabulary than the engine; nobody is asked then.
            StoreUnavailableError: Redis does not answer; the engine goes on with the actor that it has.
        """
        draft = await self._drafts.bind(self._pool, self._worker_id)
        reason = disagreement(self._vocabulary, _vocabulary(draft)) if draft is not None else ""
        address = draft.address if draft is not None and not reason else ""
        if address != self._address:
            await self._point(address)
            self._address = address
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


def _vocabulary(draft: DraftInfo) -> Vocabulary | None:
    if not draft.vocabulary_digest:
        return None
    return Vocabulary(draft.vocabulary_model, draft.vocabulary_size, draft.vocabulary_digest)
