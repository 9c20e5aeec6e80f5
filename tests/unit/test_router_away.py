"""A gateway rides out a gap: Redis is killed with and without its data, or stands still, while requests come and go."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis
from helpers.router_rig import Make, chosen, demand

from joinwise.cluster.config_model import RedisConfig, RouterConfig
from joinwise.cluster.errors import NoWorkerError, OverloadedError, StoreUnavailableError
from joinwise.cluster.router.away import REDIS_AWAY, SteadyRouter
from joinwise.cluster.router.registry import Registry, WorkerLoad
from joinwise.cluster.router.router import Assignment, samples_of
from joinwise.cluster.store.client import connect
from joinwise.cluster.store.embedded import find_server

_SETTINGS = RouterConfig(max_pending_tokens=1000, worker_ttl_s=5, split="always", away_s=30)


class Server:
    """A Redis on one port that keeps its data in a folder, if it is let."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.folder = folder
        self.start()

    def start(self) -> None:
        where = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        keep = ["--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        self.process = subprocess.Popen([str(find_server()), *where, *keep], stdout=subprocess.DEVNULL)
        with redis.Redis.from_url(self.url) as client:
            deadline = time.monotonic() + 10
            while True:
                try:
                    client.ping()
                    return
                except redis.RedisError:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def lose(self) -> None:
        for file in self.folder.rglob("*"):
            if file.is_file():
                file.unlink()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.kill()


class Site:
    """A gateway and workers that beat, and register again when they are not known."""

    def __init__(self, url: str, make: Make, settings: RouterConfig = _SETTINGS) -> None:
        self.client = connect(url, RedisConfig(timeout_s=0.2, connect_timeout_s=0.2, retries=0))
        self.registry = Registry(self.client, "c", settings)
        self.router = SteadyRouter(self.client, "c", settings)
        self._infos = {name: make(name, role) for name, role in (("p", "prefill"), ("d", "decode"), ("e", "decode"))}
        self._epochs: dict[str, int] = {}

    async def beat(self) -> None:
        for name, info in self._infos.items():
            known = name in self._epochs and await self.registry.heartbeat(name, self._epochs[name], WorkerLoad())
            if not known:
                self._epochs[name] = await self.registry.register(info)

    async def vanish(self) -> None:
        """No worker is known any more, as after heartbeats that were late, or a Redis that came back empty."""
        for name, epoch in self._epochs.items():
            await self.registry.deregister(name, epoch)

    async def look(self) -> None:
        """What the gateway does once a heartbeat."""
        self.router.observe(await self.registry.states())

    async def pending(self) -> dict[str, int]:
        return {state.info.worker_id: state.pending_tokens for state in await self.registry.states()}

    async def returned(self) -> None:
        """The gateway decides with Redis again."""
        async with asyncio.timeout(10):
            while self.router.away:
                await asyncio.sleep(0.01)


@pytest.fixture
async def site(server: Server, make_worker: Make) -> AsyncIterator[Site]:
    site = Site(server.url, make_worker)
    await site.beat()
    site.router.observe(await site.registry.states())
    yield site
    await site.client.aclose()


@pytest.mark.parametrize("data", ["kept", "lost"])
async def test_a_gap_is_ridden_out_and_nothing_is_counted_twice(site: Site, server: Server, data: str) -> None:
    ending, staying = [await site.router.route(demand()) for _ in range(2)]
    server.kill()
    begin = time.monotonic()
    first = await site.router.route(demand())
    assert (first.reason, chosen(first)[0], site.router.away) == (REDIS_AWAY, "p", True)
    lent = [first] + [await site.router.route(demand()) for _ in range(3)]
    assert time.monotonic() - begin < 1
    assert {chosen(each)[1] for each in lent} == {"d", "e"}  # shared out by what this gateway itself has added
    assert await site.router.settle(ending)
    assert await site.router.prefill_done(lent[1])
    assert await site.router.settle(lent[2])
    if data == "lost":
        server.lose()
    server.start()
    await site.beat()
    await site.returned()
    # lent[0] and [3] hold 100 + 110, lent[1] 110; what was there before is gone with the data, or as it was
    before = 210 if data == "kept" else 0
    assert sum((await site.pending()).values()) == before + 2 * 210 + 110
    assert (await site.router.route(demand(1, 1))).reason != REDIS_AWAY
    for each in (staying, lent[0], lent[1], lent[3]):
        assert await site.router.settle(each) is (data == "kept" or each is not staying)
    assert await site.router.settle(lent[0]) is False
    assert sum((await site.pending()).values()) == 1 + 2


async def test_what_redis_gave_after_the_last_look_counts_in_a_gap(site: Site, server: Server) -> None:
    limit = site.router._settings.max_pending_tokens
    full = [await site.router.route(demand(1, limit - 1)) for _ in range(2)]
    assert {chosen(each)[1] for each in full} == {"d", "e"}
    server.kill()
    spilt = await site.router.route(demand(10, 10))
    assert (spilt.reason, chosen(spilt)[1]) == (REDIS_AWAY, "p"), "both decode workers are full"
    assert await site.router.settle(full[0])
    lent = await site.router.route(demand(10, 10))
    assert (lent.reason, chosen(lent)[1]) == (REDIS_AWAY, chosen(full[0])[1])
    server.start()
    await site.beat()
    await site.returned()
    site.router.observe(await site.registry.states())
    assert not site.router._given, "the look has seen them"
    for each in (full[1], spilt, lent):
        assert await site.router.settle(each)


async def test_a_redis_that_stands_still_reserves_nothing_behind_our_backs(site: Site, server: Server) -> None:
    server.process.send_signal(signal.SIGSTOP)
    leases = await asyncio.gather(*(site.router.route(demand(10, 10)) for _ in range(8)))
    assert {lease.reason for lease in leases} == {REDIS_AWAY}
    await asyncio.gather(*(site.router.settle(lease) for lease in leases))
    server.process.send_signal(signal.SIGCONT)  # now it runs what it was asked before
    await site.beat()
    await site.returned()
    async with asyncio.timeout(5):
        while await site.router.leftovers():
            await asyncio.sleep(0.01)


async def test_load_over_a_restart_ends_at_zero(site: Site, server: Server) -> None:
    reasons: set[str] = set()

    async def requests(number: int) -> None:
        for _ in range(60):
            lease: Assignment = await site.router.route(demand(5, 5))
            reasons.add(lease.reason)
            await asyncio.sleep(0.01)
            await site.router.prefill_done(lease)
            await site.router.settle(lease, generated=number % 5)

    async def restart() -> None:
        await asyncio.sleep(0.2)
        server.kill()
        await asyncio.sleep(0.3)
        await asyncio.to_thread(server.start)
        await site.beat()

    await asyncio.gather(restart(), *(requests(number) for number in range(8)))
    await site.returned()
    assert REDIS_AWAY in reasons
    assert len(reasons) > 1
    async with asyncio.timeout(5):
        while await site.router.leftovers():
            await asyncio.sleep(0.01)


async def test_samples_that_run_on_are_written_without_those_that_have_ended(site: Site, server: Server) -> None:
    server.kill()
    samples = samples_of(await site.router.route(demand(100, 10, samples=3)), 3)
    await site.router.settle(samples[0])
    server.start()
    await site.beat()
    await site.returned()
    assert sum((await site.pending()).values()) == 100 + 100 + 2 * 10
    for each in samples[1:]:
        assert await site.router.settle(each)
    assert await site.router.leftovers() == []


async def test_a_snapshot_has_limits(site: Site, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.kill()
    alone = await site.router.route(demand(whole=True, needs=frozenset({"replay"}), exclude=frozenset({"d"})))
    assert chosen(alone) == (None, "e")
    with pytest.raises(NoWorkerError, match="away"):
        await site.router.route(demand(needs=frozenset({"lora:tone"})))
    with pytest.raises(NoWorkerError):
        await site.router.route(demand(model="other"))
    await site.router.route(demand(1, 900, exclude=frozenset({"e"})))
    with pytest.raises(OverloadedError):
        await site.router.route(demand(1, 900, whole=True, exclude=frozenset({"p"})))
    old = time.monotonic() + 31
    monkeypatch.setattr("joinwise.cluster.router.away.time.monotonic", lambda: old)
    with pytest.raises(StoreUnavailableError):
        await site.router.route(demand())


async def test_without_a_snapshot_nothing_is_guessed(server: Server, make_worker: Make) -> None:
    site = Site(server.url, make_worker)
    await site.beat()
    lease = await site.router.route(demand())
    server.kill()
    with pytest.raises(StoreUnavailableError):
        await site.router.route(demand())
    for call in (site.router.settle, site.router.prefill_done):
        with pytest.raises(StoreUnavailableError):
            await call(lease)
    assert not site.router.away
    await site.client.aclose()


async def test_workers_that_were_there_a_moment_ago_are_waited_for(site: Site) -> None:
    await site.vanish()
    waiting = [asyncio.create_task(site.router.route(demand(10, 10))) for _ in range(5)]
    await site.look()
    await asyncio.sleep(0.05)
    assert not any(each.done() for each in waiting)
    await site.beat()
    await site.look()
    leases = await asyncio.wait_for(asyncio.gather(*waiting), 1)
    assert {chosen(each)[0] for each in leases} == {"p"}
    for each in leases:
        assert await site.router.settle(each)


async def test_those_that_do_not_come_back_are_not_waited_for_long(server: Server, make_worker: Make) -> None:
    site = Site(server.url, make_worker, _SETTINGS.model_copy(update={"worker_ttl_s": 0.3}))
    await site.beat()
    await site.look()
    await site.vanish()
    begin = time.monotonic()
    with pytest.raises(NoWorkerError):
        await site.router.route(demand())
    assert 0.2 < time.monotonic() - begin < 1
    begin = time.monotonic()  # that nobody lives is known by now
    with pytest.raises(NoWorkerError):
        await site.router.route(demand())
    assert time.monotonic() - begin < 0.2
    await site.client.aclose()


@pytest.mark.parametrize("what", [{"needs": frozenset({"lora:tone"})}, {"exclude": frozenset("pde")}, {"model": "n"}])
async def test_nobody_waits_for_what_nobody_had(site: Site, what: dict[str, object]) -> None:
    begin = time.monotonic()
    with pytest.raises(NoWorkerError):
        await site.router.route(demand(**what))
    assert time.monotonic() - begin < 0.2
