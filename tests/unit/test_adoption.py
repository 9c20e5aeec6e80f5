"""A launcher where another has died: whose actors it takes over, which it ends, and which it leaves alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from joinwise.actors import adoption, ray_api
from joinwise.actors.adoption import adopt
from joinwise.actors.host import Account, Label
from joinwise.cluster.config import JoinwiseConfig, load_config
from joinwise.cluster.errors import ConfigError

CONFIG = load_config(None)
LABEL = Label("decode-0", 2, "b1", "engine", 5.0, (5.0,), "redis://x")


class FakeActor:
    """One that is found."""

    def __init__(self, name: str, world: World) -> None:
        self.name, self._world = name, world

    async def take(self, before: str) -> bool:
        self._world.log.append(f"took {self.name} of {before}")
        return self.name not in self._world.gone

    async def stop(self, timeout_s: float, *arguments: float) -> None:
        assert timeout_s > sum(arguments)
        self._world.log.append(f"stopped {self.name}")

    def kill(self) -> None:
        self._world.log.append(f"killed {self.name}")


class World:
    """A Ray with actors in it."""

    def __init__(self) -> None:
        self.found: list[tuple[FakeActor, Account]] = []
        self.living: set[str] = set()
        self.gone: set[str] = set()
        self.log: list[str] = []
        self.said: list[str] = []

    def add(self, name: str, owner: str = "job 1", *, started: bool = True, **label: Any) -> None:
        facts = {"grpc": "127.0.0.1:1"} if started else None
        config = label.pop("config", CONFIG)
        self.found.append((FakeActor(name, self), Account(replace(LABEL, **label), owner, facts, config)))

    async def adopt(self, config: JoinwiseConfig = CONFIG, *, alone: bool = True) -> list[str]:
        return [each.actor.name for each in await adopt(config, "redis://x", self.said.append, alone=alone)]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()

    async def find(namespace: str, timeout_s: float) -> Any:
        assert namespace == ray_api.namespace(CONFIG)
        return world.found

    monkeypatch.setattr(ray_api, "find", find)
    monkeypatch.setattr(ray_api, "lives", lambda owner: owner in world.living)
    monkeypatch.setattr(adoption, "_POLL_S", 0.001)
    monkeypatch.setattr(adoption, "_DEAD_WITHIN_S", 0.02)
    return world


async def test_nothing_is_left_behind(world: World) -> None:
    assert await world.adopt() == [] and world.said == []


async def test_what_serves_is_taken_over_and_what_only_starts_is_ended(world: World) -> None:
    world.add("decode-0-2")
    world.add("prefill-0-1", slot="prefill-0")
    world.add("late-0-1", slot="late-0", started=False)
    world.add("dying-0-1", slot="dying-0")
    world.gone.add("dying-0-1")
    assert await world.adopt() == ["decode-0-2", "prefill-0-1"]
    assert world.log[-1] == "killed late-0-1" and "took decode-0-2 of job 1" in world.log
    assert "engine decode-0-2 serves already: it is taken over" in world.said


async def test_a_cluster_that_another_launcher_runs_is_refused(world: World) -> None:
    world.add("decode-0-2", owner="job 2")
    world.living.add("job 2")
    with pytest.raises(ConfigError, match="run by another launcher"):
        await world.adopt()
    assert world.log == []


async def test_one_that_is_just_dying_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.add("decode-0-2")
    asked: list[str] = []

    def lives(owner: str) -> bool:
        asked.append(owner)
        return len(asked) < 3

    monkeypatch.setattr(ray_api, "lives", lives)
    monkeypatch.setattr(adoption, "_DEAD_WITHIN_S", 5.0)
    assert await world.adopt() == ["decode-0-2"]


async def test_where_two_may_overlap_the_living_one_keeps_its_actors(world: World) -> None:
    world.add("decode-0-2", owner="actor a")
    world.add("decode-1-1", owner="actor b", slot="decode-1")
    world.living.add("actor a")
    assert await world.adopt(alone=False) == ["decode-1-1"]
    assert world.log == ["took decode-1-1 of actor b"]


@pytest.mark.parametrize("other", ["redis", "model"])
async def test_what_could_not_be_changed_in_place_ends_first(world: World, other: str) -> None:
    changed = CONFIG.model_copy(deep=True)
    changed.models[0].dtype = "float16"
    world.add("decode-0-2", **({"redis_url": "redis://y"} if other == "redis" else {"config": changed}))
    world.add("prefill-0-1", slot="prefill-0")
    assert await world.adopt() == []
    assert sorted(world.log[-2:]) == ["stopped decode-0-2", "stopped prefill-0-1"]
    (said,) = world.said
    assert ("Redis was another" if other == "redis" else "files and dtype stay") in said
