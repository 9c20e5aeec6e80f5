"""The registry against a real Redis: who may join, who is forgotten."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from joinwise.cluster.config import RouterConfig
from joinwise.cluster.errors import RegistrationRefusedError
from joinwise.cluster.router.registry import Registry, WorkerInfo, WorkerLoad
from joinwise.cluster.store.client import StoreClock
from joinwise.cluster.store.keys import Keys

Make = Callable[..., WorkerInfo]


@pytest.fixture
def registry(redis_client: Redis, cluster_name: str, clock: Callable[[], int]) -> Registry:
    return Registry(redis_client, cluster_name, RouterConfig(worker_ttl_s=5), clock)


async def test_what_is_registered_is_listed(registry: Registry, make_worker: Make) -> None:
    info = make_worker("w", "decode", adapters=frozenset({"tone"}))
    epoch = await registry.register(info)
    assert await registry.list() == (replace(info, epoch=epoch),)
    load = WorkerLoad(running=3, waiting=1, kv_blocks_free=5, kv_blocks_total=9, decode_step_ms=12.5)
    assert await registry.heartbeat("w", epoch, load)
    (state,) = await registry.states()
    assert (state.load, state.pending_tokens) == (load, 0)
    assert await registry.deregister("w", epoch)
    assert not await registry.deregister("w", epoch)
    assert await registry.list() == ()


@pytest.mark.parametrize("change", [{"model_digest": "other"}, {"kv_layout": "other"}])
async def test_another_model_or_layout_is_refused(
    registry: Registry, make_worker: Make, change: dict[str, str], clock: object
) -> None:
    await registry.register(make_worker("old", "prefill"))
    odd = make_worker("new", "decode", **change)
    with pytest.raises(RegistrationRefusedError, match=r"other.*differ from those of worker old"):
        await registry.register(odd)
    assert [info.worker_id for info in await registry.list()] == ["old"]
    await registry.register(replace(odd, model="another"))
    await registry.register(make_worker("old", "prefill", **change))  # alone, it may change
    clock.pass_(6)  # type: ignore[attr-defined]
    await registry.register(make_worker("new", "decode"))  # the dead have no say
    assert [info.worker_id for info in await registry.list()] == ["new"]


async def test_a_stale_life_is_told_to_register_again(registry: Registry, make_worker: Make) -> None:
    first = await registry.register(make_worker("w"))
    second = await registry.register(make_worker("w"))
    assert second > first
    assert not await registry.heartbeat("w", first, WorkerLoad())
    assert not await registry.deregister("w", first)
    assert await registry.heartbeat("w", second, WorkerLoad())
    assert not await registry.heartbeat("unknown", 1, WorkerLoad())


async def test_epochs_grow_over_lost_data(
    registry: Registry, make_worker: Make, redis_client: Redis, cluster_name: str, clock: object
) -> None:
    first = await registry.register(make_worker("w"))
    await redis_client.delete(*[key async for key in redis_client.scan_iter(match=f"*{cluster_name}}}*")])
    clock.pass_(0.001)  # type: ignore[attr-defined]
    assert not await registry.heartbeat("w", first, WorkerLoad())
    assert await registry.register(make_worker("w")) > first


async def test_a_clock_that_steps_back_kills_nobody(registry: Registry, make_worker: Make, clock: object) -> None:
    epoch = await registry.register(make_worker("w"))
    assert await registry.heartbeat("w", epoch, WorkerLoad(), now_ms=0)
    assert len(await registry.list()) == 1
    clock.pass_(5.001)  # type: ignore[attr-defined]
    assert await registry.list() == ()


async def test_a_zero_byte_in_a_name_is_refused(registry: Registry, make_worker: Make) -> None:
    with pytest.raises(RegistrationRefusedError, match="zero byte"):
        await registry.register(make_worker("w", fingerprint="a\0b"))
    assert await registry.list() == ()


async def test_a_worker_joins_with_every_adapter(registry: Registry, make_worker: Make) -> None:
    await registry.add_adapter("m", "tone", "/a/tone", 7)
    (adapter,) = await registry.adapters("m")
    assert (adapter.name, adapter.path, adapter.lora_id) == ("tone", "/a/tone", 7)
    with pytest.raises(RegistrationRefusedError, match="has not loaded the adapter 'tone'"):
        await registry.register(make_worker("w"))
    epoch = await registry.register(make_worker("w", adapters=frozenset({"tone"})))
    info = replace(make_worker("w"), epoch=epoch)
    assert await registry.set_adapters(info, ["tone", "style"])
    assert not await registry.set_adapters(replace(info, epoch=1), [])
    assert (await registry.list())[0].adapters == {"tone", "style"}
    assert await registry.remove_adapter("m", "tone")
    assert not await registry.remove_adapter("m", "tone")
    assert await registry.adapters("m") == ()


async def test_all_keys_share_one_hash_slot(
    registry: Registry, make_worker: Make, redis_client: Redis, cluster_name: str
) -> None:
    await registry.register(make_worker("w{x}", model="m{y}"))
    await registry.add_adapter("m", "a", "p", 1)
    base = Keys(cluster_name).base
    found = [key async for key in redis_client.scan_iter(match=f"*{cluster_name}}}*")]
    assert len(found) == 8
    assert all(key.startswith(base) for key in found)
    assert base.startswith("{jw:")


async def test_the_shared_clock_is_redis_own(redis_client: Redis) -> None:
    clock = StoreClock(redis_client)
    seconds, micros = await redis_client.time()
    assert abs(await clock.now_ms() - (seconds * 1000 + micros / 1000)) < 500


async def test_troubles_are_kept_until_they_are_mended(registry: Registry, redis_client: Redis) -> None:
    assert await registry.troubles() == ()
    await registry.set_troubles(["decode-0 crashes again and again"], 60)
    assert await registry.troubles() == ("decode-0 crashes again and again",)
    assert 0 < await redis_client.ttl(registry._keys.troubles) <= 60
    await registry.set_troubles([], 60)
    assert await registry.troubles() == ()


async def test_the_clusters_token_outlives_a_redis_that_has_lost_it(
    registry: Registry, redis_client: Redis, cluster_name: str
) -> None:
    token = await registry.token()
    assert token and await registry.token() == token
    assert await registry.token("another") == token  # the one that there is holds
    await redis_client.delete(Keys(cluster_name).token)
    assert await registry.token(token) == token
    assert await registry.token() == token
