"""Stopping without harm: a worker stays until nobody needs it any more, or its patience has ended."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

_LOOK_EVERY_S = 0.05


@dataclass(frozen=True)
class Pending:
    """What a stopping worker still has.

    Attributes:
        requests: requests that have not ended.
        transfers: ids of the transfers whose KV a peer may still take, within their leases.
    """

    requests: int = 0
    transfers: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.requests or self.transfers)


@dataclass(frozen=True)
class Drained:
    """How a drain has ended.

    Attributes:
        awaited: transfers that peers needed while it lasted.
        left: what was still pending at its end; nothing where it went well.
        seconds: how long it took.
        answered: whether the engine has said what it has; False for one that hangs.
    """

    awaited: int
    left: Pending
    seconds: float
    answered: bool = True

    def __str__(self) -> str:
        told = f"waited {self.seconds:.1f} s, for {self.awaited} KV transfers that peers needed"
        if not self.answered:
            return f"{told}; the engine did not answer"
        if not self.left:
            return told
        return f"{told}; {self.left.requests} requests and {len(self.left.transfers)} transfers were left behind"


async def drain(look: Callable[[], Awaitable[Pending]], patience_s: float) -> Drained:
    """Wait until nothing is pending.

    Args:
        look: says what is; one that does not answer is waited for no longer than the patience lasts.
        patience_s: seconds to wait at most.
    """
    begin = time.monotonic()
    awaited: set[str] = set()
    left, answered = Pending(), False
    try:
        async with asyncio.timeout(patience_s):
            while left := await look():
                answered = True
                awaited |= left.transfers
                await asyncio.sleep(_LOOK_EVERY_S)
            answered = True
    except TimeoutError:
        pass
    return Drained(len(awaited), left, time.monotonic() - begin, answered)
