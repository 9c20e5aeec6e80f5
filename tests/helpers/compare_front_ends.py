"""Asks the HTTP and the gRPC front end of one gateway the same thing and compares the answers field by field.

    await compare(http, client, case)            for a case of front_end_cases.CASES
    await compare_refusal(http, client, case)    for a case of front_end_cases.REFUSALS

`http` is an httpx.AsyncClient with a base URL, `client` an AsyncClient of the SDK. The cases with tools need a gateway
with `--enable-auto-tool-choice --tool-call-parser hermes`.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
from helpers.front_end_cases import Case

from joinwise.cluster.client import AsyncClient, Generation
from joinwise.cluster.errors import JoinwiseError


async def compare(http: httpx.AsyncClient, client: AsyncClient, case: Case) -> Generation:
    """Ask both, HTTP whole and streamed; raise AssertionError at the first difference. Returns the gRPC answer."""
    body = {**case.both, **case.http, "return_token_ids": True}
    response = await http.post(case.path, json=body)
    assert response.status_code == 200, f"{case.name}: {response.status_code} {response.text}"
    answer = await client.generate(**_sdk(case))
    ours = _of_grpc(answer)
    if not case.streamed_only:
        _assert_equal(case.name, ours, _of_http(response.json()))
    streamed = await http.post(case.path, json={**body, "stream": True, "stream_options": {"include_usage": True}})
    _assert_equal(f"{case.name}, streamed", ours, _of_http(_join(streamed.text)))
    return answer


async def compare_refusal(http: httpx.AsyncClient, client: AsyncClient, case: Case) -> JoinwiseError:
    """Both must refuse with the same HTTP status; returns the error of the SDK."""
    response = await http.post(case.path, json={**case.both, **case.http})
    error: JoinwiseError | None = None
    try:
        await client.generate(**_sdk(case))
    except JoinwiseError as e:
        error = e
    assert error is not None, f"{case.name}: HTTP answers {response.status_code}, gRPC accepts it"
    assert error.http_status == response.status_code, f"{case.name}: HTTP {response.text}, gRPC {error!r}"
    assert 400 <= error.http_status < 500, f"{case.name}: {error!r}"
    assert error.message, f"{case.name}: no sentence"
    return error


def _sdk(case: Case) -> dict[str, Any]:
    return {**case.both, **case.grpc}


def _assert_equal(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for key in ("model", "usage"):
        assert ours[key] == theirs[key], f"{name}: {key}: gRPC {ours[key]} HTTP {theirs[key]}"
    assert len(ours["choices"]) == len(theirs["choices"]), f"{name}: number of choices"
    for mine, other in zip(ours["choices"], theirs["choices"], strict=True):
        for key, value in mine.items():
            assert value == other[key], f"{name}: choice {mine['index']}: {key}: gRPC {value!r} HTTP {other[key]!r}"


def _of_grpc(answer: Generation) -> dict[str, Any]:
    return {
        "model": answer.model,
        # Cached tokens depend on what was asked before, so on the order of the two: not compared.
        "usage": (answer.usage.prompt_tokens, answer.usage.completion_tokens),
        "choices": [
            {
                "index": c.index,
                "text": c.text,
                "reasoning": c.reasoning,
                "token_ids": list(c.token_ids),
                "finish_reason": c.finish_reason,
                "stop_reason": c.stop_reason,
                "tool_calls": [(t.name, t.arguments) for t in c.tool_calls],
                "logprobs": [(t.token, t.logprob, [(a.token, a.logprob) for a in t.top]) for t in c.logprobs],
            }
            for c in answer.choices
        ],
    }


def _of_http(answer: dict[str, Any]) -> dict[str, Any]:
    choices = []
    for c in sorted(answer["choices"], key=lambda c: c["index"]):
        message = c.get("message") or {"content": c.get("text")}
        stop = c.get("stop_reason")
        calls = message.get("tool_calls") or []
        choices.append(
            {
                "index": c["index"],
                "text": message.get("content") or "",
                "reasoning": message.get("reasoning") or "",
                "token_ids": c["token_ids"],
                "finish_reason": c["finish_reason"],
                "stop_reason": "" if stop is None else str(stop),
                "tool_calls": [(t["function"]["name"], t["function"]["arguments"]) for t in calls],
                "logprobs": _logprobs(c.get("logprobs")),
            }
        )
    usage = answer["usage"]
    return {
        "model": answer["model"],
        "usage": (usage["prompt_tokens"], usage["completion_tokens"]),
        "choices": choices,
    }


def _logprobs(logprobs: dict[str, Any] | None) -> list[Any]:
    if not logprobs:
        return []
    if "content" in logprobs:
        rows = [
            (t["token"], t["logprob"], [(a["token"], a["logprob"]) for a in t["top_logprobs"]])
            for t in logprobs["content"]
        ]
    else:
        columns = (logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"])
        rows = [(t, p, list((top or {}).items())) for t, p, top in zip(*columns, strict=True)]
    return [(t, p, sorted(top, key=lambda a: -a[1])) for t, p, top in rows]


def _join(sse: str) -> dict[str, Any]:
    """The answer that the chunks of a stream make up, in the shape of a whole one."""
    answer: dict[str, Any] = {"choices": []}
    choices: dict[int, dict[str, Any]] = {}
    for line in sse.split("\n"):
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        chunk = json.loads(line[6:])
        assert "error" not in chunk, chunk
        answer |= {"model": chunk["model"]} | ({"usage": chunk["usage"]} if chunk.get("usage") else {})
        for part in chunk["choices"]:
            choice = choices.setdefault(
                part["index"],
                {"index": part["index"], "token_ids": [], "finish_reason": None, "message": {"content": ""}},
            )
            _add(choice, part)
    answer["choices"] = list(choices.values())
    return answer


def _add(choice: dict[str, Any], part: dict[str, Any]) -> None:
    message, delta = choice["message"], part.get("delta") or {"content": part.get("text")}
    for key in ("content", "reasoning"):
        if delta.get(key):
            message[key] = (message.get(key) or "") + delta[key]
    for piece in delta.get("tool_calls") or ():
        calls = message.setdefault("tool_calls", [])
        if piece["index"] == len(calls):
            calls.append({"function": {"name": "", "arguments": ""}})
        for key in ("name", "arguments"):
            calls[piece["index"]]["function"][key] += (piece.get("function") or {}).get(key) or ""
    choice["token_ids"] += part.get("token_ids") or []
    for key in ("finish_reason", "stop_reason"):
        if part.get(key) is not None:
            choice[key] = part[key]
    if logprobs := part.get("logprobs"):
        joined = choice.setdefault("logprobs", {})
        for key, rows in logprobs.items():
            joined[key] = joined.get(key, []) + (rows or [])
