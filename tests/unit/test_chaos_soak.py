"""`joinwise chaos --soak`: what grows is told from what comes and goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from joinwise.actors.chaos import soak


def series(value: Callable[[float], float], count: int = 200) -> list[tuple[float, float]]:
    return [(float(at), value(at)) for at in range(count)]


@pytest.mark.parametrize(
    ("what", "value", "flat"),
    [
        ("rss_mb", lambda at: 1000 + min(at, 90) * 5, True),  # it warms up, then stays
        ("rss_mb", lambda at: 1000 + at, False),
        ("rss_mb", lambda at: 1000 - at, True),
        ("fds", lambda at: 50, True),
        ("fds", lambda at: 50 + at // 20, False),
        ("keys", lambda at: 40 + at % 7, True),
        ("kv_blocks", lambda at: 40 + 30 * ((at * 7919) % 13) / 13, True),  # it comes and goes with the load
        ("kv_blocks", lambda at: 40 + at / 4 + 30 * ((at * 7919) % 13) / 13, False),
    ],
)
def test_what_grows_is_told_from_what_comes_and_goes(what: Any, value: Callable[[float], float], flat: bool) -> None:
    (found,) = soak.judged({soak.Series("w", what): series(value)})
    assert (found["who"], found["what"], found["flat"]) == ("w", what, flat), found


def test_of_a_few_samples_nothing_is_said_to_be_flat() -> None:
    assert not soak.judge(series(lambda _: 1.0, 12), (1.0, 0.0))["flat"]
    assert not soak.judge(series(lambda _: 1.0, 1), (1.0, 0.0))["flat"]


def test_a_rise_is_measured_over_the_second_half() -> None:
    found = soak.judge(series(lambda at: 3 * at, 101), (1.0, 0.0))
    assert (found["rise"], found["noise"], found["samples"]) == (150.0, 0.0, 51)
