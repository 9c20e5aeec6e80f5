"""The search: simulate candidate clusters, keep those that meet the objectives, and say which is best for what.

For each shape the least number of machines is found by bisection (more machines never serve worse, at the best split),
and the splits around the most promising one are tried until one meets the objectives. What measures a cluster is given,
so tests need no simulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from joinwise.cluster.errors import ConfigError
from joinwise.cluster.plan.space import Shape, least, machines, power, price, shapes, splits
from joinwise.cluster.simulate.pools import PoolSpec
from joinwise.cluster.simulate.profile import Profile
from joinwise.cluster.simulate.report import SLOS, missed
from joinwise.cluster.simulate.trace import Trace

#: Splits tried for one shape and number of machines.
SPLITS = 3
Slos = Mapping[str, tuple[float, float, float]]
#: Figures of a trace on a cluster, as `joinwise simulate` has them; the rate is over the trace's own.
Measure = Callable[[Sequence[PoolSpec], float], Mapping[str, float]]


@dataclass(frozen=True)
class Candidate:
    """A cluster that was simulated.

    Attributes:
        rate: requests over those of the trace.
        over: objectives that it misses, and by which factor.
    """

    shape: Shape
    pools: tuple[PoolSpec, ...]
    rate: float
    price: float
    power: float
    figures: Mapping[str, float]
    over: Mapping[str, float]

    @property
    def meets(self) -> bool:
        """Whether it keeps all objectives, and refuses nobody."""
        return not self.over and not self.figures["refused"]

    @property
    def machines(self) -> int:
        """How many."""
        return machines(self.pools)

    @property
    def worst(self) -> float:
        """By which factor it misses the objective that it misses most; up to 1 it meets all of them."""
        return max(self.over.values(), default=1.0) + self.figures["refused"]

    def __str__(self) -> str:
        return ",".join(map(str, self.pools))


@dataclass
class Search:
    """One search over clusters for a trace.

    Attributes:
        slos: most slowdown, by percentile, over the profile's reference machine.
        tried: every cluster that was simulated.
    """

    trace: Trace
    profile: Profile
    measure: Measure
    slos: Slos = field(default_factory=lambda: SLOS)
    tried: dict[tuple[tuple[PoolSpec, ...], float], Candidate] = field(default_factory=dict)

    def look(self, shape: Shape, prefill: int, decode: int, rate: float = 1.0) -> Candidate:
        """Simulate one cluster, once."""
        pools = shape.pools(prefill, decode)
        if (pools, rate) not in self.tried:
            figures = self.measure(pools, rate)
            self.tried[pools, rate] = Candidate(
                shape,
                pools,
                rate,
                price(pools, self.profile),
                power(pools, self.profile),
                figures,
                missed(figures, self.slos),
            )
        return self.tried[pools, rate]

    def best_split(self, shape: Shape, total: int, rate: float = 1.0) -> Candidate:
        """So many machines, split so that the objectives are met, or missed by as little as was found."""
        found = []
        for prefill, decode in splits(self.trace, shape, self.profile, total)[:SPLITS]:
            found.append(self.look(shape, prefill, decode, rate))
            if found[-1].meets:
                return found[-1]
        return min(found, key=lambda each: each.worst)

    def fewest(self, shape: Shape, most: int) -> Candidate:
        """The smallest cluster of a shape that meets the objectives; what `most` machines can do if none does."""
        low = min(most, least(self.trace, shape, self.profile)) - 1
        best = self.best_split(shape, most)
        if not best.meets:
            return best
        high = most
        while high - low > 1 and high > 1 + (not shape.mixed):
            middle = (low + high) // 2
            if middle < 1 + (not shape.mixed):
                break
            found = self.best_split(shape, middle)
            if found.meets:
                best, high = found, middle
            else:
                low = middle
        return best

    def iso_throughput(self, kinds: Sequence[str], most: int) -> Plan:
        """For the trace as it is: the least of each shape."""
        return Plan([self.fewest(shape, most) for shape in shapes(kinds)])

    def iso_budget(self, kinds: Sequence[str], budget: float, unit: Callable[[str], float], most_rate: float) -> Plan:
        """For a budget of `unit` (of a kind: its price or power): the highest rate that each shape bears.

        Raises:
            ConfigError: the budget buys no machine of any kind.
        """
        found = []
        for shape in shapes(kinds):
            each = (unit(shape.prefill) + unit(shape.decode)) / 2
            total = int(budget / each + 1e-9)
            if total >= 1 + (not shape.mixed):
                found.append(self._highest_rate(shape, total, budget, unit, most_rate))
        if not found:
            raise ConfigError(f"a budget of {budget:g} buys no cluster of {', '.join(kinds)}")
        return Plan(found)

    def _highest_rate(
        self, shape: Shape, total: int, budget: float, unit: Callable[[str], float], most_rate: float
    ) -> Candidate:
        """By bisection over the rate, to a twentieth; pools of two kinds share the budget as the work asks."""
        prefill, decode = total, 0
        if not shape.mixed:
            options = [
                (count, int((budget - count * unit(shape.prefill)) / unit(shape.decode) + 1e-9))
                for count in range(1, int(budget / unit(shape.prefill)) + 1)
            ]
            share = splits(self.trace, shape, self.profile, total)[0][0] / total
            prefill, decode = min(
                ((one, other) for one, other in options if other >= 1),
                key=lambda sizes: abs(sizes[0] / (sizes[0] + sizes[1]) - share),
            )
        low, high = 0.0, most_rate
        best = self.look(shape, prefill, decode, high)
        if best.meets:
            return best
        while high - low > most_rate / 20:
            middle = (low + high) / 2
            found = self.look(shape, prefill, decode, middle)
            if found.meets:
                best, low = found, middle
            else:
                high = middle
                best = best if best.meets else found
        return best


@dataclass(frozen=True)
class Plan:
    """What a search has found.

    Attributes:
        candidates: the best of every shape, whether it meets the objectives or not.
    """

    candidates: Sequence[Candidate]

    @cached_property
    def feasible(self) -> tuple[Candidate, ...]:
        """Those that meet the objectives."""
        return tuple(each for each in self.candidates if each.meets)

    @cached_property
    def front(self) -> tuple[Candidate, ...]:
        """Those than which no other is better in one of rate, price and power and no worse in the others; by price."""
        return tuple(
            sorted(
                (each for each in self.feasible if not any(dominates(other, each) for other in self.feasible)),
                key=lambda each: (each.price, each.power, -each.rate),
            )
        )

    def cheapest(self) -> Candidate:
        """Of the front, the one with the least price; then power, then the one that splits nothing.

        Raises:
            ConfigError: none meets the objectives; says what the best one misses, and by how much.
        """
        return self._pick(lambda each: (each.price, each.power, -each.rate, not each.shape.mixed))

    def frugal(self) -> Candidate:
        """The one with the least power. Raises as `cheapest`."""
        return self._pick(lambda each: (each.power, each.price, -each.rate, not each.shape.mixed))

    def fastest(self) -> Candidate:
        """The one that bears the highest rate. Raises as `cheapest`."""
        return self._pick(lambda each: (-each.rate, each.price, each.power, not each.shape.mixed))

    def _pick(self, key: Callable[[Candidate], tuple[float, ...]]) -> Candidate:
        if not self.feasible:
            nearest = min(self.candidates, key=lambda each: each.worst)
            raise ConfigError(f"no cluster meets the objectives; the nearest is {nearest}: {_misses(nearest)}")
        return min(self.feasible, key=key)


def dominates(one: Candidate, other: Candidate) -> bool:
    """Whether it is no worse in rate, price and power, and better in one of them."""
    first, second = ((-each.rate, each.price, each.power) for each in (one, other))
    return first != second and all(a <= b for a, b in zip(first, second, strict=True))


def _misses(candidate: Candidate) -> str:
    found: Iterable[str] = (
        f"{name} is {'not to be had' if math.isnan(factor) else f'{factor:.2f} times its limit'}"
        for name, factor in sorted(candidate.over.items(), key=lambda item: -item[1])
    )
    refused = candidate.figures["refused"]
    return ", ".join([*found, *([f"{refused:.0f} requests are refused"] if refused else [])])
