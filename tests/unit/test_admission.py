"""Admission against a real Redis: the queue that all gateways share, tenants, objectives, sessions, headers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from helpers.router_rig import Bench, Make, chosen, demand
from redis.asyncio import Redis

from joinwise.cluster.config_model import TenantConfig
from joinwise.cluster.errors import (
    InvalidRequestError,
    NoWorkerError,
    ObjectiveError,
    OverloadedError,
    RateLimitedError,
)
from joinwise.cluster.router.ask import demand_of
from joinwise.cluster.router.decision import Demand, Held
from joinwise.cluster.router.pulse import count_waiting, last_asked
from joinwise.cluster.router.router import Assignment
from joinwise.cluster.router.terms import Terms


@pytest.fixture
async def bench(redis_client: Redis, cluster_name: str, clock: Callable[[], int], make_worker: Make) -> Bench:
    bench = Bench(redis_client, cluster_name, clock, make_worker, queue_timeout_s=30)
    await bench.join("m")
    await bench.measured("m", tokens_per_s=1000, step_ms=10)
    return bench


async def waiting(bench: Bench) -> int:
    """Requests in the shared queue."""
    keys = [key async for key in bench.client.scan_iter(match=f"{{jw:{bench.cluster}}}:*:wait:*")]
    return sum([await bench.client.zcard(key) for key in keys])


async def polled(bench: Bench) -> bool:
    """Whether somebody has asked for a turn at this very time."""
    (key,) = [key async for key in bench.client.scan_iter(match=f"{{jw:{bench.cluster}}}:*:pollers")]
    return max(score for _, score in await bench.client.zrange(key, 0, -1, withscores=True)) >= bench.clock()


async def until(condition: Callable[[], Any], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.005)


class Crowd:
    """Requests that want the whole worker, one after the other; `order` says in which they got it."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def come(self, bench: Bench, name: str, **terms: Any) -> None:
        bench.clock.pass_(0.001)  # type: ignore[attr-defined]
        before = await waiting(bench)
        self.tasks.append(asyncio.create_task(self._one(bench, name, Terms(**terms))))

        async def queued() -> bool:
            return await waiting(bench) > before

        await until(queued)

    async def _one(self, bench: Bench, name: str, terms: Terms) -> None:
        lease = await bench.router.route(demand(450, 100, request_id=name, terms=terms))
        self.order.append(name)
        await bench.router.settle(lease)


async def hold(bench: Bench) -> Assignment:
    return await bench.router.route(demand(450, 100))


# --- the queue --------------------------------------------------------------------------------------------------------


async def test_who_came_first_is_served_first_whatever_the_gateway(bench: Bench) -> None:
    gateways = [bench, bench.with_(), bench.with_()]
    held, crowd = await hold(bench), Crowd()
    for number in range(9):
        await crowd.come(gateways[number % 3], str(number))
    await bench.router.settle(held)
    async with asyncio.timeout(10):
        await asyncio.gather(*crowd.tasks)
    assert crowd.order == [str(number) for number in range(9)]
    assert await waiting(bench) == 0
    await bench.assert_zero()


async def test_a_small_newcomer_does_not_pass_those_who_wait(bench: Bench) -> None:
    held, crowd = await hold(bench), Crowd()
    await crowd.come(bench, "large")
    bench.clock.pass_(0.001)  # type: ignore[attr-defined]
    newcomer = asyncio.create_task(bench.router.route(demand(10, 10)))  # there is room for this one

    async def queued() -> bool:
        return await waiting(bench) == 2

    await until(queued)
    await bench.router.settle(held)
    await crowd.tasks[0]
    await bench.router.settle(await newcomer)


async def test_priority_goes_first_and_age_overtakes_it(bench: Bench, clock: Any) -> None:
    held, crowd = await hold(bench), Crowd()
    await crowd.come(bench, "old", priority=2)
    clock.pass_(0.1)
    await crowd.come(bench, "plain")
    clock.pass_(0.1)
    await crowd.come(bench, "urgent", priority=-1)
    for _ in range(5):  # more than two steps of ageing; whoever is silent for long is forgotten
        clock.pass_(2.2)
        await bench.measured("m", tokens_per_s=1000, step_ms=10)
        await until(partial(polled, bench))
    await crowd.come(bench, "late")
    await bench.router.renew([held])
    await bench.router.settle(held)
    await asyncio.gather(*crowd.tasks)
    assert crowd.order == ["urgent", "plain", "old", "late"]


async def test_turns_go_by_weight(bench: Bench) -> None:
    tenants = {"heavy": TenantConfig(weight=3.0), "light": TenantConfig(weight=1.0)}
    shared = bench.with_(tenants=tenants)
    held, crowd = await hold(shared), Crowd()
    for _ in range(8):
        await crowd.come(shared, "heavy", tenant="heavy")
    for _ in range(8):
        await crowd.come(shared, "light", tenant="light")
    await shared.router.settle(held)
    await asyncio.gather(*crowd.tasks)
    assert crowd.order[:8].count("heavy") == 6
    assert sorted(crowd.order) == ["heavy"] * 8 + ["light"] * 8


async def test_the_queue_is_bounded_over_all_gateways(bench: Bench) -> None:
    gateways = [bench.with_(max_queue=3) for _ in range(3)]
    held, crowd = await hold(bench), Crowd()
    for number in range(3):
        await crowd.come(gateways[number], str(number))
    with pytest.raises(OverloadedError, match="3 requests wait") as caught:
        await gateways[0].router.route(demand(450, 100))
    assert caught.value.retry_after_s
    await bench.router.settle(held)
    await asyncio.gather(*crowd.tasks)


async def test_a_deadline_ends_the_wait(bench: Bench) -> None:
    held = await hold(bench)
    with pytest.raises(OverloadedError, match="full"):
        await bench.with_(queue_timeout_s=0.1).router.route(demand(450, 100))
    assert await waiting(bench) == 0
    await bench.router.settle(held)
    await bench.assert_zero()


async def test_a_client_that_leaves_gives_up_its_place(bench: Bench) -> None:
    held, crowd = await hold(bench), Crowd()
    await crowd.come(bench, "leaves")
    await crowd.come(bench, "stays")
    crowd.tasks[0].cancel()
    await bench.router.settle(held)
    await crowd.tasks[1]
    assert crowd.order == ["stays"]

    async def empty() -> bool:
        return await waiting(bench) == 0

    await until(empty)
    await bench.assert_zero()


async def test_a_gateway_that_died_holds_up_nobody(bench: Bench, clock: Any) -> None:
    dead, held, crowd = bench.with_(), await hold(bench), Crowd()
    await crowd.come(dead, "dead")
    dead.router._abandon = lambda ask: None  # type: ignore[method-assign]  # it cannot even say goodbye
    crowd.tasks[0].cancel()
    await asyncio.gather(*crowd.tasks, return_exceptions=True)
    assert await waiting(bench) == 1
    await crowd.come(bench, "alive")
    await bench.router.settle(held)
    clock.pass_(4)
    await bench.measured("m", tokens_per_s=1000, step_ms=10)
    await asyncio.wait_for(crowd.tasks[1], 5)
    assert crowd.order == ["alive"]
    assert await waiting(bench) == 0


async def test_who_was_admitted_before_passes_the_queue(bench: Bench) -> None:
    tight = bench.with_(tenants={"*": TenantConfig(requests_per_min=1)})
    held, crowd = await bench.router.route(demand(400, 100)), Crowd()
    await crowd.come(bench, "waits")
    moved = await tight.router.route(demand(10, 10, urgent=True))
    assert crowd.order == []
    for lease in (moved, held):
        await bench.router.settle(lease)
    await crowd.tasks[0]
    await bench.assert_zero()


async def test_requests_with_other_needs_are_not_held_up(bench: Bench) -> None:
    await bench.join("rich", capabilities=frozenset({"min_p"}))
    await bench.router.route(demand(1500, 100, whole=True, needs=frozenset({"min_p"})))
    lease = await hold(bench)
    assert chosen(lease)[1] == "m"
    crowd = Crowd()
    await crowd.come(bench, "waits")
    await bench.join("rich2", capabilities=frozenset({"min_p"}))
    quick = bench.with_(queue_timeout_s=0.05)
    assert chosen(await quick.router.route(demand(10, 10, needs=frozenset({"min_p"}))))[1] == "rich2"
    await bench.router.settle(lease)
    await crowd.tasks[0]


async def test_race_of_four_gateways_for_one_worker_serves_everyone_once(bench: Bench) -> None:
    gateways = [bench.with_() for _ in range(4)]
    running, most = 0, 0

    async def one(number: int) -> None:
        nonlocal running, most
        router = gateways[number % 4].router
        lease = await router.route(demand(450, 100))
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        await router.settle(lease)

    async with asyncio.timeout(20):
        await asyncio.gather(*(one(number) for number in range(80)))
    assert most == 1
    assert await waiting(bench) == 0
    await bench.assert_zero()


# --- pools at zero ----------------------------------------------------------------------------------------------------


@pytest.fixture
def asleep(redis_client: Redis, cluster_name: str, clock: Callable[[], int], make_worker: Make) -> Bench:
    """No worker, and a request waits for one, though none waits for room."""
    return Bench(redis_client, cluster_name, clock, make_worker, wakes={"m": 30.0})


async def counted(bench: Bench) -> dict[str, int]:
    return await count_waiting(bench.client, bench.cluster, bench.clock())


async def wait_in(bench: Bench, *demands: Demand) -> list[asyncio.Task[Assignment]]:
    """Requests that stand in the queue, one after the other."""
    tasks = []
    for each in demands:
        bench.clock.pass_(0.001)  # type: ignore[attr-defined]
        before = sum((await counted(bench)).values())
        tasks.append(asyncio.create_task(bench.router.route(each)))

        async def queued(before: int = before) -> bool:
            return sum((await counted(bench)).values()) > before

        await until(queued)
    return tasks


async def test_requests_wait_for_the_first_worker_of_their_model(asleep: Bench) -> None:
    seed = demand(needs=frozenset({"all_sampling", "lora:x"}))
    tasks = await wait_in(asleep, demand(), demand(), seed)
    found = await counted(asleep)
    assert {demand_of(name, ["m", "m:all"]): count for name, count in found.items()} == {
        ("m", frozenset()): 2,
        ("m", frozenset({"all_sampling", "lora:x"})): 1,
    }
    with pytest.raises(NoWorkerError):
        await asleep.router.route(demand(model="other"))
    assert await last_asked(asleep.client, asleep.cluster) == {}
    await asleep.join("m", capabilities=frozenset({"all_sampling"}), adapters=frozenset({"x"}))
    for lease in await asyncio.wait_for(asyncio.gather(*tasks), 5):
        assert chosen(lease) == (None, "m")
        await asleep.router.settle(lease)
    assert await last_asked(asleep.client, asleep.cluster) == {"m": asleep.clock()}
    assert await counted(asleep) == {}
    await asleep.assert_zero()


async def test_one_who_waited_for_a_worker_goes_on_waiting_for_room_and_a_newcomer_does_not(asleep: Bench) -> None:
    first, second = await wait_in(asleep, demand(450, 100), demand(450, 100))
    await asleep.join("m")
    lease = await asyncio.wait_for(first, 5)
    with pytest.raises(OverloadedError, match="1 requests wait"):
        await asleep.router.route(demand(450, 100))
    assert not second.done()
    await asleep.router.settle(lease)
    await asleep.router.settle(await asyncio.wait_for(second, 5))
    await asleep.assert_zero()


async def test_with_a_queue_everyone_there_waits_for_the_worker_as_long(asleep: Bench) -> None:
    """Those too whose turn it is not, and who could wait for room a moment only."""
    both = asleep.with_(queue_timeout_s=0.05, wakes={"m": 30.0})
    tasks = await wait_in(both, demand(), demand(), demand())
    await asyncio.sleep(0.1)
    assert not any(task.done() for task in tasks)
    await both.join("m")
    for lease in await asyncio.wait_for(asyncio.gather(*tasks), 5):
        await both.router.settle(lease)


async def test_a_worker_that_does_not_come_in_time_is_a_503_and_so_is_a_full_queue(asleep: Bench) -> None:
    with pytest.raises(NoWorkerError, match="no live worker") as late:
        await asleep.with_(wakes={"m": 0.1}).router.route(demand())
    assert (late.value.http_status, late.value.retry_after_s) == (503, 5.0)
    assert await counted(asleep) == {}
    narrow = asleep.with_(max_queue=1, wakes={"m": 30.0})
    (task,) = await wait_in(narrow, demand())
    with pytest.raises(NoWorkerError) as full:
        await narrow.router.route(demand())
    assert full.value.retry_after_s == 5.0
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    async def empty() -> bool:
        return await counted(narrow) == {}

    await until(empty)  # whoever leaves wakes nobody any more
    await asleep.assert_zero()


async def test_who_was_admitted_before_does_not_wait_for_a_worker(asleep: Bench) -> None:
    with pytest.raises(NoWorkerError):
        await asleep.router.route(demand(urgent=True))


async def test_those_of_a_gateway_that_died_are_not_counted(asleep: Bench, clock: Any) -> None:
    (task,) = await wait_in(asleep, demand())
    asleep.router._abandon = lambda ask: None  # type: ignore[method-assign]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert sum((await counted(asleep)).values()) == 1
    clock.pass_(4)
    assert await counted(asleep) == {}


# --- tenants ----------------------------------------------------------------------------------------------------------


def limited(bench: Bench, **limits: Any) -> Bench:
    return bench.with_(max_pending_tokens=10**9, tenants={"*": TenantConfig(**limits)})


async def test_requests_a_minute(bench: Bench, clock: Any) -> None:
    shop = limited(bench, requests_per_min=3)
    for _ in range(3):
        await shop.router.route(demand())
    with pytest.raises(RateLimitedError, match="requests a minute") as caught:
        await shop.router.route(demand())
    assert (caught.value.http_status, caught.value.retry_after_s) == (429, 20.0)
    clock.pass_(20)
    await bench.measured("m", tokens_per_s=1000, step_ms=10)
    await shop.router.route(demand())
    with pytest.raises(RateLimitedError):
        await shop.router.route(demand())


async def test_tokens_a_minute_count_what_was_used(bench: Bench, clock: Any) -> None:
    shop = limited(bench, tokens_per_min=1000)
    lease = await shop.router.route(demand(100, 800))
    with pytest.raises(RateLimitedError, match="tokens a minute") as caught:
        await shop.router.route(demand(100, 200))
    assert caught.value.retry_after_s == 12.0
    await shop.router.settle(lease, generated=50)  # 750 come back
    await shop.router.settle(await shop.router.route(demand(100, 200)), generated=10**6)  # no more than was taken
    await shop.router.route(demand(100, 400))
    with pytest.raises(RateLimitedError):
        await shop.router.route(demand(100, 100))


async def test_a_request_larger_than_its_bucket_passes_when_that_is_full(bench: Bench, clock: Any) -> None:
    shop = limited(bench, tokens_per_min=100)
    await shop.router.route(demand(500, 500))
    with pytest.raises(RateLimitedError) as caught:
        await shop.router.route(demand(500, 500))
    assert caught.value.retry_after_s == 60.0
    clock.pass_(600)
    await bench.measured("m", tokens_per_s=1000, step_ms=10)
    await shop.router.route(demand(1, 1))


async def test_requests_at_once(bench: Bench) -> None:
    shop = limited(bench, concurrent=2)
    leases = [await shop.router.route(demand(samples=3)) for _ in range(2)]
    with pytest.raises(RateLimitedError, match="at once"):
        await shop.router.route(demand())
    for lease in leases:
        for sample in range(3):
            await shop.router.settle(replace(lease, sample=sample))
    await shop.router.settle(await shop.router.route(demand()))


async def test_each_tenant_has_its_own_and_the_unknown_share(bench: Bench) -> None:
    shop = bench.with_(
        max_pending_tokens=10**9, tenants={"*": TenantConfig(requests_per_min=1), "a": TenantConfig(requests_per_min=1)}
    )
    await shop.router.route(demand(terms=Terms(tenant="a")))
    await shop.router.route(demand(terms=Terms(tenant="made-up-1")))
    for tenant in ("a", "made-up-2", ""):
        with pytest.raises(RateLimitedError):
            await shop.router.route(demand(terms=Terms(tenant=tenant)))
    keys = [key async for key in bench.client.scan_iter(match=f"{{jw:{bench.cluster}}}:*:tenant:*")]
    assert len(keys) == 2  # however many names callers think of


@pytest.mark.parametrize("limits", [{"requests_per_min": 1e-6}, {"tokens_per_min": 1e-6}, {"requests_per_min": 1e9}])
async def test_absurd_limits_let_one_pass_and_time_run_back(bench: Bench, clock: Any, limits: dict[str, float]) -> None:
    shop = limited(bench, **limits)
    await shop.router.route(demand())
    clock.pass_(-3600)
    await bench.measured("m", tokens_per_s=1000, step_ms=10)
    if limits.get("requests_per_min") == 1e9:
        await shop.router.route(demand())
    else:
        with pytest.raises(RateLimitedError) as caught:
            await shop.router.route(demand())
        assert caught.value.retry_after_s == 60.0


async def test_race_of_many_for_few_tokens(bench: Bench) -> None:
    shops = [limited(bench, requests_per_min=10, concurrent=50) for _ in range(4)]
    results = await asyncio.gather(
        *(shops[number % 4].router.route(demand()) for number in range(60)), return_exceptions=True
    )
    granted = [result for result in results if isinstance(result, Assignment)]
    assert len(granted) == 10
    assert all(isinstance(result, RateLimitedError) for result in results if result not in granted)
    await asyncio.gather(*(shops[0].router.settle(lease) for lease in granted))
    await bench.assert_zero()


# --- objectives -------------------------------------------------------------------------------------------------------


async def test_what_cannot_be_kept_is_refused_at_once(bench: Bench) -> None:
    lease = await bench.router.route(demand(300, 10))
    with pytest.raises(ObjectiveError, match=r"400 ms \(asked: 200 ms\)") as caught:
        await bench.router.route(demand(100, 10, terms=Terms(slo_ttft_ms=200)))
    assert (caught.value.http_status, caught.value.retry_after_s) == (429, 1.0)
    with pytest.raises(ObjectiveError, match="every 10 ms"):
        await bench.router.route(demand(100, 10, terms=Terms(slo_tpot_ms=5)))
    kept = await bench.router.route(demand(100, 10, terms=Terms(slo_ttft_ms=400, slo_tpot_ms=10)))
    assert (kept.ttft_ms, kept.tpot_ms) == (400, 10)
    for each in (lease, kept):
        await bench.router.settle(each)
    await bench.assert_zero()


async def test_an_objective_that_only_one_plan_keeps_decides(bench: Bench) -> None:
    auto = bench.with_(split="auto", spill_ms=10**6)
    await bench.registry.deregister("m", bench.epochs["m"])
    for name, role in (("p", "prefill"), ("d", "decode")):
        await bench.join(name, role, fingerprint=role)
        await bench.measured(name, tokens_per_s=1000, step_ms=10)
    neighbours = [await auto.router.route(demand(1, 30, whole=True)) for _ in range(4)]
    for lease in neighbours:
        await auto.router.prefill_done(lease)
    await auto.router.route(demand(50, 10, exclude=frozenset({"d"})))
    assert (await auto.router.route(demand(40, 10))).reason == "split"
    strict = await auto.router.route(demand(40, 10, terms=Terms(slo_ttft_ms=60)))
    assert (chosen(strict), strict.reason) == ((None, "d"), "whole_cheaper")


# --- sessions ---------------------------------------------------------------------------------------------------------


async def test_a_session_stays_while_that_costs_little(bench: Bench, clock: Any) -> None:
    for name in ("a", "b", "c"):
        await bench.join(name)
        await bench.measured(name, tokens_per_s=1000, step_ms=10)
    mine = {"terms": Terms(session="s")}
    home = chosen(await bench.router.route(demand(2, 10, **mine)))[1]
    assert [chosen(await bench.router.route(demand(2, 10, **mine)))[1] for _ in range(5)] == [home] * 5
    await bench.router.route(demand(150, 10, held={home: Held(bench.epochs[home], 149)}))
    await bench.router.route(demand(300, 10, exclude=frozenset({"a", "b", "c", "m"} - {home})))
    assert chosen(await bench.router.route(demand(10, 10, **mine)))[1] != home  # 300 ms of queue are too much


async def test_a_sessions_worker_that_is_gone_is_no_loss_and_sessions_are_forgotten(bench: Bench, clock: Any) -> None:
    await bench.join("a")
    mine = {"terms": Terms(session="s")}
    home = chosen(await bench.router.route(demand(**mine)))[1]
    await bench.registry.deregister(home, bench.epochs[home])
    assert chosen(await bench.router.route(demand(**mine)))[1] == ({"a", "m"} - {home}).pop()
    clock.pass_(601)
    await bench.router.expire()
    clock.pass_(20)
    await bench.router.expire()
    assert [key async for key in bench.client.scan_iter(match=f"{{jw:{bench.cluster}}}:*:session*")] == []


# --- headers ----------------------------------------------------------------------------------------------------------


def test_headers_are_read() -> None:
    headers = {
        "x-tenant-id": "t",
        "x-session-id": "s",
        "x-priority": "-3",
        "x-slo-ttft-ms": "250",
        "x-slo-tpot-ms": "2.5",
    }
    assert Terms.parse(headers) == Terms("t", "s", -3, 250.0, 2.5)
    assert Terms.parse({"x-other": "1"}) == Terms()


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-tenant-id", "a b"),
        ("x-tenant-id", "x" * 129),
        ("x-session-id", "\n"),
        ("x-session-id", "ü"),
        ("x-priority", "high"),
        ("x-priority", "1001"),
        ("x-priority", "1e3"),
        ("x-priority", ""),
        ("x-slo-ttft-ms", "0"),
        ("x-slo-ttft-ms", "-1"),
        ("x-slo-ttft-ms", "nan"),
        ("x-slo-ttft-ms", "inf"),
        ("x-slo-tpot-ms", "soon"),
        ("x-slo-tpot-ms", "1e99"),
    ],
)
def test_headers_that_do_not_parse_are_named(header: str, value: str) -> None:
    with pytest.raises(InvalidRequestError, match=header):
        Terms.parse({header: value})
