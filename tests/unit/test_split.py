"""How one request becomes two and two outputs one: every rule of DESIGN.md's "A request's life", 9."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists, SamplingMaskLists

from joinwise.actors.vllm import split
from joinwise.actors.vllm.handoff import Handoff, replay_of
from joinwise.cluster.errors import InvalidRequestError
from joinwise.cluster.router.registry import ALL_SAMPLING

QUEUED, SCHEDULED, PREEMPTED = (
    EngineCoreEventType.QUEUED,
    EngineCoreEventType.SCHEDULED,
    EngineCoreEventType.PREEMPTED,
)
SEND = Handoff("send", "t", 7)
RECEIVE = Handoff("recv", "t", 7, "peer:1", 3.0)


def request(**params: Any) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id="chatcmpl-a.b-1",
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=SamplingParams(**{"max_tokens": 16, **params}),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def output(*tokens: int, **fields: Any) -> EngineCoreOutput:
    return EngineCoreOutput("id", list(tokens), **fields)


def logprobs(*tokens: int) -> LogprobsLists:
    ids = np.array([[token, 0] for token in tokens])
    return LogprobsLists(ids, -ids.astype(float), np.arange(len(tokens)))


def events(*kinds: EngineCoreEventType) -> list[EngineCoreEvent]:
    return [EngineCoreEvent(kind, 10.0 + index) for index, kind in enumerate(kinds)]


@pytest.mark.parametrize("request_id", ["a", "chatcmpl-1.2.3", "x.0.p", "ends-with."])
def test_ids_on_workers_map_back(request_id: str) -> None:
    assert split.part_id("a", 2, "p") == "a.2.p"
    for part in ("p", "d"):
        assert split.origin_of(split.part_id(request_id, 3, part)) == (request_id, part)


def test_the_prefill_copy_makes_one_token() -> None:
    original = request(max_tokens=16, min_tokens=9, seed=5, stop=["x"])
    part = split.prefill_part(original, "a.0.p", SEND)
    assert (part.request_id, part.prompt_token_ids) == ("a.0.p", [1, 2, 3])
    assert part.sampling_params is not None
    assert original.sampling_params is not None
    assert (part.sampling_params.max_tokens, part.sampling_params.min_tokens) == (1, 1)
    assert (part.sampling_params.seed, part.sampling_params.stop) == (5, ["x"])
    assert Handoff.from_params((part.sampling_params.extra_args or {})["kv_transfer_params"]) == SEND
    assert (original.request_id, original.sampling_params.max_tokens) == ("chatcmpl-a.b-1", 16)
    assert (original.sampling_params.min_tokens, original.sampling_params.extra_args) == (9, None)
    assert split.prefill_part(request(min_tokens=0), "a.0.p", SEND).sampling_params.min_tokens == 0  # type: ignore[union-attr]


def test_the_parts_share_nothing_with_the_children_of_a_fan_out() -> None:
    original = request(extra_args={"session": "s"})
    sibling = request()
    sibling.sampling_params = original.sampling_params  # n > 1: one object for all children
    prefill, decode = split.prefill_part(original, "a.0.p", SEND), split.decode_part(original, "a.0.d", RECEIVE, [])
    again = split.decode_part(sibling, "b.0.d", None, [4, 5])
    assert original.sampling_params is not None
    assert original.sampling_params.extra_args == {"session": "s"}
    assert prefill.sampling_params is not None
    assert decode.sampling_params is not None
    assert again.sampling_params is not None
    assert decode.sampling_params.max_tokens == 16
    assert (prefill.sampling_params.extra_args or {})["session"] == "s"
    assert Handoff.from_params((decode.sampling_params.extra_args or {})["kv_transfer_params"]) == RECEIVE
    assert replay_of(decode.sampling_params) == []
    assert replay_of(again.sampling_params) == [4, 5]
    assert "kv_transfer_params" not in (again.sampling_params.extra_args or {})


def test_a_stream_that_is_resumed_repeats_what_it_had_told_wherever_it_moves() -> None:
    resumed = request(extra_args={"joinwise_replay": [1, 2, 3]})
    for emitted, replayed in (([], [1, 2, 3]), ([1, 2], [1, 2, 3]), ([1, 2, 3, 4], [1, 2, 3, 4])):
        part = split.decode_part(resumed, "a.1.d", None, emitted)
        assert part.sampling_params is not None and replay_of(part.sampling_params) == replayed


@pytest.mark.parametrize(
    ("params", "fields"),
    [
        ({"max_tokens": 1}, {}),
        ({"prompt_logprobs": 2}, {}),
        ({"skip_reading_prefix_cache": True}, {}),
        ({}, {"has_embeds": True}),
        ({}, {"resumable": True}),
        ({"thinking_token_budget": 5}, {}),
    ],
)
def test_what_runs_whole(params: dict[str, Any], fields: dict[str, bool]) -> None:
    plain = SamplingParams(max_tokens=16)
    assert split.whole_reason(plain) == ""
    assert split.whole_reason(SamplingParams(**{"max_tokens": 16, **params}), **fields)


@pytest.mark.parametrize("key", ["kv_transfer_params", "ec_transfer_params", "joinwise_replay", "joinwise_"])
def test_reserved_keys_are_refused(key: str) -> None:
    split.refuse_reserved(SamplingParams())
    split.refuse_reserved(SamplingParams(extra_args={"session_id": "s", "my_joinwise_key": 1}))
    with pytest.raises(InvalidRequestError, match=key):
        split.refuse_reserved(SamplingParams(extra_args={"session_id": "s", key: None}))


def test_prefill_gives_the_first_token_with_all_that_belongs_to_it() -> None:
    merge = split.Merge(16)
    stats = PrefillStats(num_prompt_tokens=3, num_cached_tokens=2)
    said = output(
        7,
        new_logprobs=logprobs(7),
        prefill_stats=stats,
        events=events(QUEUED, SCHEDULED),
        finish_reason=FinishReason.LENGTH,
        kv_transfer_params={"joinwise": 1},
    )
    merged = merge.from_prefill(said)
    assert (merged.new_token_ids, merged.finish_reason, merged.kv_transfer_params) == ([7], None, None)
    assert merged.new_logprobs is not None
    assert merged.prefill_stats is stats
    assert [event.type for event in merged.events or ()] == [QUEUED, SCHEDULED]
    assert (merge.emitted, merge.finished) == ([7], False)


@pytest.mark.parametrize(
    ("max_tokens", "reason", "ends"),
    [
        (16, FinishReason.LENGTH, False),
        (None, FinishReason.LENGTH, False),
        (1, FinishReason.LENGTH, True),
        (16, FinishReason.STOP, True),
        (16, FinishReason.ERROR, True),
        (16, FinishReason.ABORT, True),
        (16, FinishReason.REPETITION, True),
    ],
)
def test_how_prefill_ends_the_request(max_tokens: int | None, reason: FinishReason, ends: bool) -> None:
    merge = split.Merge(max_tokens)
    merged = merge.from_prefill(output(7, finish_reason=reason, stop_reason=None))
    assert (merged.finish_reason is reason) is ends
    assert merge.finished is ends


def test_a_prefill_that_made_no_token_keeps_its_reason() -> None:
    assert split.Merge(16).from_prefill(output(finish_reason=FinishReason.LENGTH)).finish_reason is FinishReason.LENGTH


def test_decode_loses_what_was_replayed() -> None:
    merge = split.Merge(16, emitted=[7, 8], to_skip=2)
    assert merge.from_decode(output(7, new_logprobs=logprobs(7)), joined=True) is None
    assert merge.to_skip == 1
    merged = merge.from_decode(output(8, 9, 10, new_logprobs=logprobs(8, 9, 10)), joined=True)
    assert merged is not None
    assert merged.new_logprobs is not None
    assert (merged.new_token_ids, merge.to_skip) == ([9, 10], 0)
    assert merged.new_logprobs.logprob_token_ids[:, 0].tolist() == [9, 10]
    assert merge.emitted == [7, 8, 9, 10]
    later = merge.from_decode(output(11, new_logprobs=logprobs(11)), joined=True)
    assert later is not None
    assert later.new_token_ids == [11]


def test_decode_loses_the_sampling_mask_of_what_was_replayed() -> None:
    merge = split.Merge(16, emitted=[7], to_skip=1)
    mask = SamplingMaskLists(np.array([7, 70, 8, 9, 90]), np.array([0, 2, 3, 5]))
    merged = merge.from_decode(output(7, 8, 9, new_sampling_mask=mask), joined=True)
    assert merged is not None
    assert merged.new_sampling_mask is not None
    assert merged.new_sampling_mask.token_ids.tolist() == [8, 9, 90]


@pytest.mark.parametrize("reason", list(FinishReason))
def test_decode_keeps_a_reason_without_a_new_token(reason: FinishReason) -> None:
    merge = split.Merge(16, emitted=[7], to_skip=1)
    merged = merge.from_decode(output(7, finish_reason=reason, stop_reason=7, new_logprobs=logprobs(7)), joined=True)
    assert merged is not None
    assert (merged.new_token_ids, merged.finish_reason, merged.stop_reason) == ([], reason, 7)
    assert merged.new_logprobs is None
    assert merge.finished
    assert merge.emitted == [7]


def test_the_decode_half_says_nothing_of_the_prompt() -> None:
    merge = split.Merge(16, emitted=[7], to_skip=1)
    said = output(
        7, 8, prefill_stats=PrefillStats(), events=events(QUEUED, SCHEDULED, PREEMPTED), kv_transfer_params={"a": 1}
    )
    merged = merge.from_decode(said, joined=True)
    assert merged is not None
    assert (merged.prefill_stats, merged.kv_transfer_params) == (None, None)
    assert [event.type for event in merged.events or ()] == [PREEMPTED]
    quiet = merge.from_decode(output(9, events=events(SCHEDULED)), joined=True)
    assert quiet is not None
    assert quiet.events is None
    assert merge.from_decode(output(events=events(SCHEDULED)), joined=True) is None
    assert merge.from_decode(output(events=events(PREEMPTED)), joined=True) is not None


def test_a_decode_that_computed_the_prompt_itself_tells_of_it() -> None:
    merge = split.Merge(16)
    stats = PrefillStats(num_prompt_tokens=3)
    merged = merge.from_decode(output(7, prefill_stats=stats, events=events(QUEUED, SCHEDULED)), joined=False)
    assert merged is not None
    assert merged.prefill_stats is stats
    assert [event.type for event in merged.events or ()] == [QUEUED, SCHEDULED]


def test_times_move_to_the_gateways_clock() -> None:
    said = output(7, events=events(QUEUED, SCHEDULED))
    split.shift_times(said, 5.0)
    assert [event.timestamp for event in said.events or ()] == [15.0, 16.0]
    assert split.step_seconds(said, 18.0) == 2.0
    assert split.step_seconds(said, 15.0) == 0.0
    assert split.step_seconds(output(7), 18.0) == 0.0
    split.shift_times(output(7), 5.0)


@pytest.mark.parametrize(
    ("params", "plain"),
    [
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_tokens": 9, "logprobs": 2}, True),
        ({"temperature": 0, "seed": 1}, True),
        ({"temperature": 0, "seed": 1, "min_tokens": 1}, False),
        ({"stop": ["x"], "stop_token_ids": [3], "ignore_eos": True, "n": 3}, True),
        ({"detokenize": False, "flat_logprobs": True}, True),
        ({"logit_bias": {}, "bad_words": []}, True),
        ({"temperature": 1, "seed": 1}, False),
        ({"temperature": 1, "seed": 0}, False),
        ({"prompt_logprobs": 0}, False),
        ({"allowed_token_ids": [1]}, False),
        ({"bad_words": ["x"]}, False),
        ({"logprob_token_ids": [1]}, False),
        ({"thinking_token_budget": 0}, False),
        ({"min_p": 0.1}, False),
        ({"logit_bias": {1: 2.0}}, False),
        ({"presence_penalty": 0.5}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"min_tokens": 3}, False),
        ({"extra_args": {"x": 1}}, False),
    ],
)
def test_what_speculation_cannot_do_needs_a_worker_without(params: dict[str, object], plain: bool) -> None:
    assert split.needs_of(SamplingParams(**params)) == (frozenset() if plain else {ALL_SAMPLING})  # type: ignore[arg-type]


def test_prompt_embeddings_cannot_be_continued_by_tokens() -> None:
    assert split.needs_of(SamplingParams(), has_embeds=True) == {ALL_SAMPLING}
