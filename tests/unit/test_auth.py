"""Tokens on gRPC ports: with threads and without, in every streaming shape."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from helpers.kv_rig import Receiver, Sender

from joinwise.actors.auth import AsyncBearer, Bearer, TokenCheck, bearer, is_loopback

ECHO = "/test.Echo"


class _Echo(grpc.GenericRpcHandler):
    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        shapes = {
            f"{ECHO}/UU": grpc.unary_unary_rpc_method_handler(lambda request, context: request),
            f"{ECHO}/US": grpc.unary_stream_rpc_method_handler(lambda request, context: iter([request])),
            f"{ECHO}/SU": grpc.stream_unary_rpc_method_handler(lambda requests, context: b"".join(requests)),
            f"{ECHO}/SS": grpc.stream_stream_rpc_method_handler(lambda requests, context: requests),
        }
        return shapes.get(details.method)


def _call(channel: grpc.Channel, shape: str, metadata: tuple[tuple[str, str], ...]) -> bytes:
    name, options = f"{ECHO}/{shape}", {"metadata": metadata, "timeout": 5}
    if shape == "UU":
        return channel.unary_unary(name)(b"x", **options)
    if shape == "US":
        return b"".join(channel.unary_stream(name)(b"x", **options))
    if shape == "SU":
        return channel.stream_unary(name)(iter([b"x"]), **options)
    return b"".join(channel.stream_stream(name)(iter([b"x"]), **options))


@pytest.fixture
def channel() -> Iterator[grpc.Channel]:
    server = grpc.server(futures.ThreadPoolExecutor(4), interceptors=(Bearer(["one", "two"]),))
    checks = health.HealthServicer()
    checks.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    server.add_generic_rpc_handlers((_Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as opened:
        yield opened
    server.stop(0).wait()


@pytest.mark.parametrize("shape", ["UU", "US", "SU", "SS"])
def test_only_known_tokens_pass(channel: grpc.Channel, shape: str) -> None:
    for token in ("one", "two"):
        assert _call(channel, shape, bearer(token)) == b"x"
    for token in ("", "three", "on", "one "):
        with pytest.raises(grpc.RpcError) as caught:
            _call(channel, shape, bearer(token))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert ("joinwise-error", "unauthorized") in caught.value.trailing_metadata()


def test_health_is_open(channel: grpc.Channel) -> None:
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_the_same_without_threads() -> None:
    server = grpc.aio.server(interceptors=(AsyncBearer(["one"]),))

    class Echo(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
            async def echo(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
                return request

            return grpc.unary_unary_rpc_method_handler(echo)

    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as opened:
        call = opened.unary_unary(f"{ECHO}/UU")
        assert await call(b"x", metadata=bearer("one"), timeout=5) == b"x"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"x", timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    await server.stop(0)


def test_without_tokens_everybody_passes() -> None:
    class Details:
        method, invocation_metadata = f"{ECHO}/UU", None

    assert TokenCheck([]).passes(Details())
    assert not TokenCheck(["one"]).passes(Details())


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.9.1"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "gateway.example"])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_kv_is_served_to_holders_of_the_token_only() -> None:
    sender = Sender(token="secret")
    insider, outsider = Receiver(token="secret"), Receiver(token="guess")
    transfer = sender.open("t", [1, 2])
    sender.compute(transfer)
    outsider.fetch("t", [3, 4], sender.server.address).fail(grpc.StatusCode.UNAUTHENTICATED)
    insider.fetch("t", [3, 4], sender.server.address).succeed()
    sender.finish(transfer)
    for each in (sender, insider, outsider):
        each.assert_idle()
        each.stop()
