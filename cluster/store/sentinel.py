"""Clients of a Redis that Sentinel watches: `redis+sentinel://[user:password@]host:port[,host:port…]/MASTER[/DB]`.

Each new connection asks a sentinel who the master is; one whose master has become a replica is closed, and the command
is tried again. Writes that the old master had not yet replicated are lost: leases among them are written again by their
gateways, and workers register again (docs/routing.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from redis.asyncio import Redis
from redis.asyncio.sentinel import Sentinel

from joinwise.cluster.errors import ConfigError
from joinwise.cluster.store.authority import Hosts, parse_authority

SCHEME = "redis+sentinel://"
_URL = re.compile(
    r"redis\+sentinel://(?:(?P<user>[^:@/]*):(?P<password>[^@/]*)@)?(?P<hosts>[^/@]+)/(?P<master>[^/]+)(?:/(?P<db>\d+))?"
)
_DEFAULT_PORT = 26379


@dataclass(frozen=True)
class SentinelAddress:
    """A parsed URL. User and password are the data servers', and the sentinels' too."""

    hosts: Hosts
    master: str
    db: int
    user: str | None
    password: str | None


def parse_sentinel(url: str) -> SentinelAddress:
    """Parse a URL of the form above; hosts without a port get 26379.

    Raises:
        ConfigError: it has another form. The message holds no password.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise ConfigError(f"a Sentinel address is {SCHEME}[user:password@]host:port[,host:port]/MASTER[/DB]")
    hosts, user, password = parse_authority(match, _DEFAULT_PORT, "sentinel")
    return SentinelAddress(hosts, unquote(match["master"]), int(match["db"] or 0), user, password)


def connect_sentinel(url: str, **options: Any) -> Redis:
    """A client of the master that the sentinels name.

    Args:
        url: of the form above.
        options: of every connection, to sentinels and data servers.
    """
    address = parse_sentinel(url)
    options |= {"username": address.user, "password": address.password}
    sentinel_options = {name: value for name, value in options.items() if name not in ("max_connections",)}
    sentinel: Any = Sentinel(address.hosts, sentinel_kwargs=sentinel_options, **options)  # type: ignore[no-untyped-call]
    client: Redis = sentinel.master_for(address.master, redis_class=Redis, db=address.db)
    return client
