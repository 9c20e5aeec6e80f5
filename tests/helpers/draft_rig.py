"""Draft actors for tests: the real service on a port of its own, and one that answers whatever a test wants."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np

from joinwise.actors.draft.desk import Desk
from joinwise.actors.draft.drafter import Drafter
from joinwise.actors.draft.link import DraftLink, Session
from joinwise.actors.draft.service import DraftService
from joinwise.actors.draft.vocabulary import Vocabulary
from joinwise.actors.draft.wire import PROTOCOL_VERSION, prefix_hash
from joinwise.proto import draft_pb2, draft_pb2_grpc

VOCABULARY = Vocabulary("small", 1000, "d" * 32)
HELLO = draft_pb2.DraftHello(
    protocol_version=PROTOCOL_VERSION, cluster="c", worker_id="w", vocabulary=VOCABULARY.message()
)
Answerer = Callable[[draft_pb2.DraftRound], draft_pb2.DraftAnswer | None]


class ServedDesk:
    """A desk behind the real service, on an event loop in a thread of its own."""

    def __init__(self, drafter: Drafter, vocabulary: Vocabulary | None = None, *, port: int = 0, **desk: Any) -> None:
        self.desk = Desk(drafter, **desk)
        self.service: Any = None
        self._vocabulary = vocabulary
        self._drafter = drafter
        self._ready = threading.Event()
        self.port = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._ready.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        self._server = grpc.aio.server()
        self.service = DraftService(self.desk, cluster="c", drafter=self._drafter.name, vocabulary=self._vocabulary)
        draft_pb2_grpc.add_DraftServiceServicer_to_server(self.service, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()
        self.desk.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> ServedDesk:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(0), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self.desk.stop()


class _Scripted(draft_pb2_grpc.DraftServiceServicer):
    def __init__(self, answerer: Answerer, welcome: draft_pb2.DraftResponse | None) -> None:
        self._answerer = answerer
        self._welcome = welcome
        self.ended = threading.Event()

    def Draft(self, requests: Any, context: grpc.ServicerContext) -> Iterator[draft_pb2.DraftResponse]:
        context.add_callback(self.ended.set)
        assert next(requests).WhichOneof("message") == "hello"
        if self._welcome is not None:
            yield self._welcome
        for request in requests:
            answer = self._answerer(request.round)
            if answer is not None:
                yield draft_pb2.DraftResponse(answer=answer)


WELCOME = draft_pb2.DraftResponse(
    welcome=draft_pb2.DraftWelcome(protocol_version=PROTOCOL_VERSION, drafter="scripted", max_k=64)
)


@contextmanager
def scripted(answerer: Answerer, welcome: draft_pb2.DraftResponse | None = WELCOME) -> Iterator[tuple[str, Any]]:
    """A draft actor that answers what `answerer` makes of a round; None is no answer. Its address and servicer."""
    server = grpc.server(futures.ThreadPoolExecutor(8))
    servicer = _Scripted(answerer, welcome)
    draft_pb2_grpc.add_DraftServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", servicer
    finally:
        server.stop(0).wait()


@contextmanager
def linked(address: str, hello: draft_pb2.DraftHello = HELLO) -> Iterator[DraftLink]:
    """A link that is pointed at an address."""
    link = DraftLink(hello, grpc.insecure_channel)
    try:
        link.point(address)
        yield link
    finally:
        link.close()


def opened(link: DraftLink, within_s: float = 10.0) -> Session:
    """The link's session, once it may be asked."""
    deadline = threading.Event()
    for _ in range(int(within_s / 0.005)):
        if (session := link.session) is not None:
            return session
        deadline.wait(0.005)
    raise AssertionError("no session")


def tokens(*ids: int) -> np.ndarray:
    """A sequence."""
    return np.array(ids, np.int32)


def ask(sequence: int, told: np.ndarray, start: int = 0, k: int = 4, digest: int | None = None) -> draft_pb2.DraftAsk:
    """An ask for a whole sequence, of which the tokens before `start` were sent before."""
    return draft_pb2.DraftAsk(
        sequence=sequence,
        start=start,
        token_ids=told[start:].tolist(),
        prefix_hash=prefix_hash(told) if digest is None else digest,
        k=k,
    )
