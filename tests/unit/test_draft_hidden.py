"""The target's hidden states on their way to a head: none is told twice, of other tokens, or to who wants none."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.draft_rig import HELLO, ServedDesk, ask, linked, opened, tokens

from joinwise.actors.draft.asking import Asker
from joinwise.actors.draft.desk import Desk, Engine
from joinwise.actors.draft.drafter import Ask
from joinwise.actors.draft.hidden import MAX_HIDDEN, HiddenTail, packed, unpacked
from joinwise.actors.draft.lookup import PromptLookup
from joinwise.actors.vllm.hidden_tap import HiddenTap
from joinwise.proto import draft_pb2

SIZE = 3


def states(first: int, count: int) -> np.ndarray:
    """Of tokens `first` to `first + count - 1`: each is its token's position, in every number."""
    return np.repeat(np.arange(first, first + count, dtype=np.float32)[:, None], SIZE, 1)


def positions(hidden: np.ndarray | None) -> list[float] | None:
    return None if hidden is None else hidden[:, 0].tolist()


class Listening(PromptLookup):
    """A drafter that hears hidden states, and drafts the number of them."""

    def __init__(self) -> None:
        self.heard: list[list[float] | None] = []

    def draft(self, asks: Sequence[Ask]) -> list[list[int]]:
        self.heard += [positions(each.hidden) for each in asks]
        return [[0 if each.hidden is None else len(each.hidden)] for each in asks]


# Kept until they are told.


def test_what_follows_without_a_gap_is_told_together_and_once() -> None:
    tail = HiddenTail()
    tail.add(states(3, 2), 6)  # of tokens 3 and 4, before the sixth
    tail.add(None, 6)
    tail.add(states(5, 3), 9)
    assert positions(tail.take(9)) == [3, 4, 5, 6, 7]
    assert tail.take(9) is None


def test_what_comes_after_a_gap_stands_alone() -> None:
    tail = HiddenTail()
    tail.add(states(3, 2), 6)
    tail.add(states(6, 2), 9)  # that of token 5 was never told
    assert positions(tail.take(9)) == [6, 7]
    tail.add(states(8, 1), 10)
    assert tail.take(11) is None  # the last token but one has none


def test_only_the_latest_are_kept() -> None:
    tail = HiddenTail()
    for at in range(0, 3 * MAX_HIDDEN, 5):
        tail.add(states(at, 5), at + 6)
    last = 3 * MAX_HIDDEN + 2
    assert positions(tail.take(last + 2)) == [float(each) for each in range(last - MAX_HIDDEN + 1, last + 1)]


# On the wire.


def test_they_arrive_as_they_were_but_for_digits() -> None:
    there = np.random.default_rng(1).normal(size=(5, SIZE)).astype(np.float32)
    there[0, 0] = 1e6
    found = unpacked(packed(there), SIZE, 6)
    assert found is not None
    assert found[0, 0] == np.finfo(np.float16).max
    np.testing.assert_allclose(found[1:], there[1:], rtol=1e-3)


@pytest.mark.parametrize(
    ("hidden", "numbers", "tokens_told"),
    [
        (b"", SIZE, 9),
        (b"\0" * 6, 0, 9),
        (b"\0" * 7, SIZE, 9),
        (b"\0" * 6 * 9, SIZE, 9),
        (b"\0" * 6 * (MAX_HIDDEN + 1), SIZE, 999),
    ],
    ids=["none", "none wanted", "a part of one", "of the last token too", "too many"],
)
def test_what_cannot_be_is_taken_for_none(hidden: bytes, numbers: int, tokens_told: int) -> None:
    assert unpacked(hidden, numbers, tokens_told) is None


# At the draft actor.


def round_of(number: int, told: np.ndarray, start: int, hidden: bytes, patience_us: int = 10_000_000) -> Any:
    one = ask(1, told, start)
    one.hidden = hidden
    return draft_pb2.DraftRound(number=number, patience_us=patience_us, asks=[one])


def test_a_desk_hands_on_what_a_late_round_brought_and_forgets_it_with_its_tokens() -> None:
    drafter, answered = Listening(), threading.Semaphore(0)
    desk = Desk(drafter, hidden_size=SIZE)
    engine = Engine(lambda _: answered.release())
    desk.start()
    text = tokens(*range(9))

    def submit(*arguments: Any) -> None:
        desk.submit(engine, round_of(*arguments))
        assert answered.acquire(timeout=10)

    try:
        submit(1, text[:5], 0, packed(states(3, 1)), 0)  # nobody waited for it
        submit(2, text[:7], 5, packed(states(4, 2)))
        submit(3, text[:8], 7, b"")
        submit(4, text[:9], 8, b"\0" * 5)  # broken: the sequence is drafted for without
        submit(5, text[:9], 9, packed(states(7, 1)), 0)
        submit(6, tokens(*range(8), 5), 8, b"")  # other tokens than those that the states were of
    finally:
        desk.stop()
    assert drafter.heard == [[3, 4, 5], None, None, None]


def test_an_actor_that_wants_none_hears_none() -> None:
    drafter, answered = Listening(), threading.Event()
    desk = Desk(drafter)
    desk.start()
    desk.submit(Engine(lambda _: answered.set()), round_of(1, tokens(1, 2, 3), 0, packed(states(1, 1))))
    assert answered.wait(10)
    desk.stop()
    assert drafter.heard == [None]


# At the engine.


def asker() -> Asker:
    return Asker(vocabulary=1000, max_tokens=64, patience_s=5.0)


def test_an_engine_tells_them_once_and_keeps_them_while_nobody_is_asked() -> None:
    drafter = Listening()
    text = tokens(*range(1, 30))
    with ServedDesk(drafter, hidden_size=SIZE) as served, linked(served.address) as link:
        session, asking = opened(link), asker()
        asking.drafts(session, {0: text[:6]}, 4, hidden={0: states(4, 1)})
        asking.drafts(None, {0: text[:8]}, 4, hidden={0: states(5, 2)})
        asking.drafts(session, {2: text[:9]}, 4, hidden={2: states(7, 1)})
        asking.drafts(session, {2: text[:10]}, 4)
        asking.drafts(session, {2: text[:11]}, 4, hidden={2: states(9, 1)[:, :2]})  # of another size than it wants
    assert drafter.heard == [[4], [5, 6, 7], None, None]


def test_they_are_kept_while_drafts_are_looked_up() -> None:
    drafter = Listening()
    text = [*range(1, 9)] * 3
    with ServedDesk(drafter, hidden_size=SIZE) as served, linked(served.address) as link:
        session = opened(link)
        asking = Asker(vocabulary=1000, max_tokens=64, patience_s=5.0, lookup=True)
        asking.drafts(session, {0: tokens(*text[:6])}, 2, hidden={0: states(4, 1)})
        for at in range(7, 20):  # from the eleventh on it repeats itself, and is trusted
            asking.drafts(session, {0: tokens(*text[:at])}, 2, hidden={0: states(at - 2, 1)})
        asked = len(drafter.heard)
        asking.drafts(session, {0: tokens(*text[:19], 90, 91)}, 2, hidden={0: states(18, 2)})
    assert len(drafter.heard) == asked + 1 < 14
    assert asking.figures.looked_up
    assert [each for heard in drafter.heard for each in heard or ()] == list(range(4, 20))  # each once


def test_an_actor_that_wants_none_is_sent_none() -> None:
    sent: list[bytes] = []
    with ServedDesk(Listening()) as served, linked(served.address) as link:
        session = opened(link)
        real = session.ask
        session.ask = lambda asked, patience: (sent.append(asked.asks[0].hidden), real(asked, patience))[1]  # type: ignore[method-assign]
        asker().drafts(session, {0: tokens(1, 2, 3)}, 4, hidden={0: states(1, 1)})
    assert sent == [b""]
    assert HELLO.protocol_version == 1  # fields were added, nothing was changed


# In vLLM's runner.


class Runner:
    """Does what vLLM's does in a step, in its order."""

    def __init__(self) -> None:
        self.model: Any = SimpleNamespace(compute_logits=lambda states, scale=1: states * scale)
        self.sampler, self.rejection_sampler = torch.nn.Identity(), _Rejecting()

    def step(self, count: int, drafts: list[int] | None = None) -> None:
        assert torch.equal(
            self.model.compute_logits(torch.from_numpy(states(0, count)), scale=2)[:, 0], 2.0 * torch.arange(count)
        )
        if drafts is None:
            self.sampler(torch.zeros(1))
        else:
            self.rejection_sampler(SimpleNamespace(num_draft_tokens=drafts), self.sampler)


class _Rejecting(torch.nn.Module):
    def forward(self, metadata: Any, sampler: torch.nn.Module) -> None:
        sampler(torch.zeros(1))  # for the tokens after the last drafts


def tapped() -> tuple[Runner, HiddenTap]:
    runner, tap = Runner(), HiddenTap()
    tap.watch_model(runner.model)
    tap.watch_samplers(runner.sampler, runner.rejection_sampler)
    return runner, tap


def test_rows_of_a_step_without_drafts() -> None:
    runner, tap = tapped()
    runner.step(3)
    assert {row: positions(each) for row, each in tap.of_rows([[5], [], [7]]).items()} == {0: [0], 2: [2]}
    assert tap.of_rows([[5], [], [7]]) == {}  # of one step once


def test_rows_of_a_step_with_drafts_are_as_long_as_what_was_accepted() -> None:
    runner, tap = tapped()
    runner.step(8, [3, 0, 2])
    runner.model.compute_logits(torch.zeros(8, SIZE))  # log probabilities of prompts, after the sampler
    found = tap.of_rows([[5, 6], [7], [8, 9, 9]])
    assert {row: positions(each) for row, each in found.items()} == {0: [0, 1], 1: [4], 2: [5, 6, 7]}


def test_what_does_not_fit_together_is_not_used() -> None:
    runner, tap = tapped()
    assert tap.of_rows([[5]]) == {}
    runner.step(4)
    assert tap.of_rows([[5], [6]]) == {}
    runner.step(5, [3, 0])
    assert tap.of_rows([[5]]) == {}
    runner.step(2, [0, 0])
    assert list(tap.of_rows([[5, 6], [7]])) == [1]  # more ids than it had states
