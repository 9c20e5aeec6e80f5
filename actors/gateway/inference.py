"""The gRPC `InferenceService`: the same vLLM serving objects as HTTP, behind another door.

Owns the calls that run now, by request id, so that `Cancel` can find them. A call holds its vLLM generator only while
it runs: whatever ends the call (the last token, an error, the client, a deadline, `Cancel`) closes the generator, and
closing it makes vLLM abort the request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import asdict
from typing import TypeAlias

import grpc
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from joinwise.actors.gateway.convert import request_id_of, to_vllm
from joinwise.actors.gateway.events import EventStream
from joinwise.actors.gateway.failures import (
    NotedErrors,
    VllmRefusalError,
    as_joinwise_error,
    count_refusal,
    details_of,
    status_of,
    trailer_of,
)
from joinwise.actors.gateway.models import Models
from joinwise.actors.gateway.tickets import call_resumes
from joinwise.cluster.client.types import ClusterStatus
from joinwise.cluster.errors import (
    CannotResumeError,
    InternalError,
    InvalidRequestError,
    JoinwiseError,
    RequestCancelledError,
)
from joinwise.proto import inference_pb2 as pb
from joinwise.proto import inference_pb2_grpc

log = logging.getLogger(__name__)

Admission: TypeAlias = Callable[[str, pb.GenerateRequest, Mapping[str, str]], AbstractAsyncContextManager[object]]
"""`admission(request_id, request, metadata)`: entered before vLLM sees the request, left when the call has ended."""
LedgerSource: TypeAlias = Callable[[str], Awaitable[bytes | None]]
"""`ledger(request_id)`: the request's ledger as JSON, or None; asked once, after the generator has been closed."""
StatusSource: TypeAlias = Callable[[], Awaitable[ClusterStatus]]


@asynccontextmanager
async def admit_all(request_id: str, request: pb.GenerateRequest, metadata: Mapping[str, str]) -> AsyncIterator[None]:
    """The admission that refuses nobody."""
    yield


async def no_ledger(request_id: str) -> bytes | None:
    """The ledger source of a gateway that keeps none."""
    return None


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Serves `joinwise.v1.InferenceService`.

    Args:
        models: each with vLLM's `state`, as `init_app_state(engine_client, state, args, ("generate",))` leaves it.
        status: answers `ClusterStatus`; without it the call is UNIMPLEMENTED.
        ledger: gives the trailer `joinwise-ledger-bin`.
        admission: entered around every `Generate`; a JoinwiseError that it raises refuses the call.

    The id given to `ledger` and `admission` is the bare one; vLLM and the engine see `chatcmpl-<id>` or `cmpl-<id>-0`
    (`convert.bare_request_id` gives it back).
    """

    def __init__(
        self,
        models: Models,
        *,
        status: StatusSource | None = None,
        ledger: LedgerSource = no_ledger,
        admission: Admission = admit_all,
    ) -> None:
        self._models = models
        self._status = status
        self._ledger = ledger
        self._admission = admission
        self._calls: dict[str, _Call] = {}

    @property
    def running(self) -> tuple[str, ...]:
        """Ids of the requests that run now; empty on an idle gateway."""
        return tuple(self._calls)

    async def Generate(  # noqa: N802 (gRPC's name)
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Stream the events of one request; see the proto file for their order.

        Writes through the context, not as a generator: a cancellation that strikes during a write must be seen here.
        """
        request_id = ""
        failure: JoinwiseError | None = None
        with NotedErrors() as noted:
            try:
                request_id = request_id_of(request)
                with self._register(request_id, request) as call:
                    failure = await self._stream(call, request, context)
            except Exception as e:
                failure = as_joinwise_error(e, noted.last)
                if isinstance(failure, InternalError):
                    log.exception("request %s failed", request_id)
        trailer = await self._trailer(request_id)
        if failure is not None:
            count_refusal(failure)
            await context.abort(status_of(failure), details_of(failure), trailer + trailer_of(failure))
        context.set_trailing_metadata(trailer)

    async def Cancel(  # noqa: N802
        self, request: pb.CancelGenerateRequest, context: grpc.aio.ServicerContext
    ) -> pb.CancelGenerateResponse:
        """End a running request; `found` is false when none of that id runs here."""
        answered = request.request_id.removeprefix("chat").removeprefix("cmpl-")  # as vLLM's HTTP answers name it
        call = self._calls.get(request.request_id) or self._calls.get(answered)
        if call is not None:
            call.cancel()
        return pb.CancelGenerateResponse(found=call is not None)

    async def ListModels(  # noqa: N802
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        """List models, adapters after their base."""
        cards = await self._models.cards()
        limits = {card.id: card.max_model_len for card in cards}
        fallback = max((n for n in limits.values() if n), default=0)
        models = []
        for card in cards:
            limit = card.max_model_len or limits.get(card.parent) or fallback
            models.append(pb.Model(name=card.id, parent=card.parent or "", max_model_len=limit))
        return pb.ListModelsResponse(models=models)

    async def ClusterStatus(  # noqa: N802
        self, request: pb.ClusterStatusRequest, context: grpc.aio.ServicerContext
    ) -> pb.ClusterStatusResponse:
        """A snapshot of the cluster."""
        if self._status is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this gateway knows no cluster")
        try:
            snapshot = await self._status()
        except Exception as e:
            failure = as_joinwise_error(e)
            await context.abort(status_of(failure), details_of(failure), trailer_of(failure))
        workers = [pb.Worker(**asdict(w)) for w in snapshot.workers]
        links = [pb.KvLink(**asdict(link)) for link in snapshot.kv_links]
        return pb.ClusterStatusResponse(
            cluster=snapshot.cluster,
            workers=workers,
            leases=snapshot.leases,
            kv_links=links,
            troubles=snapshot.troubles,
            asleep=snapshot.asleep,
        )

    async def _stream(
        self, call: _Call, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> JoinwiseError | None:
        """Write the events of one request; raises what made it fail, returns the error if `Cancel` ended it."""
        try:
            vllm_request = to_vllm(request, call.request_id)
            metadata = {k: v for k, v in context.invocation_metadata() or () if isinstance(v, str)}
            async with self._admission(call.request_id, request, metadata):
                resume = request.resume if request.HasField("resume") else None
                call_resumes.set(tuple(resume.token_ids) if resume is not None else None)
                answer = await self._serve(vllm_request)
                stream = EventStream(call.request_id, resume)
                async with aclosing(answer) as chunks:
                    async for sse in chunks:
                        for event in stream.events(sse):
                            await context.write(event)
        except asyncio.CancelledError:
            if not call.uncancel():
                raise
            return RequestCancelledError("the request was cancelled", request_id=call.request_id)
        return None

    async def _serve(self, request: ChatCompletionRequest | CompletionRequest) -> AsyncGenerator[str, None]:
        """vLLM's stream of SSE strings for a request; it has been rendered, and no token been made."""
        state = self._models.choose(request.model).state
        if isinstance(request, ChatCompletionRequest):
            answer = await state.openai_serving_chat.create_chat_completion(request)
        else:
            answer = await state.openai_serving_completion.create_completion(request)
        if isinstance(answer, ErrorResponse):
            raise VllmRefusalError(answer.error.model_dump())
        return answer  # type: ignore[no-any-return]

    def _register(self, request_id: str, request: pb.GenerateRequest) -> _Call:
        running = self._calls.get(request_id)
        if running is not None and request.HasField("resume"):  # its connection broke, and nobody has told us yet
            running.cancel()
            raise CannotResumeError("the stream that broke is still being ended: ask again")
        if running is not None:
            raise InvalidRequestError(f"a request with the id {request_id!r} is running")
        return _Call(request_id, self._calls)

    async def _trailer(self, request_id: str) -> tuple[tuple[str, str | bytes], ...]:
        try:
            ledger = await self._ledger(request_id) if request_id else None
        except Exception:
            log.exception("no ledger for request %s", request_id)
            ledger = None
        return () if ledger is None else (("joinwise-ledger-bin", ledger),)


class _Call:
    """One running call, registered under its id while the context is open. Must be made in the call's own task."""

    def __init__(self, request_id: str, calls: dict[str, _Call]) -> None:
        self.request_id = request_id
        self._calls = calls
        task = asyncio.current_task()
        assert task is not None, "gRPC runs every call in a task"
        self._task = task
        self._cancelled = False

    def cancel(self) -> None:
        """Cancel the call; repeated cancels do nothing."""
        if not self._cancelled:
            self._cancelled = True
            self._task.cancel()

    def uncancel(self) -> bool:
        """In a handler of CancelledError: true, and the task is usable again, if `cancel` was the only cause."""
        return self._cancelled and self._task.uncancel() == 0

    def __enter__(self) -> _Call:
        self._calls[self.request_id] = self
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._calls.pop(self.request_id, None)
