"""One call at a time for all who ask meanwhile: what databases call group commit.

While a call is on its way further asks gather, and the next call takes them together. So nobody waits for others where
there is little to do, and where there is much Redis is asked seldom, for many at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from copy import copy
from typing import Generic, TypeVar

from redis import exceptions as failures

from joinwise.cluster.store.client import GONE

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Together(Generic[Item, Answer]):
    """Gathers the asks of one event loop.

    Args:
        call: asks for several, and gives as many answers in the same order. It may be repeated for the same asks: an
            ask that Redis refuses must not fail its neighbours, so each of them is then asked for by itself.
        most: asks in one call.
        linger_s: seconds that a call waits for others to join it, where nobody hurries.
    """

    def __init__(
        self, call: Callable[[Sequence[Item]], Awaitable[Sequence[Answer]]], most: int, *, linger_s: float = 0.0
    ) -> None:
        self._call = call
        self._most = most
        self._linger_s = linger_s
        self._waiting: deque[tuple[Item, asyncio.Future[Answer]]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._over = asyncio.Event()
        self._over.set()

    async def ask(self, item: Item) -> Answer:
        """The answer for one. Raises what `call` raises; one that is cancelled before its call is never sent."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append((item, answer))
        if self._task is None:
            self._task = loop.create_task(self._serve())
        return await answer

    async def past(self) -> None:
        """Returns when the call that is on its way now, if any, has ended."""
        await self._over.wait()

    async def _serve(self) -> None:
        try:
            while self._waiting:
                if self._linger_s:
                    await asyncio.sleep(self._linger_s)
                count = min(self._most, len(self._waiting))
                await self._serve_some([self._waiting.popleft() for _ in range(count)])
        except asyncio.CancelledError:  # the loop ends
            _cancel([answer for _, answer in self._waiting])
            self._waiting.clear()
            raise
        finally:
            self._task = None

    async def _serve_some(self, asks: list[tuple[Item, asyncio.Future[Answer]]]) -> None:
        asks = [each for each in asks if not each[1].done()]
        if not asks:
            return
        self._over = over = asyncio.Event()
        try:
            answers = await self._call([item for item, _ in asks])
        except GONE as error:
            # Those that came meanwhile need not find that out one after another.
            _fail([answer for _, answer in (*asks, *self._waiting)], error)
            self._waiting.clear()
        except failures.ResponseError as error:
            if len(asks) == 1:
                _fail([asks[0][1]], error)
            else:
                for each in asks:
                    await self._serve_some([each])
        except Exception as error:
            _fail([answer for _, answer in asks], error)
        except asyncio.CancelledError:
            _cancel([answer for _, answer in asks])
            raise
        else:
            for (_, future), answer in zip(asks, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
        finally:
            over.set()


def _fail(answers: Sequence[asyncio.Future[Answer]], error: Exception) -> None:
    for answer in answers:
        if not answer.done():
            answer.set_exception(copy(error))  # to be raised by each with a traceback of its own


def _cancel(answers: Sequence[asyncio.Future[Answer]]) -> None:
    for answer in answers:
        answer.cancel()
