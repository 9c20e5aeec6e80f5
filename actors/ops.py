"""The operator's port of a process: is it alive, may it get work, what does it count, and let it drain.

| path | answers |
|---|---|
| `/livez` | 200 while it makes progress; 503 and the reason when it should be restarted |
| `/readyz` | 200 while it may get work (a worker: registered; a gateway: every role is there, or can wake), else 503 |
| `/metrics` | Prometheus text |
| `/drain` | only from the machine itself: takes no more work, and answers once what runs has ended |

Served by threads, not by the process's event loop: a loop that hangs must be seen from outside. Few connections at a
time and short time-outs, because whoever may look must not be able to hold anything up. `python -m joinwise.actors.ops`
is the client that a pod's liveness probe and preStop hook run.
"""

from __future__ import annotations

import argparse
import http.client
import ipaddress
import logging
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

logger = logging.getLogger(__name__)

_IDLE_S = 5.0
_CONNECTIONS = 32


class OpsServer:
    """A running port; `close` ends it.

    Args:
        host, port: where to listen; port 0 picks a free one.
        live: why the process should be restarted; empty while it is well. Called on a thread of the server.
        ready: why it should get no work; empty while it may. Called on a thread of the server.
        drain: stops taking work and returns when what runs has ended, or its own patience has; what it says is told.
        tls: context of the listener; None listens in the clear.

    Raises:
        OSError: the address cannot be bound.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        live: Callable[[], str],
        ready: Callable[[], str],
        drain: Callable[[], str | None],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        handler = type(
            "Handler", (_Handler,), {"checks": {"/livez": live, "/readyz": ready}, "drain": staticmethod(drain)}
        )
        self._server = _Server((host, port), handler, tls)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="ops", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    """Threads up to a bound; a connection beyond it is closed at once."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], handler: type[_Handler], tls: ssl.SSLContext | None) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._tls = tls
        self._room = threading.BoundedSemaphore(_CONNECTIONS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        request.settimeout(_IDLE_S)
        if self._tls is not None:
            request = self._tls.wrap_socket(request, server_side=True)  # here, so that a slow client holds one thread
        super().finish_request(request, client_address)
        if self._tls is not None:
            request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("the connection from %s has ended early: %s", client_address, sys.exception())


class _Handler(BaseHTTPRequestHandler):
    """One request a connection."""

    checks: dict[str, Callable[[], str]]
    drain: Callable[[], str | None]
    timeout = _IDLE_S
    server_version = "joinwise"
    sys_version = ""

    def do_GET(self) -> None:
        if check := self.checks.get(self.path):
            reason = check()
            self._answer(503 if reason else 200, f"{reason or 'ok'}\n".encode())
        elif self.path == "/metrics":
            from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

            self._answer(200, generate_latest(), CONTENT_TYPE_LATEST)
        else:
            self._answer(404, b"not here\n")

    def do_POST(self) -> None:
        if self.path != "/drain":
            self._answer(404, b"not here\n")
        elif not ipaddress.ip_address(self.client_address[0].partition("%")[0]).is_loopback:
            self._answer(403, b"only from the machine itself\n")
        else:
            told = type(self).drain()
            self._answer(200, f"drained{f': {told}' if told else ''}\n".encode())

    def _answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        logger.debug(format, *arguments)


_RAYLET = 52365  # Ray's node agent


def main() -> None:
    """What a pod's probes and hooks run. `live`: exit 1 when Ray's node or the process behind the port should be
    restarted; a port where nothing listens is no reason, its process may be starting. `drain`: exit 0 once it has
    drained, or is gone already."""
    parser = argparse.ArgumentParser(prog="python -m joinwise.actors.ops", description=main.__doc__)
    parser.add_argument("action", choices=["live", "drain"])
    parser.add_argument("--port", type=int, required=True, help="the process's operator port, on this machine")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait")
    parser.add_argument("--tls", action="store_true", help="the port speaks TLS; on loopback its name is not checked")
    parser.add_argument("--ray", type=int, default=_RAYLET, help="port of Ray's node agent; 0 asks none")
    arguments = parser.parse_args()
    try:
        if arguments.action == "drain":
            asked = [("POST", "/drain", arguments.port, arguments.tls)]
        else:
            asked = [("GET", "/livez", arguments.port, arguments.tls)]
            asked += [("GET", "/api/healthz", arguments.ray, False)] if arguments.ray else []
        for method, path, port, tls in asked:
            status, text = _ask(method, path, port, tls, arguments.timeout)
            print(f"{path}: {text}")
            if status != 200 and not (status == 0 and port == arguments.port):
                sys.exit(1)
    except OSError as error:
        sys.exit(f"no answer: {error}")


def _ask(method: str, path: str, port: int, tls: bool, timeout: float) -> tuple[int, str]:
    """Status and text; 0 where nothing listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=timeout, context=context)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read(1000).decode(errors="replace").strip()
    except ConnectionRefusedError:
        return 0, "nothing listens there"
    finally:
        connection.close()


if __name__ == "__main__":
    main()
