"""`assert_idle`: nothing is left of any request, anywhere."""

from __future__ import annotations

import asyncio
import time

from helpers.cluster import RunningCluster

from joinwise.actors.chaos import leaks


async def leftovers(cluster: RunningCluster) -> list[str]:
    """A line for everything that an idle cluster must not hold."""
    return await leaks.leftovers(cluster.name, cluster.redis_url, cluster.http)


async def assert_idle(cluster: RunningCluster, within_s: float = 15.0) -> None:
    """Wait until nothing is left; fail with what is.

    Settling is asynchronous (the last token reaches the client before the lease is given back), hence
    the deadline; it does not grow with what was done before.
    """
    deadline = time.monotonic() + within_s
    while found := await leftovers(cluster):
        assert time.monotonic() < deadline, "not idle:\n" + "\n".join(found)
        await asyncio.sleep(0.1)
