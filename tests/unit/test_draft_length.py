"""The number of drafts: the best there is, by trying them all, and what it becomes while an engine works."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from joinwise.actors.draft.length import LengthChooser, Line, best_lengths

RATE = st.floats(0.0, 0.99)
COST = st.tuples(st.floats(1e-4, 0.1), st.floats(0.0, 0.05))


def speed(
    rates: dict[int, float],
    lengths: dict[int, int],
    verify: tuple[float, float],
    draft: tuple[float, float],
    guessed: Collection[int] = (),
) -> float:
    """Expected tokens a second, as the module's first lines define it."""
    tokens = sum(sum(rates[name] ** power for power in range(length + 1)) for name, length in lengths.items())
    seconds = verify[0] + verify[1] * sum(length + 1 for length in lengths.values())
    depth = max((length for name, length in lengths.items() if name not in guessed), default=0)
    return tokens / (seconds + (draft[0] + draft[1] * depth if depth else 0.0))


@given(st.lists(st.tuples(RATE, st.booleans()), min_size=1, max_size=3), st.integers(1, 4), COST, COST)
@settings(max_examples=300, deadline=None)
def test_no_other_lengths_are_faster(
    sequences: list[tuple[float, bool]], most: int, verify: tuple[float, float], draft: tuple[float, float]
) -> None:
    rates = {name: rate for name, (rate, _) in enumerate(sequences)}
    guessed = {name: rate for name, (rate, there) in enumerate(sequences) if there}
    asked = {name: rate for name, rate in rates.items() if name not in guessed}
    chosen = best_lengths(asked, most, verify, draft, guessed)
    fastest = max(
        speed(rates, dict(enumerate(lengths)), verify, draft, guessed)
        for lengths in itertools.product(range(most + 1), repeat=len(sequences))
    )
    assert speed(rates, chosen, verify, draft, guessed) == pytest.approx(fastest, rel=1e-9)


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
            lengths, _ = self._chooser.choose(range(len(self.rates)))
            lengths = {name: lengths.get(name, 0) for name in range(len(self.rates))}
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
    assert chooser.choose([2])[0][2] > 0
    for _ in range(100):
        chooser.accepted(2, 4, 0)
    assert not chooser.choose([2])[0]
    chooser.forget(2)
    chooser.forget(77)
    assert len(chooser._sequences) == 1


def settled(draft_s: float) -> LengthChooser:
    """One that knows its costs: a step of 50 ms and 1 ms a token, and drafts of so many seconds a token."""
    chooser = LengthChooser(4)
    for depth in (1, 2, 4) * 10:
        chooser.choose([1])
        chooser.accepted(1, depth, depth // 2)
        chooser.verified(depth + 1, 0.05 + 0.001 * (depth + 1))
        chooser.drafted(depth, draft_s * depth)
    return chooser


def test_what_is_there_is_taken_beside_what_is_asked_for() -> None:
    asked, taken = settled(0.002).choose([1], {2: 0.9}, {2: 0.9, 1: 0.2})
    assert asked[1] > 0
    assert taken == {2: 4}


def test_where_asking_does_not_pay_even_doubtful_guesses_are_taken() -> None:
    chooser = settled(0.5)
    seen = [chooser.choose([1, 3], {2: 0.9}, {1: 0.3, 2: 0.9, 4: 0.0}) for _ in range(100)]
    rests = [taken for asked, taken in seen if not any(asked.values())]
    assert all(taken[2] == 4 and 0 < taken[1] < 4 and not taken[4] for taken in rests)
    assert 0 < len(seen) - len(rests) < 10  # now and again it is asked all the same
    assert all(set(asked) == {1, 3} and set(taken) == {2} for asked, taken in seen if any(asked.values()))


def test_steps_without_anything_to_learn_from_do_not_count_as_the_beginning() -> None:
    chooser = LengthChooser(6)
    for _ in range(50):
        assert chooser.choose([]) == ({}, {})
    assert {chooser.choose([1])[0][1] for _ in range(6)} == {2, 4, 6}
    assert {chooser.choose([], {1: 0.5})[1][1] for _ in range(6)} == {2, 4, 6}
