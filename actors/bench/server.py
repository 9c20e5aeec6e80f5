"""A server of somebody else's, started for a benchmark and stopped with it."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from joinwise.cluster.errors import ConfigError

_STOP_S = 30
_BEHIND = "5"


def behind_clients(pid: int) -> None:
    """Give a session whose processes compute all the time a smaller share of the CPU than the benchmark's own.

    Linux may share cores out by sessions (`sched_autogroup_enabled`). Then one that only wakes up now and again, as a
    client does, was seen to wait for a second behind engines on the same cores, which looked like gaps between tokens.
    """
    with contextlib.suppress(OSError):  # sessions are no groups here
        Path(f"/proc/{pid}/autogroup").write_text(_BEHIND, encoding="ascii")


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(
    name: str,
    command: Sequence[str],
    port: int,
    log: Path,
    environment: Mapping[str, str] | None = None,
    path: str = "/health",
    *,
    computes: bool = False,
) -> Iterator[str]:
    """Run a server until the context ends, and with it whatever it has started.

    Args:
        name: for messages.
        command: starts it.
        port: of the loopback.
        log: file for its output.
        environment: all of it; None for this process's.
        path: what it answers with 200 once it serves.
        computes: see `behind_clients`.

    Yields:
        Its base URL, once it is healthy.

    Raises:
        ConfigError: it has ended, or does not answer in time; the message has the end of its log.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    if computes:
        behind_clients(process.pid)
    try:
        _wait_healthy(name, url + path, process, log)
        yield url
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its engine, too, should it have stayed
        process.wait()


def _wait_healthy(name: str, url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ConfigError(f"{name} ended while it started:\n{log.read_text()[-2000:]}")
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise ConfigError(f"{name} was not ready within 300 s:\n{log.read_text()[-2000:]}")
