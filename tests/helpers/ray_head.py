"""A Ray head of our own, as an operator starts one: on free loopback ports, in a temporary folder of its own."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from helpers.processes import Home

_BIN = Path(sys.executable).parent


@dataclass
class RayHead:
    """A running head.

    Attributes:
        home: of every process in it.
        dashboard: address of jobs and of Serve's REST interface.
        address: host:port of the control store.
        token: that Ray asks for.
    """

    home: Home
    dashboard: str
    address: str
    token: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)

    @property
    def env(self) -> dict[str, str]:
        """Environment of commands that talk to it, and of the head itself."""
        path = f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}"
        ours = {"PATH": path, "RAY_JOB_STOP_WAIT_TIME_S": "60", "RAY_USAGE_STATS_ENABLED": "0"}
        return self.home.env | ours | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def run(self, *command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run one of the environment's programs (`ray`, `serve`) to its end."""
        return subprocess.run(
            [str(_BIN / command[0]), *command[1:]],
            env=self.env,
            cwd=self.home.path,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


@contextmanager
def ray_head(folder: Path, cpus: int = 4) -> Iterator[RayHead]:
    """Start a head, and end it with everything in it; never `ray stop`, which would end other people's too."""
    port, dashboard, client, agent = free_ports(4)
    head = RayHead(Home(folder), f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}")
    short = tempfile.mkdtemp(prefix="jw-ray-")  # the path of a Unix socket has room for 107 characters
    command = [str(_BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--num-cpus={cpus}", f"--temp-dir={short}"]
    command += ["--object-store-memory=100000000"]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, short, ignore_errors=True)
        output = stack.enter_context((folder / "ray.log").open("w"))
        process = subprocess.Popen(
            command, env=head.env, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        stack.callback(head.home.wait_until_empty, 60)
        stack.callback(_end, process)
        _wait_until_it_answers(head, process)
        yield head


@contextmanager
def ray_node(head: RayHead, folder: Path, resources: dict[str, float]) -> Iterator[psutil.Process]:
    """One more node for a head while the context is open: its raylet."""
    (agent,) = free_ports(1)
    command = [str(_BIN / "ray"), "start", "--block", "--disable-usage-stats", f"--address={head.address}"]
    command += ["--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}", "--num-cpus=2"]
    command += ["--object-store-memory=100000000", f"--resources={json.dumps(resources)}"]
    with (folder / f"node-{agent}.log").open("w") as output:
        process = subprocess.Popen(
            command, env=head.env, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield _raylet_of(process)
    finally:
        _end(process)


def _raylet_of(process: subprocess.Popen[bytes], timeout_s: float = 60) -> psutil.Process:
    deadline = time.monotonic() + timeout_s
    while True:
        assert process.poll() is None and time.monotonic() < deadline, "the node has not started"
        for child in psutil.Process(process.pid).children(recursive=True):
            if child.name() == "raylet":
                return child
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _wait_until_it_answers(head: RayHead, process: subprocess.Popen[bytes], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        assert process.poll() is None, (head.home.path / "ray.log").read_text()
        assert time.monotonic() < deadline, "the Ray head's dashboard does not answer"
        try:
            if httpx.get(f"{head.dashboard}/api/version", timeout=5).status_code in (200, 401, 403):
                return
        except httpx.HTTPError:
            time.sleep(0.3)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
