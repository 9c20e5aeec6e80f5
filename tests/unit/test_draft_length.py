"""The number of drafts: the best there is, by trying them all, and what it becomes while an engine works."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from joinwise.actors.draft.length import LengthChooser, Line, best_lengths

RATE = st.floats(0.0, 0.99)
COST = st.tuples(st.floats(1e-4, 0.1), st.floats(0.0, 0.05))


def speed(
    rates: dict[int, float], lengths: dict[int, int], verify: tuple[float, float], draft: tuple[float, float]
) -> float:
    """Expected tokens a second, as the module's first lines define it."""
    tokens = sum(sum(rates[name] ** power for power in range(length + 1)) for name, length in lengths.items())
    seconds = verify[0] + verify[1] * sum(length + 1 for length in lengths.values())
    depth = max(lengths.values())
    return tokens / (seconds + (draft[0] + draft[1] * depth if depth else 0.0))


@given(st.lists(RATE, min_size=1, max_size=3), st.integers(1, 4), COST, COST)
@settings(max_examples=200, deadline=None)
def test_no_other_lengths_are_faster(
    rates: list[float], most: int, verify: tuple[float, float], draft: tuple[float, float]
) -> None:
    by_name = dict(enumerate(rates))
    chosen = best_lengths(by_name, most, verify, draft)
    fastest = max(
        speed(by_name, dict(enumerate(lengths)), verify, draft)
        for lengths in itertools.product(range(most + 1), repeat=len(rates))
    )
    assert speed(by_name, chosen, verify, draft) == pytest.approx(fastest, rel=1e-9)


def test_examples() -> None:
    free = (0.0, 0.0)
    assert best_lengths({}, 4, (0.1, 0.01), free) == {}
    assert best_lengths({1: 0.9, 2: 0.9}, 4, (0.1, 0.0), free) == {1: 4, 2: 4}  # what costs nothing is taken
    assert best_lengths({1: 0.0}, 4, (0.1, 0.001), free) == {1: 0}
    assert best_lengths({1: 0.9}, 4, (0.05, 0.001), (0.5, 0.0)) == {1: 0}  # a draft that is slower than the target
    lengths = best_lengths({1: 0.95, 2: 0.3}, 8, (0.05, 0.004), (0.002, 0.001))
    assert lengths[1] > lengths[2]


def test_a_line_forgets_and_never_falls() -> None:
    line = Line()
    assert line.fit() == (0.0, 0.0)
    line.add(4, 0.1)
    assert line.fit() == (0.1, 0.0)
    for x in (1, 5, 9) * 100:
        line.add(x, 0.02 + 0.003 * x)
    assert line.fit() == pytest.approx((0.02, 0.003), rel=1e-3)
    for x in (1, 5, 9) * 200:
        line.add(x, 0.5 - 0.01 * x)
    intercept, slope = line.fit()
    assert slope == 0.0
    assert intercept == pytest.approx(0.45, rel=0.02)


class World:
    """An engine with a draft actor, on a virtual clock."""

    def __init__(
        self, chooser: LengthChooser, rates: list[float], verify: float, per_token: float, draft: float
    ) -> None:
        self._chooser, self.rates = chooser, rates
        self._verify, self._per_token, self.draft = verify, per_token, draft
        self._chance = random.Random(3)
        self.tokens, self.seconds = 0, 0.0
        self.asked = 0

    def run(self, steps: int) -> dict[int, int]:
        lengths: dict[int, int] = {}
        for _ in range(steps):
            lengths = self._chooser.choose(range(len(self.rates)))
            if depth := max(lengths.values()):
                self.asked += 1
                self._spend(self.draft * depth, lambda s, d=depth: self._chooser.drafted(d, s))  # type: ignore[misc]
            size = sum(lengths.values()) + len(lengths)
            self._spend(self._verify + self._per_token * size, lambda s, m=size: self._chooser.verified(m, s))  # type: ignore[misc]
            for name, length in lengths.items():
                accepted = 0
                while accepted < length and self._chance.random() < self.rates[name]:
                    accepted += 1
                self.tokens += accepted + 1
                if length:
                    self._chooser.accepted(name, length, accepted)
        return lengths

    def _spend(self, seconds: float, tell) -> None:  # type: ignore[no-untyped-def]
        noisy = seconds * self._chance.uniform(0.9, 1.1)
        self.seconds += noisy
        tell(noisy)


@pytest.mark.parametrize(
    ("rates", "verify", "per_token", "draft"),
    [
        ([0.9], 0.05, 0.001, 0.004),
        ([0.9, 0.2], 0.05, 0.002, 0.004),
        ([0.6] * 4, 0.05, 0.005, 0.002),
        ([0.3], 0.05, 0.01, 0.02),
        ([0.9] * 8, 0.02, 0.02, 0.01),  # every token costs as much as a step: nothing can be won
    ],
)
def test_what_it_settles_on_is_nearly_as_fast_as_knowing_everything(
    rates: list[float], verify: float, per_token: float, draft: float
) -> None:
    world = World(LengthChooser(8), rates, verify, per_token, draft)
    world.run(100)
    tokens, seconds = world.tokens, world.seconds
    world.run(600)
    got = (world.tokens - tokens) / (world.seconds - seconds)
    by_name = dict(enumerate(rates))
    best = best_lengths(by_name, 8, (verify, per_token), (0.0, draft))
    assert got >= 0.93 * speed(by_name, best, (verify, per_token), (0.0, draft))


def test_without_gain_it_asks_hardly_ever_and_notices_when_that_changes() -> None:
    world = World(LengthChooser(4), [0.05], 0.05, 0.002, 0.05)
    world.run(100)
    world.asked = 0
    world.run(1000)
    assert 0 < world.asked < 40
    world.rates, world.draft = [0.95], 0.001  # another text, and a draft actor that is no longer busy
    world.run(3000)
    assert world.run(1)[0] >= 3


def test_a_new_sequence_is_taken_for_an_average_one_and_an_old_one_is_forgotten() -> None:
    chooser = LengthChooser(4)
    for _ in range(100):
        chooser.accepted(1, 4, 4)
        chooser.verified(5, 0.05)
        chooser.drafted(4, 0.01)
    for _ in range(20):
        chooser.choose([1])
    assert chooser.choose([2])[2] > 0
    for _ in range(100):
        chooser.accepted(2, 4, 0)
    assert chooser.choose([2])[2] == 0 or chooser.choose([1, 2])[2] < chooser.choose([1, 2])[1]
    chooser.forget(2)
    chooser.forget(77)
    assert len(chooser._sequences) == 1
