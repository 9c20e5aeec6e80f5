"""How fast an engine says it is: prompts in one step and in pieces, decode steps beside and between them."""

from __future__ import annotations

import pytest
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput

from joinwise.actors.vllm.speeds import Speeds, prompt_tokens


def output(new: dict[str, int], going_on: dict[str, tuple[int, int]]) -> SchedulerOutput:
    """A step's tokens: of new requests, and of (tokens, tokens answered so far) of those that go on."""
    made = SchedulerOutput.make_empty()
    made.scheduled_new_reqs = [type("New", (), {"req_id": name})() for name in new]
    cached = CachedRequestData.make_empty()
    cached.req_ids = list(going_on)
    cached.num_output_tokens = [answered for _, answered in going_on.values()]
    made.scheduled_cached_reqs = cached
    made.num_scheduled_tokens = {**new, **{name: tokens for name, (tokens, _) in going_on.items()}}
    return made


def test_a_piece_of_a_prompt_counts_where_it_is_computed() -> None:
    assert prompt_tokens(output({"a": 96}, {"b": (1, 5), "c": (1, 1)})) == 96
    assert prompt_tokens(output({}, {"a": (94, 0), "b": (1, 6), "c": (1, 2)})) == 94
    assert prompt_tokens(output({}, {"a": (1, 1), "b": (5, 9)})) == 0


def test_the_first_step_counts_at_once_and_later_ones_little() -> None:
    speeds = Speeds()
    speeds.stepped(0, 0.08)
    assert speeds.decode_step_s == pytest.approx(0.08)
    assert speeds.prefill_tokens_per_s == 0
    speeds.stepped(0, 0.18)
    assert speeds.decode_step_s == pytest.approx(0.09)
    speeds.stepped(400, 1.0)
    speeds.stepped(300, 1.0)
    assert speeds.prefill_tokens_per_s == pytest.approx(380)
    assert speeds.decode_step_s == pytest.approx(0.09)


def test_a_few_tokens_of_a_prompt_tell_no_speed() -> None:
    speeds = Speeds()
    speeds.stepped(31, 1.0)
    assert (speeds.prefill_tokens_per_s, speeds.decode_step_s) == (0, 0)
