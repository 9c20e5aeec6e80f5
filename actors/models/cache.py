"""Folders that are made once: conversions and downloads in the user's cache.

Promises: a folder under its final name is complete; of several processes that want it, one makes it and the others
wait; what a killed process left behind is removed by the next.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

Progress = Callable[[str], None]


def cache_root() -> Path:
    """`$JOINWISE_CACHE`, else `joinwise` in the user's cache folder."""
    if chosen := os.environ.get("JOINWISE_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "joinwise"


def make_once(target: Path, make: Callable[[Path], None], progress: Progress) -> Path:
    """Return `target`, letting `make(empty_folder)` fill it first if it is not there. Errors of `make` pass through."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f".{target.name}.lock"), progress):
        if target.is_dir():
            return target
        for leftover in target.parent.glob(f".{target.name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        draft = target.with_name(f".{target.name}.tmp-{os.getpid()}")
        draft.mkdir()
        try:
            make(draft)
            draft.replace(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return target


@contextlib.contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Hold an exclusive lock that ends with the process. The lock file stays: removing it would let two hold it."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that prepares the same model")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
