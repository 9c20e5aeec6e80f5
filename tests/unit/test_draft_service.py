"""The draft actor's port: rounds that break the protocol, sequences that are not what they seem, engines that leave."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from helpers.draft_rig import HELLO, VOCABULARY, ServedDesk, ask, tokens

from joinwise.actors.draft.drafter import Ask
from joinwise.actors.draft.lookup import PromptLookup
from joinwise.actors.draft.vocabulary import Vocabulary
from joinwise.actors.draft.wire import MAX_ASKS
from joinwise.proto import draft_pb2, draft_pb2_grpc

TEXT = tokens(1, 2, 3, 4, 1, 2)


class Counting(PromptLookup):
    """Notes batches; waits where a test says so; remembers keys as a model would."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.keys: set[Any] = set()
        self.entered, self.go = threading.Event(), threading.Event()
        self.go.set()

    def draft(self, asks: Sequence[Ask]) -> list[list[int]]:
        self.entered.set()
        assert self.go.wait(20)
        self.batches.append(len(asks))
        self.keys |= {each.key for each in asks}
        return super().draft(asks)

    def forget(self, key: Any) -> None:
        self.keys.discard(key)


class Engine:
    """A stream, by hand."""

    def __init__(self, address: str, hello: draft_pb2.DraftHello | None = HELLO) -> None:
        import queue

        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._channel = grpc.insecure_channel(address)
        self.call = draft_pb2_grpc.DraftServiceStub(self._channel).Draft(iter(self._out.get, None), timeout=20)
        if hello is not None:
            self._out.put(draft_pb2.DraftRequest(hello=hello))

    def send(self, number: int, *asks: draft_pb2.DraftAsk, **fields: Any) -> None:
        fields.setdefault("patience_us", 10_000_000)
        self._out.put(draft_pb2.DraftRequest(round=draft_pb2.DraftRound(number=number, asks=asks, **fields)))

    def say(self, request: draft_pb2.DraftRequest) -> None:
        self._out.put(request)

    def read(self) -> Any:
        return next(self.call)

    def ids(self) -> list[list[int]]:
        return [list(each.token_ids) for each in self.read().answer.drafts]

    def end(self) -> None:
        self._out.put(None)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.put(None)
        self.call.cancel()
        self._channel.close()


def until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def refused(engine: Engine) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as error:
        while True:
            engine.read()
    return error.value.code(), error.value.details()  # type: ignore[attr-defined]


def changed(**fields: Any) -> draft_pb2.DraftHello:
    hello = draft_pb2.DraftHello()
    hello.CopyFrom(HELLO)
    for name, value in fields.items():
        if isinstance(value, Vocabulary):
            getattr(hello, name).CopyFrom(value.message())
        else:
            setattr(hello, name, value)
    return hello


OTHER = Vocabulary("other", 2000, "e" * 32)


@pytest.mark.parametrize(
    ("hello", "words"),
    [
        (changed(protocol_version=2), ["version 2"]),
        (changed(cluster="x"), ["'x'", "'c'"]),
        (changed(vocabulary=OTHER), ["'other'", "'small'", "2000", "1000"]),
    ],
)
def test_whom_it_cannot_serve_is_refused_by_name(hello: draft_pb2.DraftHello, words: list[str]) -> None:
    with ServedDesk(PromptLookup(), VOCABULARY) as served, Engine(served.address, hello) as engine:
        code, details = refused(engine)
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert all(word in details for word in words), details


def test_without_a_vocabulary_of_its_own_it_serves_any() -> None:
    with ServedDesk(PromptLookup()) as served, Engine(served.address, changed(vocabulary=OTHER)) as engine:
        assert engine.read().welcome.drafter == "lookup"


def test_a_sequence_goes_on_from_what_was_sent_and_may_go_back() -> None:
    with ServedDesk(PromptLookup()) as served, Engine(served.address) as engine:
        engine.read()
        engine.send(1, ask(1, TEXT))
        assert engine.ids() == [[3, 4, 1, 2]]
        engine.send(2, ask(1, tokens(*TEXT, 3), start=6, k=1))
        assert engine.ids() == [[4]]
        engine.send(3, ask(1, tokens(*TEXT[:4], 9, 2, 3), start=4, k=2))  # other tokens from an earlier position on
        assert engine.ids() == [[4, 9]]


def test_equal_numbers_of_two_engines_are_two_sequences_in_one_batch() -> None:
    drafter = Counting()
    drafter.go.clear()
    with ServedDesk(drafter) as served, Engine(served.address) as one, Engine(served.address) as other:
        one.read(), other.read()
        one.send(1, ask(9, tokens(1)))
        assert drafter.entered.wait(10)  # it has been taken, and its drafter waits
        one.send(2, ask(1, TEXT, k=1))
        other.send(1, ask(1, tokens(8, 9, 5, 8, 9), k=1))
        until(lambda: sum(each.waiting for each in served.service._streams) == 3)
        drafter.go.set()
        one.read()
        assert one.ids() == [[3]]
        assert other.ids() == [[5]]
        assert drafter.batches == [1, 2]
        assert len(drafter.keys) == 3
    assert not drafter.keys


@pytest.mark.parametrize(
    "second",
    [
        ask(1, tokens(*TEXT, 3), start=7),  # a gap
        ask(1, tokens(*TEXT, 3), start=6, digest=12345),  # other tokens than were meant
        ask(2, tokens(*TEXT, 3), start=6),  # a sequence that never began
        ask(3, tokens()),  # nothing at all
    ],
)
def test_a_sequence_that_is_not_what_was_meant_is_unknown_and_may_begin_again(second: draft_pb2.DraftAsk) -> None:
    with ServedDesk(PromptLookup()) as served, Engine(served.address) as engine:
        engine.read()
        engine.send(1, ask(1, TEXT))
        engine.read()
        engine.send(2, second)
        (draft,) = engine.read().answer.drafts
        assert draft.unknown
        assert not draft.token_ids
        engine.send(3, ask(second.sequence, TEXT, k=1))
        assert engine.ids() == [[3]]


def test_a_round_that_nobody_waits_for_any_more_is_learnt_but_not_drafted() -> None:
    drafter = Counting()
    with ServedDesk(drafter) as served, Engine(served.address) as engine:
        engine.read()
        drafter.go.clear()
        engine.send(1, ask(1, tokens(7)))
        assert drafter.entered.wait(10)
        engine.send(2, ask(2, TEXT), patience_us=0)
        until(lambda: any(each.waiting == 2 for each in served.service._streams))
        drafter.go.set()
        engine.read()
        assert engine.ids() == []
        assert served.desk.figures.late == 1
        engine.send(3, ask(2, tokens(*TEXT, 3), start=6, k=1))
        assert engine.ids() == [[4]]


def test_sequences_end_when_they_are_said_to_and_when_their_engine_leaves() -> None:
    drafter = Counting()
    with ServedDesk(drafter) as served:
        with Engine(served.address) as engine:
            engine.read()
            engine.send(1, ask(1, TEXT), ask(2, TEXT))
            engine.read()
            assert len(drafter.keys) == 2
            engine.send(2, ended=[1, 77])
            engine.read()
            assert len(drafter.keys) == 1
            assert served.desk.figures.sequences == 1
        until(lambda: not drafter.keys)
        assert served.service.engines == 0


def test_more_than_one_may_ask_for_is_refused() -> None:
    with ServedDesk(Counting()) as served:
        for number, message in enumerate(
            [
                draft_pb2.DraftRequest(hello=HELLO),
                draft_pb2.DraftRequest(),
                draft_pb2.DraftRequest(round=draft_pb2.DraftRound(number=0)),
                draft_pb2.DraftRequest(
                    round=draft_pb2.DraftRound(number=1, asks=[draft_pb2.DraftAsk()] * (MAX_ASKS + 1))
                ),
            ]
        ):
            with Engine(served.address) as engine:
                engine.read()
                engine.say(message)
                assert refused(engine)[0] is grpc.StatusCode.INVALID_ARGUMENT, number


def test_an_engine_that_does_not_wait_for_answers_is_cut_off() -> None:
    drafter = Counting()
    with ServedDesk(drafter) as served, Engine(served.address) as engine:
        engine.read()
        drafter.go.clear()
        for number in range(1, 7):
            engine.send(number, ask(1, TEXT))
        code, details = refused(engine)
        drafter.go.set()
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "4 rounds" in details


def test_a_drafter_that_fails_is_reported_once() -> None:
    class Broken(PromptLookup):
        def draft(self, asks: Sequence[Ask]) -> list[list[int]]:
            raise RuntimeError("no memory")

    failures: list[BaseException] = []
    with ServedDesk(Broken(), on_dead=failures.append) as served, Engine(served.address) as engine:
        engine.read()
        engine.send(1, ask(1, TEXT))
        until(lambda: failures)
        assert str(failures[0]) == "no memory"
        until(lambda: not served.desk.alive)
