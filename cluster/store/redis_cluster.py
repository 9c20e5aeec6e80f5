"""Clients of a Redis Cluster: `redis+cluster://[user:password@]host:port[,host:port…]`, with TLS `rediss+cluster://`.

All keys of one joinwise cluster share a hash slot (`keys.py`), so one of the primaries holds and decides all; the
others serve other joinwise clusters. Any node may be named: it tells of the rest. When the slot moves, or its primary
is lost and a replica takes over, the client follows; what had not been replicated is written again (docs/routing.md).
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Any

from redis.asyncio.cluster import ClusterNode, RedisCluster

from joinwise.cluster.errors import ConfigError
from joinwise.cluster.store.authority import Hosts, parse_authority

SCHEMES = ("redis+cluster://", "rediss+cluster://")
_URL = re.compile(r"(?P<scheme>rediss?)\+cluster://(?:(?P<user>[^:@/]*):(?P<password>[^@/]*)@)?(?P<hosts>[^/@]+)/?")
_DEFAULT_PORT = 6379
_CLOCK_KEY = "{jw}"  # whose primary's clock is everybody's


@dataclass(frozen=True)
class ClusterAddress:
    """A parsed URL."""

    hosts: Hosts
    user: str | None
    password: str | None
    tls: bool


def parse_cluster(url: str) -> ClusterAddress:
    """Parse a URL of the form above; hosts without a port get 6379.

    Raises:
        ConfigError: it has another form. The message holds no password.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise ConfigError(f"a Redis Cluster's address is {SCHEMES[0]}[user:password@]host:port[,host:port]")
    hosts, user, password = parse_authority(match, _DEFAULT_PORT, "node")
    return ClusterAddress(hosts, user, password, match["scheme"] == "rediss")


class ClusterClient(RedisCluster):
    """As redis-py's, but one that waits for a free connection, and asks one node for the time."""

    def __init__(self, address: ClusterAddress, max_connections: int, **options: Any) -> None:
        nodes = [ClusterNode(host, port) for host, port in address.hosts]
        super().__init__(
            startup_nodes=nodes,
            username=address.user,
            password=address.password,
            ssl=address.tls,
            max_connections=max_connections,
            **options,
        )
        self._free = asyncio.Semaphore(max_connections)

    async def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command on the node that it belongs to."""
        async with self._free:
            return await super().execute_command(*args, **kwargs)

    async def time(self, **kwargs: Any) -> Any:
        """The clock of the one node that everybody asks: seconds and microseconds."""
        await self.initialize()
        return await self.execute_command("TIME", target_nodes=self.get_node_from_key(_CLOCK_KEY), **kwargs)
