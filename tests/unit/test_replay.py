import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from joinwise.actors.vllm.handoff import REPLAY_KEY, Handoff, replay_of, set_replay
from joinwise.actors.vllm.replay import ReplayLogitsProcessor

VOCABULARY = 11
SWAP, MOVE = MoveDirectionality.SWAP, MoveDirectionality.UNIDIRECTIONAL


def _processor() -> ReplayLogitsProcessor:
    return ReplayLogitsProcessor(None, torch.device("cpu"), False)


def _params(replay: list[int] | None) -> SamplingParams:
    return SamplingParams(extra_args=None if replay is None else {REPLAY_KEY: replay})


def _update(*, added=(), removed=(), moved=()) -> BatchUpdate:
    return BatchUpdate(batch_size=8, removed=list(removed), added=list(added), moved=list(moved))


def _add(processor: ReplayLogitsProcessor, row: int, replay: list[int] | None, output: list[int]) -> list[int]:
    processor.update_state(_update(added=[(row, _params(replay), [1, 2], output)]))
    return output


def _forced(processor: ReplayLogitsProcessor, rows: int = 4) -> list[int | None]:
    """The token that each row is forced to; None where its logits are untouched."""
    before = torch.randn(rows, VOCABULARY)
    after = processor.apply(before.clone())
    forced: list[int | None] = []
    for old, new in zip(before, after, strict=True):
        finite = torch.isfinite(new).nonzero().flatten().tolist()
        if len(finite) == 1:
            assert new[finite[0]] == old[finite[0]]
            forced.append(finite[0])
        else:
            assert torch.equal(old, new)
            forced.append(None)
    return forced


def test_repeats_the_list_and_then_lets_go() -> None:
    processor = _processor()
    output = _add(processor, 1, [5, 3, 5], [])
    for token in (5, 3, 5):
        assert _forced(processor) == [None, token, None, None]
        output.append(token)
        processor.update_state(None)
    assert _forced(processor) == [None] * 4
    output.append(9)
    assert _forced(processor) == [None] * 4
    assert not processor._rows, "nothing is kept of it"


def test_rows_repeat_each_their_own() -> None:
    processor = _processor()
    first, second = _add(processor, 0, [1, 2], []), _add(processor, 2, [7], [])
    assert _forced(processor) == [1, None, 7, None]
    first.append(1)
    second.append(7)
    assert _forced(processor) == [2, None, None, None]


@pytest.mark.parametrize("replay", [None, []])
def test_a_request_without_replay_is_untouched(replay: list[int] | None) -> None:
    processor = _processor()
    _add(processor, 0, replay, [])
    assert _forced(processor) == [None] * 4


def test_goes_on_where_a_preempted_request_was() -> None:
    processor = _processor()
    _add(processor, 0, [5, 3, 8], [5])
    assert _forced(processor) == [3, None, None, None]


def test_a_request_that_has_repeated_all_is_not_followed() -> None:
    processor = _processor()
    _add(processor, 0, [5, 3], [5, 3])
    assert not processor._rows


def test_a_new_request_takes_over_its_row() -> None:
    processor = _processor()
    _add(processor, 0, [5], [])
    _add(processor, 0, None, [])
    assert _forced(processor) == [None] * 4
    _add(processor, 0, [6], [])
    assert _forced(processor) == [6, None, None, None]


def test_removed() -> None:
    processor = _processor()
    _add(processor, 0, [5], [])
    _add(processor, 1, [6], [])
    processor.update_state(_update(removed=[0, 3]))
    assert _forced(processor) == [None, 6, None, None]


def test_moved_replaces_what_was_there() -> None:
    processor = _processor()
    _add(processor, 0, [5], [])
    _add(processor, 3, [6], [])
    processor.update_state(_update(moved=[(3, 0, MOVE)]))
    assert _forced(processor) == [6, None, None, None]
    processor.update_state(_update(moved=[(2, 0, MOVE)]))
    assert _forced(processor) == [None] * 4, "a row that repeats nothing has replaced it"


def test_swapped() -> None:
    processor = _processor()
    _add(processor, 0, [5], [])
    _add(processor, 3, [6], [])
    processor.update_state(_update(moved=[(3, 0, SWAP)]))
    assert _forced(processor) == [6, None, None, 5]
    processor.update_state(_update(moved=[(0, 1, SWAP)]))
    assert _forced(processor) == [None, 6, None, 5]


def test_one_update_removes_adds_and_then_moves() -> None:
    processor = _processor()
    _add(processor, 0, [5], [])
    _add(processor, 1, [6], [])
    processor.update_state(
        _update(removed=[0], added=[(2, _params([7]), None, [])], moved=[(2, 0, MOVE), (0, 1, SWAP)])
    )
    assert _forced(processor) == [6, 7, None, None]


@pytest.mark.parametrize("forbidden", [float("-inf"), float("inf"), float("nan")])
def test_a_forbidden_token_is_repeated_all_the_same(forbidden: float) -> None:
    """A grammar or a penalty may have masked it; sampling must still find it, and only it."""
    processor = _processor()
    _add(processor, 0, [5], [])
    logits = torch.full((1, VOCABULARY), 3.0)
    logits[0, 5] = forbidden
    logits[0, 7] = float("-inf")
    after = processor.apply(logits)
    probabilities = torch.softmax(after[0], 0)
    assert probabilities[5] == 1.0
    assert probabilities.sum() == 1.0


def test_all_masked_rows_still_sample_the_token() -> None:
    processor = _processor()
    _add(processor, 0, [5], [])
    after = processor.apply(torch.full((1, VOCABULARY), float("-inf")))
    assert torch.softmax(after[0], 0)[5] == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_dtype(dtype: torch.dtype) -> None:
    processor = _processor()
    _add(processor, 0, [5], [])
    after = processor.apply(torch.randn(2, VOCABULARY).to(dtype))
    assert after.dtype is dtype
    assert after[0].argmax() == 5


def test_decides_the_argmax() -> None:
    assert not _processor().is_argmax_invariant()


_ROWS = 5
_OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(("add", "remove", "move", "swap", "none")),
        st.integers(0, _ROWS - 1),
        st.integers(0, _ROWS - 1),
        st.lists(st.integers(0, VOCABULARY - 1), max_size=4),
        st.integers(0, 2),
    ),
    max_size=30,
)


@settings(deadline=None)
@given(_OPERATIONS)
def test_follows_a_batch_like_a_simple_model(operations: list[tuple[str, int, int, list[int], int]]) -> None:
    """The model: an array of requests, rearranged the same way; each step every row emits a token."""
    processor = _processor()
    batch: list[tuple[list[int], list[int]] | None] = [None] * _ROWS
    for kind, row, other, replay, done in operations:
        update = None
        if kind == "add":
            output = replay[:done]
            update = _update(added=[(row, _params(replay), None, output)])
            batch[row] = (replay, output)
        elif kind == "remove":
            update = _update(removed=[row])
            batch[row] = None
        elif row != other and kind == "move":
            update = _update(moved=[(row, other, MOVE)])
            batch[other], batch[row] = batch[row], None
        elif row != other and kind == "swap":
            update = _update(moved=[(row, other, SWAP)])
            batch[other], batch[row] = batch[row], batch[other]
        processor.update_state(update)
        forced = _forced(processor, _ROWS)
        for index, request in enumerate(batch):
            expected = None
            if request is not None and len(request[1]) < len(request[0]):
                expected = request[0][len(request[1])]
            assert forced[index] == expected
            if request is not None:
                request[1].append(0 if expected is None else expected)


def test_set_replay_touches_only_its_own_request() -> None:
    """Children of one n > 1 request share extra_args until then."""
    shared = {"other": 1}
    one, two = SamplingParams(extra_args=shared), SamplingParams(extra_args=shared)
    set_replay(one, [4, 5])
    assert replay_of(one) == [4, 5]
    assert replay_of(two) == []
    assert one.extra_args["other"] == 1
    assert shared == {"other": 1}


def test_handoff_survives_the_trip() -> None:
    handoff = Handoff("recv", "t", 7, "host:1", 3.5)
    assert Handoff.from_params(handoff.to_params()) == handoff


@pytest.mark.parametrize("params", [None, {}, {"do_remote_prefill": True}, {"joinwise": 2, "half": "send"}])
def test_what_is_not_ours_is_no_handoff(params: dict | None) -> None:
    assert Handoff.from_params(params) is None


def test_a_newer_gateway_may_add_keys() -> None:
    handoff = Handoff("send", "t", 7)
    assert Handoff.from_params({**handoff.to_params(), "codec": "int8"}) == handoff
