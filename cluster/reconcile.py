"""What to do next so that what runs becomes what is wanted. Pure: the controller asks, and carries out what is said.

Two rules settle everything. A slot that is empty is filled, after a pause that grows with each death. What runs as it
should no longer (another build) is replaced one slot at a time, and only while nothing else is on its way: so a change
that breaks the first of its actors stops there, with all the others at work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

State = Literal["starting", "ready", "leaving"]

#: Seconds for which a death counts.
WINDOW_S = 600.0
MAX_PAUSE_S = 60.0
#: Deaths within the window from which on a slot is said to crash again and again.
LOOP = 3


@dataclass(frozen=True)
class Wanted:
    """A slot to keep filled.

    Attributes:
        build: digest of all that its actor is made of; another one takes another actor.
        surge: a new actor may run beside the old one until it is ready; else the old one leaves first.
    """

    slot: str
    build: str
    surge: bool = True


@dataclass(frozen=True)
class Actor:
    """An actor that there is.

    Attributes:
        sick: why it must end; "" while it is well.
    """

    name: str
    slot: str
    build: str
    state: State
    sick: str = ""


@dataclass(frozen=True)
class Death:
    """The end of an actor that nobody wanted, or a start that failed; `at` in seconds of the controller's clock."""

    at: float
    why: str


@dataclass(frozen=True)
class Start:
    """Start an actor of the slot's wanted build."""

    slot: str


@dataclass(frozen=True)
class Leave:
    """Let an actor end what runs on it, then end it."""

    name: str
    why: str


@dataclass(frozen=True)
class Kill:
    """End an actor at once."""

    name: str
    why: str


Action: TypeAlias = Start | Leave | Kill


def reconcile(
    wanted: Sequence[Wanted], actors: Iterable[Actor], deaths: Mapping[str, Sequence[Death]], now: float
) -> list[Action]:
    """The next actions; none when all is as it should be, or on its way.

    Args:
        wanted: slots, in the order in which they are renewed; no slot twice.
        actors: all there are, those that leave included.
        deaths: by slot, oldest first.
        now: seconds, on the clock of the deaths.
    """
    held: dict[str, list[Actor]] = {each.slot: [] for each in wanted}
    actions: list[Action] = []
    for actor in actors:
        if actor.sick:
            actions.append(Kill(actor.name, actor.sick))
        if actor.slot in held:
            held[actor.slot].append(actor)
        elif not actor.sick:
            actions += _let_go(actor, "it is not wanted any more")
    quiet = not actions
    outdated: list[tuple[Wanted, Actor]] = []
    for slot in wanted:
        mine = held[slot.slot]
        well = [each for each in mine if not each.sick and each.state != "leaving"]
        current = [each for each in well if each.build == slot.build]
        old = [each for each in well if each.build != slot.build]
        kept = next((each for each in current if each.state == "ready"), None)
        quiet = quiet and len(mine) == 1 and mine[0].state == "ready"
        if kept is not None:
            for each in (*old, *current):
                if each is not kept:
                    actions += _let_go(each, "another one serves in its place")
        elif current:
            actions += [Kill(each.name, "one is enough") for each in current[1:]]
        elif working := [each for each in old if each.state == "ready"]:
            outdated.append((slot, working[0]))
            actions += [Kill(each.name, "its build is outdated") for each in old if each.state == "starting"]
            actions += [Leave(each.name, "one is enough") for each in working[1:]]
        elif old:
            actions += [Kill(each.name, "its build is outdated") for each in old]
        elif not mine and now >= retry_at(deaths.get(slot.slot, ())):
            actions.append(Start(slot.slot))
    if quiet and outdated:
        slot, actor = outdated[0]
        if now >= retry_at(deaths.get(slot.slot, ())):
            actions.append(Start(slot.slot) if slot.surge else Leave(actor.name, "its configuration has changed"))
    return actions


def _let_go(actor: Actor, why: str) -> list[Action]:
    if actor.state == "leaving" or actor.sick:
        return []
    return [Kill(actor.name, why) if actor.state == "starting" else Leave(actor.name, why)]


def retry_at(deaths: Sequence[Death]) -> float:
    """When a slot may be filled again: at once after the first death, then after 2, 6, 14, 30 and 60 seconds."""
    if not deaths:
        return float("-inf")
    last = deaths[-1].at
    recent = sum(last - each.at < WINDOW_S for each in deaths)
    return last + min(MAX_PAUSE_S, 2.0 ** min(recent, 10) - 2)


def verdict(slot: str, deaths: Sequence[Death], now: float) -> str:
    """A sentence on a slot that does not stay filled; "" for one that does."""
    recent = [each for each in deaths if now - each.at < WINDOW_S]
    if len(recent) < LOOP:
        return ""
    wait = retry_at(deaths) - now
    following = f"the next start is in {wait:.0f} s" if wait > 0 else "it is being started again"
    minutes = WINDOW_S / 60
    return (
        f"{slot} crashes again and again: {len(recent)} times in {minutes:.0f} min, last: {recent[-1].why}; {following}"
    )
