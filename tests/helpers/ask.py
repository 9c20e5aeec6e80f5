"""Asks the cluster and plain vLLM the same thing over HTTP, and finds every difference between the two answers.

pair = Pair(cluster_http, baseline_http)
answer = await pair.equal(Question("seed", {"prompt": "x", "seed": 3}))
answer.ledgers      # one per sample, in the cluster
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from helpers.cluster import MODEL

COMPLETIONS, CHAT, TOKENS = "/v1/completions", "/v1/chat/completions", "/inference/v1/generate"
# Absolute and relative; float32 sums differ with the shape of a batch.
LOGPROB_TOLERANCE = 1e-4
# Made up anew for every request, or told by the cache, whose state depends on what was asked before; the fingerprint is
# a hash of the server's configuration.
_VOLATILE = frozenset(
    {"id", "created", "created_at", "completed_at", "request_id", "prompt_tokens_details", "system_fingerprint"}
)
# Texts that come in pieces.
_PIECES = frozenset({"content", "text", "reasoning", "arguments"})


@dataclass(frozen=True)
class Question:
    """A request's body, and where it goes. With "stream" in it, the answer is what the chunks make up."""

    name: str
    body: dict[str, Any]
    path: str = COMPLETIONS

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Answer:
    """What one server said.

    Attributes:
        body: the JSON; of a stream, `join_stream` of its chunks.
        ledgers: of the cluster, one per sample; empty of plain vLLM.
    """

    status: int
    body: Any
    ledgers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def choices(self) -> list[dict[str, Any]]:
        assert self.status == 200, self.body
        return self.body["choices"]

    @property
    def token_ids(self) -> list[int]:
        """Of the only choice."""
        (choice,) = self.choices
        return choice["token_ids"]


class Pair:
    """The cluster and plain vLLM."""

    def __init__(self, cluster: httpx.AsyncClient, baseline: httpx.AsyncClient) -> None:
        self.cluster = cluster
        self.baseline = baseline

    async def ask(self, question: Question) -> tuple[Answer, Answer]:
        """Both answers, asked for at the same time."""
        return await asyncio.gather(ask(self.cluster, question), ask(self.baseline, question))

    async def equal(self, question: Question) -> Answer:
        """The cluster's answer, which must be plain vLLM's in every field."""
        ours, theirs = await self.ask(question)
        assert theirs.status == 200, f"{question}: plain vLLM refuses it: {theirs.body}"
        assert ours.status == 200, f"{question}: the cluster refuses it: {ours.body}"
        assert_same(str(question), ours.body, theirs.body)
        return ours

    async def refused(self, question: Question) -> tuple[Answer, Answer]:
        """The cluster must refuse it with 400 and a sentence. Returns both answers."""
        ours, theirs = await self.ask(question)
        assert ours.status == 400, f"{question}: {ours.status} {ours.body}"
        assert ours.body["error"]["message"], f"{question}: no sentence"
        return ours, theirs


@asynccontextmanager
async def pair(cluster: str, baseline: str) -> AsyncIterator[Pair]:
    """Clients of two base URLs."""
    async with (
        httpx.AsyncClient(base_url=cluster, timeout=300) as ours,
        httpx.AsyncClient(base_url=baseline, timeout=300) as theirs,
    ):
        yield Pair(ours, theirs)


async def ask(http: httpx.AsyncClient, question: Question) -> Answer:
    """One server's answer."""
    body = {"model": MODEL, "return_token_ids": True, **question.body}
    response = await http.post(question.path, json=body, headers={"x-joinwise-ledger": "1"})
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        return Answer(response.status_code, join_stream(response.text), _ledgers(stream_ledger(response.text)))
    return Answer(response.status_code, response.json(), _ledgers(response.headers.get("x-joinwise-ledger")))


def stream_ledger(sse: str) -> str | None:
    """The ledger's JSON among the comments of a stream."""
    comments = [line for line in sse.splitlines() if line.startswith(": joinwise-ledger ")]
    return comments[-1].removeprefix(": joinwise-ledger ") if comments else None


def join_stream(sse: str) -> dict[str, Any]:
    """What the chunks of a stream make up."""
    lines = [line.removeprefix("data: ") for line in sse.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", lines[-1]
    return join_chunks([json.loads(line) for line in lines[:-1]])


def join_chunks(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """One answer of many chunks: texts and lists are joined, other values are the last that were given.

    Two servers may cut the same answer into chunks differently; the joined answers are equal.
    """
    answer: dict[str, Any] = {"choices": {}}
    for chunk in chunks:
        assert "error" not in chunk, chunk
        for part in chunk["choices"]:
            _join(answer["choices"].setdefault(part["index"], {}), part)
        answer |= {key: value for key, value in chunk.items() if value is not None and key != "choices"}
    return {**answer, "choices": [choice for _, choice in sorted(answer["choices"].items())]}


def _join(whole: dict[str, Any], part: dict[str, Any]) -> None:
    for key, value in part.items():
        before = whole.get(key)
        if key == "tool_calls":
            calls = whole[key] = before or []
            for piece in value or ():
                if piece["index"] == len(calls):
                    calls.append({})
                _join(calls[piece["index"]], piece)
        elif isinstance(value, dict):
            whole[key] = before or {}
            _join(whole[key], value)
        elif value is None or before is None:
            whole[key] = before if value is None else value
        else:
            joins = isinstance(value, list) or key in _PIECES
            whole[key] = before + value if joins else value


def assert_same(what: str, ours: Any, theirs: Any) -> None:
    """Fail with every difference between two answers; ids and times of day are passed over."""
    found = differences(ours, theirs)
    assert not found, f"{what}: the cluster's answer is not plain vLLM's:\n" + "\n".join(found[:20])


def differences(ours: Any, theirs: Any, at: str = "answer") -> list[str]:
    """A line for each difference between two JSON values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = [key for key in {**theirs, **ours} if key not in _VOLATILE]
        missing = object()
        return [
            line
            for key in keys
            for line in differences(ours.get(key, missing), theirs.get(key, missing), f"{at}.{key}")
        ]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [
            line
            for index, (mine, other) in enumerate(zip(ours, theirs, strict=True))
            for line in differences(mine, other, f"{at}[{index}]")
        ]
    if isinstance(ours, float) and isinstance(theirs, float):
        same = math.isclose(ours, theirs, rel_tol=LOGPROB_TOLERANCE, abs_tol=LOGPROB_TOLERANCE)
    else:
        same = ours == theirs
    return [] if same else [f"{at}: {ours!r} here, {theirs!r} there"]


def _ledgers(text: str | None) -> list[dict[str, Any]]:
    if not text:
        return []
    loaded = json.loads(text)
    return loaded if isinstance(loaded, list) else [loaded]
