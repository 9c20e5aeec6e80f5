"""`EventStream` where a stream goes on that broke elsewhere: what its client has is made again and not told again."""

from __future__ import annotations

import json
from typing import Any

import pytest

from joinwise.actors.gateway.events import EventStream
from joinwise.cluster.errors import CannotResumeError
from joinwise.proto import inference_pb2 as pb

WORDS = [(5, "a"), (6, ""), (7, "bü"), (8, "c")]


def chunk(tokens: list[int], text: str, **choice: Any) -> str:
    part = {"index": 0, "text": text, "token_ids": tokens, **choice}
    return f"data: {json.dumps({'model': 'm', 'created': 7, 'choices': [part]})}\n\n"


CHUNKS = [chunk([token], text) for token, text in WORDS]
CHUNKS[-1] = chunk([8], "c", finish_reason="stop", stop_reason="x")
END = f"data: {json.dumps({'choices': [], 'usage': {'prompt_tokens': 3, 'completion_tokens': 4}})}\n\n"


def events(resume: pb.Resume | None = None, chunks: list[str] | None = None) -> list[pb.GenerateResponse]:
    stream = EventStream("r", resume)
    return [event for each in [*(chunks or CHUNKS), END, "data: [DONE]\n\n"] for event in stream.events(each)]


def told(until: int) -> pb.Resume:
    """What a client has that got so many events of the whole stream."""
    seen = events()[:until]
    deltas = [event.delta for event in seen if event.HasField("delta")]
    return pb.Resume(
        next_sequence=until,
        token_ids=[token for delta in deltas for token in delta.token_ids],
        characters=sum(len(delta.text) for delta in deltas),
        finished=any(event.HasField("finished") for event in seen),
    )


@pytest.mark.parametrize("until", range(1, 7))
def test_the_rest_is_told_from_the_event_that_is_due(until: int) -> None:
    assert events(told(until)) == events()[until:]


def test_tokens_that_came_one_by_one_may_come_again_together() -> None:
    together = [chunk([5, 6], "a"), *CHUNKS[2:]]
    assert events(told(3), together) == events()[3:]


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk([5, 6, 7], "abü"), CHUNKS[3]],  # the third was not told: its text cannot be taken out
        [chunk([5], "a"), chunk([9], ""), *CHUNKS[2:]],
        [chunk([5], "other"), *CHUNKS[1:]],
    ],
)
def test_what_does_not_come_again_as_it_was_is_refused(chunks: list[str]) -> None:
    with pytest.raises(CannotResumeError):
        events(told(3), chunks)
