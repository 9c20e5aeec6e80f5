"""The file that says which cluster runs on this machine: one launcher per cluster name.

Held under an exclusive lock by the launcher, so that a second `joinwise up` is refused and a file
left by a launcher that was killed is known to be stale. It may hold Redis' password: mode 0600.
"""

import contextlib
import fcntl
import json
import os
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from joinwise.cluster import env
from joinwise.cluster.errors import ConfigError

_WRITTEN_S = 1.0
_POLL_S = 0.01

#: Tells a launcher that there is a wish. Not SIGHUP, which ends a cluster with its terminal.
CHANGE = signal.SIGUSR1


@dataclass
class RunFile:
    """The launcher's own handle."""

    path: Path
    _file: IO[str]

    @classmethod
    @contextmanager
    def claim(cls, cluster: str) -> Iterator["RunFile"]:
        """Be the launcher of a cluster while the context is open.

        Raises:
            ConfigError: another launcher runs it.
        """
        path = run_path(cluster)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"cluster {cluster!r} runs on this machine already: use it, `joinwise down` it, "
                    "or set another `cluster:` name"
                ) from None
            claimed = cls(path, file)
            claimed._write({"pid": os.getpid(), "cluster": cluster, "started": time.time()})
            try:
                yield claimed
            finally:
                path.unlink(missing_ok=True)

    def ready(self, addresses: dict[str, str], redis_url: str) -> None:
        """Publish the addresses."""
        self._write(read(self.path) | {"ready": True, "addresses": addresses, "redis_url": redis_url})

    def take_wish(self) -> "Wish | None":
        """What somebody wants changed; None for nothing."""
        path = _wish_path(self.path)
        found = read(path)
        path.unlink(missing_ok=True)
        return Wish(str(found["id"]), str(found["file"])) if found else None

    def answer(self, wish: "Wish", *, done: bool = True, error: str = "") -> None:
        """Say how far a change is."""
        self._write(read(self.path) | {"change": {"id": wish.id, "done": done, "error": error}})

    def _write(self, facts: dict[str, Any]) -> None:
        self._file.seek(0)
        self._file.truncate()
        json.dump(facts, self._file)
        self._file.flush()


@dataclass(frozen=True)
class Wish:
    """A configuration that a running cluster is to take.

    Attributes:
        id: by which its answer is known.
        file: absolute path.
    """

    id: str
    file: str


def wish(cluster: str, file: Path) -> Wish:
    """Ask the cluster's launcher on this machine for another configuration; `granted` tells what becomes of it.

    Raises:
        ConfigError: no launcher runs it, or it is busy with another change.
    """
    facts = running(cluster)
    if not facts.get("ready"):
        raise ConfigError(f"cluster {cluster!r} does not run on this machine: `joinwise up` starts it")
    if not facts.get("change", {}).get("done", True):
        raise ConfigError(f"cluster {cluster!r} is being changed already: wait until that is done")
    wanted = Wish(secrets.token_hex(4), str(file.resolve()))
    path = _wish_path(run_path(cluster))
    draft = path.with_suffix(f".{wanted.id}")
    draft.write_text(json.dumps(asdict(wanted)))
    draft.replace(path)
    os.kill(int(facts["pid"]), CHANGE)
    return wanted


def granted(cluster: str, wanted: Wish) -> bool:
    """Whether a wish has come true; False while it is under way.

    Raises:
        ConfigError: it has failed, or the launcher has ended.
    """
    facts = running(cluster)
    if not facts:
        raise ConfigError(f"cluster {cluster!r} has stopped in the middle of the change")
    change = facts.get("change", {})
    if change.get("id") != wanted.id or not change["done"]:
        return False
    if change["error"]:
        raise ConfigError(change["error"])
    return True


def _wish_path(run: Path) -> Path:
    return run.with_suffix(".wish")


def run_path(cluster: str) -> Path:
    """Where the file of a cluster is."""
    return env.home(os.environ) / "run" / f"{cluster}.json"


def read(path: Path) -> dict[str, Any]:
    """What a run file says; empty when it is missing or half written."""
    try:
        loaded = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def running(cluster: str) -> dict[str, Any]:
    """Facts of the cluster's launcher on this machine; empty when none runs (a stale file is none)."""
    path = run_path(cluster)
    try:
        with path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _written(path)
    except OSError:
        return {}
    return {}


def _written(path: Path) -> dict[str, Any]:
    """What a run file that is held says, once it is not being written."""
    deadline = time.monotonic() + _WRITTEN_S
    while not (facts := read(path)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return facts


def forget(cluster: str) -> None:
    """Remove what a killed launcher has left."""
    path = run_path(cluster)
    with contextlib.suppress(OSError), path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
