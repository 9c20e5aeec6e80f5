"""Objects in processes of their own, of this interpreter and of another one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from helpers.counter import Counter

from joinwise.actors.bench.remote import Remote


@pytest.fixture(params=["spawned", "elsewhere"])
def python(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """None for our interpreter; another one does not have our `sys.path`, so it is told where these tests are."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    return None if request.param == "spawned" else sys.executable


def test_it_keeps_what_it_was_told(python: str | None) -> None:
    counter = Remote(Counter, 3, python=python)
    try:
        assert [counter("add", 4), counter("add", 1)] == [7, 8]
        pid = counter("pid")
        assert pid != os.getpid()
        with pytest.raises(RuntimeError, match="TypeError"):
            counter("add")
        assert counter("add", 0) == 8
    finally:
        counter.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_one_that_cannot_be_made_or_dies(python: str | None) -> None:
    with pytest.raises(RuntimeError, match="ValueError: no such count"):
        Remote(Counter, -1, python=python)
    counter = Remote(Counter, 0, python=python)
    with pytest.raises(RuntimeError, match="died"):
        counter("die")
    counter.close()


def test_an_interpreter_that_is_not_there() -> None:
    with pytest.raises(OSError, match="no/such"):
        Remote(Counter, 0, python="/no/such/python")
