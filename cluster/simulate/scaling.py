"""Pools that follow their work, in the simulator: the autoscaler of the launcher, asked as often, on the virtual clock.

A machine that is asked for serves once its engine has started; one that is to go gets nothing new, ends what it has,
and is gone then. What the router does by itself, pulling workers of one pool into the other's work, it does here too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from joinwise.cluster.autoscale import Autoscaler, work_s
from joinwise.cluster.config_model import AutoscaleConfig, PoolConfig
from joinwise.cluster.errors import ConfigError
from joinwise.cluster.router.registry import WorkerState
from joinwise.cluster.simulate.engine import Engine
from joinwise.cluster.simulate.job import Job
from joinwise.cluster.simulate.outages import START_S, Disruption
from joinwise.cluster.simulate.pools import HOMES, PoolSpec
from joinwise.cluster.simulate.profile import Profile
from joinwise.cluster.simulate.report import SLOS, tbt

if TYPE_CHECKING:
    from joinwise.cluster.simulate.live_router import LiveRouter
    from joinwise.cluster.simulate.simulator import Simulation

EVERY_S = 2.0  # as the launcher does
_NOTED = 3  # a look in so many
_WINDOW_S = 10.0
_P90 = 1  # of `SLOS`


@dataclass(frozen=True)
class Bounds:
    """A pool that scales, as a command names it: `pool=decode,least=1,up=10,down=60,target=5,start=30`.

    Attributes:
        pool: its role. It begins with `least` machines, and the most are those of the pool.
        start_s: that an engine takes to start.
    """

    pool: str
    least: int = 1
    target_s: float = 5.0
    up_s: float = 10.0
    down_s: float = 60.0
    start_s: float = START_S

    def config(self, most: int) -> PoolConfig:
        """The same as configuration.

        Raises:
            ConfigError: bounds that cannot be.
        """
        if not 1 <= self.least <= most:
            raise ConfigError(f"the pool {self.pool} has {most} machines, and cannot begin with {self.least}")
        scale = AutoscaleConfig(least=self.least, most=most, target_s=self.target_s, up_s=self.up_s, down_s=self.down_s)
        return PoolConfig(name=self.pool, model="m", role=self.pool, replicas=self.least, autoscale=scale)


def parse_bounds(text: str) -> Bounds:
    """Read a pool that scales; Splitwise's words "prompt" and "token" stand for prefill and decode.

    Raises:
        ConfigError: a word that is not one of `Bounds`, a value that cannot be, or no pool.
    """
    readers: Mapping[str, tuple[str, Callable[[str], Any]]] = {
        "pool": ("pool", HOMES.__getitem__),
        "least": ("least", int),
        **{name: (f"{name}_s", float) for name in ("target", "up", "down", "start")},
    }
    given: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            field, read = readers[name]
            given[field] = read(value)
        except (KeyError, ValueError):
            raise ConfigError(f"{part!r} in {text!r} is not one of {', '.join(readers)}, with a value") from None
    times = [value for field, value in given.items() if field.endswith("_s")]
    if "pool" not in given or not all(0 < value < math.inf for value in times):
        raise ConfigError(f"{text!r} needs a pool, and seconds above zero")
    return Bounds(**given)


class Scaling(Disruption):
    """Lets pools grow and shrink, and notes how they are.

    Args:
        simulation: whose engines are the most that there can be.
        router: its policy.
        pools: of the simulation.
        bounds: of those that scale.

    Attributes:
        notes: a row every few seconds: time, requests under way; seconds of work, workers, those of them that do the
            other pool's work, and those that start, by pool.
    """

    def __init__(
        self, simulation: Simulation, router: LiveRouter, pools: Sequence[PoolSpec], bounds: Sequence[Bounds]
    ) -> None:
        super().__init__(simulation, ())
        sizes = Counter({pool.home: 0 for pool in pools})
        for pool in pools:
            sizes[pool.home] += pool.size
        if twice := [each.pool for each in bounds if each.pool not in sizes or [*bounds].count(each) > 1]:
            raise ConfigError(f"the pool {twice[0]!r} is not there, or named twice")
        self._router = router
        self._bounds = {each.pool: each for each in bounds}
        self._scaler = Autoscaler(each.config(sizes[each.pool]) for each in bounds)
        self._starting: dict[Engine, float] = {}
        self._leaving: set[Engine] = set()
        self.notes: list[dict[str, Any]] = []
        self._looks = 0
        self.ever = True
        for name, count in self._scaler.workers.items():
            for engine in self._machines(name)[count:]:
                self._take_away(engine, 0.0)
        self.next_at = EVERY_S

    def step(self) -> None:
        """Look at the cluster, and do what the autoscaler says."""
        now = self.next_at
        self.next_at = now + EVERY_S
        for engine in [each for each, ready in self._starting.items() if ready <= now]:
            del self._starting[engine]
            engine.down = False
            self._router.back(engine, now)
        held = {each for choice in self._simulation.choices.values() for each in choice}
        for engine in self._leaving - held:
            self._leaving.remove(engine)
            self._take_away(engine, now)
        states = self._router.states(now)
        for pool in self._scaler.look(states, {}, now):
            self._match(pool, self._scaler.workers[pool], now)
        self._looks += 1
        if self._looks % _NOTED == 0:
            self._note(now, states)

    def _machines(self, pool: str) -> list[Engine]:
        return [engine for engine in self._simulation.engines if engine.home == pool]

    def _take_away(self, engine: Engine, now: float) -> None:
        self._router.lost(engine, now)
        engine.down = True

    def _match(self, pool: str, wanted: int, now: float) -> None:
        """Start machines, or let the last ones go; those that still start go first."""
        there = [each for each in self._machines(pool) if not each.down and each not in self._leaving]
        starting = [each for each in self._starting if each.home == pool]
        spare = [each for each in self._machines(pool) if each.down and each not in self._starting]
        for engine in spare[: max(0, wanted - len(there) - len(starting))]:
            self._starting[engine] = now + self._bounds[pool].start_s
        for engine in [*starting[::-1], *there[::-1]][: max(0, len(there) + len(starting) - wanted)]:
            if engine in self._starting:
                del self._starting[engine]
            else:
                self._leaving.add(engine)
                self._router.leave(engine, now)

    def _note(self, now: float, states: Sequence[WorkerState]) -> None:
        row: dict[str, Any] = {"t": now, "requests": len(self._simulation.choices)}
        for pool in dict.fromkeys(engine.home for engine in self._simulation.engines):
            mine = [each for each in states if each.info.pool == pool]
            row[f"{pool}_work_s"] = round(sum(map(work_s, mine)), 3)
            row[f"{pool}_workers"] = sum(each.info.role != "draining" for each in mine)
            row[f"{pool}_pulled"] = sum(each.info.role not in (pool, "draining") for each in mine)
            row[f"{pool}_starting"] = sum(each.home == pool for each in self._starting)
        self.notes.append(row)


def attainment(jobs: Sequence[Job], notes: Sequence[Mapping[str, Any]], profile: Profile) -> list[dict[str, Any]]:
    """The notes, each with how many requests a second arrived in the ten seconds before it (`rate`), and what share of
    these kept Splitwise's limits for P90 on the first token and on the gaps (`attained`; None where none arrived)."""
    alone = profile.kind(profile.reference)

    def kept(job: Job) -> bool:
        if job.end < 0:
            return False
        gap = tbt(job, over_all=False)
        first = job.ttft <= SLOS["ttft"][_P90] * alone.prefill(job.arrival.prompt)
        return first and (gap is None or gap <= SLOS["tbt"][_P90] * alone.tokens(job.arrival.prompt))

    rows = []
    for note in notes:
        arrived = [job for job in jobs if note["t"] - _WINDOW_S < job.at <= note["t"]]
        share = sum(map(kept, arrived)) / len(arrived) if arrived else None
        rows.append({**note, "rate": len(arrived) / _WINDOW_S, "attained": share})
    return rows
