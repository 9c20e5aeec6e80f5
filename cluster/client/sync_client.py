"""`Client`: the blocking SDK. One client may be used by many threads; each stream by one (but cancelled by any)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import grpc

from joinwise.cluster.client import channel as ch
from joinwise.cluster.client.failures import ClientClosedError, as_dict, error_of
from joinwise.cluster.client.progress import Progress
from joinwise.cluster.client.retry import Patience
from joinwise.cluster.client.types import ClusterStatus, Event, GenerateOptions, Generation, Message, Model
from joinwise.cluster.client.wire import build_request, read_models, read_status
from joinwise.cluster.errors import JoinwiseError, RequestCancelledError
from joinwise.proto import inference_pb2 as pb
from joinwise.proto import inference_pb2_grpc


class Client:
    """A connection to a gateway.

    Args:
        target: `host:port` of the gateway's gRPC listener, or of several gateways of one cluster: the next one is asked
            where one cannot be reached.
        token: API key.
        tls: True for TLS with the system's authorities, a `TLS` for more, False for plain text.
        timeout: seconds that a call may take in all; None for no limit. Each call may say its own.
        resume: seconds within which a stream whose gateway has died goes on at another one, or at its successor, from
            the event that is due; 0 for never. Only requests for one choice can.

    All methods raise errors of `joinwise.cluster.errors`.
    """

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
        creds = ch.credentials(tls)
        self._channels = {
            each: grpc.insecure_channel(each, ch.options(tls))
            if creds is None
            else grpc.secure_channel(each, creds, ch.options(tls))
            for each in self.targets
        }
        self._stubs: dict[str, Any] = {
            each: inference_pb2_grpc.InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
            for each, channel in self._channels.items()
        }
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
    ) -> Generation: ...

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
    ) -> Stream: ...

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        stream: bool = False,
        timeout: float | None = ch.CLIENT_DEFAULT,
        **options: Unpack[GenerateOptions],
    ) -> Generation | Stream:
        """Complete a prompt (exactly one of `prompt`, `messages` and `token_ids`).

        Args:
            stream: False waits and returns the whole answer, True returns its events as they come.
            timeout: seconds for the whole call.
            options: see `GenerateOptions`.
        """
        request = build_request(prompt, messages, token_ids, options)
        seconds = self._timeout if timeout == ch.CLIENT_DEFAULT else timeout
        patience = Patience(self._resume_s, len(self.targets), seconds)
        running = Stream(partial(self._start, "Generate"), request, patience, self)
        return running if stream else running.result()

    def models(self, *, timeout: float | None = ch.CLIENT_DEFAULT) -> tuple[Model, ...]:
        """The models and adapters that can be named in `model`."""
        return read_models(self._unary("ListModels", pb.ListModelsRequest(), timeout))

    def status(self, *, timeout: float | None = ch.CLIENT_DEFAULT) -> ClusterStatus:
        """Which workers serve, and how loaded they are."""
        return read_status(self._unary("ClusterStatus", pb.ClusterStatusRequest(), timeout))

    def cancel(self, request_id: str, *, timeout: float | None = ch.CLIENT_DEFAULT) -> bool:
        """End a running request; False when none of that id runs at the gateway that is asked."""
        request = pb.CancelGenerateRequest(request_id=request_id)
        return bool(self._unary("Cancel", request, timeout).found)

    def close(self) -> None:
        """Close the connection; calls that still run end with RequestCancelledError. May be repeated."""
        self._closed = True
        for channel in self._channels.values():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, method: str, request: Any, seconds: float | None) -> Any:
        if self._closed:
            raise ClientClosedError("this client has been closed")
        try:
            return getattr(self._stubs[self.target], method)(request, timeout=seconds, metadata=self._metadata)
        except ValueError as e:  # closed by another thread in this moment
            raise ClientClosedError(str(e)) from None

    def _unary(self, method: str, request: Any, timeout: float | None) -> Any:
        seconds = self._timeout if timeout == ch.CLIENT_DEFAULT else timeout
        patience = Patience(self._resume_s, len(self.targets), seconds)
        while True:
            target = self.target
            try:
                return self._start(method, request, patience.rest_s())
            except grpc.RpcError as e:
                failure = _error(e, target, None)
            if patience.pause_s(failure, begun=False) is None:
                raise failure
            self.targets.turn(target)


class Stream(Iterator[Event]):
    """The events of one request, in order; also a context manager, which ends the request when it is left early.

    One whose gateway dies goes on at the next one, or at its successor, from the event that is due.
    """

    def __init__(self, start: Callable[..., Any], request: Any, patience: Patience, client: Client) -> None:
        self._start, self._patience, self._client = start, patience, client
        self._progress = Progress(request)
        self._cancelled = threading.Event()
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

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        while not self._ended:
            try:
                event = self._progress.take(next(self._call))
                self._patience.moved()
            except StopIteration:
                self._end()
            except grpc.RpcError as e:
                self._broken(e)
            except JoinwiseError as e:
                self._ended, self._failure = True, e
                self._call.cancel()
            else:
                if event is not None:
                    return event
        if self._failure is not None:
            raise self._failure
        raise StopIteration

    def _ask(self, request: Any) -> None:
        self._target = self._client.target
        self._call = self._start(request, self._patience.rest_s())
        if self._cancelled.is_set():  # in this moment, by another thread
            self._call.cancel()

    def _broken(self, e: grpc.RpcError) -> None:
        """Go on elsewhere, or end with the error."""
        failure = _error(e, self._target, self.request_id)
        request = None if self._cancelled.is_set() else self._progress.again()
        pause = self._patience.pause_s(failure, begun=self._progress.begun) if request is not None else None
        if pause is None:
            self._ended = True
            self._progress.take_trailer(as_dict(self._call.trailing_metadata()))
            self._failure = failure
            return
        self._cancelled.wait(pause)
        self._client.targets.turn(self._target)
        try:
            if self._cancelled.is_set():
                raise RequestCancelledError("the request was cancelled", request_id=self.request_id)
            self._ask(request)
        except JoinwiseError as error:  # or the client has been closed
            self._ended, self._failure = True, error

    def _end(self) -> None:
        self._ended = True
        self._progress.take_trailer(as_dict(self._call.trailing_metadata()))
        try:
            self._progress.check_complete()
        except JoinwiseError as e:
            self._failure = e

    def result(self) -> Generation:
        """Wait for the end and return the whole answer, the events already taken included."""
        for _ in self:
            pass
        return self._progress.result()

    def cancel(self) -> None:
        """End the request; a thread that waits for its next event gets RequestCancelledError. May be repeated."""
        self._cancelled.set()
        self._call.cancel()

    close = cancel

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()


def _error(e: Any, target: str, request_id: str | None) -> JoinwiseError:
    # A grpc.RpcError of a call is also a grpc.Call, which its type does not say.
    return error_of(e.code(), e.details(), as_dict(e.trailing_metadata()), target=target, request_id=request_id)
