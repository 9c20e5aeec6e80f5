"""Every Redis key that joinwise uses, in one place.

All keys of a cluster share the hash tag `{jw:<cluster>}`, so one Lua script may touch all of them on Redis Cluster too,
and a version: two releases with different layouts run side by side without reading each other's.

| key after the base                | type   | holds |
|-----------------------------------|--------|-------|
| workers                           | hash   | worker id -> what it is routed by, packed (`scripts/common.lua`) |
| worker:<id>                       | hash   | its registration, and the load that it last reported |
| beats                             | zset   | worker id -> milliseconds of its last heartbeat |
| queue:<role>:<profile>:<model>    | zset   | worker id -> us to a typical request's end; the routable of a role |
| room:<role>:<profile>:<model>     | zset   | the same workers -> pending tokens |
| profiles:<model>                  | hash   | profile -> the capabilities that its workers share |
| adapters:<model>                  | hash   | adapter name -> JSON of path and id |
| lease:<id>                        | string | one reservation, packed (`scripts/lease.lua`) |
| ended:<id>                        | string | bitmap: samples of a lease that have been settled, while others run |
| leases                            | zset   | lease id -> milliseconds at which it expires |
| wait:<tenant>:<class>             | zset   | requests that wait for room -> their place |
| turns:<class>                     | zset   | tenant -> its virtual time, while requests of it wait |
| asked                             | hash   | model whose pools may be at zero -> milliseconds of its last lease |
| pollers                           | zset   | gateway -> milliseconds at which it last asked for one that waits |
| tenant:<name>                     | hash   | token buckets, and how many requests run |
| sessions, session_ends            | hash, zset | session -> its worker, and when that is forgotten |
| decisions                         | stream | the last decisions, packed (`scripts/explain.lua`) |
| blocks                            | stream | KV events of all workers |
| snapshots                         | set    | workers that are asked for all that their caches hold |
| clock, grace                      | string | when `expire` last ran, and until when nobody is judged silent |
| epoch                             | string | counter of epochs; starts at the time, so that lost data repeats none |
| drafts:<pool>                     | hash   | draft actor -> milliseconds of its last heartbeat, and its facts |
| bound:<pool>                      | hash   | worker id -> milliseconds at which it last asked, and its draft actor |
| token                             | string | what the cluster's processes show each other |
| troubles                          | string | JSON list: what the controller cannot mend, for people |
| asleep                            | string | JSON list: name, model and role of each pool at zero |
"""

from __future__ import annotations

from dataclasses import dataclass

VERSION = "v3"


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

    @property
    def workers(self) -> str:
        """What workers are routed by."""
        return f"{self.base}workers"

    def worker(self, worker_id: str) -> str:
        """One worker's registration."""
        return f"{self.base}worker:{worker_id}"

    @property
    def decisions(self) -> str:
        """The last decisions."""
        return f"{self.base}decisions"

    @property
    def blocks(self) -> str:
        """KV events."""
        return f"{self.base}blocks"

    @property
    def snapshots(self) -> str:
        """Workers that are asked for a snapshot."""
        return f"{self.base}snapshots"

    @property
    def turns(self) -> str:
        """Before the name of a class of requests that wait."""
        return f"{self.base}turns:"

    @property
    def turns_pattern(self) -> str:
        """SCAN pattern of the classes of requests that wait."""
        return "".join(f"\\{char}" if char in "*?[]\\" else char for char in self.turns) + "*"

    @property
    def asked(self) -> str:
        """When models whose pools may be at zero were last given a lease."""
        return f"{self.base}asked"

    @property
    def asleep(self) -> str:
        """Pools at zero."""
        return f"{self.base}asleep"

    def adapters(self, model: str) -> str:
        """LoRA adapters of a model."""
        return f"{self.base}adapters:{model}"

    def drafts(self, pool: str) -> str:
        """Draft actors of a pool."""
        return f"{self.base}drafts:{pool}"

    def bound(self, pool: str) -> str:
        """The draft actor of each engine that asks a pool."""
        return f"{self.base}bound:{pool}"

    @property
    def token(self) -> str:
        """What the cluster's processes show each other."""
        return f"{self.base}token"

    @property
    def troubles(self) -> str:
        """What the controller cannot mend."""
        return f"{self.base}troubles"

    def lease(self, lease_id: str) -> str:
        """One lease."""
        return f"{self.base}lease:{lease_id}"
