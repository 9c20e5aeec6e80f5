"""Prompt lookup against the definition, written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from joinwise.actors.draft.drafter import Ask
from joinwise.actors.draft.lookup import Guess, PromptLookup, lookup, repeated


def by_definition(tokens: list[int], k: int, longest: int, shortest: int) -> list[int]:
    """The longest end that stands earlier too, at its latest place; what followed, then what that predicts."""
    for length in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        end = tokens[len(tokens) - length :]
        for at in range(len(tokens) - length - 1, -1, -1):
            if tokens[at : at + length] == end:
                text = list(tokens)
                for step in range(k):
                    text.append(text[at + length + step])
                return text[len(tokens) :]
    return []


@given(
    st.lists(st.integers(0, 3), max_size=40),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(1, 5),
)
@settings(max_examples=300, deadline=None)
def test_it_is_what_the_definition_says(tokens: list[int], k: int, longest: int, shortest: int) -> None:
    if shortest > longest:
        longest, shortest = shortest, longest
    drafted = lookup(np.array(tokens, np.int32), k, longest=longest, shortest=shortest)
    assert drafted == by_definition(tokens, k, longest, shortest)
    assert len(drafted) in (0, k)


@pytest.mark.parametrize(
    ("tokens", "drafted"),
    [
        ([], []),
        ([7], []),
        ([7, 7], []),  # one token alone is no match
        ([1, 2, 3, 9, 1, 2], [3, 9, 1, 2]),
        ([5, 6, 5, 6, 5, 6], [5, 6, 5, 6]),  # a text that repeats goes on repeating, however short it is
        ([1, 2, 8, 1, 2, 9, 1, 2], [9, 1, 2, 9]),  # the latest
        ([3, 1, 2, 8, 1, 2, 9, 3, 1, 2], [8, 1, 2, 9]),  # unless another match is longer
    ],
)
def test_examples(tokens: list[int], drafted: list[int]) -> None:
    assert lookup(np.array(tokens, np.int32), 4) == drafted


def test_each_sequence_is_drafted_by_itself() -> None:
    drafter = PromptLookup()
    asks = [Ask("a", np.array([1, 2, 3, 1, 2], np.int32), 2), Ask("b", np.array([4, 5], np.int32), 8)]
    assert drafter.draft(asks) == [[3, 1], []]
    assert not drafter.catch_up()
    assert drafter.held == 0


# Beside a model.

REPEATED = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]


def renewed(guess: Guess, tokens: list[int], k: int = 4) -> tuple[list[int], bool]:
    text = np.array(tokens, np.int32)
    guess.renew(text, repeated(text, k))
    return guess.ids, guess.trusted


def test_a_text_that_repeats_itself_is_trusted_at_first() -> None:
    assert renewed(Guess(), REPEATED) == ([4, 5, 6, 7], True)
    assert renewed(Guess(), [1, 2, 3, 4]) == ([], False)
    assert renewed(Guess(), [1, 2, 9, 8, 1, 2]) == ([], False)  # two equal tokens are no repetition


def test_guesses_that_were_wrong_are_not_trusted_until_they_would_have_been_right() -> None:
    guess, text = Guess(), list(REPEATED)
    assert renewed(guess, text)[1]
    text += [99, 1, 2, 3]  # something else came, and the text begins to repeat itself again
    assert renewed(guess, text) == ([99, 1, 2, 3], False)
    rates, trusts = [guess.rate], []
    for token in [99, 1, 2, 3] * 5:  # from here on it does
        text.append(token)
        trusts.append(renewed(guess, text)[1])
        rates.append(guess.rate)
    assert (trusts[0], trusts[-1]) == (False, True)
    assert rates == sorted(rates)


@given(st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 8)), max_size=12))
def test_any_tokens_are_guessed_within_what_was_asked(rounds: list[tuple[list[int], int]]) -> None:
    """A later text may be another one, or shorter."""
    guess = Guess()
    for tokens, k in rounds:
        ids, trusted = renewed(guess, tokens, k)
        assert len(ids) in (0, k)
        assert set(ids) <= set(tokens)
        assert 0 <= guess.rate < 1
        assert ids or not trusted
