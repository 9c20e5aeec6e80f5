"""The named baseline: plain vLLM, its own server and its own engine, pinned to given cores."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from joinwise.cluster.errors import ConfigError


@contextmanager
def plain_vllm(
    model_path: str,
    name: str,
    cores: Sequence[int],
    engine: dict[str, Any],
    log: Path,
    settings: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Run `vllm.entrypoints.openai.api_server` with one engine on these cores.

    vLLM binds the engine's threads; its HTTP process is left free to run anywhere, which favours it.

    Args:
        model_path: local folder.
        name: the name clients ask for.
        cores: cores of the engine, one thread each.
        engine: engine arguments by name, as in joinwise.yaml.
        log: file for its output.
        settings: more variables of its environment.

    Yields:
        The server's base URL.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--model", model_path, "--served-model-name", name]
    for key, value in engine.items():
        flag = "--" + key.replace("_", "-")
        command += [flag] if value is True else [flag, str(value)]
    environment = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_LOGGING_LEVEL": "WARNING",
        **(settings or {}),
    }
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_healthy("plain vLLM", url, server, log)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_healthy(name: str, url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until a server answers /health.

    Raises:
        ConfigError: it has ended, or does not answer in time; the message has the end of its log.
    """
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise ConfigError(f"{name} ended while it started:\n{log.read_text()[-2000:]}")
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise ConfigError(f"{name} was not ready within 300 s:\n{log.read_text()[-2000:]}")
