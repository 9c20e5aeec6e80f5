"""The launcher of the cluster that is broken: started again when it has died, as a service manager would."""

from pathlib import Path
from typing import Any, Self

import psutil

from joinwise.actors.launcher import Launcher
from joinwise.cluster.errors import InternalError

_READY_S = 300.0


class Kept:
    """A cluster while the context is open. Errors of its start are those of `Launcher.wait_ready`.

    Args:
        cluster: its name.
        file: its configuration, read at each start.
        folder: for the logs, one of each start.

    Attributes:
        facts: of its run file, as of the last start.
    """

    def __init__(self, cluster: str, file: Path, folder: Path) -> None:
        self._cluster, self._file, self._folder = cluster, file, folder
        self._starts = 0
        self._launcher: Launcher | None = None
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self.stop():
            raise InternalError(f"cluster {self._cluster!r} did not stop and was killed; its logs: {self._folder}")

    @property
    def launcher(self) -> Launcher:
        """The one that was started last."""
        assert self._launcher is not None, "it has been started"
        return self._launcher

    def start(self) -> None:
        """Start it and wait until it serves; to be called when it does not run."""
        self._starts += 1
        self._launcher = Launcher(self._cluster, self._file, self._folder / f"{self._cluster}-{self._starts}.log")
        self.facts = self._launcher.wait_ready(_READY_S)

    def stop(self) -> bool:
        """Let it end; False if it had to be killed."""
        return self._launcher is None or self._launcher.stop()

    @property
    def process(self) -> psutil.Process:
        """The launcher's."""
        return psutil.Process(self.launcher.pid)
