import itertools

import pytest

from joinwise.cluster.errors import InternalError
from joinwise.cluster.lifecycle import Lifecycle, RequestState, may_follow

S = RequestState


@pytest.mark.parametrize(
    "path",
    [
        [S.ROUTED, S.PREFILLING, S.TRANSFERRING, S.DECODING, S.FINISHED],
        [S.ROUTED, S.PREFILLING, S.DECODING, S.FINISHED],
        [S.ROUTED, S.PREFILLING, S.FINISHED],  # max_tokens=1, or a stop at the first token
        [S.ROUTED, S.PREFILLING, S.TRANSFERRING, S.ROUTED, S.DECODING, S.FINISHED],  # a move
        [S.FAILED],
        [S.ROUTED, S.CANCELLED],
    ],
)
def test_lives(path: list[RequestState]) -> None:
    life = Lifecycle("r")
    for state in path:
        life.advance(state)
        life.advance(state)
    assert life.state.ended


@pytest.mark.parametrize(("state", "following"), [*itertools.product([s for s in S if s.ended], S)])
def test_nothing_follows_an_end(state: RequestState, following: RequestState) -> None:
    assert not may_follow(state, following)


def test_a_wrong_step_changes_nothing() -> None:
    life = Lifecycle("r")
    with pytest.raises(InternalError, match="queued request cannot become decoding"):
        life.advance(S.DECODING)
    assert life.state is S.QUEUED


def test_an_end_counts_once() -> None:
    life = Lifecycle("r")
    assert life.end(S.CANCELLED)
    assert not life.end(S.FAILED)
    assert life.state is S.CANCELLED
    with pytest.raises(InternalError):
        Lifecycle("r").end(S.DECODING)
