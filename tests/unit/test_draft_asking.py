"""Rows of a batch become sequences, and answers are used only where they fit: with and without a draft actor."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, cast

import grpc
import numpy as np
import pytest
from helpers.draft_rig import HELLO, ServedDesk, linked, opened, scripted, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from joinwise.actors.draft.asking import Asker
from joinwise.actors.draft.link import DraftLink, Session
from joinwise.actors.draft.lookup import PromptLookup
from joinwise.actors.draft.tracks import _FORGET_AFTER, Tracks
from joinwise.proto import draft_pb2

PATIENCE_S = 5.0
TEXT = tokens(1, 2, 3, 4, 1, 2)


def asker(patience_s: float = PATIENCE_S) -> Asker:
    return Asker(vocabulary=1000, max_tokens=64, patience_s=patience_s)


# Rows and sequences.


def test_a_row_that_goes_on_is_the_same_sequence() -> None:
    tracks = Tracks()
    first, _ = tracks.follow({0: tokens(1, 2)})
    second, over = tracks.follow({0: tokens(1, 2, 3)})
    assert first[0] is second[0]
    assert not over


def test_rows_that_move_keep_their_sequences_and_a_new_request_begins_one() -> None:
    tracks = Tracks()
    first, _ = tracks.follow({0: tokens(1, 2), 1: tokens(5, 6), 2: tokens(8, 9)})
    moved, _ = tracks.follow({0: tokens(8, 9, 1), 1: tokens(1, 2, 3), 2: tokens(7)})
    assert moved[0] is first[2]
    assert moved[1] is first[0]
    assert moved[2] not in first.values()


def test_equal_requests_are_two_sequences() -> None:
    tracks = Tracks()
    first, _ = tracks.follow({0: tokens(1, 2), 1: tokens(1, 2)})
    assert first[0] is not first[1]
    second, _ = tracks.follow({0: tokens(1, 2, 3), 1: tokens(1, 2, 4)})
    assert (second[0], second[1]) == (first[0], first[1])


def test_what_a_batch_holds_is_copied() -> None:
    tracks, row = Tracks(), tokens(1, 2)
    found, _ = tracks.follow({0: row})
    row[0] = 9
    assert found[0].tokens.tolist() == [1, 2]


def test_a_sequence_without_a_row_is_over_in_the_end() -> None:
    tracks = Tracks()
    gone = tracks.follow({0: tokens(1)})[0][0].number
    over: list[int] = []
    for _ in range(_FORGET_AFTER + 1):
        over += tracks.follow({1: tokens(2)})[1]
    assert over == [gone]


@given(st.lists(st.dictionaries(st.integers(0, 3), st.lists(st.integers(0, 1), min_size=1, max_size=5)), max_size=12))
@settings(max_examples=150, deadline=None)
def test_whatever_a_batch_does_each_row_has_a_sequence_of_its_own_with_its_tokens(
    steps: list[dict[int, list[int]]],
) -> None:
    tracks = Tracks()
    before: dict[int, list[int]] = {}
    for step in steps:
        found, over = tracks.follow({row: tokens(*history) for row, history in step.items()})
        assert {row: track.tokens.tolist() for row, track in found.items()} == step
        numbers = [track.number for track in found.values()]
        assert len(set(numbers)) == len(numbers)
        assert not set(over) & set(numbers)
        for track in found.values():  # a number never stands for tokens that do not go on from those it stood for
            earlier = before.get(track.number, [])
            assert track.tokens.tolist()[: len(earlier)] == earlier
            before[track.number] = track.tokens.tolist()


# With a draft actor.


def test_drafts_come_from_the_actor_and_only_what_is_new_is_sent() -> None:
    seen: list[draft_pb2.DraftRound] = []
    with ServedDesk(PromptLookup()) as served, linked(served.address) as link:
        session, asking = opened(link), asker()
        ask, session.ask = session.ask, lambda asked, patience: (seen.append(asked), ask(asked, patience))[1]  # type: ignore[method-assign]
        assert asking.drafts(session, {3: TEXT}, 2) == {3: [3, 4]}
        assert asking.drafts(session, {1: tokens(*TEXT, 3, 4, 9)}, 4) == {}
        assert asking.drafts(session, {1: tokens(*TEXT, 3, 4, 9, 1, 2)}, 4) == {1: [3, 4, 9, 1]}
    assert [list(each.asks[0].token_ids) for each in seen] == [[*TEXT], [3, 4, 9], [1, 2]]
    assert len({each.asks[0].sequence for each in seen}) == 1


def test_nothing_is_asked_beyond_the_longest_sequence_or_with_k_0() -> None:
    with ServedDesk(PromptLookup()) as served, linked(served.address) as link:
        session, asking = opened(link), asker()
        assert asking.drafts(session, {0: TEXT}, 0) == {}
        full = np.tile(TEXT, 11)
        assert asking.drafts(session, {0: full[:63]}, 4) == {}
        assert asking.figures.asked == 0
        assert len(asking.drafts(session, {0: full[:61]}, 4)[0]) == 2  # and one token of the target's own: 64


def wrong(change: Callable[[draft_pb2.DraftAnswer], None]) -> Callable[[draft_pb2.DraftRound], draft_pb2.DraftAnswer]:
    """An answerer whose good answer was changed."""

    def answer(asked: draft_pb2.DraftRound) -> draft_pb2.DraftAnswer:
        good = draft_pb2.DraftAnswer(number=asked.number)
        for each in asked.asks:
            good.drafts.add(sequence=each.sequence, prefix_hash=each.prefix_hash, token_ids=[5, 6])
        change(good)
        return good

    return answer


def other_sequence(answer: draft_pb2.DraftAnswer) -> None:
    answer.drafts[0].sequence += 77


def other_tokens(answer: draft_pb2.DraftAnswer) -> None:
    answer.drafts[0].prefix_hash ^= 1


def swapped(answer: draft_pb2.DraftAnswer) -> None:
    first, second = answer.drafts
    first.sequence, second.sequence = second.sequence, first.sequence


def out_of_range(answer: draft_pb2.DraftAnswer) -> None:
    answer.drafts[0].token_ids[1] = 1000


def huge(answer: draft_pb2.DraftAnswer) -> None:
    answer.drafts[0].token_ids[0] = 0xFFFFFFFF


def too_many(answer: draft_pb2.DraftAnswer) -> None:
    answer.drafts[0].token_ids.extend([1] * 60)


def twice(answer: draft_pb2.DraftAnswer) -> None:
    answer.drafts.add(sequence=answer.drafts[0].sequence, prefix_hash=answer.drafts[0].prefix_hash, token_ids=[9])


@pytest.mark.parametrize(
    ("change", "used", "reason"),
    [
        (other_sequence, {1: [5, 6]}, "nobody asked for the sequence"),
        (other_tokens, {1: [5, 6]}, "it continues other tokens"),
        (swapped, {}, "it continues other tokens"),
        (out_of_range, {1: [5, 6]}, "ids out of range"),
        (huge, {1: [5, 6]}, "ids out of range"),
        (too_many, {1: [5, 6]}, "more ids than asked for"),
        (twice, {0: [5, 6], 1: [5, 6]}, "nobody asked for the sequence"),
    ],
)
def test_what_does_not_fit_is_not_used(
    change: Callable[[draft_pb2.DraftAnswer], None], used: dict[int, list[int]], reason: str
) -> None:
    with scripted(wrong(change)) as (address, _), linked(address) as link:
        asking = asker()
        assert asking.drafts(opened(link), {0: tokens(1), 1: tokens(2)}, 4) == used
        assert asking.figures.refused[reason] >= 1


def test_an_answer_to_another_round_is_not_used() -> None:
    def answer(asked: draft_pb2.DraftRound) -> draft_pb2.DraftAnswer:
        good = wrong(lambda _: None)(asked)
        good.number += 1
        return good

    with scripted(answer) as (address, _), linked(address) as link:
        asking = asker(patience_s=0.2)
        assert asking.drafts(opened(link), {0: TEXT}, 4) == {}
        assert asking.figures.missed == 1


def test_an_actor_that_stalls_costs_one_deadline_and_its_late_answer_is_not_used() -> None:
    going_on, answered = threading.Event(), threading.Event()

    def answer(asked: draft_pb2.DraftRound) -> draft_pb2.DraftAnswer:
        if asked.number == 1:
            assert going_on.wait(20)
            answered.set()
        return wrong(lambda _: None)(asked)

    with scripted(answer) as (address, _), linked(address) as link:
        session, asking = opened(link), asker(patience_s=0.3)
        begin = time.monotonic()
        assert asking.drafts(session, {0: TEXT}, 4) == {}
        took = time.monotonic() - begin
        assert 0.3 <= took < 1.5
        for _ in range(50):  # nobody can be asked until the answer is there: these cost nothing
            assert asking.drafts(link.session, {0: TEXT}, 4) == {}
        assert time.monotonic() - begin - took < 0.3
        assert asking.figures.asked == 1
        going_on.set()
        assert answered.wait(5)
        session = opened(link)
        drafted = {}
        while not drafted:  # the late answer is nobody's; the next round, a pause later, is a round like any other
            drafted = asking.drafts(session, {0: tokens(*TEXT, 5)}, 4)
            assert asking.figures.skipped < 60
        assert drafted == {0: [5, 6]}
        assert asking.figures.asked == 2


def test_one_that_is_always_late_is_asked_less_and_less() -> None:
    def slow(asked: draft_pb2.DraftRound) -> draft_pb2.DraftAnswer:
        time.sleep(0.03)
        return wrong(lambda _: None)(asked)

    with scripted(slow) as (address, _), linked(address) as link:
        asking, session = asker(patience_s=0.001), opened(link)
        for _ in range(40):
            session = opened(link)
            assert asking.drafts(session, {0: TEXT}, 4) == {}
        assert asking.figures.missed == asking.figures.asked <= 6  # after pauses of 1, 3, 7, 15 steps
        assert asking.figures.skipped + asking.figures.asked == 40


def test_without_a_limit_a_step_waits_for_as_long_as_two_steps_take() -> None:
    now, waits = [0.0], []

    class Patient:
        """A session that notes how long it may take, and has no drafts."""

        told: ClassVar[dict[int, int]] = {}
        hidden_size = 0

        def ask(self, asked: draft_pb2.DraftRound, patience_s: float) -> draft_pb2.DraftAnswer:
            waits.append(patience_s)
            return draft_pb2.DraftAnswer()

    asking = Asker(vocabulary=1000, max_tokens=64, patience_s=None, clock=lambda: now[0])
    for length, step_s in ((2, 0.4), (3, 0.4), (4, 0.0), (5, 0.0)):
        assert asking.drafts(cast(Session, Patient()), {0: TEXT[:length]}, 4, alone=length != 5) == {}
        now[0] += step_s
    assert waits == pytest.approx([0.1, 0.8, 0.8, 0.8])  # the last step computed a prompt too: it says nothing


def test_an_actor_that_has_forgotten_a_sequence_gets_it_whole() -> None:
    with ServedDesk(PromptLookup(), idle_s=0.05) as served, linked(served.address) as link:
        session, asking = opened(link), asker()
        assert asking.drafts(session, {0: TEXT}, 2) == {0: [3, 4]}
        deadline = time.monotonic() + 10
        while served.desk.figures.sequences:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        longer = tokens(*TEXT, 3)
        assert asking.drafts(session, {0: longer}, 2) == {}
        assert asking.figures.refused["the actor does not know the sequence"] == 1
        assert asking.drafts(session, {0: longer}, 2) == {0: [4, 1]}


def test_a_killed_actor_costs_nothing_and_its_successor_is_told_everything() -> None:
    asking, served = asker(), ServedDesk(PromptLookup())
    with ExitStack() as stack:
        with served:
            link = stack.enter_context(linked(served.address))
            assert asking.drafts(opened(link), {0: TEXT}, 2) == {0: [3, 4]}
        begin = time.monotonic()
        while link.session is not None:
            assert time.monotonic() - begin < PATIENCE_S
        assert asking.drafts(link.session, {0: TEXT}, 2) == {}
        with ServedDesk(PromptLookup(), port=served.port):
            assert asking.drafts(opened(link, 20), {0: tokens(*TEXT, 3)}, 2) == {0: [4, 1]}
    assert not asking.figures.refused


def test_pointing_elsewhere_changes_the_actor() -> None:
    with ServedDesk(PromptLookup()) as first, ServedDesk(PromptLookup()) as second, linked(first.address) as link:
        asking = asker()
        assert asking.drafts(opened(link), {0: TEXT}, 2)
        link.point(second.address)
        assert asking.drafts(opened(link), {0: TEXT}, 2) == {0: [3, 4]}
        assert second.desk.figures.rounds == 1
        link.point("")
        assert link.session is None


def test_a_refused_link_stays_without_a_session_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    stranger = draft_pb2.DraftHello()
    stranger.CopyFrom(HELLO)
    stranger.cluster = "another"
    with ServedDesk(PromptLookup()) as served, linked(served.address, stranger) as link:
        deadline = time.monotonic() + 10
        while "another" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert link.session is None
    assert "ERROR" in {record.levelname for record in caplog.records}


@pytest.mark.parametrize("version", [None, 2])
def test_an_actor_that_speaks_otherwise_is_not_asked(version: int | None) -> None:
    welcome = draft_pb2.DraftResponse(answer=draft_pb2.DraftAnswer(number=1))
    if version is not None:
        welcome = draft_pb2.DraftResponse(welcome=draft_pb2.DraftWelcome(protocol_version=version))
    with scripted(lambda _: None, welcome) as (address, servicer), linked(address) as link:
        assert servicer.ended.wait(10)
        assert link.session is None


def test_closing_a_link_frees_whoever_waits() -> None:
    with scripted(lambda _: None) as (address, _):
        link = DraftLink(HELLO, grpc.insecure_channel)
        link.point(address)
        session = opened(link)
        threading.Timer(0.1, link.close).start()
        begin = time.monotonic()
        assert asker(patience_s=30).drafts(session, {0: TEXT}, 4) == {}
        assert time.monotonic() - begin < 10


# The number of drafts.


class Told:
    """Stands for a chooser: notes what it is told, and chooses what a test says."""

    def __init__(self) -> None:
        self.length = 2
        self.told: list[tuple[Any, ...]] = []

    def choose(
        self, asked: Sequence[int], guessed: Mapping[int, float], spare: Mapping[int, float]
    ) -> tuple[dict[int, int], dict[int, int]]:
        self.spare = dict(spare)
        return dict.fromkeys(asked, self.length), dict.fromkeys(guessed, self.length)

    def verified(self, tokens: int, seconds: float) -> None:
        self.told.append(("verified", tokens, round(seconds, 6)))

    def drafted(self, depth: int, seconds: float) -> None:
        self.told.append(("drafted", depth, round(seconds, 6)))

    def accepted(self, sequence: int, drafts: int, accepted: int) -> None:
        self.told.append(("accepted", drafts, accepted))

    def forget(self, sequence: int) -> None:
        self.told.append(("forget", sequence))

    def take(self) -> list[tuple[Any, ...]]:
        told, self.told = self.told, []
        return told


class Answering:
    """A session that drafts 5, 6, 7, ... and takes a while by the test's clock."""

    hidden_size = 0

    def __init__(self) -> None:
        self.now = 0.0
        self.told: dict[int, int] = {}
        self.silent = False

    def ask(self, asked: draft_pb2.DraftRound, patience_s: float) -> draft_pb2.DraftAnswer | None:
        self.now += patience_s if self.silent else 0.01
        answer = draft_pb2.DraftAnswer(number=asked.number)
        for each in asked.asks:
            ids = [5 + index for index in range(each.k)]
            answer.drafts.add(sequence=each.sequence, prefix_hash=each.prefix_hash, token_ids=ids)
        return None if self.silent else answer


def test_what_steps_and_drafts_cost_and_bring_is_told() -> None:
    told, session = Told(), Answering()
    asking = Asker(
        vocabulary=1000,
        max_tokens=64,
        patience_s=0.5,
        lengths=told,  # type: ignore[arg-type]
        clock=lambda: session.now,
    )

    def step(rows: dict[int, np.ndarray], seconds: float = 0.1, *, alone: bool = True) -> list[tuple[Any, ...]]:
        session.now += seconds
        asking.drafts(session, rows, 4, alone=alone)  # type: ignore[arg-type]
        return told.take()

    assert step({0: tokens(1)}) == [("drafted", 2, 0.01)]  # a new sequence: its step computed a prompt
    assert step({0: tokens(1, 5, 9)}) == [("accepted", 2, 1), ("verified", 3, 0.1), ("drafted", 2, 0.01)]
    more = {0: tokens(1, 5, 9, 5, 6, 3), 1: tokens(8)}
    assert step(more) == [("accepted", 2, 2), ("drafted", 2, 0.01)]  # the step computed the other's prompt too
    more = {1: tokens(8, 4), 0: tokens(1, 5, 9, 5, 6, 3, 2)}
    seen = step(more, 0.2)
    assert sorted(seen[:2]) == [("accepted", 2, 0), ("accepted", 2, 0)]
    assert seen[2:] == [("verified", 6, 0.2), ("drafted", 2, 0.01)]
    told.length = 0
    more = {row: tokens(*more[row], 2) for row in more}
    assert step(more, alone=False)[2:] == []  # beside others' prompts, and nothing was asked
    more = {row: tokens(*more[row], 2) for row in more}
    assert step(more, 0.07) == [("verified", 2, 0.07)]
    told.length, session.silent = 3, True
    more = {row: tokens(*more[row], 2) for row in more}
    assert step(more, 0.07) == [("verified", 2, 0.07), ("drafted", 3, 0.5)]  # in vain


def test_the_chooser_never_gets_more_than_there_is_room_for() -> None:
    told, session = Told(), Answering()
    told.length = 9
    asking = Asker(vocabulary=1000, max_tokens=8, patience_s=1, lengths=told)  # type: ignore[arg-type]
    assert asking.drafts(session, {0: tokens(1, 2, 3, 4)}, 4) == {0: [5, 6, 7]}  # type: ignore[arg-type]
    assert asking.drafts(session, {0: tokens(1, 2)}, 4) == {0: [5, 6, 7, 8]}  # type: ignore[arg-type]


# Drafts that are looked up.

REPEATED = tokens(1, 2, 3, 4, 1, 2, 3)


def test_what_a_text_says_itself_is_asked_of_nobody() -> None:
    session = Answering()
    asking = Asker(vocabulary=1000, max_tokens=64, patience_s=1, lookup=True)
    rows = {0: REPEATED, 1: tokens(8, 9), 2: tokens(*REPEATED, 4)}
    assert asking.drafts(session, rows, 3) == {0: [4, 1, 2], 1: [5, 6, 7], 2: [1, 2, 3]}  # type: ignore[arg-type]
    assert len(session.told) == 1
    assert asking.drafts(None, {row: tokens(*text, 4) for row, text in rows.items()}, 3) == {0: [1, 2, 3]}
    figures = asking.figures
    assert (figures.asked, figures.skipped, figures.drafted, figures.looked_up) == (1, 1, 12, 9)


def test_a_guess_that_was_wrong_is_asked_for_and_what_drafts_bring_is_told_of_those_alone() -> None:
    told, session = Told(), Answering()
    asking = Asker(vocabulary=1000, max_tokens=64, patience_s=1, lookup=True, lengths=told, clock=lambda: session.now)  # type: ignore[arg-type]
    assert asking.drafts(session, {0: REPEATED}, 4) == {0: [4, 1]}  # type: ignore[arg-type]
    session.now += 0.1
    text = tokens(*REPEATED, 99, 1, 2, 3)
    assert asking.drafts(session, {0: tokens(*REPEATED, 99)}, 4) == {0: [5, 6]}  # type: ignore[arg-type]
    assert told.take() == [("verified", 3, 0.1), ("drafted", 2, 0.01)]
    assert asking.drafts(session, {0: text[:9]}, 4) == {0: [5, 6]}  # type: ignore[arg-type]
    assert told.take()[0] == ("accepted", 2, 0)
    assert asking.drafts(session, {0: text}, 4) == {0: [5, 6]}  # type: ignore[arg-type]
    assert 0 < told.spare[1] < 0.6  # it is there, and not trusted


def test_doubtful_guesses_are_used_where_nobody_can_be_asked() -> None:
    told = Told()
    told.choose = lambda asked, guessed, spare: ({}, dict.fromkeys(spare, 3))  # type: ignore[assignment, method-assign]
    asking = Asker(vocabulary=1000, max_tokens=64, patience_s=1, lookup=True, lengths=told)  # type: ignore[arg-type]
    text = [*REPEATED, 99, 1, 2, 3]
    for size in (7, 8, 11):
        drafted = asking.drafts(None, {0: tokens(*text[:size])}, 4)
    assert drafted == {0: [99, 1, 2]}
    assert asking.drafts(None, {0: tokens(*text, *([7] * 51))}, 4) == {0: [7]}  # there is room for one
