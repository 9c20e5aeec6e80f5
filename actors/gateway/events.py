"""Turns the SSE chunks of vLLM's serving objects into `GenerateResponse` events.

Owns the numbering of one stream: from 0, without gaps, `started` first and `usage` last. vLLM's chunks are the only
source; nothing is computed here that the HTTP front end does not also send.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from joinwise.actors.gateway.failures import VllmRefusalError
from joinwise.cluster.errors import CannotResumeError
from joinwise.proto import inference_pb2 as pb

_UNKNOWN_LOGPROB = -9999.0  # what vLLM writes where it has none


class EventStream:
    """The events of one request. Feed every SSE string of vLLM's generator to `events`, in order.

    Args:
        request_id: the id that `started` tells the client.
        resume: how far the stream had come elsewhere; what its client has is made again, and not told again.
    """

    def __init__(self, request_id: str, resume: pb.Resume | None = None) -> None:
        self._request_id = request_id
        self._sequence = resume.next_sequence if resume is not None else 0
        self._known = resume or pb.Resume()
        self._tokens = self._characters = 0

    def events(self, sse: str) -> Iterator[pb.GenerateResponse]:
        """The events in one SSE string; none for keep-alive comments and `[DONE]`.

        Raises:
            VllmRefusalError: the chunk says that the request failed.
        """
        for line in sse.split("\n"):  # not splitlines: text may hold other line separators, such as U+2028
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[len("data: ") :])
            if "error" in chunk:
                raise VllmRefusalError(chunk["error"])
            yield from self._chunk(chunk)

    def _chunk(self, chunk: Mapping[str, Any]) -> Iterator[pb.GenerateResponse]:
        if self._sequence == 0:
            started = pb.Started(request_id=self._request_id, model=chunk["model"], created=chunk["created"])
            yield self._next(started=started)
        for choice in chunk["choices"]:
            delta = _delta(choice)
            if delta.ByteSize() > (pb.Delta(index=delta.index)).ByteSize() and not self._is_known(delta):
                yield self._next(delta=delta)
            if (reason := choice.get("finish_reason")) and not self._known.finished:
                stop = choice.get("stop_reason")
                finished = pb.Finished(
                    index=choice["index"], finish_reason=reason, stop_reason="" if stop is None else str(stop)
                )
                yield self._next(finished=finished)
        if usage := chunk.get("usage"):
            details = usage.get("prompt_tokens_details") or {}
            yield self._next(
                usage=pb.Usage(
                    prompt_tokens=usage["prompt_tokens"],
                    completion_tokens=usage.get("completion_tokens") or 0,
                    cached_tokens=details.get("cached_tokens") or 0,
                )
            )

    def _is_known(self, delta: pb.Delta) -> bool:
        """Whether the client has this delta already.

        Raises:
            CannotResumeError: what is made here is not what the client has; or two tokens came as one, of which it has
                the first only, which another attempt may have apart.
        """
        known = self._known.token_ids
        if self._tokens == len(known):
            return bool(self._known.finished)
        begin, end = self._tokens, self._tokens + len(delta.token_ids)
        self._tokens, self._characters = end, self._characters + len(delta.text) + len(delta.reasoning)
        if list(delta.token_ids) != list(known[begin:end]):
            raise CannotResumeError(
                "the tokens that the stream had told before it broke do not come again as they were"
            )
        if end == len(known) and self._characters != self._known.characters:
            raise CannotResumeError("the text that the stream had told before it broke does not come again as it was")
        return True

    def _next(self, **event: Any) -> pb.GenerateResponse:
        response = pb.GenerateResponse(sequence=self._sequence, **event)
        self._sequence += 1
        return response


def _delta(choice: Mapping[str, Any]) -> pb.Delta:
    """One choice of a chunk: a chat completion has `delta`, a completion has `text`."""
    delta = pb.Delta(index=choice["index"], token_ids=choice.get("token_ids") or ())
    message = choice.get("delta")
    logprobs = choice.get("logprobs")
    if message is None:
        delta.text = choice.get("text") or ""
        if logprobs:
            delta.logprobs.extend(_completion_logprobs(logprobs))
        return delta
    delta.text = message.get("content") or ""
    delta.reasoning = message.get("reasoning") or ""
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        delta.tool_calls.add(
            id=call.get("id") or "",
            name=function.get("name") or "",
            arguments=function.get("arguments") or "",
            index=call["index"],
        )
    if logprobs:
        delta.logprobs.extend(_chat_logprob(item) for item in logprobs.get("content") or ())
    return delta


def _chat_logprob(item: Mapping[str, Any]) -> pb.TokenLogprob:
    top = [(t["token"], t["logprob"]) for t in item.get("top_logprobs") or ()]
    return _token(item["token"], item.get("logprob"), top)


def _completion_logprobs(logprobs: Mapping[str, Any]) -> Iterator[pb.TokenLogprob]:
    columns = (logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"])
    for token, logprob, top in zip(*columns, strict=True):
        yield _token(token, logprob, list((top or {}).items()))


def _token(token: str, logprob: float | None, top: list[tuple[str, float]]) -> pb.TokenLogprob:
    likeliest_first = sorted(top, key=lambda item: -item[1])
    return pb.TokenLogprob(
        token=token,
        logprob=_UNKNOWN_LOGPROB if logprob is None else logprob,
        top=[pb.TokenLogprob(token=t, logprob=p) for t, p in likeliest_first],
    )
