"""What the SDK takes and gives: frozen dataclasses, no protobuf.

Units are in the names or in the field comments; every collection is a tuple, so a result can be shared between
threads. `GenerateOptions` is the one list of what `generate` accepts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypedDict

Message: TypeAlias = Mapping[str, Any]
"""One turn as OpenAI writes it: `role`, `content`, and where they apply `name`, `tool_calls`, `tool_call_id`."""


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate`; one that is absent takes the model's default. Names follow the HTTP API."""

    model: str  # model or adapter; absent means the gateway's only one
    max_tokens: int  # most tokens to generate
    temperature: float  # 0 is greedy
    top_p: float  # nucleus mass in (0, 1]
    top_k: int  # 0 keeps all
    min_p: float  # least probability relative to the likeliest token
    seed: int  # of the request's own generator
    stop: str | Sequence[str]  # strings that end the output
    stop_token_ids: Sequence[int]  # token ids that end the output
    n: int  # number of choices
    presence_penalty: float  # in [-2, 2]
    frequency_penalty: float  # in [-2, 2]
    repetition_penalty: float  # above 0, 1 is none
    logprobs: int  # alternatives with log probability per token
    ignore_eos: bool  # go on after the end-of-sequence token
    min_tokens: int  # fewest tokens before a stop
    logit_bias: Mapping[int, float]  # by token id
    skip_special_tokens: bool  # keep them out of the text; the default
    include_stop_str_in_output: bool  # put the stop string into the text
    tools: Sequence[Mapping[str, Any]]  # OpenAI tools, or bare {"name", "description", "parameters"}
    tool_choice: str  # "none", "auto", "required" or a tool's name
    json_object: bool  # any JSON object
    json_schema: Mapping[str, Any]  # JSON that follows this schema, keys in this order
    regex: str  # text that matches
    choice: Sequence[str]  # one of these
    grammar: str  # EBNF
    request_id: str  # the caller's id, for logs and `cancel`
    session_id: str  # requests of one session prefer workers that hold its prefix
    priority: int  # lower is served first
    chat_template_kwargs: Mapping[str, Any]  # for the chat template


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The natural log probability of one token, with its alternatives, likeliest first."""

    token: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool; inside a `Delta`, a piece of one (pieces with equal `index` belong together)."""

    id: str
    name: str
    arguments: str  # JSON text
    index: int = 0


@dataclass(frozen=True, slots=True)
class Started:
    """First event of a stream: the request has been accepted."""

    request_id: str
    model: str
    created: int  # Unix time in seconds


@dataclass(frozen=True, slots=True)
class Delta:
    """More output of one choice."""

    index: int
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of one choice."""

    index: int
    finish_reason: str  # "stop", "length", "tool_calls", ...
    stop_reason: str = ""  # the stop string or token id; empty for none


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts; the last event of a stream."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


Event: TypeAlias = Started | Delta | Finished | Usage


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished completion."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """The whole answer to one request."""

    request_id: str
    model: str
    created: int  # Unix time in seconds
    choices: tuple[Choice, ...]
    usage: Usage
    ledger: Mapping[str, Any] | None = field(default=None, repr=False)
    """Where the request's time went, as the gateway's JSON; None when it sent none."""

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text if self.choices else ""


@dataclass(frozen=True, slots=True)
class Model:
    """A model or adapter that can be named in `model`."""

    name: str
    parent: str  # base model of an adapter, empty for a base model
    max_model_len: int  # prompt and output together, in tokens


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One engine."""

    worker_id: str
    pool: str
    role: str  # "prefill", "decode" or "mixed"
    model: str
    epoch: int
    running: int = 0  # requests
    waiting: int = 0  # requests
    pending_tokens: int = 0  # reserved by the router
    kv_blocks_free: int = 0
    kv_blocks_total: int = 0
    address: str = ""
    decode_step_ms: float = 0.0  # median


@dataclass(frozen=True, slots=True)
class KvLinkStatus:
    """How one worker gets KV from a rank of another; counts since they first met."""

    sender: str  # worker id; its KV address where no live worker has that
    receiver: str
    transport: str  # in use now
    why: str = ""  # that transport
    codec: str = "none"  # of the last transfer
    codec_why: str = ""
    bytes_per_s: float = 0.0  # measured speed of the wire; 0 before there is one
    bytes: int = 0  # payload received
    streams: int = 0
    failed: int = 0  # streams that ended without all of their KV
    retries: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)  # frames by reason


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """A snapshot of the cluster. Gateways answer `ClusterStatus` with one of these, the SDK returns it."""

    cluster: str
    workers: tuple[WorkerStatus, ...] = ()
    leases: int = 0  # requests with a lease now
    kv_links: tuple[KvLinkStatus, ...] = ()
    troubles: tuple[str, ...] = ()  # what the controller cannot mend, a sentence each
    asleep: tuple[str, ...] = ()  # pools without a worker, that get one with the next request for their model
