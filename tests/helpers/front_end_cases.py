"""What both front ends are asked: `CASES` they must answer alike, `REFUSALS` they must refuse alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "city": {"type": "string", "maxLength": 12},
            },
            "required": ["unit", "city"],
            "additionalProperties": False,
        },
    },
}
_PERSON = {  # keys neither sorted nor reverse sorted: their order must survive
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "city": {"type": "string", "maxLength": 10},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
_HELLO = [{"role": "user", "content": "Say hello and tell me your name."}]
_TALK = [
    {"role": "system", "content": "You answer in one short sentence."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?"},
]
_STORY = "Once upon a time, in a small village by the sea,"


@dataclass(frozen=True)
class Case:
    """One question in both tongues: `http` goes into the body, `grpc` to the SDK, `both` to both."""

    name: str
    both: dict[str, Any]
    http: dict[str, Any]
    grpc: dict[str, Any]
    streamed_only: bool = False
    """vLLM parses a malformed tool call one way when it streams and another way when it does not."""

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if "messages" in {**self.both, **self.http} else "/v1/completions"


def _case(
    name: str, both: dict[str, Any], http: dict[str, Any] | None = None, grpc: dict[str, Any] | None = None
) -> Case:
    return Case(name, both, http or {}, grpc or {})


_GREEDY = {"temperature": 0, "max_tokens": 12}
_NAMED = {"type": "function", "function": {"name": "get_weather"}}

CASES = (
    _case("chat", {"messages": _HELLO, **_GREEDY}),
    _case("chat with turns", {"messages": _TALK, **_GREEDY}),
    _case("completion", {"prompt": _STORY, **_GREEDY}),
    _case("completion of default length", {"prompt": _STORY, "temperature": 0}),
    _case("token ids", _GREEDY, {"prompt": [504, 2732, 282, 4649, 314]}, {"token_ids": [504, 2732, 282, 4649, 314]}),
    _case("n and seed", {"messages": _HELLO, "n": 2, "seed": 11, "temperature": 0.9, "top_p": 0.95, "max_tokens": 10}),
    _case("n and seed, completion", {"prompt": _STORY, "n": 3, "seed": 5, "temperature": 1.1, "max_tokens": 6}),
    _case(
        "stop string",
        {"prompt": "One, two, three,", "stop": [" five"], "temperature": 0, "max_tokens": 24},
    ),
    _case(
        "stop string kept",
        {"prompt": _STORY, "stop": ["."], "include_stop_str_in_output": True, "temperature": 0, "max_tokens": 60},
    ),
    _case("stop token", {"prompt": _STORY, "stop_token_ids": [28, 30], "temperature": 0, "max_tokens": 60}),
    _case("logprobs, chat", {"messages": _HELLO, **_GREEDY}, {"logprobs": True, "top_logprobs": 3}, {"logprobs": 3}),
    _case("logprobs, completion", {"prompt": _STORY, **_GREEDY, "logprobs": 2}),
    _case("logprobs without alternatives", {"messages": _HELLO, **_GREEDY}, {"logprobs": True}, {"logprobs": 0}),
    _case(
        "penalties",
        {
            "prompt": _STORY,
            "seed": 3,
            "temperature": 0.8,
            "presence_penalty": 0.4,
            "frequency_penalty": 0.3,
            "repetition_penalty": 1.1,
            "top_k": 40,
            "max_tokens": 16,
        },
    ),
    _case(
        "min_p, bias and min_tokens",
        {"prompt": _STORY, "seed": 3, "temperature": 0.8, "min_p": 0.05, "min_tokens": 8, "max_tokens": 16},
        {"logit_bias": {"260": 4.5}},
        {"logit_bias": {260: 4.5}},
    ),
    _case("ignore_eos", {"messages": _TALK, "temperature": 0, "max_tokens": 24, "ignore_eos": True}),
    _case(
        "special tokens shown", {"messages": _TALK, "temperature": 0, "max_tokens": 24, "skip_special_tokens": False}
    ),
    _case(
        "JSON schema",
        {"messages": _HELLO, "temperature": 0, "max_tokens": 48},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": _PERSON}}},
        {"json_schema": _PERSON},
    ),
    _case(
        "JSON object",
        {"prompt": "A JSON object: ", "temperature": 0, "max_tokens": 16},
        {"response_format": {"type": "json_object"}},
        {"json_object": True},
    ),
    _case(
        "regex",
        {"messages": _HELLO, **_GREEDY},
        {"structured_outputs": {"regex": "(yes|no), [0-9]{3}"}},
        {"regex": "(yes|no), [0-9]{3}"},
    ),
    _case(
        "choice",
        {"prompt": _STORY, **_GREEDY},
        {"structured_outputs": {"choice": ["there was a cat", "there was a dog"]}},
        {"choice": ["there was a cat", "there was a dog"]},
    ),
    _case(
        "grammar",
        {"prompt": _STORY, **_GREEDY},
        {"structured_outputs": {"grammar": 'root ::= "a" ("b" | "c") "d"'}},
        {"grammar": 'root ::= "a" ("b" | "c") "d"'},
    ),
    Case(
        "named tool",
        {"messages": _TALK, "tools": [_WEATHER], "temperature": 0, "max_tokens": 48},
        {"tool_choice": _NAMED},
        {"tool_choice": "get_weather"},
        streamed_only=True,
    ),
    _case(
        "required tool",
        {"messages": _TALK, "tools": [_WEATHER], "tool_choice": "required", "temperature": 0, "max_tokens": 64},
    ),
    _case("tools, the model's choice", {"messages": _TALK, "tools": [_WEATHER], **_GREEDY}),
    _case("tools not to be called", {"messages": _TALK, "tools": [_WEATHER], "tool_choice": "none", **_GREEDY}),
)

REFUSALS = (
    _case("unknown model", {"messages": _HELLO, "model": "nobody"}),
    _case("over-long prompt", {}, {"prompt": [504] * 100_000}, {"token_ids": [504] * 100_000}),
    _case("token out of the vocabulary", {}, {"prompt": [4_000_000]}, {"token_ids": [4_000_000]}),
    _case("empty text", {"prompt": ""}),
    _case("negative temperature", {"messages": _HELLO, "temperature": -1}),
    _case("top_p above 1", {"prompt": _STORY, "top_p": 1.5}),
    _case("n of 0", {"prompt": _STORY, "n": 0}),
    _case("too many tokens", {"messages": _HELLO, "max_tokens": 1_000_000}),
    _case("penalty out of range", {"prompt": _STORY, "presence_penalty": 3}),
    _case("tool choice without tools", {"messages": _HELLO, "tool_choice": "required"}),
    _case(
        "unknown named tool",
        {"messages": _HELLO, "tools": [_WEATHER]},
        {"tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tool_choice": "other"},
    ),
    _case("bad regex", {"prompt": _STORY}, {"structured_outputs": {"regex": "(unclosed"}}, {"regex": "(unclosed"}),
    _case(
        "bad schema",
        {"prompt": _STORY},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}},
        {"json_schema": {"type": "no such type"}},
    ),
    _case("too many logprobs", {"prompt": _STORY, "logprobs": 1000}),
)
