"""The two ports that a worker opens, whatever it does: gRPC for the cluster, and the operator's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from joinwise.actors.auth import AsyncBearer, is_loopback
from joinwise.actors.ops import OpsServer
from joinwise.actors.tls import Certificates
from joinwise.cluster.config_model import PoolConfig
from joinwise.cluster.errors import ConfigError

_STOP_S = 0.2


class GrpcPort:
    """A worker's gRPC server, with health checks and reflection, on a free port.

    Args:
        host: where to listen.
        service: full name of the service that `add` adds.
        add: adds the servicer to the server.
        token: what callers must show; empty asks for none.
        certificates: for TLS; None listens in the clear.
        options: channel arguments of the server.
    """

    def __init__(
        self,
        host: str,
        service: str,
        add: Callable[[grpc.aio.Server], None],
        *,
        token: str,
        certificates: Certificates | None,
        options: Sequence[tuple[str, Any]],
    ) -> None:
        self._service = service
        self._server = grpc.aio.server(interceptors=(AsyncBearer([token]),) if token else (), options=options)
        add(self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((service, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        if certificates is None:
            port = self._server.add_insecure_port(f"{host}:0")
        else:
            port = self._server.add_secure_port(f"{host}:0", certificates.grpc_server())
        self.address = f"{host}:{port}"

    async def open(self) -> None:
        """Serve, and be healthy."""
        await self._server.start()
        for name in ("", self._service):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def leave(self) -> None:
        """Be healthy no more; calls still pass."""
        await self._health.enter_graceful_shutdown()

    async def close(self) -> None:
        """End the calls, and close the port."""
        await self._server.stop(_STOP_S)


def open_ops(
    host: str,
    pool: PoolConfig,
    *,
    live: Callable[[], str],
    ready: Callable[[], str],
    drain: Callable[[], Coroutine[Any, Any, str | None]],
    patience_s: float,
    certificates: Certificates | None,
) -> OpsServer:
    """Open the operator's port of a worker. A fixed one is open on all interfaces: a pod drains itself over loopback.

    Args:
        host: where the worker's other ports listen.
        pool: the worker's.
        live, ready: as in `OpsServer`; called on threads.
        drain: runs on the loop that this is called on.
        patience_s: the longest that `drain` may take.
        certificates: for TLS, which asks for no client's certificate; None listens in the clear.

    Raises:
        ConfigError: the pool's port is taken.
    """
    loop, port = asyncio.get_running_loop(), pool.ops_port
    if port and not is_loopback(host):
        host = "::" if ":" in host else "0.0.0.0"  # noqa: S104

    def wait() -> str | None:
        return asyncio.run_coroutine_threadsafe(drain(), loop).result(patience_s)

    try:
        tls = certificates.server_context(clients=False) if certificates else None
        return OpsServer(host, port, live=live, ready=ready, drain=wait, tls=tls)
    except OSError as error:
        raise ConfigError(
            f"pool {pool.name!r}: the operator's port {port} is taken: ops_port: 0 picks a free one"
        ) from error
