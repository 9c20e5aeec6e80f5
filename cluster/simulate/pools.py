"""What a cluster consists of, as a command names it: `prompt=25xh100,token=15xh100`, or `mixed=40xh100`."""

from __future__ import annotations

import re
from typing import NamedTuple

from joinwise.cluster.errors import ConfigError

#: Names of roles, with Splitwise's own.
HOMES = {"prompt": "prefill", "prefill": "prefill", "token": "decode", "decode": "decode", "mixed": "mixed"}
_POOL = re.compile(r"(?P<home>[a-z]+)=(?P<count>\d{1,5})x(?P<kind>[a-z0-9_.-]+)")


class PoolSpec(NamedTuple):
    """Machines that are alike: the pool's role (prefill, decode or mixed), their kind, and how many."""

    home: str
    kind: str
    size: int

    def __str__(self) -> str:
        return f"{self.home}={self.size}x{self.kind}"


def parse_pools(text: str) -> tuple[PoolSpec, ...]:
    """Read pools; Splitwise's words "prompt" and "token" stand for prefill and decode.

    Raises:
        ConfigError: what is no pool, a pool of none, or pools that cannot serve a request.
    """
    pools = []
    for part in text.split(","):
        found = _POOL.fullmatch(part.strip())
        if found is None or found["home"] not in HOMES:
            raise ConfigError(f"{part!r} is no pool; write prompt=25xh100, token=15xh100 or mixed=40xh100")
        if int(found["count"]) == 0:
            raise ConfigError(f"{part!r} is a pool without a machine; leave it out")
        pools.append(PoolSpec(HOMES[found["home"]], found["kind"], int(found["count"])))
    homes = {pool.home for pool in pools}
    if "mixed" not in homes and homes != {"prefill", "decode"}:
        raise ConfigError(
            f"{text!r} cannot serve a request: it needs machines for prompts and for tokens, or mixed ones"
        )
    return tuple(pools)
