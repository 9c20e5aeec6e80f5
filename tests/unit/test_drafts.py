"""Draft actors in Redis: engines are spread evenly, keep theirs, and lose it only when it is gone."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from redis.asyncio import Redis

from joinwise.actors.draft.binding import Binding, round_trip
from joinwise.actors.draft.vocabulary import Vocabulary
from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.drafts import DraftInfo, Drafts
from joinwise.cluster.errors import ConfigError
from joinwise.cluster.store.keys import Keys

POOL = "p"
TARGET = Vocabulary("target", 100, "a" * 32)


@pytest.fixture
def drafts(redis_client: Redis, cluster_name: str, clock: Any) -> Drafts:
    return Drafts(redis_client, cluster_name, RouterConfig(worker_ttl_s=5), clock)


def info(name: str, **fields: Any) -> DraftInfo:
    return DraftInfo(name, f"{name}:1", f"{name}:2", "lookup", **fields)


async def bound(drafts: Drafts, *engines: str) -> dict[str, str]:
    found = {engine: await drafts.bind(POOL, engine) for engine in engines}
    return {engine: draft.draft_id for engine, draft in found.items() if draft is not None}


async def test_an_engine_gets_what_the_actor_said_of_itself(drafts: Drafts) -> None:
    assert await drafts.bind(POOL, "e") is None
    told = info("d", vocabulary_model="m", vocabulary_size=3, vocabulary_digest="x y {}")
    await drafts.beat(POOL, told)
    assert await drafts.bind(POOL, "e") == told
    assert await drafts.bind("another", "e") is None


async def test_engines_are_spread_evenly_and_keep_theirs(drafts: Drafts) -> None:
    engines = [f"e{number}" for number in range(9)]
    for name in "abc":
        await drafts.beat(POOL, info(name))
    first = await bound(drafts, *engines)
    assert Counter(first.values()) == {"a": 3, "b": 3, "c": 3}
    assert await bound(drafts, *reversed(engines)) == first


async def test_many_that_ask_at_once_are_spread_evenly_too(drafts: Drafts) -> None:
    for name in "abcd":
        await drafts.beat(POOL, info(name))
    found = await asyncio.gather(*(drafts.bind(POOL, f"e{number}") for number in range(100)))
    assert set(Counter(each.draft_id for each in found if each).values()) == {25}


async def test_a_new_actor_takes_its_share(drafts: Drafts) -> None:
    await drafts.beat(POOL, info("a"))
    engines = [f"e{number}" for number in range(6)]
    await bound(drafts, *engines)
    await drafts.beat(POOL, info("b"))
    second = await bound(drafts, *engines)
    assert Counter(second.values()) == {"a": 3, "b": 3}
    assert await bound(drafts, *engines) == second


@pytest.mark.parametrize("silent", [True, False])
async def test_the_engines_of_one_that_is_gone_go_to_the_others(drafts: Drafts, clock: Any, silent: bool) -> None:
    for name in "ab":
        await drafts.beat(POOL, info(name))
    engines = [f"e{number}" for number in range(4)]
    await bound(drafts, *engines)
    if silent:
        clock.pass_(4)
        await drafts.beat(POOL, info("b"))
        clock.pass_(4)
    else:
        await drafts.leave(POOL, "a")
    assert set((await bound(drafts, *engines)).values()) == {"b"}
    await drafts.leave(POOL, "b")
    assert await bound(drafts, *engines) == {}


async def test_of_two_the_nearer_is_asked_until_it_has_too_many_engines(drafts: Drafts) -> None:
    for name in "ab":
        await drafts.beat(POOL, info(name, round_ms=2.0))
    trips = {"a": 5, "b": 0}
    found = [await drafts.bind(POOL, f"e{number}", trips) for number in range(6)]
    assert [each.draft_id for each in found if each] == ["b", "b", "b", "a", "b", "a"]  # 2 4 6 7 8 9 ms


async def test_a_faster_actor_has_more_engines(drafts: Drafts) -> None:
    await drafts.beat(POOL, info("slow", round_ms=30.0))
    await drafts.beat(POOL, info("fast", round_ms=10.0))
    found = await bound(drafts, *(f"e{number}" for number in range(8)))
    assert Counter(found.values()) == {"fast": 6, "slow": 2}


async def test_an_engine_moves_for_a_good_deal_only(drafts: Drafts) -> None:
    await drafts.beat(POOL, info("a", round_ms=10.0))
    assert await bound(drafts, "e") == {"e": "a"}
    await drafts.beat(POOL, info("b", round_ms=9.0))
    assert await bound(drafts, "e") == {"e": "a"}
    await drafts.beat(POOL, info("b", round_ms=7.0))
    assert await bound(drafts, "e") == {"e": "b"}


@pytest.mark.parametrize("lie", [-1.0, 0.0, "much", None, float("nan")])
async def test_what_an_actor_cannot_have_taken_counts_as_nothing_said(drafts: Drafts, lie: Any) -> None:
    await drafts.beat(POOL, info("a", round_ms=lie))
    await drafts.beat(POOL, info("b", round_ms=0.5))
    assert set((await bound(drafts, "e1")).values()) == {"b"}


async def test_nothing_is_left_of_those_that_are_gone(
    drafts: Drafts, clock: Any, redis_client: Redis, cluster_name: str
) -> None:
    await drafts.beat(POOL, info("a"))
    await bound(drafts, "e1", "e2", "e3")
    await drafts.unbind(POOL, "e1")
    clock.pass_(10)
    assert await drafts.bind(POOL, "e2") is None
    keys = Keys(cluster_name)
    assert not await redis_client.exists(keys.drafts(POOL), keys.bound(POOL))


async def test_what_cannot_be_read_is_forgotten(drafts: Drafts, redis_client: Redis, cluster_name: str) -> None:
    keys = Keys(cluster_name)
    for number, text in enumerate(("no number", "1 {", "1 []", '1 {"draft_id": 3}')):
        await redis_client.hset(keys.drafts(POOL), f"broken-{number}", text)  # type: ignore[misc]
    await redis_client.hset(keys.bound(POOL), "e", "99999999999999 nobody")  # type: ignore[misc]
    await drafts.beat(POOL, info("a"))
    assert await drafts.of(POOL) == [info("a")]
    assert await bound(drafts, "e") == {"e": "a"}


# The engine's side.


async def nowhere(address: str) -> int:
    pytest.fail(f"{address} was measured, though there is no choice")


async def test_an_engine_asks_whom_it_reaches_sooner_and_measures_once(drafts: Drafts) -> None:
    pointed: list[str] = []
    measured: list[str] = []

    async def point(address: str) -> None:
        pointed.append(address)

    async def measure(address: str) -> int:
        measured.append(address)
        return {"a:1": 40, "b:1": 1}[address]

    for name in "ab":
        await drafts.beat(POOL, info(name))
    binding = Binding(drafts, POOL, "e", TARGET, point, measure)
    await binding.renew()
    await binding.renew()
    assert pointed == ["b:1"]
    assert sorted(measured) == ["a:1", "b:1"]
    await drafts.leave(POOL, "b")
    await binding.renew()
    assert pointed == ["b:1", "a:1"]


async def test_round_trips_of_ports_that_listen_and_that_do_not() -> None:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        assert await round_trip(f"127.0.0.1:{port}") < 1000
    assert await round_trip(f"127.0.0.1:{port}") == await round_trip("no port") == 1_000_000


async def test_an_engine_is_pointed_at_its_actor_only_when_that_changes(drafts: Drafts) -> None:
    pointed: list[str] = []

    async def point(address: str) -> None:
        pointed.append(address)

    binding = Binding(drafts, POOL, "e", TARGET, point, nowhere)
    await binding.renew()
    await drafts.beat(POOL, info("a"))
    await binding.renew()
    await binding.renew()
    await drafts.leave(POOL, "a")
    await drafts.beat(POOL, info("b"))
    await binding.renew()
    await drafts.leave(POOL, "b")
    await binding.renew()
    assert pointed == ["a:1", "b:1", ""]
    await binding.end()


async def test_another_vocabulary_is_refused_naming_both_and_not_asked(drafts: Drafts) -> None:
    pointed: list[str] = []

    async def point(address: str) -> None:
        pointed.append(address)

    binding = Binding(drafts, POOL, "e", TARGET, point, nowhere)
    await drafts.beat(POOL, info("a", vocabulary_model="target2", vocabulary_size=100, vocabulary_digest="a" * 32))
    await binding.renew()
    await drafts.leave(POOL, "a")
    await drafts.beat(POOL, info("b", vocabulary_model="stranger", vocabulary_size=7, vocabulary_digest="b" * 32))
    with pytest.raises(ConfigError, match=r"'stranger'.*'target'"):
        await binding.renew()
    assert pointed == ["a:1", ""]
