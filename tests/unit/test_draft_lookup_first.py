"""Which drafter a sequence is drafted by: the text itself while it repeats itself, a model elsewhere."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from joinwise.actors.draft.drafter import Ask
from joinwise.actors.draft.lookup_first import LookupFirst


class Model:
    """Drafts 900 and nothing else, and notes what it was asked."""

    name = "model"
    held = 7

    def __init__(self) -> None:
        self.asked: list[list[Hashable]] = []
        self.forgotten: list[Hashable] = []
        self.begun = False

    def begin(self) -> None:
        self.begun = True

    def draft(self, asks: Sequence[Ask]) -> list[list[int]]:
        self.asked.append([ask.key for ask in asks])
        return [[900] * ask.k for ask in asks]

    def catch_up(self) -> bool:
        return True

    def forget(self, key: Hashable) -> None:
        self.forgotten.append(key)


def ask(tokens: Sequence[int], k: int = 4, key: str = "a") -> Ask:
    return Ask(key, np.array(tokens, np.int32), k)


REPEATED = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]


def test_what_the_text_has_is_not_asked_of_the_model() -> None:
    model = Model()
    drafter = LookupFirst(model)
    assert drafter.draft([ask(REPEATED), ask([1, 2, 3, 4], key="b"), ask(REPEATED, 2, key="c")]) == [
        [4, 5, 6, 7],
        [900] * 4,
        [4, 5],
    ]
    assert model.asked == [["b"]]
    assert drafter.draft([ask(REPEATED)]) == [[4, 5, 6, 7]]
    assert model.asked == [["b"]]


def test_two_equal_tokens_are_no_repetition() -> None:
    assert LookupFirst(Model()).draft([ask([1, 2, 9, 8, 1, 2])]) == [[900] * 4]


def test_lookups_that_were_wrong_are_not_used_until_they_would_have_been_right() -> None:
    drafter, text = LookupFirst(Model()), list(REPEATED)
    assert drafter.draft([ask(text)]) == [[4, 5, 6, 7]]
    text += [99, 1, 2, 3]  # something else came, and the text begins to repeat itself again
    assert drafter.draft([ask(text)]) == [[900] * 4]
    used = []
    for token in [99, 1, 2, 3] * 5:  # from here on it does
        text.append(token)
        used.append(drafter.draft([ask(text)]) != [[900] * 4])
    assert not used[0]
    assert used[-1]


def test_what_else_a_drafter_does_is_the_models() -> None:
    model = Model()
    drafter = LookupFirst(model)
    drafter.begin()
    drafter.draft([ask(REPEATED)])
    drafter.forget("a")
    assert (model.begun, model.forgotten, drafter.catch_up(), drafter.held) == (True, ["a"], True, 7)
    assert drafter.name == "lookup, then model"


@given(st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 8)), max_size=12))
def test_any_tokens_of_any_sequence_are_drafted_within_what_was_asked(rounds: list[tuple[list[int], int]]) -> None:
    """A later ask may tell other tokens, or fewer, under the same name."""
    drafter = LookupFirst(Model())
    for tokens, k in rounds:
        (drafted,) = drafter.draft([ask(tokens, k)])
        assert len(drafted) == k
        assert set(drafted) <= set(tokens) or set(drafted) == {900}
