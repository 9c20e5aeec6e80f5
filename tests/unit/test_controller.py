"""The controller over fake actors: what `reconcile` says is done, and every way to end is counted as one."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

import pytest

from joinwise.actors.controller import Controller, Post
from joinwise.cluster.errors import ConfigError, InternalError, JoinwiseError
from joinwise.cluster.reconcile import Wanted


class FakeActor:
    """Starts when its gate opens."""

    def __init__(self, name: str, world: World) -> None:
        self.name, self._world = name, world
        self.gate = asyncio.Event()
        if not world.slow:
            self.gate.set()
        self.sick = ""
        self.phases = {"imports": 5.25, "engine": 3.0}
        self.awake = asyncio.Event()
        self.awake.set()
        self.error: JoinwiseError | None = world.errors.get(name)
        self.may_stop = asyncio.Event()
        self.may_stop.set()
        world.actors[name] = self

    async def start(self) -> dict[str, str]:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self._world.log.append(f"ready {self.name}")
        return {"name": self.name}

    async def failure(self, timeout_s: float) -> str:
        await self.awake.wait()
        return self.sick

    async def dismiss(self, timeout_s: float) -> None:
        self._world.log.append(f"dismissed {self.name}")

    async def stop(self, timeout_s: float, *arguments: float) -> None:
        assert timeout_s > sum(arguments)
        await self.may_stop.wait()
        self._world.log.append(f"stopped {self.name}")

    def kill(self) -> None:
        self._world.log.append(f"killed {self.name}")


class World:
    """A controller, its actors by name, and what happened to them."""

    def __init__(self) -> None:
        self.actors: dict[str, FakeActor] = {}
        self.errors: dict[str, JoinwiseError] = {}
        self.log: list[str] = []
        self.said: list[str] = []
        self.slow = False
        self.now = 0.0

    def post(self, slot: str, build: str = "1", what: str = "engine", *, surge: bool = True) -> Post:
        make: Callable[[Post, int], FakeActor] = lambda _, number: FakeActor(f"{slot}-{number}", self)  # noqa: E731
        return Post(Wanted(slot, build, surge), what, make, 1.0, (1.0,))

    def controller(self, *posts: Post, timeout_s: float = 5.0) -> Controller:
        return Controller(posts, self.said.append, timeout_s, lambda: self.now)

    async def rest(self, controller: Controller, rounds: int = 30) -> bool:
        """Look until all is as it is wanted."""
        for _ in range(rounds):
            if await controller.look():
                return True
            for _ in range(5):
                await asyncio.sleep(0)
        return False


@pytest.fixture
def world() -> World:
    return World()


async def test_it_fills_all_slots_at_once(world: World) -> None:
    controller = world.controller(world.post("a"), world.post("b"))
    await controller.fill()
    assert sorted(world.log) == ["ready a-1", "ready b-1"]
    assert controller.facts("a") == {"name": "a-1"} and controller.facts("nobody") == {}
    for line in world.said:  # and says what the seconds of each went to
        assert re.fullmatch(r"engine [ab]-1 is ready after 0\.\d s: imports 5\.2 s, engine 3\.0 s", line), line
    assert len(world.said) == 2
    assert await controller.look()


async def test_a_start_that_fails_is_raised_and_one_that_hangs_is_named(world: World) -> None:
    world.errors["b-1"] = ConfigError("no such model")
    with pytest.raises(ExceptionGroup) as raised:
        await world.controller(world.post("a"), world.post("b")).fill()
    assert raised.value.subgroup(ConfigError)
    world.slow = True
    controller = world.controller(world.post("c"), timeout_s=0.01)
    with pytest.raises(TimeoutError):
        await controller.fill()
    assert controller.late() == ["c-1"]


async def test_a_sick_actor_is_killed_and_replaced(world: World) -> None:
    controller = world.controller(world.post("a"))
    await controller.fill()
    world.actors["a-1"].sick = "it has not answered for 20 s"
    assert not await controller.look()
    assert await world.rest(controller)
    assert world.log == ["ready a-1", "killed a-1", "ready a-2"]
    assert "engine a-1 has failed: it has not answered for 20 s; a new one starts in 0 s" in world.said
    assert controller.facts("a") == {"name": "a-2"}


async def test_one_that_does_not_answer_holds_nobody_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("joinwise.actors.controller._ANSWER_S", 0.01)
    controller = world.controller(world.post("a"), world.post("b"))
    await controller.fill()
    frozen = world.actors["a-1"]
    frozen.awake.clear()
    world.actors["b-1"].sick = "gone"
    await world.rest(controller)
    assert controller.facts("b") == {"name": "b-2"} and controller.facts("a") == {"name": "a-1"}
    frozen.sick = "it has not answered for 20 s"
    frozen.awake.set()
    await world.rest(controller)
    assert controller.facts("a") == {"name": "a-2"}


async def test_one_that_dies_again_and_again_gets_pauses_and_a_verdict(world: World) -> None:
    controller = world.controller(world.post("a"))
    await controller.fill()
    world.errors |= {f"a-{number}": ConfigError("out of memory") for number in range(2, 5)}
    world.actors["a-1"].sick = "it is gone"
    await world.rest(controller)
    assert controller.verdicts() == []
    assert list(world.actors) == ["a-1", "a-2"], "the next one must wait for 2 s"
    world.now = 2.0
    await world.rest(controller)
    (said,) = controller.verdicts()
    assert "a crashes again and again: 3 times" in said and "out of memory" in said and "in 6 s" in said
    world.now = 8.0
    await world.rest(controller)
    world.now = 22.0
    assert await world.rest(controller)
    assert controller.facts("a") == {"name": "a-5"}
    world.now = 2000.0
    assert controller.verdicts() == []


async def test_a_start_that_hangs_is_given_up(world: World) -> None:
    controller = world.controller(world.post("a"), timeout_s=0.5)
    await controller.fill()
    world.slow = True
    world.actors["a-1"].sick = "gone"
    await controller.look()
    await controller.look()
    async with asyncio.timeout(5):
        while not any("was not ready within" in line for line in world.said):
            await asyncio.sleep(0.01)
            await controller.look()
    assert "killed a-2" in world.log


async def test_a_change_renews_only_what_it_touches_one_by_one(world: World) -> None:
    controller = world.controller(world.post("a"), world.post("b"), world.post("c"))
    await controller.fill()
    world.log.clear()
    controller.want([world.post("a"), world.post("b", "2"), world.post("c", "2", surge=False)])
    assert await world.rest(controller)
    assert world.log == ["ready b-2", "stopped b-1", "stopped c-1", "ready c-2"]


async def test_a_change_that_does_not_start_leaves_the_old_ones_at_work(world: World) -> None:
    controller = world.controller(world.post("a"), world.post("b"))
    await controller.fill()
    world.errors |= {f"a-{number}": ConfigError("no such argument") for number in range(2, 9)}
    controller.want([world.post("a", "2"), world.post("b", "2")])
    assert not await world.rest(controller, rounds=5)
    assert controller.refused[0] == "engine a-2: it could not start: no such argument"
    controller.want([world.post("a"), world.post("b")])
    assert await world.rest(controller)
    assert [line for line in world.log if "-1" in line] == ["ready a-1", "ready b-1"]


async def test_slots_come_and_go(world: World) -> None:
    controller = world.controller(world.post("a"))
    await controller.fill()
    controller.want([world.post("b")])
    assert await world.rest(controller)
    assert world.log == ["ready a-1", "stopped a-1", "ready b-1"]


async def test_the_end_stops_the_gateway_first_and_kills_what_is_not_ready(world: World) -> None:
    controller = world.controller(world.post("a"), world.post("gateway", what="gateway"))
    await controller.fill()
    world.slow = True
    controller.want([world.post("a"), world.post("gateway", what="gateway"), world.post("late")])
    await controller.look()
    world.log.clear()
    await controller.stop(first="gateway")
    assert world.log == ["killed late-1", "dismissed a-1", "dismissed gateway-1", "stopped gateway-1", "stopped a-1"]


async def test_the_end_waits_for_one_that_leaves_already(world: World) -> None:
    controller = world.controller(world.post("a"))
    await controller.fill()
    world.actors["a-1"].may_stop.clear()
    controller.want([])
    await controller.look()
    stopping = asyncio.create_task(controller.stop())
    await asyncio.sleep(0)
    world.actors["a-1"].may_stop.set()
    await stopping
    assert world.log == ["ready a-1", "dismissed a-1", "stopped a-1"]


async def test_what_is_adopted_is_looked_after_like_the_rest(world: World) -> None:
    controller = world.controller(world.post("a"), world.post("b", "2"), world.post("c"))
    for slot, number in (("a", 4), ("b", 7), ("gone", 1)):
        post = world.post(slot, "1")
        controller.adopt(FakeActor(f"{slot}-{number}", world), post, number, {"name": slot})
    assert controller.facts("a") == {"name": "a"}
    assert await world.rest(controller)
    assert sorted(world.log) == ["ready b-8", "ready c-1", "stopped b-7", "stopped gone-1"], "and a-4 serves on"
    world.actors["a-4"].sick = "it is gone"
    assert await world.rest(controller)
    assert "ready a-5" in world.log


async def test_one_that_another_launcher_has_taken_over_ends_the_looking(world: World) -> None:
    controller = world.controller(world.post("a"))
    await controller.fill()

    async def taken(timeout_s: float) -> str:
        raise InternalError("another launcher looks after a-1 now")

    world.actors["a-1"].failure = taken  # type: ignore[method-assign]
    with pytest.raises(InternalError, match="another launcher"):
        await controller.look()


async def test_those_that_are_ready_are_asked_while_others_start(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("joinwise.actors.controller._ASK_EVERY_S", 0.0)
    controller = world.controller(world.post("a"), world.post("b"))
    world.slow = True
    filling = asyncio.create_task(controller.fill())
    while "b-1" not in world.actors:
        await asyncio.sleep(0)
    world.actors["a-1"].gate.set()
    asked = asyncio.Event()

    async def failure(timeout_s: float) -> str:
        asked.set()
        return ""

    world.actors["a-1"].failure = failure  # type: ignore[method-assign]
    async with asyncio.timeout(5):
        await asked.wait()
    assert not filling.done()
    world.actors["b-1"].gate.set()
    await filling
