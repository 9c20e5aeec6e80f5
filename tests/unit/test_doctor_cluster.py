"""`joinwise doctor --running`: each thing that can be wrong with a cluster is found, named, and comes with a remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from helpers.workers import worker as registered

from joinwise.cluster.cli.doctor import healthy
from joinwise.cluster.cli.doctor_cluster import Seen, examine, look
from joinwise.cluster.client.types import ClusterStatus, KvLinkStatus
from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.errors import StoreUnavailableError
from joinwise.cluster.router.pulse import Pulse
from joinwise.cluster.router.registry import AsleepPool, Registry, WorkerInfo, WorkerLoad, WorkerState
from joinwise.cluster.router.router import Demand, Router
from joinwise.cluster.store.client import connect
from joinwise.cluster.store.embedded import EmbeddedRedis

NOW = 1_000_000_000


def info(name: str, role: str, **changes: object) -> WorkerInfo:
    fixed = {"epoch": 1, "engine_address": f"10.0.0.1:{name}", "vllm_version": "1", "started_ms": NOW - 5000}
    return registered(name, role, **{**fixed, **changes})


def worker(name: str, role: str, load: WorkerLoad | None = None, beat_ms: int = NOW, **changes: object) -> WorkerState:
    return WorkerState(info(name, role, **changes), load or WorkerLoad(), beat_ms, 0, 0, 0, 0, 0)


PAIR = (worker("p", "prefill"), worker("d", "decode"))
PULSE = Pulse(NOW, PAIR, leases=0, waiting=0, span_s=10, verdicts={}, links={})
LINK = KvLinkStatus("p", "d", "tcp")
WELL = Seen(PULSE, 0, (), 3.0, "noeviction", (), ClusterStatus("c", kv_links=(LINK,)))


def workers(*some: WorkerState) -> Callable[[], Seen]:
    return lambda: replace(WELL, pulse=replace(PULSE, workers=some))


def linked(**changes: object) -> Callable[[], Seen]:
    return lambda: replace(WELL, status=ClusterStatus("c", kv_links=(replace(LINK, **changes),)))


def test_a_cluster_that_is_well() -> None:
    found = examine(WELL)
    assert {each.level for each in found} == {"ok"} and len({each.check for each in found}) == len(found) == 10
    assert healthy(found)


@pytest.mark.parametrize(
    ("make", "check", "level", "said"),
    [
        (lambda: replace(WELL, status=None, no_gateway="refused"), "gateway", "warning", "refused"),
        (lambda: replace(WELL, eviction="allkeys-lru"), "redis", "warning", "may drop leases"),
        (lambda: replace(WELL, skew_ms=-2500), "clock", "warning", "-2.5 s off"),
        (workers(PAIR[0], worker("d", "decode", started_ms=NOW + 4000)), "clock", "warning", "started 4.0 s from now"),
        (workers(), "workers", "missing", "none is registered"),
        (workers(PAIR[0]), "workers", "missing", "no worker of m does decode"),
        (workers(PAIR[0], worker("d", "draining")), "workers", "missing", "no worker of m does decode"),
        (workers(PAIR[0], worker("d", "decode", beat_ms=NOW - 4000)), "workers", "warning", "said nothing for 4.0 s"),
        (lambda: replace(WELL, troubles=("decode-0 crashes",)), "workers", "missing", "decode-0 crashes"),
        (workers(PAIR[0], worker("d", "decode", vllm_version="2")), "versions", "warning", "vLLM 1: p; 2: d"),
        (workers(PAIR[0], worker("d", "decode", protocol_version=2)), "versions", "warning", "protocol 1: p; 2: d"),
        (workers(*PAIR, worker("e", "decode", fingerprint="g")), "configuration", "warning", "d | e"),
        (lambda: replace(WELL, overdue=2), "leases", "missing", "2 have ended"),
        (lambda: replace(WELL, leftovers=["worker d: 7 tokens"]), "leases", "warning", "worker d: 7 tokens"),
        (lambda: replace(WELL, pulse=replace(PULSE, waiting=4)), "queue", "missing", "4 wait"),
        (
            workers(PAIR[0], worker("d", "decode", WorkerLoad(waiting=3, kv_blocks_free=1, kv_blocks_total=100))),
            "kv caches",
            "warning",
            "1 of 100 blocks free",
        ),
        (linked(refused={"checksum": 2, "epoch": 0}), "kv links", "warning", "(2 checksum)"),
        (linked(failed=1, streams=9, retries=3), "kv links", "warning", "1 of 9 transfers did not end, 3 retries"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_a_remedy(make: Callable[[], Seen], check: str, level: str, said: str) -> None:
    wrong = [each for each in examine(make()) if each.level != "ok"]
    assert [(each.check, each.level) for each in wrong] == [(check, level)]
    assert said in wrong[0].detail and wrong[0].fix


def test_a_queue_that_moves_and_a_mixed_pool_are_well() -> None:
    moving = replace(PULSE, waiting=4, verdicts={"split": 5}, workers=(worker("m", "mixed"),))
    assert healthy(examine(replace(WELL, pulse=moving)))


def test_pools_at_zero_are_no_fault() -> None:
    both = (AsleepPool("p", "m", "prefill"), AsleepPool("d", "m", "decode"))
    zero = replace(WELL, pulse=replace(PULSE, workers=(), asleep=both))
    assert {each.level for each in examine(zero)} == {"ok"}
    assert "0 live, p at zero, d at zero" in [each.detail for each in examine(zero)]
    alone = replace(WELL, pulse=replace(PULSE, workers=PAIR[1:], asleep=both[:1]))
    assert {each.level for each in examine(alone)} == {"ok"}
    (wakes,) = [each for each in examine(replace(zero, pulse=replace(zero.pulse, waiting=2))) if each.level != "ok"]
    assert (wakes.check, wakes.level, wakes.detail) == ("queue", "warning", "2 wait for a worker of p, d")
    half = replace(WELL, pulse=replace(PULSE, workers=PAIR[:1], asleep=(AsleepPool("d", "other", "decode"),)))
    assert not healthy(examine(half))


async def test_a_look_at_a_real_redis_finds_a_lease_that_nobody_takes_back() -> None:
    server = EmbeddedRedis.start()
    client = connect(server.url)

    def nobody() -> ClusterStatus:
        raise StoreUnavailableError("no gateway here")

    try:
        settings = RouterConfig(lease_s=0.001)
        registry = Registry(client, "c", settings)
        for name, role in (("p", "prefill"), ("d", "decode")):
            epoch = await registry.register(info(name, role))
            await registry.heartbeat(name, epoch, WorkerLoad())
        seen = await look(server.url, "c", nobody)
        assert [each.check for each in examine(seen) if each.level != "ok"] == ["gateway"]
        seconds_ago = await Router(client, "c", settings, clock=lambda: seen.pulse.now_ms - 60_000).route(
            Demand("r", "m", 10, 5)
        )
        assert seconds_ago.decode
        seen = await look(server.url, "c", nobody)
        assert (seen.overdue, seen.leftovers, seen.no_gateway) == (1, [], "no gateway here")
        assert abs(seen.skew_ms) < 1000
    finally:
        await client.aclose()
        server.stop()
