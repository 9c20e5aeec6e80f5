"""`AsyncClient`: the SDK for asyncio. One client belongs to one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import grpc
import grpc.aio

from joinwise.cluster.client import channel as ch
from joinwise.cluster.client.failures import ClientClosedError, as_dict, error_of
from joinwise.cluster.client.progress import Progress
from joinwise.cluster.client.retry import Patience
from joinwise.cluster.client.types import ClusterStatus, Event, GenerateOptions, Generation, Message, Model
from joinwise.cluster.client.wire import build_request, read_models, read_status
from joinwise.cluster.errors import JoinwiseError, RequestCancelledError
from joinwise.proto import inference_pb2 as pb
from joinwise.proto import inference_pb2_grpc


class AsyncClient:
    """A connection to a gateway; takes the same arguments as `Client`, and connects at the first call."""

    def __init__(
        self,
        target: str | Sequence[str] = ch.DEFAULT_TARGET,
        *,
        token: str | None = None,
        tls: ch.TLS | bool = False,
        timeout: float | None = ch.DEFAULT_TIMEOUT_S,
        resume: float = ch.DEFAULT_RESUME_S,
    ) -> None:
        self.targets = ch.Targets(target)
        self._timeout = timeout
        self._resume_s = resume
        self._metadata = ch.call_metadata(token)
        self._credentials = ch.credentials(tls)
        self._options = ch.options(tls)
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._closed = False

    @property
    def target(self) -> str:
        """The gateway that is asked next."""
        return self.targets.now

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
        seconds = self._timeout if timeout == ch.CLIENT_DEFAULT else timeout
        patience = Patience(self._resume_s, len(self.targets), seconds)
        running = AsyncStream(partial(self._start, "Generate"), request, patience, self)
        return running if stream else running.result()

    async def models(self, *, timeout: float | None = ch.CLIENT_DEFAULT) -> tuple[Model, ...]:
        """The models and adapters that can be named in `model`."""
        return read_models(await self._unary("ListModels", pb.ListModelsRequest(), timeout))

    async def status(self, *, timeout: float | None = ch.CLIENT_DEFAULT) -> ClusterStatus:
        """Which workers serve, and how loaded they are."""
        return read_status(await self._unary("ClusterStatus", pb.ClusterStatusRequest(), timeout))

    async def cancel(self, request_id: str, *, timeout: float | None = ch.CLIENT_DEFAULT) -> bool:
        """End a running request; False when none of that id runs at the gateway that is asked."""
        answer = await self._unary("Cancel", pb.CancelGenerateRequest(request_id=request_id), timeout)
        return bool(answer.found)

    async def close(self) -> None:
        """Close the connection; calls that still run end with RequestCancelledError. May be repeated."""
        self._closed = True
        for channel in self._channels.values():
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _start(self, method: str, request: Any, seconds: float | None) -> Any:
        if self._closed:
            raise ClientClosedError("this client has been closed")
        channel = self._channels.get(self.target)
        if channel is None:
            channel = self._channels[self.target] = (
                grpc.aio.insecure_channel(self.target, self._options)
                if self._credentials is None
                else grpc.aio.secure_channel(self.target, self._credentials, self._options)
            )
        stub = inference_pb2_grpc.InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        return getattr(stub, method)(request, timeout=seconds, metadata=self._metadata)

    async def _unary(self, method: str, request: Any, timeout: float | None) -> Any:
        seconds = self._timeout if timeout == ch.CLIENT_DEFAULT else timeout
        patience = Patience(self._resume_s, len(self.targets), seconds)
        while True:
            target = self.target
            try:
                return await self._start(method, request, patience.rest_s())
            except grpc.aio.AioRpcError as e:
                failure = _error(e, target, None)
            if patience.pause_s(failure, begun=False) is None:
                raise failure
            self.targets.turn(target)


class AsyncStream(AsyncIterator[Event]):
    """The events of one request, in order; also a context manager, which ends the request when it is left early.

    One whose gateway dies goes on at the next one, or at its successor, from the event that is due.
    """

    def __init__(self, start: Callable[..., Any], request: Any, patience: Patience, client: AsyncClient) -> None:
        self._start, self._patience, self._client = start, patience, client
        self._progress = Progress(request)
        self._cancelled = False
        self._ask(request)
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
                self._patience.moved()
            except StopAsyncIteration:
                await self._end()
            except grpc.aio.AioRpcError as e:
                await self._broken(e)
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

    def _ask(self, request: Any) -> None:
        self._target = self._client.target
        self._call = self._start(request, self._patience.rest_s())
        self._responses = aiter(self._call)

    async def _broken(self, e: grpc.aio.AioRpcError) -> None:
        """Go on elsewhere, or end with the error."""
        failure = _error(e, self._target, self.request_id)
        request = None if self._cancelled else self._progress.again()
        pause = self._patience.pause_s(failure, begun=self._progress.begun) if request is not None else None
        if pause is None:
            self._ended = True
            self._progress.take_trailer(as_dict(e.trailing_metadata()))
            self._failure = failure
            return
        await asyncio.sleep(pause)
        self._client.targets.turn(self._target)
        try:
            if self._cancelled:
                raise RequestCancelledError("the request was cancelled", request_id=self.request_id)
            self._ask(request)
        except JoinwiseError as error:  # or the client has been closed
            self._ended, self._failure = True, error

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
        self._cancelled = True
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
