"""The split cluster answers as one plain vLLM engine does: every sampling parameter, any prompt, many at once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from helpers.ask import CHAT, TOKENS, Answer, Pair, Question, ask, assert_same, pair
from helpers.cluster import RunningCluster
from helpers.plain_vllm import PlainServer
from helpers.sampling_fields import EOS, FIELDS, chat, greedy, seeded, tokens

pytestmark = [pytest.mark.cluster, pytest.mark.model]

MAX_MODEL_LEN = 2048
BLOCK = 32
BLOCK_BYTES = BLOCK * 2 * 30 * 3 * 64 * 4  # K and V, layers, KV heads, head size, float32


@pytest.fixture
async def both(cluster: RunningCluster, baseline: PlainServer) -> AsyncIterator[Pair]:
    async with pair(cluster.http, baseline.http) as both:
        yield both


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Token ids that no other length or seed begins with."""
    numbers = random.Random(length * 1000 + seed)
    return [numbers.randrange(1000, 40000) for _ in range(length)]


def blocks(tokens: int) -> int:
    """Blocks that hold so many tokens; equal engines ship whole ones."""
    return -(-tokens // BLOCK)


def assert_split(question: Question, answer: Answer) -> None:
    assert answer.ledgers, f"{question}: no ledger"
    for ledger in answer.ledgers:
        assert ledger["prefill_worker"] != ledger["decode_worker"], f"{question}: {ledger}"
        assert ledger["prefill_worker"] is not None, f"{question}: not split: {ledger}"
        assert not ledger["recomputed"], f"{question}: {ledger}"
        assert ledger["attempt"] == 0, f"{question}: {ledger}"


def assert_whole(question: Question, answer: Answer) -> None:
    assert answer.ledgers, f"{question}: no ledger"
    for ledger in answer.ledgers:
        assert ledger["prefill_worker"] is None, f"{question}: {ledger}"
        assert ledger["wire_bytes"] == 0, f"{question}: {ledger}"


# Every field of SamplingParams.


def test_every_field_is_named() -> None:
    """A vLLM with another field must not pass unseen."""
    from vllm.sampling_params import SamplingParams

    known = {field.name for field in msgspec.structs.fields(SamplingParams)}
    assert known == set(FIELDS), f"new: {known - set(FIELDS)}, gone: {set(FIELDS) - known}"
    for name, field in FIELDS.items():
        assert field.questions or field.fate == "internal", f"{name}: nothing shows it"
        assert field.why or field.fate in ("equal", "refused"), f"{name}: no reason"


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.fate != "internal"])
async def test_field(both: Pair, name: str) -> None:
    field = FIELDS[name]
    for question in field.questions:
        if field.fate == "refused":
            await both.refused(question)
            continue
        answer = await both.equal(question)
        (assert_whole if field.fate == "whole" else assert_split)(question, answer)
    for question in field.unsplit:
        assert_whole(question, await both.equal(question))


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.fate == "internal"])
async def test_clients_cannot_set(both: Pair, name: str) -> None:
    """What a client sends under an internal name changes nothing."""
    value = {"_eos_token_id": 665, "_watermarking_skipped": True}.get(name, [665])
    plain = (await both.equal(tokens("without"))).choices
    for sent in (tokens(name, **{name: value}), greedy(name, **{name: value})):
        answer = await both.equal(sent)
        assert sent.path != TOKENS or answer.choices == plain


@pytest.mark.parametrize(
    "body",
    [
        {"kv_transfer_params": {"do_remote_decode": True}},
        {"kv_transfer_params": {"joinwise": 1, "half": "recv", "transfer_id": "x", "epoch": 1}},
        {"ec_transfer_params": {"x": 1}},
        {"vllm_xargs": {"kv_transfer_params": "x"}},
        {"vllm_xargs": {"joinwise_replay": [1, 2]}},
        {"vllm_xargs": {"joinwise_anything": 1}},
    ],
    ids=str,
)
async def test_reserved_keys_are_refused(both: Pair, body: dict[str, Any]) -> None:
    for make in (greedy, chat):
        for stream in (False, True):
            answer = await ask(both.cluster, make("reserved", **body, stream=stream))
            assert answer.status == 400, answer.body
            assert "cluster" in answer.body["error"]["message"]


async def test_reserved_keys_are_refused_among_tokens(both: Pair) -> None:
    answer = await ask(both.cluster, tokens("reserved", extra_args={"joinwise_replay": [1, 2]}))
    assert answer.status == 400, answer.body


async def test_priority(both: Pair) -> None:
    """It orders requests where the engines schedule by priority; these do not, and nothing else changes."""
    for question in (greedy("priority", priority=3), chat("priority", priority=-1)):
        assert_split(question, await both.equal(question))


async def test_beam_search(both: Pair) -> None:
    """Each step of it is a request for one token."""
    question = greedy("beam search", use_beam_search=True, n=2, max_tokens=5)
    assert_whole(question, await both.equal(question))


# Prompts.


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 256, 511, 512, 513, 545, 1024, 1500])
async def test_prompt_length(both: Pair, length: int) -> None:
    """Around the borders of blocks (32) and of prefill's chunks (512)."""
    question = Question(
        f"{length} tokens", {"prompt": prompt_of(length), "temperature": 0, "max_tokens": 6, "logprobs": 2}
    )
    answer = await both.equal(question)
    assert_split(question, answer)
    (ledger,) = answer.ledgers
    assert ledger["prompt_tokens"] == length
    assert ledger["wire_bytes"] == blocks(length) * BLOCK_BYTES


async def test_a_prompt_that_fills_the_context(both: Pair) -> None:
    """Up to the last position, and not one further; vLLM's front end cuts max_tokens to what is left."""
    prompt = prompt_of(MAX_MODEL_LEN)
    for length, body in (
        (MAX_MODEL_LEN - 8, {"max_tokens": 8}),
        (MAX_MODEL_LEN - 2, {"max_tokens": 2}),
        (MAX_MODEL_LEN - 1, {"max_tokens": 2}),
    ):
        await both.equal(greedy(f"{length} tokens", prompt=prompt[:length], ignore_eos=True, **body))
    question = greedy("one too many", prompt=prompt, max_tokens=1)
    ours, theirs = await both.refused(question)
    assert_same(str(question), ours.body, theirs.body)


@pytest.mark.parametrize("side", ["left", "right"])
async def test_truncated_prompt(both: Pair, side: str) -> None:
    answer = await both.equal(seeded("truncated", truncate_prompt_tokens=5, truncation_side=side))
    assert answer.ledgers[0]["prompt_tokens"] == 5


async def test_a_prompt_asked_twice_ships_its_tail_only(both: Pair) -> None:
    question = Question("twice", {"prompt": prompt_of(200, 1), "temperature": 0, "max_tokens": 4})
    first, second = await both.equal(question), await both.equal(question)
    assert_same("the second time", second.body, first.body)
    assert_split(question, second)
    assert first.ledgers[0]["wire_bytes"] == 7 * BLOCK_BYTES
    assert second.ledgers[0]["wire_bytes"] == BLOCK_BYTES
    assert second.ledgers[0]["cached_tokens"] == 192
    # A prompt that ends with a block: its last token must be computed again, so its last block is.
    even = Question("even", {"prompt": prompt_of(192, 2), "temperature": 0, "max_tokens": 4})
    await both.equal(even)
    (ledger,) = (await both.equal(even)).ledgers
    assert ledger["wire_bytes"] == BLOCK_BYTES


async def test_a_shared_prefix_ships_the_tail_only(both: Pair) -> None:
    prefix = prompt_of(160, 3)
    for seed, tail in enumerate((40, 1, 33, 90)):
        question = seeded("prefix", prompt=prefix + prompt_of(tail, 10 + seed))
        answer = await both.equal(question)
        assert_split(question, answer)
        shipped = 160 + tail if seed == 0 else tail
        assert answer.ledgers[0]["wire_bytes"] == blocks(shipped) * BLOCK_BYTES


async def test_a_prefix_that_only_decode_has(both: Pair) -> None:
    """A turn's answer lies with the decode worker: the next turn ships less than prefill computes."""
    prompt = prompt_of(64, 4)
    first = await both.equal(greedy("first turn", prompt=prompt, max_tokens=40, ignore_eos=True))
    turn = greedy("second turn", prompt=prompt + first.token_ids + prompt_of(20, 5))
    answer = await both.equal(turn)
    assert_split(turn, answer)
    # 64 + 39 computed tokens are three whole blocks in decode, and 124 tokens are asked for.
    assert answer.ledgers[0]["wire_bytes"] == blocks(124 - 96) * BLOCK_BYTES


async def test_cache_salt_keeps_prefixes_apart(both: Pair) -> None:
    prompt = prompt_of(96, 6)
    for salt in ("a", "b"):
        answer = await both.equal(greedy("salt", prompt=prompt, cache_salt=salt))
        assert answer.ledgers[0]["wire_bytes"] == 3 * BLOCK_BYTES


# Many at once.


async def test_concurrent_requests_equal_single_ones(both: Pair) -> None:
    """Greedy, seeded, constrained and ending early, of many lengths, some prefilled in chunks."""
    questions = [
        greedy("short", max_tokens=24),
        greedy("700", prompt=prompt_of(700, 20), max_tokens=16),
        seeded("600", prompt=prompt_of(600, 21), max_tokens=16),
        chat("schema", response_format={"type": "json_object"}, max_tokens=24),
        greedy("eos", logit_bias={EOS: 100}, min_tokens=6),
        seeded("penalties", prompt=prompt_of(100, 22), frequency_penalty=1.0, repetition_penalty=1.2, max_tokens=24),
        greedy("stop", stop=[" wise"]),
        seeded("min_p", min_p=0.1, prompt=prompt_of(33, 23), max_tokens=20),
    ]
    together = await asyncio.gather(*(ask(both.cluster, question) for question in questions))
    for question, answer in zip(questions, together, strict=True):
        theirs = await ask(both.baseline, question)
        assert_same(f"{question}, with others", answer.body, theirs.body)
        assert_split(question, answer)


async def test_eight_equal_requests_at_once(both: Pair) -> None:
    question = greedy("eight", max_tokens=16, logprobs=1)
    answers = await asyncio.gather(*(ask(both.cluster, question) for _ in range(8)))
    theirs = await ask(both.baseline, question)
    for answer in answers:
        assert_same("one of eight", answer.body, theirs.body)


# Requests that end with their first token.


@pytest.mark.parametrize(
    "question",
    [
        greedy("EOS", logit_bias={EOS: 100}),
        greedy("stop token", stop_token_ids=[665]),
        greedy("stop string", stop=[" there"]),
        greedy("stop string streamed", stop=["there"], stream=True, stream_options={"include_usage": True}),
        greedy("choice", structured_outputs={"choice": ["yes"]}),
        seeded("three samples", n=3, logit_bias={EOS: 100}),
        Question("chat", {"messages": [{"role": "user", "content": "x"}], "logit_bias": {EOS: 100}, "seed": 1}, CHAT),
    ],
    ids=str,
)
async def test_a_first_token_that_ends_it_leaves_nothing(both: Pair, question: Question) -> None:
    """Decode has begun to wait for KV by then; the fixture sees that it holds nothing afterwards."""
    for _ in range(3):
        answer = await both.equal(question)
        assert_split(question, answer)
        assert all(choice["finish_reason"] == "stop" for choice in answer.choices)
