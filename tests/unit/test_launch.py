"""The launcher's part in a change of configuration: what it replaces, and that it goes back when that fails."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from helpers.router_rig import demand
from helpers.workers import worker
from redis.asyncio import Redis

from joinwise.actors import deployment, launch, runfile
from joinwise.actors.adoption import Adopted
from joinwise.actors.controller import Controller
from joinwise.actors.host import Account, Label
from joinwise.actors.posts import Posts
from joinwise.cluster.config_model import JoinwiseConfig
from joinwise.cluster.errors import ConfigError, InternalError
from joinwise.cluster.router.registry import Registry
from joinwise.cluster.router.router import Router
from joinwise.cluster.store.embedded import EmbeddedRedis


class FakeActor:
    """Ready at once, unless its name is among the broken."""

    def __init__(self, name: str, log: list[str], broken: set[str]) -> None:
        self.name, self._log, self._broken = name, log, broken
        self.phases: dict[str, float] = {}

    async def start(self) -> dict[str, str]:
        if self.name in self._broken:
            raise ConfigError("no such argument")
        self._log.append(f"+{self.name}")
        return {"http": "http://h:1", "grpc": "h:2"}

    async def failure(self, timeout_s: float) -> str:
        return ""

    async def stop(self, timeout_s: float, *arguments: float) -> None:
        self._log.append(f"-{self.name}")

    def kill(self) -> None:
        self._log.append(f"x{self.name}")


def config(**change: Any) -> JoinwiseConfig:
    raw: dict[str, Any] = {
        "models": [{"name": "m", "model": "smollm2-135m-instruct"}],
        "pools": [
            {"name": "p", "model": "m", "role": "prefill"},
            {"name": "d", "model": "m", "role": "decode", "replicas": 2},
        ],
    }
    return JoinwiseConfig.model_validate(raw | change)


def pools(**of_prefill: Any) -> list[dict[str, Any]]:
    return [
        {"name": "p", "model": "m", "role": "prefill", **of_prefill},
        {"name": "d", "model": "m", "role": "decode", "replicas": 2},
    ]


def posts(redis_url: str = "redis://unused") -> Posts:
    return Posts(redis_url, local=True, with_gateway=True, owner="")


class Site:
    """A cluster that runs, of fake actors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.said: list[str] = []
        self.broken: set[str] = set()
        monkeypatch.setattr(deployment, "_CHANGE_EVERY_S", 0)
        monkeypatch.setattr(deployment.Cluster, "_fetch_models", lambda cluster: None)
        monkeypatch.setattr(deployment.ray_api, "Actor", SimpleNamespace(launch=self._actor))
        monkeypatch.setattr(deployment.ray_api, "node_id", lambda: "node")
        self.cluster = deployment.Cluster(config(), self.said.append)
        self.cluster._ray = SimpleNamespace(local=True, through_client=False)  # type: ignore[assignment]
        self.cluster._posts = posts()

    def _actor(self, target: str, *arguments: Any, name: str, num_cpus: float, **rest: Any) -> FakeActor:
        assert num_cpus == 0, "on a Ray of our own CPUs hold nothing up"
        return FakeActor(name, self.log, self.broken)

    async def start(self) -> None:
        self.cluster._controller = Controller(self.cluster._wanted(self.cluster.config), self.said.append, 5)
        await self.cluster._controller.fill()
        self.log.clear()


@pytest.fixture
async def site(monkeypatch: pytest.MonkeyPatch) -> Site:
    site = Site(monkeypatch)
    await site.start()
    return site


async def test_a_change_of_one_pool_replaces_its_worker_alone(site: Site) -> None:
    await site.cluster.apply(config(pools=pools(engine={"max_num_seqs": 4})))
    assert site.log == ["+p-0-2", "-p-0-1"]
    assert site.cluster.config.pools[0].engine == {"max_num_seqs": 4}


async def test_more_replicas_start_and_fewer_leave(site: Site) -> None:
    await site.cluster.apply(config(pools=pools(replicas=2)))
    await site.cluster.apply(config(pools=pools()))
    assert site.log == ["+p-1-1", "-p-1-1"]


async def test_a_gateway_makes_room_first(site: Site) -> None:
    await site.cluster.apply(config(gateway={"tool_parser": "hermes"}))
    assert site.log == ["-gateway-0-1", "+gateway-0-2"]


async def test_a_change_that_breaks_its_first_worker_is_taken_back(site: Site) -> None:
    before = site.cluster.config
    site.broken = {f"{slot}-{number}" for slot in ("p-0", "d-0", "d-1") for number in range(2, 9)}
    with pytest.raises(ConfigError, match="no such argument"):
        await site.cluster.apply(config(kv={"codec": "lossless"}))
    assert site.cluster.config is before
    assert site.cluster._controller is not None
    while not await site.cluster._controller.look():
        await asyncio.sleep(0)
    assert not [line for line in site.log if line.startswith(("-", "+"))]


async def test_what_cannot_be_changed_is_refused_before_anything_is_touched(site: Site) -> None:
    with pytest.raises(ConfigError, match="dtype stay") as raised:
        await site.cluster.apply(config(models=[{"name": "m", "model": "m", "dtype": "float32"}], cluster="other"))
    assert len(raised.value.problems) == 2
    assert site.log == []


async def test_a_wish_is_answered(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JOINWISE_HOME", str(tmp_path))
    file = tmp_path / "new.yaml"
    with runfile.RunFile.claim("joinwise") as claimed:
        claimed.ready({}, "redis://")
        changes = launch._Changes(site.cluster, claimed, site.said.append)
        asyncio.get_running_loop().add_signal_handler(runfile.CHANGE, changes.asked)

        async def ask(text: str) -> None:
            file.write_text(text)
            wanted = runfile.wish("joinwise", file)
            async with asyncio.timeout(5):
                while not runfile.granted("joinwise", wanted):
                    await asyncio.sleep(0.01)

        try:
            await ask(yaml.safe_dump(config().model_dump(mode="json")))
            with pytest.raises(ConfigError, match="pools"):
                await ask("pools: 1")
        finally:
            await changes.end()
            asyncio.get_running_loop().remove_signal_handler(runfile.CHANGE)
    assert "changed" in site.said


async def test_a_pool_wakes_for_a_request_and_ends_again(
    site: Site, monkeypatch: pytest.MonkeyPatch, redis_server: EmbeddedRedis, redis_client: Redis, cluster_name: str
) -> None:
    """From a start with no engine at all. The other model is not asked for, and stays at zero."""
    monkeypatch.setattr(deployment, "_HEALTH_EVERY_S", 0.02)
    bounds = {"least": 0, "most": 1, "down_s": 0.3, "wake_s": 30}
    zero = config(
        cluster=cluster_name,
        models=[{"name": name, "served_name": f"org/{name}", "model": "smollm2-135m-instruct"} for name in ("m", "n")],
        pools=[
            {"name": f"{name}-{role}", "model": name, "role": role, "replicas": 0, "autoscale": bounds}
            for name in ("m", "n")
            for role in ("prefill", "decode")
        ],
    )
    cluster, registry = deployment.Cluster(zero, site.said.append), Registry(redis_client, cluster_name, zero.router)
    cluster._ray, cluster.redis_url = SimpleNamespace(local=True, through_client=False, alive=True), redis_server.url  # type: ignore[assignment]
    cluster._posts = posts(cluster.redis_url)
    cluster._controller = Controller(cluster._wanted(zero), site.said.append, 5)
    site.log.clear()
    await cluster._fill()
    assert site.log == ["+gateway-0-1"] and site.said[-2] == "starting no engine and the gateway"
    over = asyncio.Event()
    supervising = asyncio.create_task(cluster.supervise(over))

    async def until(lines: set[str]) -> None:
        async with asyncio.timeout(10):
            while set(site.log) != {"+gateway-0-1"} | lines:
                await asyncio.sleep(0.01)

    router = Router(redis_client, cluster_name, zero.router, wakes=zero.wakes)
    answer = asyncio.create_task(router.route(demand(model="org/m")))
    await until({"+m-prefill-0-1", "+m-decode-0-1"})
    assert {each.name for each in await registry.asleep()} == {f"{n}-{r}" for n in "mn" for r in ("prefill", "decode")}
    epochs = [
        await registry.register(worker(f"m-{role}-0-1", role, model="org/m", pool=f"m-{role}"))
        for role in ("prefill", "decode")
    ]
    lease = await asyncio.wait_for(answer, 5)
    await asyncio.sleep(0.8)  # longer than `down_s`: what is pending keeps both
    assert not [line for line in site.log if line.startswith("-")]
    assert {each.name for each in await registry.asleep()} == {"n-prefill", "n-decode"}
    await router.settle(lease)
    await until({"+m-prefill-0-1", "+m-decode-0-1", "-m-prefill-0-1", "-m-decode-0-1"})
    for role, epoch in zip(("prefill", "decode"), epochs, strict=True):
        await registry.deregister(f"m-{role}-0-1", epoch)
    assert "pool m-decode: 0 -> 1 workers, for those who ask for org/m" in site.said
    over.set()
    await supervising
    assert cluster._store is not None
    await cluster._store.aclose()


def test_the_next_launcher_finds_pools_at_zero_as_they_were() -> None:
    bounds = [{"autoscale": {"least": least, "most": 4}, "replicas": 2} for least in (0, 0, 1)]
    raw = [{"name": f"p-{n}", "model": "m", "role": "mixed", **each} for n, each in enumerate(bounds)]
    made = config(pools=raw).pools
    there = [
        Adopted(SimpleNamespace(), Account(Label(slot, 1, "", "", 1, (), ""), "", {}, None))  # type: ignore[arg-type]
        for slot in ("gateway", "p-1-0", "p-1-1", "p-1-2")
    ]
    assert deployment._workers_of(there, made) == {"p-0": 0, "p-1": 3}
    assert deployment._workers_of(there[:1], made) == {"p-0": 0, "p-1": 0}
    assert deployment._workers_of([], made) == {}, "a cluster that begins has its replicas"


async def test_a_node_of_its_own_that_has_died_ends_the_launcher(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its actors end with it, and no other would ever start."""
    monkeypatch.setattr(deployment, "_HEALTH_EVERY_S", 0.01)
    site.cluster._ray = SimpleNamespace(local=True, alive=False)  # type: ignore[assignment]
    with pytest.raises(InternalError, match="node has died"):
        await asyncio.wait_for(site.cluster.supervise(asyncio.Event()), 5)
