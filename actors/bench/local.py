"""A cluster of the benchmark's own, started and stopped with it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from joinwise.actors import runfile
from joinwise.cluster.config import JoinwiseConfig
from joinwise.cluster.errors import ConfigError

_START_S = 300.0


@contextmanager
def local_cluster(config: JoinwiseConfig, folder: Path) -> Iterator[dict[str, Any]]:
    """Run a cluster in a process of its own.

    Yields:
        What its run file says: addresses and Redis' URL.

    Raises:
        ConfigError: it did not start; the message has the end of its log.
    """
    file, log = folder / f"{config.cluster}.yaml", folder / f"{config.cluster}.log"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with log.open("w") as output:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "joinwise.actors.launch", "-f", str(file)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + _START_S
        while not (facts := runfile.running(config.cluster)).get("ready"):
            if launcher.poll() is not None or time.monotonic() > deadline:
                raise ConfigError(f"the cluster did not start; the end of its log:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield facts
    finally:
        if launcher.poll() is None:
            launcher.send_signal(signal.SIGTERM)
            try:
                launcher.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(launcher.pid, signal.SIGKILL)
                launcher.wait()
