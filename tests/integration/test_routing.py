"""Routing with real engines: prefixes are followed, samples share a prompt, headers reach the scheduler."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

import grpc
import httpx
import msgspec
import pytest
from helpers.cluster import MODEL, RunningCluster

from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.router.prefix_index import PrefixFollower, PrefixIndex
from joinwise.cluster.router.registry import Registry, WorkerInfo
from joinwise.cluster.router.why import decisions_on
from joinwise.cluster.store.client import connect
from joinwise.proto import engine_pb2, engine_pb2_grpc

pytestmark = [pytest.mark.cluster, pytest.mark.model]

BLOCK = 32


def prompt_of(length: int, seed: int) -> list[int]:
    numbers = random.Random(f"routing-{length}-{seed}")
    return [numbers.randrange(1000, 40_000) for _ in range(length)]


async def complete(
    cluster: RunningCluster, prompt: list[int], headers: dict[str, str] | None = None, **body: Any
) -> Any:
    asked = {"model": MODEL, "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True, **body}
    async with httpx.AsyncClient(base_url=cluster.http, timeout=120) as http:
        return await http.post("/v1/completions", json=asked, headers={"x-joinwise-ledger": "1", **(headers or {})})


async def held_blocks(cluster: RunningCluster) -> dict[str, set[int]]:
    """What a gateway that starts now learns from the stream, of the workers that there are."""
    client, index = connect(cluster.redis_url), PrefixIndex()
    try:
        await PrefixFollower(client, cluster.name, index).read()
        workers = await Registry(client, cluster.name, RouterConfig()).list()
        index.keep({worker.worker_id: worker.epoch for worker in workers})
    finally:
        await client.aclose()
    return {name: set(worker.blocks) for name, worker in index._workers.items()}


async def reset_cache(worker: WorkerInfo) -> None:
    request = engine_pb2.UtilityRequest(method="reset_prefix_cache", arguments=msgspec.msgpack.encode([False]))
    async with asyncio.timeout(10), grpc.aio.insecure_channel(worker.engine_address) as channel:
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        while not msgspec.msgpack.decode((await stub.Utility(request, timeout=30)).result):
            await asyncio.sleep(0.05)  # blocks of a request that has just ended are still held


async def test_a_known_prefix_is_found_and_not_computed_again(cluster: RunningCluster) -> None:
    prompt = prompt_of(10 * BLOCK + 5, seed=1)
    first = await complete(cluster, prompt)
    assert first.status_code == 200, first.text
    before = await held_blocks(cluster)
    assert sum(len(blocks) for blocks in before.values()) >= 20  # both workers hold the prompt's ten blocks
    client = connect(cluster.redis_url)
    try:
        deadline = time.monotonic() + 10
        while True:  # the gateway's own copy is as far as the stream within moments
            again = await complete(cluster, prompt, {"x-request-id": f"again-{time.monotonic_ns()}"})
            request_id = again.json()["id"]
            decision = (
                await decisions_on(client, cluster.name, f"{request_id}-0")
                or await decisions_on(client, cluster.name, request_id)
            )[-1]
            prefill = next(each for each in decision.candidates if each.role == "prefill")
            if prefill.uncached_tokens == 5:
                break
            assert time.monotonic() < deadline, decision
    finally:
        await client.aclose()
    assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= 10 * BLOCK


async def test_a_reset_cache_vanishes_from_the_index(cluster: RunningCluster) -> None:
    await complete(cluster, prompt_of(4 * BLOCK, seed=2))
    client = connect(cluster.redis_url)
    try:
        workers = await Registry(client, cluster.name, RouterConfig()).list()
    finally:
        await client.aclose()
    for worker in workers:
        await reset_cache(worker)
    deadline = time.monotonic() + 10
    while any((held := await held_blocks(cluster)).values()):
        assert time.monotonic() < deadline, {name: len(blocks) for name, blocks in held.items()}
        await asyncio.sleep(0.05)


async def test_samples_share_one_prefill_and_one_transfer(cluster: RunningCluster) -> None:
    answer = await complete(cluster, prompt_of(8 * BLOCK, seed=3), n=3, temperature=1.0, seed=5)
    assert answer.status_code == 200, answer.text
    ledgers = json.loads(answer.headers["x-joinwise-ledger"])
    assert len(ledgers) == 3
    assert sorted(ledger["wire_bytes"] > 0 for ledger in ledgers) == [False, False, True]
    assert len({ledger["decode_worker"] for ledger in ledgers}) == 1
    assert sum(ledger["cached_tokens"] >= 7 * BLOCK for ledger in ledgers) == 2


async def test_samples_answer_as_single_requests_do(cluster: RunningCluster) -> None:
    """Sample i of a seeded request is the request with its seed and i."""
    prompt = prompt_of(3 * BLOCK + 7, seed=4)
    together = (await complete(cluster, prompt, n=3, temperature=1.0, seed=5)).json()["choices"]
    for index, choice in enumerate(sorted(together, key=lambda each: each["index"])):
        alone = (await complete(cluster, prompt, temperature=1.0, seed=5 + index)).json()["choices"][0]
        assert choice["text"] == alone["text"]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_first_finished_sample_is_the_answer(cluster: RunningCluster, stream: bool) -> None:
    """Of seeded samples, whose lengths differ by where a stop string happens to be, the shortest."""
    asked = {"temperature": 1.0, "stop": ["e", "a"], "max_tokens": 40}
    prompt = prompt_of(3 * BLOCK, seed=6)
    for seed in range(0, 60, 3):
        choices = (await complete(cluster, prompt, n=3, seed=seed, **asked, logprobs=0)).json()["choices"]
        lengths = sorted(len(each["logprobs"]["tokens"]) for each in choices)
        if lengths[0] + 4 <= lengths[1]:  # clear of what a late start of a sample could change
            break
    else:
        pytest.fail("no seed gave samples of clearly different lengths")
    shortest = min(choices, key=lambda each: len(each["logprobs"]["tokens"]))
    answer = await complete(cluster, prompt, {"x-first-finish": "3"}, seed=seed, stream=stream, **asked)
    assert answer.status_code == 200, answer.text
    if stream:
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
        found = [choice for line in lines for choice in json.loads(line)["choices"]]
    else:
        found = answer.json()["choices"]
    assert "".join(each["text"] for each in found) == shortest["text"]
    assert [each["finish_reason"] for each in found if each["finish_reason"]] == ["stop"]
    assert {each["index"] for each in found} == {0}


@pytest.mark.parametrize(
    ("headers", "status", "text"),
    [
        ({"x-first-finish": "3"}, 400, "temperature above 0"),
        ({"x-first-finish": "many"}, 400, "x-first-finish"),
        ({"x-slo-ttft-ms": "0.001"}, 429, "objectives"),
        ({"x-slo-ttft-ms": "600000", "x-priority": "-5", "x-session-id": "s", "x-tenant-id": "t"}, 200, ""),
        ({"x-priority": "high"}, 400, "x-priority"),
        ({"x-session-id": "a b"}, 400, "x-session-id"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_headers_are_terms(
    cluster: RunningCluster, headers: dict[str, str], status: int, text: str, stream: bool
) -> None:
    answer = await complete(cluster, prompt_of(40, seed=5), headers, stream=stream)
    assert answer.status_code == status, answer.text
    assert text in answer.text
    if status == 429:
        assert int(answer.headers["retry-after"]) >= 1


async def test_a_priority_reaches_the_scheduler(cluster: RunningCluster) -> None:
    """More requests than slots: the urgent one, sent last, is not last."""
    finished: list[str] = []

    async def one(name: str, priority: int, seed: int) -> None:
        answer = await complete(cluster, prompt_of(64, seed), max_tokens=24, priority=priority)
        assert answer.status_code == 200, answer.text
        finished.append(name)

    crowd = [asyncio.create_task(one(f"plain-{number}", 5, number)) for number in range(24)]
    await asyncio.sleep(0.5)
    await asyncio.gather(*crowd, one("urgent", -5, 99))
    assert finished.index("urgent") < len(finished) - 4
