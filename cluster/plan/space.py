"""The clusters that a plan looks at: a shape of pools, sized from how much work a trace brings.

Pure functions: nothing here simulates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from joinwise.cluster.simulate.pools import PoolSpec
from joinwise.cluster.simulate.profile import Kind, Profile
from joinwise.cluster.simulate.trace import Trace

#: Sequences in a decode batch that work is estimated with; the simulation decides.
_TYPICAL_BATCH = 32


@dataclass(frozen=True)
class Shape:
    """Which kinds of machines do what.

    Attributes:
        prefill, decode: kinds; equal to each other in `mixed` shapes.
        mixed: whole requests on every machine, nothing is split.
    """

    prefill: str
    decode: str
    mixed: bool = False

    def __str__(self) -> str:
        return f"{self.prefill}, whole" if self.mixed else f"{self.prefill} + {self.decode}"

    def pools(self, prefill: int, decode: int) -> tuple[PoolSpec, ...]:
        """The pools with so many machines each; a mixed shape has all of them in one."""
        if self.mixed:
            return (PoolSpec("mixed", self.prefill, prefill + decode),)
        return PoolSpec("prefill", self.prefill, prefill), PoolSpec("decode", self.decode, decode)


def shapes(kinds: Sequence[str]) -> Iterator[Shape]:
    """Every shape from some kinds: whole on each, and each pair of them for the phases."""
    for kind in kinds:
        yield Shape(kind, kind, mixed=True)
    for prefill in kinds:
        for decode in kinds:
            yield Shape(prefill, decode)


def price(pools: Sequence[PoolSpec], profile: Profile) -> float:
    """Of an hour."""
    return sum(pool.size * profile.kind(pool.kind).price for pool in pools)


def power(pools: Sequence[PoolSpec], profile: Profile) -> float:
    """Kilowatts provisioned."""
    return sum(pool.size * profile.kind(pool.kind).power for pool in pools)


def machines(pools: Sequence[PoolSpec]) -> int:
    """How many."""
    return sum(pool.size for pool in pools)


def work(trace: Trace, prefill: Kind, decode: Kind) -> tuple[float, float]:
    """Machines that a trace keeps busy with prompts, and with answers, if nothing ever waited."""
    seconds = trace.seconds or 1.0
    prompts = sum(prefill.prefill(each.prompt) for each in trace.arrivals)
    answers = sum(each.output for each in trace.arrivals) * decode.batch(_TYPICAL_BATCH) / _TYPICAL_BATCH
    return prompts / seconds, answers / seconds


def prompt_share(trace: Trace, shape: Shape, profile: Profile) -> float:
    """The share of a split cluster's machines that prompts ask for, by their work."""
    prompts, answers = work(trace, profile.kind(shape.prefill), profile.kind(shape.decode))
    return prompts / ((prompts + answers) or 1.0)
