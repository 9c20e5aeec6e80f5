"""The command line under a home of its own, and every process that was ever started under it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from joinwise.actors.models.cache import cache_root

_JOINWISE = str(Path(sys.executable).with_name("joinwise"))


@dataclass
class Home:
    """A folder for `JOINWISE_HOME`. Children inherit the variable, so it names whatever belongs to it."""

    path: Path

    @property
    def env(self) -> dict[str, str]:
        """Environment of a command."""
        ours = {"JOINWISE_HOME": str(self.path), "JOINWISE_CACHE": str(cache_root()), "COLUMNS": "200"}
        return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | ours

    def write_config(self, config: dict[str, Any]) -> str:
        """Write a configuration; returns its path."""
        file = self.path / f"{config['cluster']}.yaml"
        file.write_text(yaml.safe_dump(config))
        return str(file)

    def joinwise(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        command = [_JOINWISE, *arguments]
        return subprocess.run(
            command, env=self.env, cwd=self.path, capture_output=True, text=True, timeout=timeout, check=False
        )

    @contextmanager
    def start(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Run a command in the background; it is killed if it still runs afterwards."""
        process = subprocess.Popen(
            [_JOINWISE, *arguments],
            env=self.env,
            cwd=self.path,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    def run_path(self, cluster: str) -> Path:
        """The cluster's run file."""
        return self.path / "run" / f"{cluster}.json"

    def run_file(self, cluster: str) -> dict[str, Any]:
        """What the run file says; empty when there is none."""
        try:
            facts: dict[str, Any] = json.loads(self.run_path(cluster).read_text())
        except (OSError, ValueError):
            return {}
        return facts

    def log(self, cluster: str) -> str:
        """The cluster's log."""
        return (self.path / "log" / f"{cluster}.log").read_text(errors="replace")

    def wait_ready(self, cluster: str, launcher: subprocess.Popen[str], timeout_s: float = 300) -> dict[str, Any]:
        """Wait until the launcher has published that cluster; returns its run file."""
        deadline = time.monotonic() + timeout_s
        while not ((facts := self.run_file(cluster)).get("ready") and facts["pid"] == launcher.pid):
            assert launcher.poll() is None, "the launcher has ended"
            assert time.monotonic() < deadline, f"not ready after {timeout_s} s"
            time.sleep(0.1)
        return facts

    def processes(self) -> list[str]:
        """Every process under this home."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("JOINWISE_HOME") == str(
                    self.path
                ):
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:120]}")
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def wait_until_empty(self, timeout_s: float) -> None:
        """Wait until no process is left; fail with those that are."""
        deadline = time.monotonic() + timeout_s
        while left := self.processes():
            assert time.monotonic() < deadline, "left running:\n" + "\n".join(left)
            time.sleep(0.2)


def listener(address: str) -> int:
    """The process that listens at host:port."""
    host, _, port = address.rpartition(":")
    listening = [each for each in psutil.net_connections("tcp") if each.status == "LISTEN"]
    mine = (f"::ffff:{host}", int(port)), (host, int(port))  # gRPC listens by IPv6, where there is that
    (pid,) = {each.pid for each in listening if (each.laddr.ip, each.laddr.port) in mine}
    assert pid
    return pid
