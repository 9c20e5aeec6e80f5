"""The reconcile function: each rule by itself, then any world at all, which must come to rest as it is wanted."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from joinwise.cluster.reconcile import (
    WINDOW_S,
    Action,
    Actor,
    Death,
    Kill,
    Leave,
    Start,
    State,
    Wanted,
    reconcile,
    retry_at,
    verdict,
)

A, B = Wanted("a", "1"), Wanted("b", "1")


def actor(slot: str, build: str = "1", state: State = "ready", sick: str = "", name: str = "") -> Actor:
    return Actor(name or f"{slot}-{build}", slot, build, state, sick)


@pytest.mark.parametrize(
    ("actors", "expected"),
    [
        ([], [Start("a"), Start("b")]),
        ([actor("a"), actor("b", state="starting")], []),
        ([actor("a"), actor("b", sick="gone")], [Kill("b-1", "gone")]),
        ([actor("a"), actor("b"), actor("c")], [Leave("c-1", "it is not wanted any more")]),
        ([actor("a"), actor("b"), actor("c", state="starting")], [Kill("c-1", "it is not wanted any more")]),
        ([actor("a"), actor("b"), actor("c", state="leaving")], []),
        ([actor("a"), actor("b"), actor("c", state="leaving", sick="hangs")], [Kill("c-1", "hangs")]),
        ([actor("a"), actor("b", state="leaving")], []),  # it is waited for
        # Renewed one by one: the new one first, where there is room for both.
        ([actor("a", "0"), actor("b", "0")], [Start("a")]),
        ([actor("a", "0"), actor("a", state="starting"), actor("b", "0")], []),
        ([actor("a", "0"), actor("a"), actor("b", "0")], [Leave("a-0", "another one serves in its place")]),
        ([actor("a", "0", state="leaving"), actor("a"), actor("b", "0")], []),
        ([actor("a"), actor("b", "0")], [Start("b")]),
        # The first new one dies: the second slot is left alone.
        ([actor("a", "0"), actor("a", sick="dies"), actor("b", "0")], [Kill("a-1", "dies")]),
        ([actor("a", "0", state="starting"), actor("b")], [Kill("a-0", "its build is outdated")]),
        # Two of one slot.
        ([actor("a"), actor("a", name="twin"), actor("b")], [Leave("twin", "another one serves in its place")]),
    ],
)
def test_rules(actors: list[Actor], expected: list[Action]) -> None:
    assert reconcile([A, B], actors, {}, 0.0) == expected


def test_without_room_for_both_the_old_one_leaves_first() -> None:
    wanted = [Wanted("a", "1", surge=False)]
    assert reconcile(wanted, [actor("a", "0")], {}, 0.0) == [Leave("a-0", "its configuration has changed")]
    assert reconcile(wanted, [actor("a", "0", state="leaving")], {}, 0.0) == []
    assert reconcile(wanted, [], {}, 0.0) == [Start("a")]


@pytest.mark.parametrize("old", [[], [actor("a", "0")]])
def test_a_slot_that_dies_is_filled_after_a_pause(old: list[Actor]) -> None:
    deaths = {"a": [Death(10.0, "x"), Death(20.0, "x")]}
    assert reconcile([A], old, deaths, 21.9) == []
    assert reconcile([A], old, deaths, 22.0) == [Start("a")]


def test_pauses_grow_to_a_minute_and_old_deaths_are_forgotten() -> None:
    deaths: list[Death] = []
    pauses = []
    for number in range(8):
        deaths.append(Death(float(number), "x"))
        pauses.append(retry_at(deaths) - number)
    assert pauses == [0, 2, 6, 14, 30, 60, 60, 60]
    assert retry_at([*deaths, Death(7 + WINDOW_S + 1, "x")]) == 7 + WINDOW_S + 1


def test_the_verdict_is_for_people() -> None:
    deaths = [Death(0.0, "x"), Death(1.0, "x"), Death(3.0, "out of memory")]
    assert verdict("decode-0", deaths[:2], 3.0) == ""
    assert verdict("decode-0", deaths, 4.0) == (
        "decode-0 crashes again and again: 3 times in 10 min, last: out of memory; the next start is in 5 s"
    )
    assert "is being started again" in verdict("decode-0", deaths, 100.0)
    assert verdict("decode-0", deaths, 3.0 + WINDOW_S) == ""


# Any world.

_SLOTS = "abc"
_WANTED = st.lists(
    st.builds(Wanted, st.sampled_from(_SLOTS), st.sampled_from("12"), st.booleans()), unique_by=lambda each: each.slot
)
_STATES: st.SearchStrategy[State] = st.sampled_from(["starting", "ready", "leaving"])


@st.composite
def _actors(draw: st.DrawFn) -> list[Actor]:
    one = st.tuples(st.sampled_from(_SLOTS + "d"), st.sampled_from("12"), _STATES, st.sampled_from(["", "", "sick"]))
    return [Actor(f"old-{i}", *each) for i, each in enumerate(draw(st.lists(one, max_size=6)))]


class World:
    """Carries actions out; what starts becomes ready, and what leaves goes, when the test says so."""

    def __init__(self, actors: list[Actor], wanted: list[Wanted]) -> None:
        self.actors = {each.name: each for each in actors}
        self.build = {each.slot: each.build for each in wanted}
        self.deaths: dict[str, list[Death]] = {}
        self.made = 0

    def act(self, action: Action, now: float) -> None:
        if isinstance(action, Start):
            self.made += 1
            name = f"new-{self.made}"
            self.actors[name] = Actor(name, action.slot, self.build[action.slot], "starting")
        elif isinstance(action, Leave):
            assert self.actors[action.name].state == "ready"
            self.actors[action.name] = replace(self.actors[action.name], state="leaving")
        else:
            gone = self.actors.pop(action.name)
            if gone.sick:
                self.deaths.setdefault(gone.slot, []).append(Death(now, gone.sick))

    def move_on(self, name: str) -> None:
        found = self.actors[name]
        if found.state == "starting":
            self.actors[name] = replace(found, state="ready")
        elif found.state == "leaving":
            del self.actors[name]

    def working(self) -> Counter[str]:
        return Counter(each.slot for each in self.actors.values() if each.state == "ready" and not each.sick)


@settings(max_examples=200, deadline=None)
@given(wanted=_WANTED, actors=_actors(), data=st.data())
def test_any_world_comes_to_rest_as_it_is_wanted(
    wanted: list[Wanted], actors: list[Actor], data: st.DataObject
) -> None:
    world, now = World(actors, wanted), 0.0
    for _ in range(200):
        actions = reconcile(wanted, list(world.actors.values()), world.deaths, now)
        assert len(set(actions)) == len(actions)
        names = [each.name for each in actions if not isinstance(each, Start)]
        assert len(set(names)) == len(names), "one fate for each"
        for action in actions:
            world.act(action, now)
        moving = [each.name for each in world.actors.values() if each.state != "ready"]
        if not actions and not moving and now > 1000:
            break
        if moving:
            world.move_on(data.draw(st.sampled_from(moving)))
        now += 60
    found = sorted((each.slot, each.build, each.state, each.sick) for each in world.actors.values())
    assert found == sorted((each.slot, each.build, "ready", "") for each in wanted)


@settings(max_examples=100, deadline=None)
@given(surge=st.lists(st.booleans(), min_size=1, max_size=3), data=st.data())
def test_a_change_takes_at_most_one_slot_at_a_time_and_none_where_there_is_room(
    surge: list[bool], data: st.DataObject
) -> None:
    wanted = [Wanted(slot, "2", room) for slot, room in zip(_SLOTS, surge, strict=False)]
    world = World([actor(each.slot, "1") for each in wanted], wanted)
    for _ in range(100):
        for action in reconcile(wanted, list(world.actors.values()), world.deaths, 0.0):
            world.act(action, 0.0)
        working = world.working()
        down = [each for each in wanted if not working[each.slot]]
        assert len(down) <= 1
        assert not [each for each in down if each.surge]
        assert len(world.actors) <= len(wanted) + 1
        moving = [each.name for each in world.actors.values() if each.state != "ready"]
        if moving:
            world.move_on(data.draw(st.sampled_from(moving)))
    assert {each.build for each in world.actors.values()} == {"2"}


@settings(max_examples=12, deadline=None)
@given(times=st.integers(1, 12))
def test_a_build_that_never_starts_costs_nobody_else_anything(times: int) -> None:
    """Each new actor dies while it starts: those of the old build go on, and the pauses grow."""
    wanted, now = [Wanted("a", "2"), Wanted("b", "2")], 0.0
    world = World([actor("a", "1"), actor("b", "1")], wanted)
    started: list[float] = []
    while len(started) < times:
        for action in reconcile(wanted, list(world.actors.values()), world.deaths, now):
            world.act(action, now)
            if isinstance(action, Start):
                started.append(now)
                assert action.slot == "a"
        for each in list(world.actors.values()):
            if each.state == "starting":
                world.actors[each.name] = replace(each, sick="dies")
        assert world.working() == {"a": 1, "b": 1}
        now += 1.0
    gaps = [later - earlier for earlier, later in itertools.pairwise(started)]
    assert gaps == sorted(gaps)
