"""Recalled answers against the definition, written out; and what an engine makes of them."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from joinwise.actors.draft.asking import Asker
from joinwise.actors.draft.lookup import Guess
from joinwise.actors.draft.recall import _LONGEST, _PLACES, _SHORTEST, Recall
from joinwise.actors.draft.tracks import Tracks


def text(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def matching(answer: list[int], at: int, tokens: list[int]) -> int:
    """Tokens before `at` that are as those at the end."""
    length = 0
    while length < min(_LONGEST, at, len(tokens)) and answer[at - 1 - length] == tokens[-1 - length]:
        length += 1
    return length


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=30), max_size=5),
    st.lists(st.integers(0, 9), max_size=30),
    st.integers(1, 6),
)
@settings(max_examples=300, deadline=None)
def test_it_is_what_the_definition_says(answers: list[list[int]], tokens: list[int], k: int) -> None:
    recall = Recall(10_000)
    for answer in answers:
        recall.add(text(*answer), 0)
    found = recall.continued(text(*tokens), k)
    places = [
        (matching(answer, at, tokens), number, at, answer)
        for number, answer in enumerate(answers)
        for at in range(3, len(answer) + 1)
        if matching(answer, at, tokens) >= 3
    ][-_PLACES:]
    best = max(((length, number, at) for length, number, at, answer in places if at < len(answer)), default=(0, 0, 0))
    length, number, at = best
    assert found == (answers[number][at : at + k] if length >= _SHORTEST else [])


def test_what_matches_longest_counts_and_of_equal_ones_the_latest() -> None:
    recall = Recall(10_000)
    recall.add(text(9, 1, 2, 3, 4, 5, 50, 51), 0)
    recall.add(text(8, 2, 3, 4, 5, 60), 0)
    recall.add(text(7, 2, 3, 4, 5, 70), 0)
    assert recall.continued(text(1, 2, 3, 4, 5), 4) == [50, 51]  # to the end of that answer
    assert recall.continued(text(0, 2, 3, 4, 5), 4) == [70]
    assert recall.continued(text(0, 3, 4, 5), 4) == []  # three are a coincidence
    assert recall.continued(text(4, 5), 4) == []


def test_only_answers_are_kept_with_a_little_of_what_came_before() -> None:
    recall = Recall(10_000)
    prompt = list(range(100))
    recall.add(text(*prompt, 500, 501, 502), 100)
    assert recall.continued(text(*prompt[60:70]), 4) == []
    assert recall.continued(text(*prompt), 4) == [500, 501, 502]
    recall.add(text(*prompt), 100)  # no answer
    recall.add(text(1), 0)
    assert recall.continued(text(*prompt), 4) == [500, 501, 502]


def test_the_oldest_answers_are_forgotten_and_what_is_kept_is_bounded() -> None:
    chance = random.Random(3)
    recall, size = Recall(1000), 90
    answers = [chance.choices(range(1000), k=size) for _ in range(200)]
    for number, answer in enumerate(answers):
        recall.add(text(*answer), 0)
        newest = answers[max(0, number - 4) : number + 1]  # at least half of what may be kept
        assert all(recall.continued(text(*each[:8]), 5) == each[8:13] for each in newest)
        assert not any(recall.continued(text(*each[:8]), 5) for each in answers[: max(0, number - 11)])
        assert sum(len(kept._newest) for kept in (recall._young, recall._old)) <= 1000
    long = list(range(3000))
    recall.add(text(*long), 0)  # as much of it as has room
    assert recall.continued(text(*long[2000:2010]), 3) == []
    assert recall.continued(text(*long[2900:2910]), 3) == [2910, 2911, 2912]


def test_a_sequence_is_recalled_once_its_row_is_gone_and_not_twice() -> None:
    recall = Recall(10_000)
    tracks = Tracks(recall)
    prompt, answer = [1, 2, 3, 4, 5], [11, 12, 13, 14, 15, 16]
    for size in (1, 3, 4):
        tracks.follow({0: text(*prompt, *answer[:size])})
        assert recall.continued(text(*prompt), 4) == []
    tracks.follow({})  # it waits for its turn
    assert recall.continued(text(*prompt), 9) == answer[:4]
    tracks.follow({3: text(*prompt, *answer)})
    tracks.follow({})
    tracks.follow({})
    kept = recall._young._tokens[: recall._young._used].tolist()
    assert kept == [*prompt, *answer[:4], -1, *prompt, *answer, -1]  # the second time what is new, and what is before
    assert recall.continued(text(*prompt, *answer[:4]), 4) == answer[4:]


def test_an_answer_that_is_given_again_is_drafted_without_asking() -> None:
    asking = Asker(vocabulary=1000, max_tokens=256, patience_s=1, recall=10_000)
    chance = random.Random(5)
    prompt, answer = chance.choices(range(1000), k=30), chance.choices(range(1000), k=60)
    for size in range(1, 61):
        assert asking.drafts(None, {0: text(*prompt, *answer[:size])}, 8) == {}
    again = chance.choices(range(1000), k=10)  # another question
    steps, size = 0, 4
    while size < 60:
        drafts = asking.drafts(None, {0: text(*again, *answer[:size])}, 8).get(0, [])
        assert drafts == answer[size : size + 8]
        size, steps = size + len(drafts) + 1, steps + 1
    assert steps == 7
    assert asking.figures.looked_up == asking.figures.drafted == 56 - steps + 1


def test_what_recalled_text_was_worth_elsewhere_is_where_a_new_sequence_begins() -> None:
    recall = Recall(1000)
    first = Guess(recall.worth)
    assert first.rate == 0.6
    for at in range(30):
        first.renew(np.arange(at), [7000, 7001])
    assert recall.worth.rate < 0.3
    assert abs(Guess(recall.worth).rate - recall.worth.rate) < 1e-9
    assert first.rate < recall.worth.rate  # its own record forgets the beginning sooner


def test_the_better_of_two_guesses_counts() -> None:
    tracks = Tracks()
    track = tracks.follow({0: text(1, 2, 3)})[0][0]
    assert track.guess.ids == []
    track.recalled.renew(track.tokens, [5, 6])
    assert track.guess is track.recalled
    track.own.renew(track.tokens, [4])
    assert track.guess is track.own  # equally good
    track.own.renew(text(1, 2, 3, 5), [4])
    track.recalled.renew(text(1, 2, 3, 5), [6])
    assert track.guess is track.recalled


def test_answers_in_which_nothing_is_found_for_long_end_nothing() -> None:
    guess = Guess()
    for size in range(10_000):
        guess.renew(np.zeros(size, np.int32), [])
    assert guess.rate == 0.6
