"""The gRPC listener without an engine: keys, ports, admission, and errors from below vLLM. The rest is tested on a
cluster, in tests/integration/test_front_ends.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Iterator
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.certificates import Authority
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from joinwise.actors.tls import Certificates
from joinwise.cluster import apikeys
from joinwise.cluster.client import TLS, AsyncClient, UnreachableError
from joinwise.cluster.config import GatewayConfig
from joinwise.cluster.errors import (
    ConfigError,
    ForbiddenError,
    InvalidRequestError,
    JoinwiseError,
    ModelNotFoundError,
    OverloadedError,
    UnauthorizedError,
    WorkerLostError,
)

MODEL = "small"


class Serving:
    """In place of vLLM's serving objects: lists one model, and fails as an engine client below vLLM would."""

    def __init__(self, name: str = MODEL) -> None:
        self.name, self.lora_requests, self.asked = name, {f"{name}-lora": None}, 0

    async def show_available_models(self) -> Any:
        return SimpleNamespace(data=[SimpleNamespace(id=self.name, parent=None, max_model_len=1024)])

    async def create_completion(self, request: Any, raw_request: Any = None) -> Any:
        from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

        from joinwise.actors.gateway.failures import note_error

        if request.model not in (None, self.name, *self.lora_requests):
            message = f"The model `{request.model}` does not exist."
            return create_error_response(message, "NotFoundError", HTTPStatus.NOT_FOUND)
        self.asked += 1

        async def chunks() -> AsyncIterator[str]:
            note_error(WorkerLostError("decode worker d0 is gone", retry_after_s=1))
            # What vLLM makes of an exception in its stream: the class is lost, a status stays.
            yield 'data: {"error": {"message": "Internal server error", "type": "InternalServerError", "code": 500}}'

        return chunks()


class Admission:
    """What the gateway injects, switchable by a test."""

    def __init__(self) -> None:
        self.refusal: Exception | None = None
        self.inside = 0

    @contextlib.asynccontextmanager
    async def __call__(self, request_id: str, request: Any, metadata: Any) -> AsyncIterator[None]:
        if self.refusal is not None:
            raise self.refusal
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


def service_of(*servings: Serving, **options: Any) -> Any:
    """The service of a gateway with these models."""
    from joinwise.actors.gateway.inference import InferenceService
    from joinwise.actors.gateway.models import Models

    fronts: Any = {
        each.name: SimpleNamespace(state=SimpleNamespace(openai_serving_models=each, openai_serving_completion=each))
        for each in servings
    }
    return InferenceService(Models(fronts), **options)


@pytest.fixture
def admission() -> Admission:
    return Admission()


@pytest.fixture
def service(admission: Admission) -> Any:
    return service_of(Serving(), admission=admission)


@pytest.fixture
async def client(service: Any) -> AsyncIterator[AsyncClient]:
    from joinwise.actors.gateway.grpc_server import GrpcOptions, serve_grpc

    server = await serve_grpc(service, GrpcOptions(port=0))
    async with AsyncClient(f"127.0.0.1:{server.port}", timeout=30) as client:
        yield client
    assert not service.running
    await server.stop(0)


async def test_admission_refuses_with_its_own_words(client: AsyncClient, admission: Admission) -> None:
    admission.refusal = OverloadedError("the cluster is full", retry_after_s=2.5)
    with pytest.raises(OverloadedError, match="the cluster is full") as caught:
        await client.generate("x")
    assert caught.value.retry_after_s == 2.5


async def test_an_error_below_vllm_keeps_its_class(client: AsyncClient, admission: Admission) -> None:
    with pytest.raises(WorkerLostError, match="d0 is gone") as caught:
        await client.generate("x")
    assert caught.value.retry_after_s == 1
    assert admission.inside == 0


async def test_the_model_chooses_among_several() -> None:
    from joinwise.actors.gateway.grpc_server import GrpcOptions, serve_grpc

    one, other = Serving("one"), Serving("other")
    server = await serve_grpc(service_of(one, other), GrpcOptions(port=0))
    async with AsyncClient(f"127.0.0.1:{server.port}", timeout=30) as client:
        assert [model.name for model in await client.models()] == ["one", "other"]
        for name, asked in (("one", (1, 0)), ("other", (1, 1)), ("other-lora", (1, 2)), ("one-lora", (2, 2))):
            with pytest.raises(WorkerLostError):
                await client.generate("x", model=name)
            assert (one.asked, other.asked) == asked
        with pytest.raises(ModelNotFoundError, match="`third` does not exist"):
            await client.generate("x", model="third")
        with pytest.raises(InvalidRequestError, match="one of one, other"):
            await client.generate("x")
        assert (one.asked, other.asked) == (2, 2)
    await server.stop(0)


async def test_api_keys(service: Any, tmp_path: Path) -> None:
    from joinwise.actors.gateway.grpc_server import GrpcOptions, serve_grpc
    from joinwise.actors.gateway.identity import Authenticator

    hashed, entry = apikeys.make("search", ("user",))
    watcher, watching = apikeys.make("watch", ("metrics",))
    apikeys.KeyRing((entry, watching)).save(tmp_path / "keys.yaml")
    authenticator = Authenticator(GatewayConfig(api_keys=["right"], keys_file=str(tmp_path / "keys.yaml")))
    server = await serve_grpc(service, GrpcOptions(port=0, authenticator=authenticator))
    target = f"127.0.0.1:{server.port}"
    async with AsyncClient(target, token="right") as right, AsyncClient(target, token=hashed) as also:
        assert [model.name for model in await right.models()] == [MODEL]
        assert [model.name for model in await also.models()] == [MODEL]
    for token in ("wrong", None):
        async with AsyncClient(target, token=token) as wrong:
            with pytest.raises(UnauthorizedError):
                await wrong.models()
            with pytest.raises(UnauthorizedError):
                await wrong.generate("x")
    async with AsyncClient(target, token=watcher) as lowly:
        with pytest.raises(ForbiddenError, match="lacks the role"):
            await lowly.models()
    async with grpc.aio.insecure_channel(target) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    await server.stop(0)


async def test_the_tenant_is_known_to_the_handlers(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from joinwise.actors.gateway.grpc_server import GrpcOptions, serve_grpc
    from joinwise.actors.gateway.identity import Authenticator, caller

    seen: list[str] = []
    models = Serving.show_available_models

    async def show(self: Serving) -> Any:
        seen.append(caller.get().tenant)
        return await models(self)

    monkeypatch.setattr(Serving, "show_available_models", show)
    server = await serve_grpc(
        service, GrpcOptions(port=0, authenticator=Authenticator(GatewayConfig(api_keys=["right"])))
    )
    async with AsyncClient(f"127.0.0.1:{server.port}", token="right") as client:
        await client.models()
    await server.stop(0)
    assert seen == ["default"]
    assert caller.get().tenant == ""


async def test_metadata_bombs_are_refused(service: Any) -> None:
    from joinwise.actors.gateway.grpc_server import GrpcOptions, serve_grpc

    server = await serve_grpc(service, GrpcOptions(port=0, max_metadata_bytes=4096))
    async with AsyncClient(f"127.0.0.1:{server.port}", token="x" * 50_000, timeout=10) as client:
        with pytest.raises(JoinwiseError):
            await client.models()
    async with AsyncClient(f"127.0.0.1:{server.port}", token="x", timeout=10) as client:
        assert await client.models()
    await server.stop(0)


async def test_tls_with_client_certificates(service: Any, tmp_path: Path) -> None:
    from joinwise.actors.gateway.grpc_server import GrpcOptions, serve_grpc

    files = Authority().issue(tmp_path)
    certificates = Certificates(files.cert, files.key, files.ca)
    server = await serve_grpc(service, GrpcOptions(port=0, certificates=certificates))
    target = f"localhost:{server.port}"
    own = TLS(ca=files.ca, certificate=files.cert, key=files.key)
    async with AsyncClient(target, tls=own, timeout=20) as client:
        assert await client.models()
    for stranger in (TLS(ca=files.ca), False):
        async with AsyncClient(target, tls=stranger, timeout=10) as client:
            with pytest.raises(UnreachableError):
                await client.models()
    await server.stop(0)


async def test_a_taken_port_and_a_stopped_server(service: Any) -> None:
    from joinwise.actors.gateway.grpc_server import GrpcOptions, serve_grpc

    server = await serve_grpc(service, GrpcOptions(port=0))
    with pytest.raises(ConfigError, match="another cluster"):
        await serve_grpc(service, GrpcOptions(port=server.port))
    await server.stop(0)
    async with AsyncClient(f"127.0.0.1:{server.port}", timeout=10) as client:
        with pytest.raises(UnreachableError):
            await client.models()


# Generated calls.


class Door:
    """A listener on a loop of its own thread, asked with raw bytes."""

    def __init__(self) -> None:
        from joinwise.actors.gateway.grpc_server import GrpcOptions, serve_grpc

        self.service = service_of(Serving(), admission=Admission())
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = self._run(serve_grpc(self.service, GrpcOptions(port=0)))
        self._channel = grpc.insecure_channel(f"127.0.0.1:{self._server.port}")

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def call(self, method: str, request: bytes) -> grpc.StatusCode:
        """The status of a call; a method that streams is read to its end.

        What does not parse is UNKNOWN to gRPC itself, before it is ours; that counts as an argument that is refused.
        """
        path = f"/joinwise.v1.InferenceService/{method}"
        try:
            if method == "Generate":
                for _ in self._channel.unary_stream(path)(request, timeout=10):
                    pass
            else:
                self._channel.unary_unary(path)(request, timeout=10)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNKNOWN and "DecodeError" in error.details():
                return grpc.StatusCode.INVALID_ARGUMENT
            code: grpc.StatusCode = error.code()
            return code
        return grpc.StatusCode.OK

    def close(self) -> None:
        self._channel.close()
        self._run(self._server.stop(0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="module")
def door() -> Iterator[Door]:
    door = Door()
    yield door
    assert door.call("ListModels", b"") == grpc.StatusCode.OK
    assert not door.service.running
    door.close()


FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_ROUNDS", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
_UNDECLARED = frozenset({grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED})  # a crash; no answer at all


@FUZZ
@given(st.sampled_from(["Generate", "Cancel", "ListModels", "ClusterStatus"]), st.binary(max_size=300))
def test_noise_is_answered(door: Door, method: str, noise: bytes) -> None:
    assert door.call(method, noise) not in _UNDECLARED
