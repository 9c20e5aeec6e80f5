"""`assert_idle` must fail: a test leaks one of each, sees `leftovers` name it, and sees it go again.

And a worker against a gateway that misbehaves: it harms neither the worker nor other gateways.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest
from helpers.cluster import MODEL, RunningCluster
from helpers.idle import assert_idle, leftovers
from helpers.raw_gateway import attached, workers

from joinwise.actors.kv.frames import PROTOCOL_VERSION
from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.router.registry import WorkerInfo
from joinwise.cluster.router.router import Demand, Router
from joinwise.cluster.store.client import connect
from joinwise.proto import engine_pb2, kv_pb2

pytestmark = [pytest.mark.cluster, pytest.mark.model]

PROMPT = list(range(1000, 1100))


async def until_seen(cluster: RunningCluster, *parts: str, within_s: float = 20.0) -> None:
    """Wait until, for each of `parts`, some line of `leftovers` has it."""
    deadline = time.monotonic() + within_s
    while True:
        found = await leftovers(cluster)
        missing = [part for part in parts if not any(part in line for line in found)]
        if not missing:
            return
        assert time.monotonic() < deadline, f"nobody saw {missing} in {found}"
        await asyncio.sleep(0.1)


@pytest.fixture
async def prefill(cluster: RunningCluster) -> WorkerInfo:
    return (await workers(cluster))["prefill"]


@pytest.fixture
async def decode(cluster: RunningCluster) -> WorkerInfo:
    return (await workers(cluster))["decode"]


@pytest.fixture
async def router(cluster: RunningCluster) -> AsyncIterator[Router]:
    client = connect(cluster.redis_url)
    yield Router(client, cluster.name, RouterConfig())
    await client.aclose()


async def test_a_leaked_lease_is_seen(cluster: RunningCluster, router: Router) -> None:
    lease = await router.route(Demand("leaked-request", MODEL, 100, 50, False))
    await until_seen(cluster, "of request leaked-request", "has 100 prefill and 0", "has 0 prefill and 150")
    with pytest.raises(AssertionError, match=r"not idle:\n.*leaked-request"):
        await assert_idle(cluster, within_s=0.1)
    await router.settle(lease)
    await assert_idle(cluster, within_s=5)


@pytest.mark.parametrize("end", ["abort", "break"])
async def test_kv_that_nobody_fetches_is_seen(cluster: RunningCluster, prefill: WorkerInfo, end: str) -> None:
    from joinwise.actors.vllm.handoff import Handoff

    async with attached(cluster.name, prefill) as gateway:
        await gateway.add("held.0.p", PROMPT, handoff=Handoff("send", f"held-{end}", 1), max_tokens=1)
        tokens, _ = await gateway.tokens("held.0.p")
        assert len(tokens) == 1
        who = prefill.worker_id
        blocks = -(-len(PROMPT) // prefill.block_size)
        await until_seen(
            cluster, f"{who}: {blocks} KV blocks in use", f"{who}: 1 requests in the scheduler", "held.0.p"
        )
        if end == "abort":
            await gateway.abort("held.0.p", "unknown.0.p")
            await assert_idle(cluster, within_s=5)
    await assert_idle(cluster, within_s=5)


async def test_a_decode_part_that_waits_for_a_dead_peer_is_seen(cluster: RunningCluster, decode: WorkerInfo) -> None:
    from joinwise.actors.vllm.handoff import Handoff

    handoff = Handoff("recv", "from-nowhere", 1, "127.0.0.1:1", timeout_s=30.0)
    async with attached(cluster.name, decode) as gateway:
        await gateway.add("waits.0.d", PROMPT, handoff=handoff, max_tokens=8)
        report = await gateway.report("waits.0.d")
        assert report.recomputed
        assert "UNAVAILABLE" in report.failure
        who = decode.worker_id
        await until_seen(
            cluster, f"{who}: 1 requests in the scheduler", "KV blocks in use", "receive waits.0.d (loading)"
        )
        await gateway.abort("waits.0.d")
        await assert_idle(cluster, within_s=5)


async def test_a_stuck_stream_is_seen(cluster: RunningCluster, prefill: WorkerInfo) -> None:
    async with grpc.aio.insecure_channel(prefill.kv_address) as channel:
        service = "/joinwise.v1.KvService"
        ask = channel.unary_unary(
            f"{service}/Layout", kv_pb2.LayoutRequest.SerializeToString, kv_pb2.LayoutResponse.FromString
        )
        layout = kv_pb2.KvLayout(protocol_version=PROTOCOL_VERSION, model_digest=prefill.model_digest)
        instance = (await ask(kv_pb2.LayoutRequest(layout=layout), timeout=5)).instance
        fetch = channel.unary_stream(f"{service}/Fetch", kv_pb2.FetchRequest.SerializeToString, None)
        request = kv_pb2.FetchRequest(
            transfer_id="never-sent", epoch=1, num_tokens=1, instance=instance, encoding=kv_pb2.ENCODING_BLOCKS
        )
        call = fetch(request, timeout=50)
        await until_seen(cluster, f"{prefill.worker_id}: 1 KV streams")
        call.cancel()
        await assert_idle(cluster, within_s=5)


async def test_a_file_in_shared_memory_is_seen(cluster: RunningCluster) -> None:
    leaked = Path("/dev/shm/joinwise-selftest-leak")
    leaked.write_bytes(b"x")
    try:
        await until_seen(cluster, f"shared memory: {leaked.name}")
    finally:
        leaked.unlink()


async def test_a_request_that_runs_is_seen(cluster: RunningCluster) -> None:
    body = {"model": MODEL, "prompt": "Once upon", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    http = httpx.AsyncClient(base_url=cluster.http, timeout=60)
    async with http, http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.aiter_lines()  # kept: httpx ends the answer with its iterator
        await anext(lines)
        await until_seen(cluster, "joinwise:requests_running 1", "lease", "requests in the scheduler")
    await assert_idle(cluster, within_s=5)


async def test_a_request_that_had_lost_a_worker_is_said_to_have_begun(
    cluster: RunningCluster, decode: WorkerInfo
) -> None:
    """Before its first token, so that a worker that dies of it can be told from one that was dead already."""
    from joinwise.actors.vllm.handoff import Handoff

    async with attached(cluster.name, decode) as gateway:
        await gateway.add("again.1.d", PROMPT, again=True, max_tokens=4)
        assert (await gateway.read()).begun.request_id == "again.1.d"
        again, _ = await gateway.tokens("again.1.d")
        await gateway.add("waits.0.d", PROMPT, handoff=Handoff("recv", "from-nowhere", 1, "127.0.0.1:1"), max_tokens=4)
        assert (await gateway.report("waits.0.d")).recomputed
        await gateway.send(continue_request=engine_pb2.ContinueRequest(request_id="waits.0.d", epoch=1, recompute=True))
        assert (await gateway.read()).begun.request_id == "waits.0.d"
        assert (await gateway.tokens("waits.0.d"))[0] == again
    await assert_idle(cluster, within_s=5)


# A gateway that misbehaves.


async def test_a_duplicate_id_ends_with_an_error_and_harms_nobody(cluster: RunningCluster, decode: WorkerInfo) -> None:
    from vllm.v1.engine import FinishReason

    async with attached(cluster.name, decode) as first, attached(cluster.name, decode) as second:
        await first.add("alone.0.d", PROMPT, max_tokens=24)
        undisturbed, _ = await first.tokens("alone.0.d")
        await first.add("same.0.d", PROMPT, max_tokens=24)
        output = await first.output("same.0.d")
        await second.add("same.0.d", PROMPT, max_tokens=24)
        refused = await second.output("same.0.d")
        assert (refused.new_token_ids, refused.finish_reason) == ([], FinishReason.ERROR)
        rest, reason = await first.tokens("same.0.d")
        assert (output.new_token_ids + rest, reason) == (undisturbed, FinishReason.LENGTH)
        await second.add("same.0.d", PROMPT, max_tokens=24)  # the id is free again
        assert await second.tokens("same.0.d") == (undisturbed, FinishReason.LENGTH)


async def test_a_gateway_that_breaks_off_leaves_nothing(
    cluster: RunningCluster, prefill: WorkerInfo, decode: WorkerInfo
) -> None:
    from joinwise.actors.vllm.handoff import Handoff

    async with attached(cluster.name, prefill) as to_prefill, attached(cluster.name, decode) as to_decode:
        for number in range(4):
            send = Handoff("send", f"broken-{number}", 1)
            receive = Handoff("recv", f"broken-{number}", 1, prefill.kv_address)
            prompt = [100 + number, *PROMPT]
            await to_prefill.add(f"broken{number}.0.p", prompt, handoff=send, max_tokens=1)
            if number < 3:  # imported, and never released
                await to_decode.add(f"broken{number}.0.d", prompt, handoff=receive, max_tokens=8)
        await to_decode.add("running.0.d", PROMPT, max_tokens=1500)
        await to_decode.output("running.0.d")
        await until_seen(cluster, f"{decode.worker_id}: 4 requests in the scheduler", "receive broken0.0.d")
    await assert_idle(cluster, within_s=8)


async def test_rubbish_ends_the_stream_and_nothing_else(cluster: RunningCluster, decode: WorkerInfo) -> None:
    async with attached(cluster.name, decode) as good, attached(cluster.name, decode) as bad:
        await good.add("good.0.d", PROMPT, max_tokens=16)
        await bad.add("dragged.0.d", PROMPT, max_tokens=1500)
        await bad.send(add=engine_pb2.AddRequest(request=[b"\xc1rubbish"]))
        with pytest.raises((AssertionError, grpc.aio.AioRpcError)):
            while True:
                await bad.read()
        tokens, _ = await good.tokens("good.0.d")
        assert len(tokens) == 16
    await assert_idle(cluster, within_s=5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"protocol_version": 99}, "protocol version"),
        ({"vllm_version": "0.1.0"}, "vLLM version"),
        ({"cluster": "another"}, "cluster"),
        ({"worker_id": "another"}, "worker id"),
        ({"worker_epoch": 1}, "worker epoch"),
    ],
)
async def test_a_hello_that_does_not_fit_is_refused(
    cluster: RunningCluster, decode: WorkerInfo, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=f"{says}: the gateway says") as refused:
        async with attached(cluster.name, decode, **changes) as gateway:
            await gateway.add("never.0.d", PROMPT, max_tokens=4)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
