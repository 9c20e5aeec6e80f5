"""The stop-watch of a start."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from joinwise.actors import phases
from joinwise.actors.phases import Phases, told


def test_each_phase_ends_where_the_next_one_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([10.0, 11.5, 11.75, 14.75])
    monkeypatch.setattr(phases.time, "monotonic", lambda: next(ticks))
    watch = Phases()
    for name in ("imports", "engine", "imports"):
        watch.done(name)
    assert watch.seconds == {"imports": 4.5, "engine": 0.25}
    assert watch.total == 4.75


def test_what_has_gone_before_is_the_first_phase() -> None:
    watch = Phases(time.monotonic() - 3)
    watch.done("imports")
    assert 3 <= watch.seconds["imports"] == watch.total < 4


def test_short_phases_are_not_told() -> None:
    assert told({"imports": 5.25, "model": 0.04, "engine": 3.0}) == "imports 5.2 s, engine 3.0 s"
    assert told({}) == ""


def test_a_process_knows_when_it_began() -> None:
    """Its interpreter's own start and what it did before it asked count."""
    code = "import time; time.sleep(0.5); from joinwise.actors.phases import process_began; print(process_began())"
    before = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert before - 0.02 <= float(done.stdout) <= time.monotonic() - 0.5  # the system counts in hundredths
