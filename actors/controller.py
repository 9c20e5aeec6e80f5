"""Keeps a cluster's actors as they are wanted: asks each how it is, asks `reconcile` what to do, and does that.

Holds no opinion of its own: what is to be done when is decided by the pure function, and Ray is behind `ray_api`.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from joinwise.actors.host import STOP_BESIDE_S
from joinwise.actors.phases import told
from joinwise.cluster import reconcile as rec
from joinwise.cluster.errors import JoinwiseError

logger = logging.getLogger(__name__)

_HEALTH_TIMEOUT_S = 20.0
_ANSWER_S = 1.0
_ASK_EVERY_S = 2.0
Say = Callable[[str], None]


class Actor(Protocol):
    """What is needed of `ray_api.Actor`."""

    name: str
    phases: dict[str, float]
    """Seconds of its start by what they went to, once it is ready."""

    async def start(self) -> dict[str, str]:
        """Returns facts once it is ready; raises JoinwiseError."""

    async def failure(self, timeout_s: float) -> str:
        """Why it is sick; "" while it is well. Raises JoinwiseError when it is not ours any more."""

    async def dismiss(self, timeout_s: float) -> None:
        """Tell it that it will be stopped."""

    async def stop(self, timeout_s: float, *arguments: float) -> None:
        """Let it end, and kill it when that takes too long."""

    def kill(self) -> None:
        """End it at once."""


@dataclass(frozen=True)
class Post:
    """A slot, and how it is filled.

    Attributes:
        what: in the lines that people read.
        make: starts the process of an actor, given the post and how many the slot has had before, plus 1.
        patience_s: seconds for which what runs on a leaving actor may go on.
        stop: arguments of the actor's `stop`.
    """

    wanted: rec.Wanted
    what: str
    make: Callable[["Post", int], Actor]
    patience_s: float
    stop: tuple[float, ...] = ()


@dataclass
class _Held:
    actor: Actor
    post: Post
    state: rec.State = "starting"
    sick: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    doing: asyncio.Task[None] | None = None
    asked: asyncio.Task[str] | None = None

    def seen(self) -> rec.Actor:
        wanted = self.post.wanted
        return rec.Actor(self.actor.name, wanted.slot, wanted.build, self.state, self.sick)


class Controller:
    """The actors of one cluster. All methods run on one event loop.

    Args:
        posts: what is wanted.
        say: gets one line for everything that happens.
        start_timeout_s: seconds after which an actor that is not ready has failed.
        clock: seconds; for deaths and pauses.
    """

    def __init__(
        self,
        posts: Sequence[Post],
        say: Say,
        start_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._posts = list(posts)
        self._say = say
        self._start_timeout_s = start_timeout_s
        self._clock = clock
        self._held: dict[str, _Held] = {}
        self._made: dict[str, int] = {}
        self._deaths: dict[str, list[rec.Death]] = {}
        self._looking = asyncio.Lock()
        self.refused: list[str] = []
        """A sentence on each replacement that did not start, oldest first."""

    def adopt(self, actor: Actor, post: Post, number: int, facts: dict[str, str]) -> None:
        """Look after an actor that is ready already. `number`: of those that its slot has had."""
        self._made[post.wanted.slot] = max(number, self._made.get(post.wanted.slot, 0))
        self._held[actor.name] = _Held(actor, post, "ready", facts=facts)

    async def fill(self) -> None:
        """Start an actor in every slot, all at once, and wait until they are ready.

        Raises:
            ExceptionGroup: of what the first that failed has raised.
            TimeoutError: some are not ready in time; `late` names them.
        """
        asking = asyncio.create_task(self._keep_asking())
        try:
            async with asyncio.timeout(self._start_timeout_s), asyncio.TaskGroup() as group:
                for post in self._posts:
                    group.create_task(self._start(self._make(post)))
        finally:
            asking.cancel()

    def want(self, posts: Sequence[Post]) -> None:
        """Change what is wanted; `look` brings it about."""
        self._posts = list(posts)

    async def look(self) -> bool:
        """One round: ask all how they are and do what is to be done. Returns whether all is as it is wanted."""
        async with self._looking:
            return await self._look()

    def facts(self, slot: str) -> dict[str, str]:
        """What the ready actor of a slot has said at its start; empty while there is none."""
        found = [held.facts for held in self._held.values() if held.post.wanted.slot == slot and held.state == "ready"]
        return found[0] if found else {}

    def late(self) -> list[str]:
        """Names of actors that are not ready yet."""
        return [name for name, held in self._held.items() if held.state == "starting"]

    def verdicts(self) -> list[str]:
        """A sentence on each slot that does not stay filled."""
        now = self._clock()
        said = [rec.verdict(slot, deaths, now) for slot, deaths in self._deaths.items()]
        return [each for each in said if each]

    async def stop(self, first: str = "") -> None:
        """End everything; the actors of one kind before the others. What is not ready is killed."""
        self._posts = []
        for held in list(self._held.values()):
            if held.state == "starting":
                self._end(held)
        await asyncio.gather(*(held.actor.dismiss(_ANSWER_S) for held in self._held.values()))
        for early in (True, False):
            some = [held for held in self._held.values() if (held.post.what == first) == early]
            for held in some:
                if held.state == "ready":
                    held.state, held.doing = "leaving", asyncio.create_task(self._leave(held))
            await asyncio.gather(*(held.doing for held in some if held.doing is not None))

    # Inside.

    async def _look(self) -> bool:
        await self._ask()
        now = self._clock()
        wanted = [post.wanted for post in self._posts]
        actions = rec.reconcile(wanted, [held.seen() for held in self._held.values()], self._deaths, now)
        for action in actions:
            self._do(action)
        return not actions and self._as_wanted()

    async def _ask(self) -> None:
        """Ask all that are ready how they are. One that does not answer at once holds nobody up: it is heard later."""
        ready = [held for held in self._held.values() if held.state == "ready"]
        for held in ready:
            held.asked = held.asked or asyncio.create_task(held.actor.failure(_HEALTH_TIMEOUT_S))
        if ready:
            await asyncio.wait([held.asked for held in ready if held.asked is not None], timeout=_ANSWER_S)
        for held in ready:
            if held.asked is not None and held.asked.done():
                if held.state == "ready":
                    held.sick = held.asked.result()
                held.asked = None

    async def _keep_asking(self) -> None:
        """Nobody shall think, while others start, that there is no launcher any more."""
        while True:
            with contextlib.suppress(JoinwiseError):  # said again when it is looked after
                await self._ask()
            await asyncio.sleep(_ASK_EVERY_S)

    def _as_wanted(self) -> bool:
        wanted = {(post.wanted.slot, post.wanted.build) for post in self._posts}
        found = [held.seen() for held in self._held.values()]
        ready = {(each.slot, each.build) for each in found if each.state == "ready"}
        return ready == wanted and len(found) == len(wanted)

    def _do(self, action: rec.Action) -> None:
        if isinstance(action, rec.Start):
            post = next(post for post in self._posts if post.wanted.slot == action.slot)
            held = self._make(post)
            held.doing = asyncio.create_task(self._restart(held))
            return
        held = self._held[action.name]
        if isinstance(action, rec.Leave):
            self._say(f"{held.post.what} {action.name} leaves: {action.why}")
            held.state, held.doing = "leaving", asyncio.create_task(self._leave(held))
            return
        if held.sick:
            self._died(held, held.sick)
        self._end(held)

    def _make(self, post: Post) -> _Held:
        slot = post.wanted.slot
        self._made[slot] = self._made.get(slot, 0) + 1
        held = _Held(post.make(post, self._made[slot]), post)
        self._held[held.actor.name] = held
        return held

    async def _start(self, held: _Held) -> None:
        begin = time.monotonic()
        held.facts = await held.actor.start()
        held.state = "ready"
        said = f"{held.post.what} {held.actor.name} is ready after {time.monotonic() - begin:.1f} s"
        self._say(f"{said}: {told(held.actor.phases)}")

    async def _restart(self, held: _Held) -> None:
        try:
            async with asyncio.timeout(self._start_timeout_s):
                await self._start(held)
        except TimeoutError:
            held.sick = f"it was not ready within {self._start_timeout_s:.0f} s (ray.start_timeout_s)"
        except Exception as error:
            held.sick = f"it could not start: {error}"
        if held.sick:
            self.refused.append(f"{held.post.what} {held.actor.name}: {held.sick}")

    async def _leave(self, held: _Held) -> None:
        await held.actor.stop(held.post.patience_s + STOP_BESIDE_S, *held.post.stop)
        self._forget(held)

    def _end(self, held: _Held) -> None:
        if held.doing is not None:
            held.doing.cancel()
        held.actor.kill()
        self._forget(held)

    def _forget(self, held: _Held) -> None:
        if held.asked is not None:
            held.asked.cancel()
        self._held.pop(held.actor.name, None)

    def _died(self, held: _Held, why: str) -> None:
        slot, now = held.post.wanted.slot, self._clock()
        deaths = self._deaths.setdefault(slot, [])
        deaths[:] = [each for each in deaths if now - each.at < rec.WINDOW_S] + [rec.Death(now, why)]
        pause = max(0.0, rec.retry_at(deaths) - now)
        self._say(f"{held.post.what} {held.actor.name} has failed: {why}; a new one starts in {pause:.0f} s")
