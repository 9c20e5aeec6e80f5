"""Plain vLLM, to compare with: its own unmodified HTTP server in processes of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

ENGINE = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "300",  # its 5 s are httpx's too: a client would write while the server closes
}


@dataclass(frozen=True)
class PlainServer:
    """vLLM's own server, ready.

    Attributes:
        http: base URL without /v1.
    """

    http: str
    log: Path
    pid: int


@contextmanager
def plain_server(
    model: str, name: str, folder: Path, extra: Sequence[str] = (), timeout_s: float = 300.0
) -> Iterator[PlainServer]:
    """Start `python -m vllm.entrypoints.openai.api_server`, on one thread; afterwards no process of it is left.

    Args:
        model: local folder.
        name: the name clients ask for.
        folder: where its log goes.
        extra: further arguments of vLLM's server.
    """
    port, log = _free_port(), folder / "plain-vllm.log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", model, "--served-model-name", name, "--dtype", "float32", "--enforce-eager", *extra]
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            env={**os.environ, **ENGINE},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_healthy(url, server, log, timeout_s)
        yield PlainServer(url, log, server.pid)
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(server.pid, signal.SIGKILL)  # its engine, too, should it have stayed
        except ProcessLookupError:
            pass
        server.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_healthy(url: str, server: subprocess.Popen[bytes], log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert server.poll() is None, f"plain vLLM ended:\n{log.read_text()[-4000:]}"
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"plain vLLM was not ready after {timeout_s} s:\n{log.read_text()[-4000:]}")
