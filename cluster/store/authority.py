"""The part `user:password@host:port,host:port` of Redis' addresses that name several hosts."""

from __future__ import annotations

import re
from urllib.parse import unquote

from joinwise.cluster.errors import ConfigError

Hosts = tuple[tuple[str, int], ...]


def parse_authority(match: re.Match[str], default_port: int, what: str) -> tuple[Hosts, str | None, str | None]:
    """Hosts with their ports, user and password.

    Args:
        match: of an address, with groups `hosts`, `user` and `password`.
        default_port: of hosts without one.
        what: such a host is, for the error.

    Raises:
        ConfigError: a port is not a number. The message holds no password.
    """
    hosts = []
    for host in match["hosts"].split(","):
        name, colon, port = host.rpartition(":")
        if colon and not port.isdigit():
            raise ConfigError(f"the port of the {what} {host!r} is not a number")
        hosts.append((name, int(port)) if colon else (host, default_port))
    user, password = (unquote(match[part]) if match[part] else None for part in ("user", "password"))
    return tuple(hosts), user, password
