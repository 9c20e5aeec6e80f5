"""Plain requests that were begun elsewhere, on an engine that cannot replay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest

from joinwise.actors.vllm.handoff import KV_TRANSFER_KEY, REPLAY_KEY, Handoff
from joinwise.actors.vllm.plain import PlainTakeover

PROMPT = [1, 2, 3]
RECEIVE = Handoff("recv", "t", 7, "peer:1")


def request(name: str = "r.0.d", *, handoff: Handoff | None = None, replay: Any = (), **params: Any) -> Any:
    extra: dict[str, Any] = {}
    if handoff is not None:
        extra[KV_TRANSFER_KEY] = handoff.to_params()
    if replay:
        extra[REPLAY_KEY] = list(replay)
    extra |= params.pop("extra_args", {})
    return EngineCoreRequest(
        request_id=name,
        prompt_token_ids=list(PROMPT),
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=10, **params, extra_args=extra or None),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def outputs(*each: tuple[str, list[int]]) -> EngineCoreOutputs:
    return EngineCoreOutputs(outputs=[EngineCoreOutput(name, ids) for name, ids in each])


def said(of: EngineCoreOutputs) -> list[tuple[str, list[int]]]:
    return [(each.request_id, each.new_token_ids) for each in of.outputs]


def test_a_request_that_begins_here_is_as_it_was() -> None:
    plain = PlainTakeover()
    given = plain.admit(0, request(top_p=0.9, logprobs=2))
    assert given is not None
    assert given.prompt_token_ids == PROMPT
    assert given.sampling_params is not None
    assert (given.sampling_params.max_tokens, given.sampling_params.top_p) == (10, 0.9)
    frame = outputs(("r.0.d", [5]))
    plain.complete(frame)
    assert said(frame) == [("r.0.d", [5])]


def test_one_that_has_moved_goes_on_after_what_it_emitted_and_says_it_once() -> None:
    plain = PlainTakeover()
    original = request(replay=[8, 9])
    before = copy.deepcopy(original)
    given = plain.admit(0, original)
    assert given is not None
    assert given.sampling_params is not None
    assert given.prompt_token_ids == [*PROMPT, 8, 9]
    assert given.sampling_params.max_tokens == 8
    assert given.sampling_params.extra_args is None
    assert original == before
    frame = outputs(("other", [1]), ("r.0.d", [4, 5]))
    plain.complete(frame)
    assert said(frame) == [("r.0.d", [8, 9]), ("other", [1]), ("r.0.d", [4, 5])]
    frame = outputs(("r.0.d", [6]))
    plain.complete(frame)
    assert said(frame) == [("r.0.d", [6])]


def test_a_receiver_waits_for_its_token_and_then_fetches_the_prompts_kv() -> None:
    plain = PlainTakeover()
    assert plain.admit(3, request(handoff=RECEIVE)) is None
    assert plain.held == {"r.0.d"}
    assert plain.release("r.0.d", 6, [8], recompute=False) is None  # of another attempt
    slot, given = plain.release("r.0.d", 7, [8], recompute=False) or (None, None)
    assert slot == 3
    assert given is not None
    assert given.sampling_params is not None
    assert given.prompt_token_ids == [*PROMPT, 8]
    handoff = Handoff.from_params((given.sampling_params.extra_args or {})[KV_TRANSFER_KEY])
    assert handoff == Handoff("recv", "t", 7, "peer:1", num_tokens=len(PROMPT))
    assert not plain.held
    assert plain.release("r.0.d", 7, [8], recompute=False) is None


@pytest.mark.parametrize("replay", [[], [8]])
def test_without_its_prefill_worker_it_computes_the_prompt(replay: list[int]) -> None:
    plain = PlainTakeover()
    plain.admit(3, request(handoff=RECEIVE))
    _, given = plain.release("r.0.d", 7, replay, recompute=True) or (None, None)
    assert given is not None
    assert given.sampling_params is not None
    assert given.prompt_token_ids == [*PROMPT, *replay]
    assert given.sampling_params.extra_args is None
    frame = outputs(("r.0.d", [5]))
    plain.complete(frame)
    assert said(frame) == ([("r.0.d", replay)] if replay else []) + [("r.0.d", [5])]


def test_one_that_sends_is_given_on_with_its_hand_off() -> None:
    send = Handoff("send", "t", 7)
    given = PlainTakeover().admit(0, request(handoff=send))
    assert given is not None
    assert given.sampling_params is not None
    assert Handoff.from_params((given.sampling_params.extra_args or {})[KV_TRANSFER_KEY]) == send


def test_what_is_over_is_forgotten() -> None:
    plain = PlainTakeover()
    plain.admit(0, request("a", handoff=RECEIVE))
    plain.admit(0, request("b", replay=[8]))
    plain.forget(["a", "b", "never known"])
    assert not plain.held
    frame = outputs(("b", [5]))
    plain.complete(frame)
    assert said(frame) == [("b", [5])]


@pytest.mark.parametrize(
    "special",
    [{"seed": 0}, {"min_p": 0.1}, {"min_tokens": 1}, {"prompt_logprobs": 0}, {"extra_args": {"x": 1}}],
)
def test_what_is_not_plain_is_refused(special: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="plain"):
        PlainTakeover().admit(0, request(**special))


def test_an_id_that_waits_already_is_refused() -> None:
    plain = PlainTakeover()
    plain.admit(0, request(handoff=RECEIVE))
    with pytest.raises(ValueError, match="in use"):
        plain.admit(0, request(handoff=RECEIVE))
