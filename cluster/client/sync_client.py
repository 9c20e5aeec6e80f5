"""`Client`: the blocking SDK. One client may be used by many threads; each stream by one (but cancelled by any)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import grpc

from joinwise.cluster.client import channel as ch
from joinwise.cluster.client.failures import ClientClosedError, as_dict, error_of
from joinwise.cluster.client.progress import Progress
from joinwise.cluster.client.types import ClusterStatus, Event, GenerateOptions, Generation, Message, Model
from joinwise.cluster.client.wire import build_request, read_models, read_status
from joinwise.cluster.errors import JoinwiseError
from joinwise.proto import inference_pb2 as pb
from joinwise.proto import inference_pb2_grpc


class Client:
    """A connection to a gateway.

    Args:
        target: `host:port` of the gateway's gRPC listener.
        token: API key.
        tls: True for TLS with the system's authorities, a `TLS` for more, False for plain text.
        timeout: seconds that a call may take in all; None for no limit. Each call may say its own.

    All methods raise errors of `joinwise.cluster.errors`.
    """

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
        creds = ch.credentials(tls)
        self._channel = (
            grpc.insecure_channel(target, ch.options(tls))
            if creds is None
            else grpc.secure_channel(target, creds, ch.options(tls))
        )
        self._stub: Any = inference_pb2_grpc.InferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]
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
        call = self._start(self._stub.Generate, request, timeout)
        running = Stream(call, Progress(request.request_id or None), self.target)
        return running if stream else running.result()

    def models(self, *, timeout: float | None = ch.CLIENT_DEFAULT) -> tuple[Model, ...]:
        """The models and adapters that can be named in `model`."""
        return read_models(self._unary(self._stub.ListModels, pb.ListModelsRequest(), timeout))

    def status(self, *, timeout: float | None = ch.CLIENT_DEFAULT) -> ClusterStatus:
        """Which workers serve, and how loaded they are."""
        return read_status(self._unary(self._stub.ClusterStatus, pb.ClusterStatusRequest(), timeout))

    def cancel(self, request_id: str, *, timeout: float | None = ch.CLIENT_DEFAULT) -> bool:
        """End a running request of this gateway; False when none of that id runs there."""
        request = pb.CancelGenerateRequest(request_id=request_id)
        return bool(self._unary(self._stub.Cancel, request, timeout).found)

    def close(self) -> None:
        """Close the connection; calls that still run end with RequestCancelledError. May be repeated."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, method: Any, request: Any, timeout: float | None) -> Any:
        if self._closed:
            raise ClientClosedError("this client has been closed")
        seconds = self._timeout if timeout == ch.CLIENT_DEFAULT else timeout
        try:
            return method(request, timeout=seconds, metadata=self._metadata)
        except ValueError as e:  # closed by another thread in this moment
            raise ClientClosedError(str(e)) from None

    def _unary(self, method: Any, request: Any, timeout: float | None) -> Any:
        try:
            return self._start(method, request, timeout)
        except grpc.RpcError as e:
            raise _error(e, self.target, None) from None


class Stream(Iterator[Event]):
    """The events of one request, in order; also a context manager, which ends the request when it is left early."""

    def __init__(self, call: Any, progress: Progress, target: str) -> None:
        self._call = call
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

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        while not self._ended:
            try:
                event = self._progress.take(next(self._call))
            except StopIteration:
                self._end()
            except grpc.RpcError as e:
                self._ended = True
                self._progress.take_trailer(as_dict(self._call.trailing_metadata()))
                self._failure = _error(e, self._target, self.request_id)
            except JoinwiseError as e:
                self._ended, self._failure = True, e
                self._call.cancel()
            else:
                if event is not None:
                    return event
        if self._failure is not None:
            raise self._failure
        raise StopIteration

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
