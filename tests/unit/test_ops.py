"""The operator's port, asked over real sockets: answers, draining, TLS, and clients that try to hold it up."""

from __future__ import annotations

import http.client
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.certificates import Authority

from joinwise.actors import ops
from joinwise.actors.ops import OpsServer
from joinwise.actors.tls import Certificates


class Process:
    """Something to ask about."""

    def __init__(self) -> None:
        self.sick = self.busy = ""
        self.drained = threading.Event()

    def serve(self, host: str = "127.0.0.1", **more: Any) -> OpsServer:
        return OpsServer(host, 0, live=lambda: self.sick, ready=lambda: self.busy, drain=self.drained.set, **more)


@pytest.fixture
def process() -> Process:
    return Process()


@pytest.fixture
def port(process: Process) -> Iterator[int]:
    server = process.serve()
    yield server.port
    server.close()


def ask(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path)
    response = connection.getresponse()
    return response.status, response.read().decode()


def test_alive_and_ready(process: Process, port: int) -> None:
    assert ask(port, "/livez") == ask(port, "/readyz") == (200, "ok\n")
    process.sick, process.busy = "the engine has stopped", "it drains"
    assert ask(port, "/livez") == (503, "the engine has stopped\n")
    assert ask(port, "/readyz") == (503, "it drains\n")


def test_metrics(port: int) -> None:
    status, text = ask(port, "/metrics")
    assert status == 200 and "# TYPE python_info gauge" in text


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/"), ("GET", "/drain"), ("GET", "/../livez"), ("GET", "/livez/"), ("POST", "/livez")]
)
def test_nothing_else(process: Process, port: int, method: str, path: str) -> None:
    assert ask(port, path, method)[0] == 404
    assert not process.drained.is_set()


def test_other_methods_are_refused(port: int) -> None:
    assert ask(port, "/livez", "DELETE")[0] == 501


def test_drain(process: Process, port: int) -> None:
    assert ask(port, "/drain", "POST") == (200, "drained\n")
    assert process.drained.is_set()


def test_what_was_waited_for_is_told() -> None:
    server = OpsServer("127.0.0.1", 0, live=str, ready=str, drain=lambda: "waited for 2")
    try:
        assert ask(server.port, "/drain", "POST") == (200, "drained: waited for 2\n")
    finally:
        server.close()


def test_only_the_machine_itself_drains(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    get_request = ops._Server.get_request

    def from_elsewhere(self: Any) -> tuple[Any, Any]:
        return get_request(self)[0], ("192.0.2.7", 4711)

    monkeypatch.setattr(ops._Server, "get_request", from_elsewhere)
    server = process.serve()
    try:
        assert ask(server.port, "/drain", "POST")[0] == 403
        assert ask(server.port, "/livez")[0] == 200
    finally:
        server.close()
    assert not process.drained.is_set()


def test_connections_are_bounded_and_time_out(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_IDLE_S", 0.3)
    monkeypatch.setattr(ops._Handler, "timeout", 0.3)
    server = process.serve()
    try:
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(ops._CONNECTIONS + 8)]
        assert idle[-1].recv(1) == b""  # beyond the bound: closed at once
        for each in idle:  # the others, when they have said nothing for too long
            each.settimeout(10)
            assert each.recv(1) == b""
            each.close()
        assert ask(server.port, "/livez")[0] == 200
    finally:
        server.close()


def test_a_header_without_end_is_refused(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nx: " + b"a" * 100_000 + b"\r\n\r\n")
        assert b" 431 " in client.recv(100)


def test_the_port_is_taken(process: Process, port: int) -> None:
    with pytest.raises(OSError, match="in use"):
        OpsServer("127.0.0.1", port, live=str, ready=str, drain=lambda: None)


# TLS, and the client that pods run.


@pytest.fixture
def secured(process: Process, tmp_path: Path) -> Iterator[int]:
    files = Authority().issue(tmp_path)
    certificates = Certificates(files.cert, files.key, files.ca, server_name="joinwise")
    server = process.serve(tls=certificates.server_context(clients=False))
    yield server.port
    server.close()


def test_no_plain_text_where_tls_is_on(secured: int) -> None:
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        ask(secured, "/livez")
    with socket.create_connection(("127.0.0.1", secured), 10) as plain:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with context.wrap_socket(plain) as client:
            client.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
            assert client.recv(100).split(b"\r\n")[0].endswith(b"200 OK")


def run(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "joinwise.actors.ops", "--ray", "0", "--timeout", "20", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("tls", [False, True])
def test_the_client_drains(process: Process, tls: bool, request: pytest.FixtureRequest) -> None:
    port = request.getfixturevalue("secured" if tls else "port")
    code, said = run("drain", "--port", str(port), *(["--tls"] if tls else []))
    assert (code, said) == (0, "/drain: drained\n")
    assert process.drained.is_set()


def test_the_client_tells_sick_from_well(process: Process, port: int) -> None:
    assert run("live", "--port", str(port)) == (0, "/livez: ok\n")
    process.sick = "stuck"
    assert run("live", "--port", str(port)) == (1, "/livez: stuck\n")


def test_a_pod_without_a_process_is_left_alone(unused: Callable[[], int]) -> None:
    assert run("live", "--port", str(unused())) == (0, "/livez: nothing listens there\n")
    assert run("drain", "--port", str(unused()))[0] == 0


def test_a_node_that_does_not_answer_is_sick(port: int, unused: Callable[[], int]) -> None:
    assert run("live", "--port", str(port), "--ray", str(unused()))[0] == 1


@pytest.fixture
def unused() -> Callable[[], int]:
    def free_port() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return free_port
