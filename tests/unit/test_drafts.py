"""Draft actors in Redis: engines are spread evenly, keep theirs, and lose it only when it is gone."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from redis.asyncio import Redis

from joinwise.actors.draft.binding import Binding
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
    await redis_client.hset(keys.drafts(POOL), "broken", "no number")  # type: ignore[misc]
    await redis_client.hset(keys.bound(POOL), "e", "99999999999999 nobody")  # type: ignore[misc]
    await drafts.beat(POOL, info("a"))
    assert await bound(drafts, "e") == {"e": "a"}


# The engine's side.


async def test_an_engine_is_pointed_at_its_actor_only_when_that_changes(drafts: Drafts) -> None:
    pointed: list[str] = []

    async def point(address: str) -> None:
        pointed.append(address)

    binding = Binding(drafts, POOL, "e", TARGET, point)
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

    binding = Binding(drafts, POOL, "e", TARGET, point)
    await drafts.beat(POOL, info("a", vocabulary_model="target2", vocabulary_size=100, vocabulary_digest="a" * 32))
    await binding.renew()
    await drafts.leave(POOL, "a")
    await drafts.beat(POOL, info("b", vocabulary_model="stranger", vocabulary_size=7, vocabulary_digest="b" * 32))
    with pytest.raises(ConfigError, match=r"'stranger'.*'target'"):
        await binding.renew()
    assert pointed == ["a:1", ""]
