"""Between the SDK's types and protobuf: builds requests, reads events, and joins events into a `Generation`.

The only module of the SDK that knows field names of the wire. Wrong arguments become `InvalidRequestError` here, before
anything is sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from joinwise.cluster.client.types import (
    Choice,
    ClusterStatus,
    Delta,
    Event,
    Finished,
    GenerateOptions,
    Generation,
    KvLinkStatus,
    Message,
    Model,
    Started,
    TokenLogprob,
    ToolCall,
    Usage,
    WorkerStatus,
)
from joinwise.cluster.errors import InvalidRequestError
from joinwise.proto import inference_pb2 as pb

_SAMPLING = frozenset(pb.SamplingOptions.DESCRIPTOR.fields_by_name)
_PLAIN = frozenset({"model", "tool_choice", "request_id", "session_id", "priority"})
_FORMATS: Mapping[str, Callable[[Any], pb.ResponseFormat]] = {
    "json_object": lambda v: pb.ResponseFormat(json_object=bool(v)),
    "json_schema": lambda v: pb.ResponseFormat(json_schema=json.dumps(v)),
    "regex": lambda v: pb.ResponseFormat(regex=v),
    "choice": lambda v: pb.ResponseFormat(choice=pb.Choices(choices=_strings("choice", v))),
    "grammar": lambda v: pb.ResponseFormat(grammar=v),
}


def build_request(
    prompt: str | None, messages: Sequence[Message] | None, token_ids: Sequence[int] | None, options: GenerateOptions
) -> pb.GenerateRequest:
    """Make the request of one `generate` call.

    Raises:
        InvalidRequestError: not exactly one prompt, an unknown option, or a value that its field cannot hold.
    """
    if sum(x is not None for x in (prompt, messages, token_ids)) != 1:
        raise InvalidRequestError("give exactly one of prompt, messages and token_ids")
    request = pb.GenerateRequest()
    try:
        if prompt is not None:
            request.text = prompt
        elif messages is not None:
            request.messages.messages.extend([_message(m) for m in messages])
            request.messages.SetInParent()
        else:
            request.token_ids.ids.extend(token_ids or ())
            request.token_ids.SetInParent()
    except (TypeError, ValueError, KeyError, AttributeError) as e:
        raise InvalidRequestError(f"the prompt cannot be sent: {_reason(e)}") from None
    for name, value in options.items():
        if value is None:
            continue
        try:
            _set_option(request, name, value)
        except (TypeError, ValueError, KeyError, AttributeError) as e:
            raise InvalidRequestError(f"{name}={value!r} cannot be sent: {_reason(e)}") from None
    return request


def _set_option(request: pb.GenerateRequest, name: str, value: Any) -> None:
    if name in ("stop", "stop_token_ids"):
        getattr(request.sampling, name).extend([value] if isinstance(value, str) else value)
    elif name == "logit_bias":
        request.sampling.logit_bias.update({int(k): float(v) for k, v in value.items()})
    elif name in _SAMPLING:
        setattr(request.sampling, name, value)
    elif name in _PLAIN:
        setattr(request, name, value)
    elif name in _FORMATS:
        if request.HasField("response_format"):
            raise ValueError(f"only one of {', '.join(_FORMATS)} can be given")
        request.response_format.CopyFrom(_FORMATS[name](value))
    elif name == "tools":
        request.tools.extend([_tool(t) for t in value])
    elif name == "chat_template_kwargs":
        request.chat_template_kwargs = json.dumps(value)
    else:
        raise ValueError("no such option")


def _strings(name: str, value: Sequence[str]) -> list[str]:
    if isinstance(value, str):
        raise TypeError(f"{name} is a list of strings")
    return list(value)


def _message(m: Message) -> pb.Message:
    content = m.get("content")
    if content is not None and not isinstance(content, str):
        raise TypeError("the content of a message is text; parts of other kinds are not supported")
    message = pb.Message(role=m["role"], content=content or "", name=m.get("name") or "")
    message.tool_call_id = m.get("tool_call_id") or ""
    for index, call in enumerate(m.get("tool_calls") or ()):
        if isinstance(call, ToolCall):
            message.tool_calls.add(id=call.id, name=call.name, arguments=call.arguments, index=index)
        else:
            function = call.get("function", call)
            message.tool_calls.add(
                id=call.get("id", ""), name=function["name"], arguments=function["arguments"], index=index
            )
    return message


def _tool(t: Mapping[str, Any]) -> pb.Tool:
    function = t.get("function", t)
    parameters = function.get("parameters")
    return pb.Tool(
        name=function["name"],
        description=function.get("description") or "",
        parameters="" if parameters is None else json.dumps(parameters),
    )


def _reason(e: Exception) -> str:
    return f"{e} is missing" if isinstance(e, KeyError) else str(e)


def read_event(response: pb.GenerateResponse) -> Event | None:
    """The typed event of a response; None for a kind that this version does not know (it is to be ignored)."""
    match response.WhichOneof("event"):
        case "started":
            s = response.started
            return Started(s.request_id, s.model, s.created)
        case "delta":
            d = response.delta
            return Delta(
                index=d.index,
                text=d.text,
                reasoning=d.reasoning,
                tool_calls=tuple(ToolCall(c.id, c.name, c.arguments, c.index) for c in d.tool_calls),
                token_ids=tuple(d.token_ids),
                logprobs=_logprobs(d.logprobs),
            )
        case "finished":
            f = response.finished
            return Finished(f.index, f.finish_reason, f.stop_reason)
        case "usage":
            u = response.usage
            return Usage(u.prompt_tokens, u.completion_tokens, u.cached_tokens)
        case _:
            return None


def _logprobs(items: Iterable[pb.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(t.token, t.logprob, _logprobs(t.top)) for t in items)


def read_models(response: pb.ListModelsResponse) -> tuple[Model, ...]:
    """The models of a listing, in its order."""
    return tuple(Model(m.name, m.parent, m.max_model_len) for m in response.models)


def read_status(response: pb.ClusterStatusResponse) -> ClusterStatus:
    """The snapshot in a status answer."""
    names = tuple(WorkerStatus.__dataclass_fields__)
    workers = tuple(WorkerStatus(**{n: getattr(w, n) for n in names}) for w in response.workers)
    names = tuple(name for name in KvLinkStatus.__dataclass_fields__ if name != "refused")
    links = tuple(
        KvLinkStatus(**{n: getattr(link, n) for n in names}, refused=dict(link.refused)) for link in response.kv_links
    )
    troubles, asleep = tuple(response.troubles), tuple(response.asleep)
    return ClusterStatus(response.cluster, workers, response.leases, links, troubles, asleep)


class Collector:
    """Joins the events of one request into a `Generation`. Feed every event to `add`, then call `result`."""

    def __init__(self) -> None:
        self._started = Started("", "", 0)
        self._usage = Usage()
        self._deltas: dict[int, list[Delta]] = {}
        self._finished: dict[int, Finished] = {}

    def add(self, event: Event) -> None:
        """Take the next event."""
        if isinstance(event, Delta):
            self._deltas.setdefault(event.index, []).append(event)
        elif isinstance(event, Finished):
            self._finished[event.index] = event
        elif isinstance(event, Usage):
            self._usage = event
        else:
            self._started = event

    def received(self, index: int) -> tuple[tuple[int, ...], int, bool]:
        """Of one choice so far: its tokens, its characters of text and reasoning, and whether it has ended."""
        deltas = self._deltas.get(index, [])
        tokens = tuple(token for delta in deltas for token in delta.token_ids)
        return tokens, sum(len(delta.text) + len(delta.reasoning) for delta in deltas), index in self._finished

    def result(self, ledger: Mapping[str, Any] | None) -> Generation:
        """The answer so far; choices in order of their index."""
        indexes = sorted(self._deltas.keys() | self._finished.keys())
        choices = tuple(self._choice(i) for i in indexes)
        s = self._started
        return Generation(s.request_id, s.model, s.created, choices, self._usage, ledger)

    def _choice(self, index: int) -> Choice:
        deltas = self._deltas.get(index, [])
        end = self._finished.get(index, Finished(index, ""))
        return Choice(
            index=index,
            text="".join(d.text for d in deltas),
            token_ids=tuple(t for d in deltas for t in d.token_ids),
            finish_reason=end.finish_reason,
            stop_reason=end.stop_reason,
            reasoning="".join(d.reasoning for d in deltas),
            tool_calls=_join_calls(c for d in deltas for c in d.tool_calls),
            logprobs=tuple(lp for d in deltas for lp in d.logprobs),
        )


def _join_calls(pieces: Iterable[ToolCall]) -> tuple[ToolCall, ...]:
    calls: dict[int, ToolCall] = {}
    for p in pieces:
        old = calls.get(p.index)
        calls[p.index] = (
            p if old is None else ToolCall(old.id or p.id, old.name or p.name, old.arguments + p.arguments, p.index)
        )
    return tuple(calls[i] for i in sorted(calls))
