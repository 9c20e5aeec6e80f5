"""Every Redis key that joinwise uses, in one place.

All keys of a cluster share the hash tag `{jw:<cluster>}`, so one Lua script may touch all of them on Redis Cluster too,
and a version: two releases with different layouts run side by side without reading each other's.

| key after the base    | type   | holds |
|-----------------------|--------|-------|
| worker:<id>           | hash   | registration, epoch, role, last heartbeat, load, pending tokens per phase |
| beats                 | zset   | worker id -> milliseconds of its last heartbeat |
| queue:<role>:<model>  | zset   | worker id -> pending tokens; the routable workers of one role |
| adapters:<model>      | hash   | adapter name -> JSON of path and id |
| lease:<id>            | hash   | one reservation |
| leases                | zset   | lease id -> milliseconds at which it expires |
| epoch                 | string | counter of epochs; starts at the time, so that lost data repeats none |
"""

from __future__ import annotations

from dataclasses import dataclass

VERSION = "v1"


@dataclass(frozen=True)
class Keys:
    """Names the keys of one cluster. The Lua scripts derive the same names from `base` (`scripts/common.lua`)."""

    cluster: str

    @property
    def base(self) -> str:
        """Prefix of every key."""
        return f"{{jw:{self.cluster}}}:{VERSION}:"

    @property
    def beats(self) -> str:
        """Last heartbeats."""
        return f"{self.base}beats"

    @property
    def leases(self) -> str:
        """Expiry of leases."""
        return f"{self.base}leases"

    def worker(self, worker_id: str) -> str:
        """One worker."""
        return f"{self.base}worker:{worker_id}"

    def queue(self, role: str, model: str) -> str:
        """Routable workers of a role, by pending tokens."""
        return f"{self.base}queue:{role}:{model}"

    def adapters(self, model: str) -> str:
        """LoRA adapters of a model."""
        return f"{self.base}adapters:{model}"

    @property
    def token(self) -> str:
        """What the cluster's processes show each other."""
        return f"{self.base}token"

    def lease(self, lease_id: str) -> str:
        """One lease."""
        return f"{self.base}lease:{lease_id}"
