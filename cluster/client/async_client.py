"""`AsyncClient`: the SDK for asyncio. One client belongs to one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import grpc
import grpc.aio

from joinwise.cluster.client import channel as ch
from joinwise.cluster.client.failures import ClientClosedError, as_dict, error_of
from joinwise.cluster.client.progress import Progress
from joinwise.cluster.client.types import ClusterStatus, Event, GenerateOptions, Generation, Message, Model
from joinwise.cluster.client.wire import build_request, read_models, read_status
from joinwise.cluster.errors import JoinwiseError, RequestCancelledError
from joinwise.proto import inference_pb2 as pb
from joinwise.proto import inference_pb2_grpc


class AsyncClient:
    """A connection to a gateway; takes the same arguments as `Client`, and connects at the first call."""

    def __init__(
        self,
        target: str = ch.DEFAULT_TARGET,
        *,
        token: str | None = None,
        tls: ch.TLS | bool = False,
        timeout: float | None = ch.DEFAULT_TIMEOUT_S,
    ) -> None:
        self.target = target
        self._timeout = timeout
        self._metadata = ch.call_metadata(token)
        self._credentials = ch.credentials(tls)
        self._options = ch.options(tls)
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._closed = False

    @overload
    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        stream: Literal[False] = False,
        timeout: float | None = ...,
        **options: Unpack[GenerateOptions],
    ) -> Awaitable[Generation]: ...

    @overload
    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        stream: Literal[True],
        timeout: float | None = ...,
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream: ...

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        stream: bool = False,
        timeout: float | None = ch.CLIENT_DEFAULT,
        **options: Unpack[GenerateOptions],
    ) -> Awaitable[Generation] | AsyncStream:
        """Complete a prompt: `await client.generate(...)`, or `async for event in client.generate(..., stream=True)`.

        The arguments are those of `Client.generate`.
        """
        request = build_request(prompt, messages, token_ids, options)
        call = self._start("Generate", request, timeout)
        running = AsyncStream(call, Progress(request.request_id or None), self.target)
        return running if stream else running.result()

    async def models(self, *, timeout: float | None = ch.CLIENT_DEFAULT) -> tuple[Model, ...]:
        """The models and adapters that can be named in `model`."""
        return read_models(await self._unary("ListModels", pb.ListModelsRequest(), timeout))

    async def status(self, *, timeout: float | None = ch.CLIENT_DEFAULT) -> ClusterStatus:
        """Which workers serve, and how loaded they are."""
        return read_status(await self._unary("ClusterStatus", pb.ClusterStatusRequest(), timeout))

    async def cancel(self, request_id: str, *, timeout: float | None = ch.CLIENT_DEFAULT) -> bool:
        """End a running request of this gateway; False when none of that id runs there."""
        answer = await self._unary("Cancel", pb.CancelGenerateRequest(request_id=request_id), timeout)
        return bool(answer.found)

    async def close(self) -> None:
        """Close the connection; calls that still run end with RequestCancelledError. May be repeated."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _start(self, method: str, request: Any, timeout: float | None) -> Any:
        if self._closed:
            raise ClientClosedError("this client has been closed")
        if self._channel is None:
            self._channel = (
                grpc.aio.insecure_channel(self.target, self._options)
                if self._credentials is None
                else grpc.aio.secure_channel(self.target, self._credentials, self._options)
            )
            self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]
        seconds = self._timeout if timeout == ch.CLIENT_DEFAULT else timeout
        return getattr(self._stub, method)(request, timeout=seconds, metadata=self._metadata)

    async def _unary(self, method: str, request: Any, timeout: float | None) -> Any:
        try:
            return await self._start(method, request, timeout)
        except grpc.aio.AioRpcError as e:
            raise _error(e, self.target, None) from None


class AsyncStream(AsyncIterator[Event]):
    """The events of one request, in order; also a context manager, which ends the request when it is left early."""

    def __init__(self, call: Any, progress: Progress, target: str) -> None:
        self._call = call
        self._responses = aiter(call)
        self._progress = progress
        self._target = target
        self._failure: JoinwiseError | None = None
        self._ended = False

    @property
    def request_id(self) -> str | None:
        """The request's id; known from the first event on, or at once if the caller chose it."""
        return self._progress.request_id

    @property
    def ledger(self) -> Any:
        """After the end: where the request's time went, as a mapping; None when the gateway sent none."""
        return self._progress.ledger

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._ended:
            try:
                event = self._progress.take(await anext(self._responses))
            except StopAsyncIteration:
                await self._end()
            except grpc.aio.AioRpcError as e:
                self._ended = True
                self._progress.take_trailer(as_dict(e.trailing_metadata()))
                self._failure = _error(e, self._target, self.request_id)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise  # the caller's task is cancelled, which is not an error of this request
                self._ended = True
                self._failure = RequestCancelledError("the request was cancelled", request_id=self.request_id)
            except JoinwiseError as e:
                self._ended, self._failure = True, e
                self._call.cancel()
            else:
                if event is not None:
                    return event
        if self._failure is not None:
            raise self._failure
        raise StopAsyncIteration

    async def _end(self) -> None:
        self._ended = True
        self._progress.take_trailer(as_dict(await self._call.trailing_metadata()))
        try:
            self._progress.check_complete()
        except JoinwiseError as e:
            self._failure = e

    async def result(self) -> Generation:
        """Wait for the end and return the whole answer, the events already taken included."""
        async for _ in self:
            pass
        return self._progress.result()

    def cancel(self) -> None:
        """End the request; who waits for its next event gets RequestCancelledError. May be repeated."""
        self._call.cancel()

    async def close(self) -> None:
        """Same as `cancel`."""
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()


def _error(e: grpc.aio.AioRpcError, target: str, request_id: str | None) -> JoinwiseError:
    return error_of(e.code(), e.details(), as_dict(e.trailing_metadata()), target=target, request_id=request_id)
