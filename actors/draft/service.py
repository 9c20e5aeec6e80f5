"""The draft actor's end of `draft.proto`: a stream per engine, its rounds handed to the desk."""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc

from joinwise.actors.draft.desk import Desk, Engine
from joinwise.actors.draft.vocabulary import Vocabulary, disagreement
from joinwise.actors.draft.wire import MAX_ASKS, MAX_K, PROTOCOL_VERSION
from joinwise.proto import draft_pb2, draft_pb2_grpc

logger = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 5.0
_MAX_WAITING = 4
"""Rounds of one engine that are not answered yet. It asks for one at a time; a few may cross a slow answer."""


@dataclass(eq=False)
class _Stream:
    """One engine's stream.

    Attributes:
        answers: to be sent; None ends the stream.
        last: number of the last round.
        waiting: rounds that are not answered yet.
        refusal: what was wrong with a message; empty while nothing was.
    """

    answers: "asyncio.Queue[draft_pb2.DraftAnswer | None]" = field(default_factory=asyncio.Queue)
    last: int = 0
    waiting: int = 0
    refusal: str = ""

    def deliver(self, answer: draft_pb2.DraftAnswer) -> None:
        """Send an answer."""
        self.waiting -= 1
        self.answers.put_nowait(answer)

    def accept(self, request: draft_pb2.DraftRequest) -> bool:
        """Look at a message; False, with `refusal` set, when it breaks the protocol."""
        asked = request.round
        if request.WhichOneof("message") != "round":
            self.refusal = "what follows the hello must be rounds"
        elif asked.number <= self.last:
            self.refusal = f"round {asked.number} came after round {self.last}"
        elif len(asked.asks) > MAX_ASKS:
            self.refusal = f"round {asked.number} asks for {len(asked.asks)} sequences, more than {MAX_ASKS}"
        elif self.waiting >= _MAX_WAITING:
            self.refusal = f"{self.waiting} rounds wait for their answers already"
        else:
            self.last = asked.number
            self.waiting += 1
        return not self.refusal


class DraftService(draft_pb2_grpc.DraftServiceServicer):
    """Serves engines from one desk. Lives on one event loop.

    Args:
        desk: answers the rounds.
        cluster: whose engines are served.
        drafter: its name.
        vocabulary: of the drafter; None when it drafts in any.
    """

    def __init__(self, desk: Desk, *, cluster: str, drafter: str, vocabulary: Vocabulary | None) -> None:
        self._desk = desk
        self._cluster = cluster
        self._drafter = drafter
        self._vocabulary = vocabulary
        self._loop = asyncio.get_running_loop()
        self._streams: set[_Stream] = set()

    @property
    def engines(self) -> int:
        """Open streams."""
        return len(self._streams)

    def end_all(self) -> None:
        """End every stream; for any thread."""

        def end() -> None:
            for stream in self._streams:
                stream.answers.put_nowait(None)

        self._loop.call_soon_threadsafe(end)

    async def Draft(  # noqa: N802 - gRPC's name
        self, requests: AsyncIterator[draft_pb2.DraftRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[draft_pb2.DraftResponse]:
        """See draft.proto."""
        hello = await self._hello(requests, context)
        stream = _Stream()

        def deliver(answer: draft_pb2.DraftAnswer) -> None:
            self._loop.call_soon_threadsafe(stream.deliver, answer)

        engine = Engine(deliver)
        reading = asyncio.create_task(self._read(stream, engine, requests))
        self._streams.add(stream)
        logger.info("engine %s asks for drafts", hello.worker_id)
        try:
            yield draft_pb2.DraftResponse(welcome=self._welcome())
            while (answer := await stream.answers.get()) is not None:
                yield draft_pb2.DraftResponse(answer=answer)
            if stream.refusal:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, stream.refusal)
        finally:
            reading.cancel()
            self._streams.discard(stream)
            self._desk.leave(engine)
            logger.info("engine %s has left", hello.worker_id)

    async def _hello(
        self, requests: AsyncIterator[draft_pb2.DraftRequest], context: grpc.aio.ServicerContext
    ) -> draft_pb2.DraftHello:
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                hello = (await anext(aiter(requests), draft_pb2.DraftRequest())).hello
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the stream did not open with a hello")
        reason = ""
        if hello.protocol_version != PROTOCOL_VERSION:
            reason = f"the engine speaks protocol version {hello.protocol_version}, this actor {PROTOCOL_VERSION}"
        elif hello.cluster != self._cluster:
            reason = f"the engine is of cluster {hello.cluster!r}, this actor of {self._cluster!r}"
        else:
            reason = disagreement(Vocabulary.of(hello.vocabulary), self._vocabulary)
        if reason:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, reason)
        return hello

    def _welcome(self) -> draft_pb2.DraftWelcome:
        vocabulary = self._vocabulary.message() if self._vocabulary is not None else None
        return draft_pb2.DraftWelcome(
            protocol_version=PROTOCOL_VERSION,
            drafter=self._drafter,
            vocabulary=vocabulary,
            max_k=MAX_K,
            hidden_size=self._desk.hidden_size,
        )

    async def _read(self, stream: _Stream, engine: Engine, requests: AsyncIterator[draft_pb2.DraftRequest]) -> None:
        """Submit rounds until the engine ends the stream, or breaks the protocol."""
        try:
            async for request in requests:
                if not stream.accept(request):
                    return
                self._desk.submit(engine, request.round)
        finally:
            stream.answers.put_nowait(None)
