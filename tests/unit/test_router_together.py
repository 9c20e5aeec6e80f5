"""Decisions that one gateway asks for together: each as if it had come by itself, and none harmed by its neighbours."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from helpers.router_rig import Bench, Make, chosen, demand
from redis import exceptions as failures
from redis.asyncio import Redis

from joinwise.cluster.errors import JoinwiseError
from joinwise.cluster.router.router import Assignment, Demand, Held, Terms, samples_of
from joinwise.cluster.router.together import Together


class Calls:
    """A call that is answered when the test says so: with each ask twice over, or a failure."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.begun = asyncio.Event()
        self.go = asyncio.Event()
        self.failure: Callable[[Sequence[int]], Exception | None] = lambda _: None

    async def __call__(self, asks: Sequence[int]) -> list[int]:
        self.seen.append(list(asks))
        self.begun.set()
        await self.go.wait()
        if error := self.failure(asks):
            raise error
        return [2 * ask for ask in asks]


async def _asked(together: Together[int, int], calls: Calls, *later: int) -> list[asyncio.Task[int]]:
    """One call on its way for 0, and further asks behind it."""
    tasks = [asyncio.create_task(together.ask(0))]
    await calls.begun.wait()
    tasks += [asyncio.create_task(together.ask(each)) for each in later]
    await asyncio.sleep(0)
    return tasks


async def test_what_comes_while_a_call_is_on_its_way_goes_in_the_next() -> None:
    calls = Calls()
    tasks = await _asked(Together(calls, 3), calls, 1, 2, 3, 4)
    calls.go.set()
    assert await asyncio.gather(*tasks) == [0, 2, 4, 6, 8]
    assert calls.seen == [[0], [1, 2, 3], [4]]


async def test_one_that_is_refused_fails_alone() -> None:
    calls = Calls()
    calls.failure = lambda asks: failures.ResponseError("bad") if 2 in asks else None
    tasks = await _asked(Together(calls, 9), calls, 1, 2, 3)
    calls.go.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [answers[0], answers[1], answers[3]] == [0, 2, 6]
    assert isinstance(answers[2], failures.ResponseError)
    assert calls.seen == [[0], [1, 2, 3], [1], [2], [3]]


@pytest.mark.parametrize("error", [failures.ConnectionError("gone"), failures.OutOfMemoryError("full")])
async def test_without_redis_those_that_wait_are_told_at_once(error: Exception) -> None:
    calls = Calls()
    calls.failure = lambda _: error
    together = Together(calls, 9)
    tasks = await _asked(together, calls, 1, 2)
    calls.go.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in answers] == [type(error)] * 3
    assert len(set(map(id, answers))) == 3  # each its own, to be raised with its own traceback
    assert calls.seen == [[0]]
    calls.failure = lambda _: None
    assert await together.ask(7) == 14


async def test_a_cancelled_ask_is_not_sent_and_the_call_goes_on_without_it() -> None:
    calls = Calls()
    together = Together(calls, 9)
    tasks = await _asked(together, calls, 1, 2)
    tasks[0].cancel()
    tasks[1].cancel()
    past = asyncio.create_task(together.past())
    await asyncio.sleep(0)
    assert not past.done()
    calls.go.set()
    await past
    assert await tasks[2] == 4
    assert calls.seen == [[0], [2]]
    await together.past()


# --- decisions -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(redis_client: Redis, cluster_name: str, clock: Callable[[], int], make_worker: Make) -> tuple[Bench, Bench]:
    """Two clusters that are alike."""
    made = [
        Bench(redis_client, f"{cluster_name}-{each}", clock, make_worker, split="auto", max_pending_tokens=1500)
        for each in ("one", "many")
    ]
    return made[0], made[1]


def _request(rng: random.Random, number: int, epochs: dict[str, int]) -> Demand:
    """Anything that a request may bring."""
    changes: dict[str, Any] = {
        "request_id": f"r{number}",
        "samples": rng.choice((1, 1, 3)),
        "whole": rng.random() < 0.1,
    }
    if rng.random() < 0.3:
        changes["held"] = {each: Held(epochs[each], rng.randrange(900)) for each in rng.sample(sorted(epochs), 2)}
    if rng.random() < 0.2:
        changes["exclude"] = frozenset(rng.sample(sorted(epochs), 2))
    if rng.random() < 0.2:
        changes["needs"] = frozenset({"min_p"})
    session = f"s{rng.randrange(4)}" if rng.random() < 0.3 else ""
    changes["terms"] = Terms(tenant=rng.choice(("", "small")), session=session, slo_ttft_ms=rng.choice((0, 0, 3000)))
    return demand(rng.randrange(20, 900), rng.randrange(10, 300), **changes)


async def test_a_batch_decides_as_its_requests_one_after_another(pair: tuple[Bench, Bench]) -> None:
    tenants = {"small": {"requests_per_min": 30, "tokens_per_min": 20_000, "concurrent": 9, "weight": 1}}
    one, many = (each.with_(tenants=tenants) for each in pair)
    roles = ["prefill"] * 5 + ["decode"] * 5 + ["mixed"] * 2
    for number, role in enumerate(roles):
        for bench in (one, many):
            features = {"replay", "min_p"} if number % 2 else {"replay"}
            await bench.join(f"w{number:02}", role, capabilities=frozenset(features))
            speed = (number % 3 + 1) * 1000
            await bench.measured(f"w{number:02}", tokens_per_s=speed, step_ms=10 + number % 4)
    many.router._deciding._most = 16

    async def tell(bench: Bench, request: Demand) -> Any:
        try:
            return await bench.router.route(request)
        except JoinwiseError as error:
            return f"{type(error).__name__}: {error}"

    def told(answer: Any) -> Any:
        return answer if isinstance(answer, str) else (*chosen(answer), answer.reason, answer.ttft_ms, answer.tpot_ms)

    rng, held, reasons = random.Random(5), [], set()
    for group in range(12):
        requests = [_request(rng, 100 * group + number, one.epochs) for number in range(24)]
        twins = [_renamed(request, one.epochs, many.epochs) for request in requests]
        alone = [await tell(one, request) for request in requests]
        together = await asyncio.gather(*(tell(many, request) for request in twins))
        assert [told(answer) for answer in together] == [told(answer) for answer in alone]
        assert await one.pending() == await many.pending()
        assert await one.roles() == await many.roles()
        reasons |= {told(answer)[2] for answer in alone if not isinstance(answer, str)}
        reasons |= {answer.split(":")[0] for answer in alone if isinstance(answer, str)}
        held += [pair for pair in zip(alone, together, strict=True) if not isinstance(pair[0], str)]
        rng.shuffle(held)
        while len(held) > 6:
            mine, other = held.pop()
            for bench, lease in ((one, mine), (many, other)):
                assert await bench.router._client.exists(bench.router._keys.lease(lease.lease_id))
                for sample in range(3):
                    await bench.router.settle(_sample(lease, sample))
    assert {"split", "whole_cheaper", "RateLimitedError", "OverloadedError"} <= reasons
    for mine, other in held:
        for sample in range(3):
            await one.router.settle(_sample(mine, sample))
            await many.router.settle(_sample(other, sample))
    await one.assert_zero()
    await many.assert_zero()


async def test_endings_that_come_together_count_once(pair: tuple[Bench, Bench]) -> None:
    bench = pair[0]
    await bench.join("p", "prefill")
    await bench.join("d", "decode")
    leases = [await bench.router.route(demand(20, 5, samples=samples)) for samples in (1, 3, 1, 2)]
    parts = [part for lease, samples in zip(leases, (1, 3, 1, 2), strict=True) for part in samples_of(lease, samples)]
    strange = [replace(parts[0], lease_id="nobody"), replace(parts[1], lease_epoch=3), *parts[2:5]]
    ended = await asyncio.gather(*map(bench.router.settle, (*parts, *strange)))
    assert ended == [True] * len(parts) + [False] * len(strange)
    await bench.assert_zero()


async def test_a_lease_whose_asker_left_during_the_call_is_given_back(pair: tuple[Bench, Bench]) -> None:
    bench = pair[0]
    await bench.join("m")
    deciding = bench.router._deciding
    call: Callable[[Sequence[Any]], Awaitable[Sequence[Any]]] = deciding._call
    begun, go = asyncio.Event(), asyncio.Event()

    async def slow(asks: Sequence[Any]) -> Sequence[Any]:
        begun.set()
        await go.wait()
        return await call(asks)

    deciding._call = slow
    left, stays = (asyncio.create_task(bench.router.route(demand(request_id=each))) for each in ("left", "stays"))
    await begun.wait()
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    go.set()
    lease = await stays
    await asyncio.gather(*bench.router._abandoned)
    assert await bench.pending() == {"m": (100, 110)}
    await bench.router.settle(lease)
    await bench.assert_zero()


def _renamed(request: Demand, mine: dict[str, int], theirs: dict[str, int]) -> Demand:
    """The same request in the other cluster, where workers have other epochs."""
    held = {each: Held(theirs[each], known.tokens) for each, known in request.held.items()}
    assert all(mine[each] == known.epoch for each, known in request.held.items())
    return replace(request, held=held)


def _sample(lease: Assignment, sample: int) -> Assignment:
    return replace(lease, sample=sample)
