"""The search: simulate candidate clusters, keep those that meet the objectives, and say which is best for what.

For each shape the least number of machines is found by bisection (more machines never serve worse, at the best split),
and so is the split between its pools. What measures a cluster is given, so tests need no simulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from joinwise.cluster.errors import ConfigError
from joinwise.cluster.plan.space import Shape, machines, power, price, prompt_share, shapes
from joinwise.cluster.simulate.pools import PoolSpec
from joinwise.cluster.simulate.profile import Profile
from joinwise.cluster.simulate.report import SLOS, missed
from joinwise.cluster.simulate.trace import Trace

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
    _share: dict[Shape, float] = field(default_factory=dict)

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
        """So many machines, split so that the objectives are met, or missed by as little as was found.

        Bisects the size of the prefill pool, from where the last success or the work suggests: a time to the first
        token that is too long asks for more of it, a time between tokens for less.
        """
        if shape.mixed:
            return self.look(shape, total, 0, rate)
        low, high = 1, total - 1
        share = self._share.get(shape) or prompt_share(self.trace, shape, self.profile)
        prefill = min(high, max(low, round(share * total)))
        found: list[Candidate] = []
        while low <= high:
            found.append(self.look(shape, prefill, total - prefill, rate))
            if found[-1].meets:
                self._share[shape] = prefill / total
                return found[-1]
            first, between = (_worst(found[-1], name) for name in ("ttft", "tbt"))
            if first >= between:
                low = prefill + 1
            else:
                high = prefill - 1
            prefill = (low + high) // 2
        return min(found, key=lambda each: each.worst)

    def fewest(self, shape: Shape, most: int) -> Candidate:
        """The smallest cluster of a shape that meets the objectives; what `most` machines can do if none does."""
        best = self.best_split(shape, most)
        low, high = (0 if shape.mixed else 1), most
        while best.meets and high - low > 1:
            middle = (low + high) // 2
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
            share = self._balance(shape, total)
            options = [
                (count, int((budget - count * unit(shape.prefill)) / unit(shape.decode) + 1e-9))
                for count in range(1, int(budget / unit(shape.prefill)) + 1)
            ]
            prefill, decode = min(
                ((one, other) for one, other in options if other >= 1),
                key=lambda sizes: abs(sizes[0] / (sizes[0] + sizes[1]) - share),
                default=(1, 1),
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

    def _balance(self, shape: Shape, total: int) -> float:
        """The share of machines for prompts in the smallest cluster of a shape that bears the trace."""
        self.fewest(shape, total)
        return self._share.get(shape) or prompt_share(self.trace, shape, self.profile)


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


def _worst(candidate: Candidate, name: str) -> float:
    """The largest factor by which one of a family of objectives is missed; 0 if none is."""
    return max((factor for key, factor in candidate.over.items() if key.startswith(f"{name}_")), default=0.0)


def _misses(candidate: Candidate) -> str:
    found: Iterable[str] = (
        f"{name} is {'not to be had' if math.isnan(factor) else f'{factor:.2f} times its limit'}"
        for name, factor in sorted(candidate.over.items(), key=lambda item: -item[1])
    )
    refused = candidate.figures["refused"]
    return ", ".join([*found, *([f"{refused:.0f} requests are refused"] if refused else [])])
