"""The run file: one launcher a cluster, and wishes for another configuration."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from joinwise.actors import runfile
from joinwise.actors.runfile import RunFile
from joinwise.cluster.errors import ConfigError


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[int]]:
    """Signals that came; under a home of its own."""
    monkeypatch.setenv("JOINWISE_HOME", str(tmp_path))
    came: list[int] = []
    before = signal.signal(runfile.CHANGE, lambda number, frame: came.append(number))
    yield came
    signal.signal(runfile.CHANGE, before)


@pytest.fixture
def launcher(heard: list[int]) -> Iterator[RunFile]:
    with RunFile.claim("c") as claimed:
        claimed.ready({"http": "http://h"}, "redis://")
        yield claimed


def test_one_launcher_a_cluster(launcher: RunFile) -> None:
    assert runfile.running("c")["pid"] == os.getpid()
    with pytest.raises(ConfigError, match="already"), RunFile.claim("c"):
        pass


def test_a_wish_comes_true(launcher: RunFile, heard: list[int], tmp_path: Path) -> None:
    wanted = runfile.wish("c", tmp_path / "new.yaml")
    assert heard == [runfile.CHANGE]
    assert not runfile.granted("c", wanted)
    taken = launcher.take_wish()
    assert taken == wanted and taken.file == str(tmp_path / "new.yaml")
    assert launcher.take_wish() is None
    launcher.answer(taken, done=False)
    assert not runfile.granted("c", wanted)
    with pytest.raises(ConfigError, match="being changed already"):
        runfile.wish("c", tmp_path / "new.yaml")
    launcher.answer(taken)
    assert runfile.granted("c", wanted)
    assert runfile.running("c")["addresses"] == {"http": "http://h"}, "the rest of it stays"
    again = runfile.wish("c", tmp_path / "new.yaml")
    assert not runfile.granted("c", again), "the answer to the one before is not its own"


def test_who_reads_while_it_is_written_reads_it_afterwards(launcher: RunFile) -> None:
    """A launcher that writes for ever, and a reader that must never believe that it has gone."""
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            launcher.ready({"http": "h" * 2000}, "redis://")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(runfile.running("c")["pid"] == os.getpid() for _ in range(40))
    finally:
        over.set()
        writer.join()


def test_a_wish_that_fails_says_why(launcher: RunFile, tmp_path: Path) -> None:
    wanted = runfile.wish("c", tmp_path / "new.yaml")
    launcher.answer(wanted, error="no such model")
    with pytest.raises(ConfigError, match="no such model"):
        runfile.granted("c", wanted)


def test_without_a_launcher(heard: list[int], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not run"):
        runfile.wish("c", tmp_path / "new.yaml")
    with RunFile.claim("c") as claimed:
        with pytest.raises(ConfigError, match="does not run"):
            runfile.wish("c", tmp_path / "new.yaml")  # it is not ready
        claimed.ready({}, "redis://")
        wanted = runfile.wish("c", tmp_path / "new.yaml")
    with pytest.raises(ConfigError, match="has stopped"):
        runfile.granted("c", wanted)
