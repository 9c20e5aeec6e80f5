"""The launcher as a process of its own, for `joinwise up --detach`, benchmarks and tests: started, awaited, stopped."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from joinwise.actors import runfile
from joinwise.cluster.errors import ConfigError, InternalError, JoinwiseError

_POLL_S = 0.1


class Launcher:
    """`python -m joinwise.actors.launch` in a session of its own.

    Args:
        cluster: name in the configuration.
        file: the configuration; None for the default one.
        log: what it prints, and its actors print, is written here.
        environment: settings that the caller's own environment overrides.
    """

    def __init__(self, cluster: str, file: Path | None, log: Path, environment: dict[str, str] | None = None) -> None:
        self._cluster, self.log = cluster, log
        command = [sys.executable, "-m", "joinwise.actors.launch", *(["-f", str(file.resolve())] if file else [])]
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                env=(environment or {}) | os.environ,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process, which leads a group of its own."""
        return self._process.pid

    def wait_ready(self, timeout_s: float | None = None, say: Callable[[str], None] | None = None) -> dict[str, Any]:
        """Wait until it serves; returns what its run file says: addresses and Redis' URL.

        Args:
            timeout_s: seconds; None to wait as long as it takes.
            say: is told each line of its progress.

        Raises:
            ConfigError: it has failed; its last line says why.
            InternalError: it has ended, or is not ready in time; the message has the end of its log.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self.log.open(errors="replace") as lines:
            while True:
                for line in lines:
                    if say is not None and line.startswith("["):
                        say(line.rstrip())
                if (facts := runfile.running(self._cluster)).get("ready"):
                    return facts
                if self._process.poll() is not None:
                    raise self._last_words(f"the launcher has ended with status {self._process.returncode}")
                if deadline is not None and time.monotonic() > deadline:
                    raise self._last_words(f"cluster {self._cluster!r} is not ready after {timeout_s:.0f} s")
                time.sleep(_POLL_S)

    def stop(self, timeout_s: float = 60.0) -> bool:
        """End it, running requests first; returns whether that was in time, else its processes were killed."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                os.killpg(self.pid, signal.SIGKILL)
                self._process.wait()
                return False
        return True

    def _last_words(self, what: str) -> JoinwiseError:
        from joinwise.actors.launch import FAILED

        text = self.log.read_text(errors="replace")
        lines = text.splitlines()
        for index in range(len(lines) - 1, -1, -1):
            if lines[index].startswith(FAILED):
                return ConfigError("\n".join(lines[index:]).removeprefix(FAILED))
        return InternalError(f"{what}; the end of {self.log}:\n{text[-2000:]}")


@contextmanager
def launched(
    cluster: str, file: Path, log: Path, timeout_s: float = 300.0
) -> Iterator[tuple[Launcher, dict[str, Any]]]:
    """Run a cluster while the context is open: its launcher and what its run file says. Errors as for `wait_ready`.

    Raises:
        InternalError: it did not stop by itself, and was killed.
    """
    launcher = Launcher(cluster, file, log)
    try:
        facts = launcher.wait_ready(timeout_s)
        yield launcher, facts
    finally:
        in_time = launcher.stop()
    if not in_time:
        raise InternalError(f"cluster {cluster!r} did not stop and was killed; see {log}")
