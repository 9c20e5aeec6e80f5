"""Decisions are kept, found by the client's id, and printed."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from helpers.router_rig import Bench, Make, demand
from redis.asyncio import Redis
from typer.testing import CliRunner

from joinwise.cluster.cli.main import app
from joinwise.cluster.errors import OverloadedError
from joinwise.cluster.router.why import decisions_on
from joinwise.cluster.store.embedded import EmbeddedRedis
from joinwise.cluster.store.keys import Keys


@pytest.fixture
async def bench(redis_client: Redis, cluster_name: str, clock: Callable[[], int], make_worker: Make) -> Bench:
    bench = Bench(redis_client, cluster_name, clock, make_worker, decisions_kept=100)
    for name, role in (("p", "prefill"), ("d", "decode")):
        await bench.join(name, role)
        await bench.measured(name, tokens_per_s=1000, step_ms=10)
    return bench


async def test_a_decision_names_who_was_looked_at_and_why(bench: Bench) -> None:
    await bench.router.route(demand(200, 10, request_id="chatcmpl-first"))
    await bench.router.route(demand(100, 10, request_id="chatcmpl-second"))
    (decision,) = await decisions_on(bench.client, bench.cluster, "second")
    assert (decision.verdict, decision.chosen, decision.at_ms) == ("split", ("p", "d"), bench.clock())
    prefill, decode = decision.candidates
    assert (prefill.worker_id, prefill.role, prefill.wait_ms, prefill.prefill_ms) == ("p", "prefill", 200, 100)
    assert (prefill.uncached_tokens, prefill.pending_tokens) == (100, 200)
    assert (decode.worker_id, decode.harm_ms, decode.pending_tokens) == ("d", 100, 210)
    assert decode.move_ms == 13.5
    assert decision.cost_ms == pytest.approx(300 + 13.5 + decode.queue_ms, abs=0.1)
    assert await decisions_on(bench.client, bench.cluster, "ond") == []


async def test_refusals_are_kept_too(bench: Bench) -> None:
    await bench.router.route(demand(900, 50))
    with pytest.raises(OverloadedError):
        await bench.router.route(demand(900, 50, request_id="r2"))
    (decision,) = await decisions_on(bench.client, bench.cluster, "r2")
    assert decision.verdict == "full"
    assert decision.candidates


async def test_decisions_are_bounded_and_can_be_turned_off(bench: Bench) -> None:
    wide = bench.with_(max_pending_tokens=10**9)
    for number in range(700):
        await wide.router.route(demand(1, 1, request_id=f"r{number}"))
    length = await bench.client.xlen(Keys(bench.cluster).decisions)
    assert 100 <= length < 400
    await wide.with_(decisions_kept=0).router.route(demand(1, 1, request_id="silent"))
    assert await bench.client.xlen(Keys(bench.cluster).decisions) == length
    assert len(await decisions_on(bench.client, bench.cluster, "r699")) == 1


async def test_the_command(bench: Bench, redis_server: EmbeddedRedis) -> None:
    import asyncio

    await bench.router.route(demand(100, 10, request_id="cmpl-x"))
    options = ["explain", "x", "--redis", redis_server.url, "--cluster", bench.cluster]
    printed = await asyncio.to_thread(CliRunner().invoke, app, options, env={"COLUMNS": "200"})
    assert printed.exit_code == 0, printed.output
    assert "split" in printed.output
    assert "hand-off" in printed.output
    as_json = await asyncio.to_thread(CliRunner().invoke, app, [*options, "--json"])
    assert json.loads(as_json.output)[0]["chosen"] == ["p", "d"]
    missing = await asyncio.to_thread(CliRunner().invoke, app, ["explain", "nobody", *options[2:]])
    assert missing.exit_code != 0
