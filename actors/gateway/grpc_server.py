"""The gateway's gRPC listener: `InferenceService`, health and reflection on one port.

Owns the server between `serve_grpc` and `GrpcServer.stop`. Health says NOT_SERVING as soon as a stop begins, so that
load balancers turn away before the last requests are done.
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from joinwise.actors.gateway.identity import AsyncIdentity, Authenticator
from joinwise.actors.tls import Certificates
from joinwise.cluster.errors import ConfigError
from joinwise.proto import inference_pb2, inference_pb2_grpc

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name


@dataclass(frozen=True)
class GrpcOptions:
    """How the listener behaves."""

    host: str = "127.0.0.1"
    port: int = 8001
    """0 lets the system choose; `GrpcServer.port` tells which."""
    max_body_bytes: int = 8 << 20
    """Largest request accepted; a larger one is refused with RESOURCE_EXHAUSTED before it is read."""
    max_concurrent: int | None = None
    """Most calls at a time; None for no limit."""
    keepalive_s: float = 60.0
    """Idle connections are probed this often; clients may not probe more often than every 10 s."""
    certificates: Certificates | None = None
    """Speak TLS; with an authority, clients must show a certificate that it signed."""
    max_metadata_bytes: int = 32 << 10
    """Largest metadata of a call; larger ones are refused with RESOURCE_EXHAUSTED."""
    authenticator: Authenticator | None = None
    """Where it asks for credentials, every call but health needs `authorization: Bearer <key>`."""


class GrpcServer:
    """A running listener; made by `serve_grpc`."""

    def __init__(self, server: grpc.aio.Server, health_servicer: health.aio.HealthServicer, port: int) -> None:
        self._server = server
        self._health = health_servicer
        self.port = port

    async def set_serving(self, serving: bool) -> None:
        """Tell health checks whether this gateway takes requests."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, status)

    async def stop(self, grace_s: float = 10.0) -> None:
        """Take no new call, let running ones end for up to `grace_s` seconds, then cancel them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def wait(self) -> None:
        """Return when the server has stopped."""
        await self._server.wait_for_termination()


async def serve_grpc(
    service: inference_pb2_grpc.InferenceServiceServicer, options: GrpcOptions | None = None
) -> GrpcServer:
    """Start the listener in the running event loop.

    Raises:
        ConfigError: the port is taken.
    """
    options = options or GrpcOptions()
    asks = options.authenticator is not None and options.authenticator.asks
    interceptors = (AsyncIdentity(options.authenticator),) if options.authenticator is not None and asks else ()
    server = grpc.aio.server(
        interceptors=interceptors,
        maximum_concurrent_rpcs=options.max_concurrent,
        options=[
            ("grpc.max_receive_message_length", options.max_body_bytes),
            ("grpc.max_metadata_size", options.max_metadata_bytes),
            ("grpc.absolute_max_metadata_size", options.max_metadata_bytes),
            ("grpc.keepalive_time_ms", int(options.keepalive_s * 1000)),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.so_reuseport", 0),  # a second gateway on this port must fail, not share it
        ],
    )
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"{host}:{options.port}"
    try:
        if options.certificates is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, options.certificates.grpc_server())
    except RuntimeError as e:
        raise ConfigError(f"the gRPC listener cannot bind {address}: is another cluster running? ({e})") from None
    await server.start()
    running = GrpcServer(server, health_servicer, port)
    await running.set_serving(True)
    return running
