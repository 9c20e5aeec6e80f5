"""The unmodified `openai` and `anthropic` packages get from the cluster what they get from plain vLLM."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import openai
import pytest
from anthropic import AsyncAnthropic
from helpers.ask import assert_same, join_chunks, stream_ledger
from helpers.cluster import MODEL, RunningCluster
from helpers.plain_vllm import PlainServer
from helpers.sampling_fields import PERSON, STORY, schema
from openai import AsyncOpenAI

pytestmark = [pytest.mark.cluster, pytest.mark.model]

ASK = [{"role": "user", "content": "What is the weather in Paris?"}]
TALK = [
    {"role": "system", "content": "You answer in one short sentence."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?"},
]
PARAMETERS = {
    "type": "object",
    "properties": {
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        "city": {"type": "string", "maxLength": 12},
    },
    "required": ["unit", "city"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city.",
        "parameters": PARAMETERS,
        "strict": True,
    },
}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 16}
SEEDED: dict[str, Any] = {"temperature": 0.9, "seed": 11, "max_tokens": 12}

CHATS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "n=2 and seed": {**SEEDED, "n": 2},
    "penalties": {**SEEDED, "presence_penalty": 0.6, "frequency_penalty": 0.8, "top_p": 0.9, "max_tokens": 20},
    "stop strings": {**GREEDY, "stop": [".", "Rome"]},
    "logprobs": {**SEEDED, "logprobs": True, "top_logprobs": 3},
    "logit_bias": {**GREEDY, "logit_bias": {"30": 5, "28": -100}},
    "max_completion_tokens": {"temperature": 0, "max_completion_tokens": 5},
    "one token": {"temperature": 0, "max_tokens": 1},
    "JSON schema": {**GREEDY, "max_tokens": 32, **schema(PERSON)},
    "JSON object": {**SEEDED, "response_format": {"type": "json_object"}},
    "vLLM's own": {**SEEDED, "extra_body": {"min_p": 0.05, "top_k": 20, "min_tokens": 6, "repetition_penalty": 1.1}},
}
TOOLS: dict[str, dict[str, Any]] = {
    "required": {"tool_choice": "required", "max_tokens": 96},
    "named": {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}, "max_tokens": 96},
    "auto": {"tool_choice": "auto", "max_tokens": 24},
    "none": {"tool_choice": "none", "max_tokens": 12},
}
HERMES_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture
async def openais(cluster: RunningCluster, baseline: PlainServer) -> AsyncIterator[tuple[AsyncOpenAI, AsyncOpenAI]]:
    async with AsyncExitStack() as stack:
        made = [AsyncOpenAI(base_url=f"{s.http}/v1", api_key="any", max_retries=0) for s in (cluster, baseline)]
        ours, theirs = [await stack.enter_async_context(client) for client in made]
        yield ours, theirs


@pytest.fixture
async def anthropics(
    cluster: RunningCluster, baseline: PlainServer
) -> AsyncIterator[tuple[AsyncAnthropic, AsyncAnthropic]]:
    async with AsyncExitStack() as stack:
        made = [AsyncAnthropic(base_url=s.http, api_key="any", max_retries=0) for s in (cluster, baseline)]
        ours, theirs = [await stack.enter_async_context(client) for client in made]
        yield ours, theirs


async def same(clients: tuple[Any, Any], call: Callable[[Any], Awaitable[Any]]) -> Any:
    """Make one call with both clients; the answers must be equal, the cluster's is returned as JSON."""
    ours, theirs = [json.loads(_json(each)) for each in await asyncio.gather(*(call(client) for client in clients))]
    assert_same("client", ours, theirs)
    return ours


def _json(answer: Any) -> str:
    return answer.model_dump_json() if hasattr(answer, "model_dump_json") else json.dumps(answer)


async def chat(client: AsyncOpenAI, **body: Any) -> Any:
    return await client.chat.completions.create(model=MODEL, **body)


async def streamed_chat(client: AsyncOpenAI, **body: Any) -> dict[str, Any]:
    stream = await client.chat.completions.create(
        model=MODEL, stream=True, stream_options={"include_usage": True}, **body
    )
    return join_chunks([chunk.model_dump() async for chunk in stream])


# OpenAI: chat.


@pytest.mark.parametrize("name", CHATS)
async def test_chat(openais: tuple[AsyncOpenAI, AsyncOpenAI], name: str) -> None:
    """Whole and streamed, with the usage of both."""
    body = {"messages": TALK, **CHATS[name]}
    whole = await same(openais, lambda client: chat(client, **body))
    streamed = await same(openais, lambda client: streamed_chat(client, **body))
    assert streamed["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] > 0
    for one, other in zip(whole["choices"], streamed["choices"], strict=True):
        assert other["delta"]["content"] == one["message"]["content"]
        assert other["finish_reason"] == one["finish_reason"]


@pytest.mark.parametrize("choice", TOOLS)
async def test_tools(openais: tuple[AsyncOpenAI, AsyncOpenAI], choice: str) -> None:
    body = {"messages": ASK, "tools": [TOOL], "temperature": 0, **TOOLS[choice]}
    whole = await same(openais, lambda client: chat(client, **body))
    await same(openais, lambda client: streamed_chat(client, **body))
    if choice in ("required", "named"):
        (call,) = whole["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "get_weather"
        assert set(json.loads(call["function"]["arguments"])) == {"unit", "city"}


async def test_a_tool_that_the_model_chose(openais: tuple[AsyncOpenAI, AsyncOpenAI]) -> None:
    """The small model seldom calls by itself: made to say a call in the hermes form, it is parsed as one."""
    free = {"type": "function", "function": {**TOOL["function"], "strict": False}}  # else its schema constrains, too
    body = {
        "messages": ASK,
        "tools": [free],
        "tool_choice": "auto",
        "temperature": 0,
        "max_tokens": 96,
        "extra_body": {"structured_outputs": {"choice": [HERMES_CALL]}},
    }
    whole = await same(openais, lambda client: chat(client, **body))
    await same(openais, lambda client: streamed_chat(client, **body))
    assert whole["choices"][0]["finish_reason"] == "tool_calls"
    (call,) = whole["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}


async def test_a_conversation_with_a_tools_answer(openais: tuple[AsyncOpenAI, AsyncOpenAI]) -> None:
    call = {"id": "call-1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    turns = [
        *ASK,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "sunny, 21 degrees"},
    ]
    await same(openais, lambda client: chat(client, messages=turns, tools=[TOOL], **GREEDY))


# OpenAI: the rest.


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": STORY, **GREEDY, "logprobs": 2},
        {"prompt": STORY, **SEEDED, "n": 3, "stop": ["."]},
        {"prompt": [STORY, "Two words:"], **GREEDY},
        {"prompt": [504, 2732, 282, 4649, 314], **GREEDY, "echo": True},
        {"prompt": STORY, **SEEDED, "best_of": None, "suffix": None, "user": "someone"},
    ],
    ids=["logprobs", "n=3", "two prompts", "token ids and echo", "unused fields"],
)
async def test_completion(openais: tuple[AsyncOpenAI, AsyncOpenAI], body: dict[str, Any]) -> None:
    async def streamed(client: AsyncOpenAI) -> dict[str, Any]:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        return join_chunks(
            [c.model_dump() async for c in await client.completions.create(model=MODEL, **body, **options)]
        )

    whole = await same(openais, lambda client: client.completions.create(model=MODEL, **body))
    joined = await same(openais, streamed)
    assert [c["text"] for c in joined["choices"]] == [c["text"] for c in whole["choices"]]
    assert joined["usage"]["total_tokens"] == whole["usage"]["total_tokens"]


async def test_responses(openais: tuple[AsyncOpenAI, AsyncOpenAI]) -> None:
    body: dict[str, Any] = {
        "model": MODEL,
        "input": "What is the capital of Italy?",
        "instructions": "Answer in one short sentence.",
        "temperature": 0,
        "max_output_tokens": 16,
    }

    async def streamed(client: AsyncOpenAI) -> Any:
        kinds, text = [], ""
        async for event in await client.responses.create(**body, stream=True):
            if event.type == "response.output_text.delta":
                text += event.delta
            else:
                kinds.append(event.type)
        return {"kinds": kinds, "text": text, "usage": event.response.usage.model_dump()}

    whole = await same(openais, lambda client: client.responses.create(**body))
    joined = await same(openais, streamed)
    assert joined["text"] == whole["output"][0]["content"][0]["text"]
    assert joined["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    assert joined["kinds"][0] == "response.created"
    constrained = {"text": {"format": {"type": "json_schema", "name": "person", "schema": PERSON}}}
    await same(openais, lambda client: client.responses.create(**{**body, **constrained, "max_output_tokens": 32}))


async def test_models(openais: tuple[AsyncOpenAI, AsyncOpenAI]) -> None:
    (model,) = [m async for m in openais[0].models.list()]
    (other,) = [m async for m in openais[1].models.list()]
    assert model.id == other.id == MODEL
    assert model.max_model_len == other.max_model_len == 2048  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError, match="nobody"):
        await openais[0].chat.completions.create(model="nobody", messages=TALK)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"model": MODEL, "prompt": STORY}),
        ("/tokenize", {"model": MODEL, "messages": TALK, "add_generation_prompt": True, "return_token_strs": True}),
        ("/detokenize", {"model": MODEL, "tokens": [504, 2732, 282]}),
    ],
    ids=["text", "chat", "detokenize"],
)
async def test_tokenize(cluster: RunningCluster, baseline: PlainServer, path: str, body: dict[str, Any]) -> None:
    async with httpx.AsyncClient(timeout=60) as http:
        ours, theirs = [(await http.post(server.http + path, json=body)) for server in (cluster, baseline)]
    assert ours.status_code == 200, ours.text
    assert ours.json() == theirs.json()


async def test_cached_tokens_are_told_alike(openais: tuple[AsyncOpenAI, AsyncOpenAI]) -> None:
    """A prompt that nobody has asked, then the same again, and a longer one."""
    prompt = list(range(1200, 1350))
    expected = [0, 128, 128]
    for ids, cached in zip((prompt, prompt, [*prompt, 77, 78]), expected, strict=True):
        for client in openais:
            answer = await client.completions.create(model=MODEL, prompt=ids, temperature=0, max_tokens=3)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            assert answer.usage.prompt_tokens_details.cached_tokens == cached


async def test_usage_in_every_chunk(openais: tuple[AsyncOpenAI, AsyncOpenAI]) -> None:
    """Chunks may hold different numbers of tokens: what counts is that each tells the tokens so far."""
    last = []
    for client in openais:
        seen = []
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=TALK,  # type: ignore[arg-type]
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
            **GREEDY,
        )
        async for chunk in stream:
            assert chunk.usage is not None
            seen.append(chunk.usage.completion_tokens)
        assert seen == sorted(seen)
        last.append((chunk.usage.prompt_tokens, chunk.usage.completion_tokens, chunk.usage.total_tokens))
    assert last[0] == last[1]


# Anthropic.


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"system": "You answer in one short sentence.", "stop_sequences": ["."]},
        {"metadata": {"user_id": "someone"}},
    ],
    ids=["greedy", "system and stop", "metadata"],
)
async def test_messages(anthropics: tuple[AsyncAnthropic, AsyncAnthropic], body: dict[str, Any]) -> None:
    """Whole and streamed. Greedy only: this protocol has no seed."""
    arguments = {"model": MODEL, "max_tokens": 16, "messages": ASK, "extra_body": {"temperature": 0}, **body}

    async def streamed(client: AsyncAnthropic) -> Any:
        async with client.messages.stream(**arguments) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_message()
        assert kinds[0] == "message_start"
        assert kinds[-1] == "message_stop"
        return final

    whole = await same(anthropics, lambda client: client.messages.create(**arguments))
    joined = await same(anthropics, streamed)
    assert joined["content"][0]["text"] == whole["content"][0]["text"]
    assert joined["stop_reason"] == whole["stop_reason"]
    assert joined["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


@pytest.mark.parametrize(
    "choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}, {"type": "auto"}], ids=str
)
async def test_messages_with_tools(anthropics: tuple[AsyncAnthropic, AsyncAnthropic], choice: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 96 if choice["type"] != "auto" else 12,
        "messages": ASK,
        "extra_body": {"temperature": 0},
        "tools": [
            {"name": "get_weather", "description": "Weather of a city.", "input_schema": PARAMETERS, "strict": True}
        ],
        "tool_choice": choice,
    }

    async def streamed(client: AsyncAnthropic) -> Any:
        async with client.messages.stream(**arguments) as stream:
            return await stream.get_final_message()

    whole = await same(anthropics, lambda client: client.messages.create(**arguments))
    await same(anthropics, streamed)
    if choice["type"] != "auto":
        (use,) = [block for block in whole["content"] if block["type"] == "tool_use"]
        assert set(use["input"]) == {"unit", "city"}


async def test_count_tokens(anthropics: tuple[AsyncAnthropic, AsyncAnthropic]) -> None:
    await same(anthropics, lambda client: client.messages.count_tokens(model=MODEL, messages=ASK))


# The ledger, for clients that ask for it.


LEDGER = {"x-joinwise-ledger": "1"}


async def test_ledger_in_a_header(openais: tuple[AsyncOpenAI, AsyncOpenAI]) -> None:
    raw = await openais[0].chat.completions.with_raw_response.create(
        model=MODEL,
        messages=TALK,  # type: ignore[arg-type]
        extra_headers=LEDGER,
        **GREEDY,
    )
    ledger = json.loads(raw.headers["x-joinwise-ledger"])
    usage = raw.parse().usage
    assert usage is not None
    assert (ledger["prompt_tokens"], ledger["output_tokens"]) == (usage.prompt_tokens, usage.completion_tokens)
    plain = await openais[0].chat.completions.with_raw_response.create(
        model=MODEL,
        messages=TALK,  # type: ignore[arg-type]
        max_tokens=1,
    )
    assert "x-joinwise-ledger" not in plain.headers


@pytest.mark.parametrize(
    ("path", "body", "ending"),
    [
        ("/v1/chat/completions", {"messages": TALK, **SEEDED, "n": 2}, "data: [DONE]"),
        ("/v1/completions", {"prompt": STORY, **GREEDY}, "data: [DONE]"),
        ("/v1/messages", {"messages": ASK, "max_tokens": 5}, "message_stop"),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 5}, "response.completed"),
    ],
    ids=["chat", "completion", "messages", "responses"],
)
async def test_ledger_in_a_stream(cluster: RunningCluster, path: str, body: dict[str, Any], ending: str) -> None:
    """As a comment, which clients pass over."""
    body = {"model": MODEL, "stream": True, **body}
    async with httpx.AsyncClient(base_url=cluster.http, timeout=120) as http:
        response = await http.post(path, json=body, headers=LEDGER)
        without = await http.post(path, json=body)
    text = stream_ledger(response.text)
    assert text is not None, response.text[-500:]
    ledgers = json.loads(text) if text.startswith("[") else [json.loads(text)]
    assert len(ledgers) == body.get("n", 1)
    assert sum(ledger["wire_bytes"] > 0 for ledger in ledgers) == 1  # samples share the prompt's KV
    assert all(ledger["total_s"] > 0 for ledger in ledgers)
    assert response.text.count("joinwise-ledger") == 1
    assert "joinwise-ledger" not in without.text
    if ending == "data: [DONE]":
        assert response.text.rstrip().endswith(ending)
    assert ending in response.text


async def test_openai_reads_a_stream_with_a_ledger(openais: tuple[AsyncOpenAI, AsyncOpenAI]) -> None:
    body = {"messages": TALK, **GREEDY}
    assert_same(
        "with a ledger",
        json.loads(json.dumps(await streamed_chat(openais[0], **body, extra_headers=LEDGER))),
        json.loads(json.dumps(await streamed_chat(openais[0], **body))),
    )
