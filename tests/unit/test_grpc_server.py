"""The gRPC listener without an engine: keys, ports, admission, and errors from below vLLM. The rest is tested on a
cluster, in tests/integration/test_front_ends.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from joinwise.cluster.client import AsyncClient, UnreachableError
from joinwise.cluster.errors import ConfigError, OverloadedError, UnauthorizedError, WorkerLostError

MODEL = "small"


class Serving:
    """In place of vLLM's serving objects: lists one model, and fails as an engine client below vLLM would."""

    async def show_available_models(self) -> Any:
        return SimpleNamespace(data=[SimpleNamespace(id=MODEL, parent=None, max_model_len=1024)])

    async def create_completion(self, request: Any, raw_request: Any = None) -> Any:
        from joinwise.actors.gateway.failures import note_error

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


@pytest.fixture
def admission() -> Admission:
    return Admission()


@pytest.fixture
def service(admission: Admission) -> Any:
    from joinwise.actors.gateway.inference import InferenceService

    serving = Serving()
    state = SimpleNamespace(openai_serving_models=serving, openai_serving_completion=serving)
    return InferenceService(state, admission=admission)


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


async def test_api_keys(service: Any) -> None:
    from joinwise.actors.gateway.grpc_server import GrpcOptions, serve_grpc

    server = await serve_grpc(service, GrpcOptions(port=0, tokens=("right", "other")))
    target = f"127.0.0.1:{server.port}"
    async with AsyncClient(target, token="right") as right, AsyncClient(target, token="wrong") as wrong:
        assert [model.name for model in await right.models()] == [MODEL]
        with pytest.raises(UnauthorizedError):
            await wrong.models()
        with pytest.raises(UnauthorizedError):
            await wrong.generate("x")
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
