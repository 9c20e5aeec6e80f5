"""What would help a cluster most: one worker in another role, or one machine more. Each change is simulated.

What simulates is given, so tests need no simulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from joinwise.cluster.simulate.pools import PoolSpec
from joinwise.cluster.simulate.report import PERCENTILES, SLOS

#: Figures of the traffic on pools, as `joinwise simulate` has them; the rate is over the traffic's own.
Measure = Callable[[Sequence[PoolSpec], float], Mapping[str, float]]
_WORTH = 0.97  # a change helps if what is worst falls below so much of what it is
_MOST_RATE = 8.0


@dataclass(frozen=True)
class Option:
    """A cluster with one thing changed, or nothing.

    Attributes:
        what: the change, in words.
        pools: what there is then.
        figures: of the traffic on it.
    """

    what: str
    change: Literal["none", "role", "machine"]
    pools: tuple[PoolSpec, ...]
    figures: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The largest of the nine slowdowns over its limit; infinite where a request is refused."""
        if self.figures["refused"]:
            return math.inf
        shares = [
            self.figures[f"{name}_slowdown_p{percent}"] / limit
            for name, limits in SLOS.items()
            for percent, limit in zip(PERCENTILES, limits, strict=True)
        ]
        return max((share for share in shares if not math.isnan(share)), default=0.0)


@dataclass(frozen=True)
class Advice:
    """What was looked at: the cluster as it is, and every change, the best first.

    Attributes:
        bears: for some of the options, by their words: the highest rate, over the traffic's own, that keeps the nine
            objectives; 0 if not even a sixteenth does.
    """

    now: Option
    options: tuple[Option, ...]
    bears: Mapping[str, float]

    def best(self, change: str) -> Option | None:
        """The best change of a sort, unless it helps by less than a thirtieth."""
        found = next((each for each in self.options if each.change == change), None)
        return found if found is not None and found.worst < self.now.worst * _WORTH else None


def advise(pools: Sequence[PoolSpec], measure: Measure) -> Advice:
    """Simulate a cluster as it is and with each change; then how much traffic it and the best of them bear."""
    now = Option("as it is", "none", tuple(pools), measure(pools, 1.0))
    options = [Option(what, change, to, measure(to, 1.0)) for what, change, to in changes(pools)]
    options.sort(key=lambda each: (each.worst, each.figures["e2e_p50_s"], each.what))
    advice = Advice(now, tuple(options), {})
    chosen = [now, *filter(None, map(advice.best, ("role", "machine")))]
    return Advice(now, tuple(options), {each.what: _bears(each, measure) for each in chosen})


def changes(pools: Sequence[PoolSpec]) -> Iterator[tuple[str, Literal["role", "machine"], tuple[PoolSpec, ...]]]:
    """Every change of one worker's role that leaves a cluster that can serve, and one machine more of each pool."""
    for pool in pools:
        for home in ("prefill", "decode", "mixed"):
            if home != pool.home:
                to = _with(_with(pools, pool.home, pool.kind, -1), home, pool.kind, 1)
                if _serves(to):
                    yield f"one worker of {pool.kind} from {pool.home} to {home}", "role", to
        yield f"one machine more in {pool.kind} as {pool.home}", "machine", _with(pools, pool.home, pool.kind, 1)


def _with(pools: Sequence[PoolSpec], home: str, kind: str, more: int) -> tuple[PoolSpec, ...]:
    sizes = {(pool.home, pool.kind): pool.size for pool in pools}
    sizes[home, kind] = sizes.get((home, kind), 0) + more
    return tuple(PoolSpec(*key, size) for key, size in sorted(sizes.items()) if size)


def _serves(pools: Sequence[PoolSpec]) -> bool:
    homes = {pool.home for pool in pools}
    return "mixed" in homes or homes >= {"prefill", "decode"}


def _bears(option: Option, measure: Measure) -> float:
    """By bisection over the rate's logarithm, to a sixteenth."""

    def keeps(rate: float) -> bool:
        return Option(option.what, option.change, option.pools, measure(option.pools, rate)).worst <= 1

    low, high = (1.0, _MOST_RATE) if option.worst <= 1 else (1 / 16, 1.0)
    if low < 1 and not keeps(low):
        return 0.0
    if high > 1 and keeps(high):
        return high
    while high / low > 1 + 1 / 16:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low
