"""Cuts ports off: what is sent to them, or by them, gets lost, and the kernel counts it.

Only within a network of the run's own (`actors.bench.link.own_network`): nobody else's packets are in there.
"""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from joinwise.actors.bench.link import own_network, run
from joinwise.cluster.errors import ConfigError

_TABLE = "inet joinwise_cut"
_COUNTED = re.compile(r"counter packets (\d+)")


def refused() -> str:
    """Why nothing can be cut off here; empty when it can."""
    try:
        with own_network(), cut([1]):
            return ""
    except ConfigError as error:
        return str(error)


@contextmanager
def cut(ports: Collection[int]) -> Iterator[None]:
    """Cut these TCP ports off while the context is open; `dropped` counts.

    Raises:
        ConfigError: this machine does not let us.
    """
    run(f"nft add table {_TABLE}")
    try:
        run(f"nft add chain {_TABLE} input {{ type filter hook input priority 0 ; }}")
        for port in ports:
            for side in ("dport", "sport"):
                run(f"nft add rule {_TABLE} input tcp {side} {port} counter drop")
        yield
    finally:
        run(f"nft delete table {_TABLE}")


def dropped() -> int:
    """Packets that the open cut has dropped."""
    return sum(map(int, _COUNTED.findall(run(f"nft list table {_TABLE}"))))
