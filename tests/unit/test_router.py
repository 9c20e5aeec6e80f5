"""The router against a real Redis: choice, admission, leases, and the races between them."""

import asyncio
from collections.abc import Callable

import pytest
from helpers.router_rig import Bench, Make, chosen, demand
from redis.asyncio import Redis

from joinwise.cluster.config import RouterConfig
from joinwise.cluster.errors import InvalidRequestError, NoWorkerError, OverloadedError, StoreUnavailableError
from joinwise.cluster.router.admission import retry_after_s
from joinwise.cluster.router.registry import WorkerLoad
from joinwise.cluster.router.router import Assignment, Router, Running, WorkerRef, samples_of
from joinwise.cluster.store.client import connect
from joinwise.cluster.store.embedded import EmbeddedRedis
from joinwise.cluster.store.keys import Keys


@pytest.fixture
def bench(redis_client: Redis, cluster_name: str, clock: Callable[[], int], make_worker: Make) -> Bench:
    return Bench(redis_client, cluster_name, clock, make_worker)


# --- choice ----------------------------------------------------------------------------------------------------------


async def test_a_split_takes_one_worker_of_each_role_and_reserves_its_tokens(bench: Bench) -> None:
    epoch = await bench.join("p", "prefill")
    await bench.join("d", "decode")
    assignment = await bench.router.route(demand())
    assert (chosen(assignment), assignment.reason) == (("p", "d"), "split")
    assert assignment.prefill is not None
    assert assignment.prefill.epoch == epoch
    assert (assignment.prefill.engine_address, assignment.prefill.kv_address) == ("p:1", "p:2")
    assert assignment.expires_ms == bench.clock() + 10_000
    assert await bench.pending() == {"p": (100, 0), "d": (0, 110)}
    assert await bench.router.prefill_done(assignment)
    assert not await bench.router.prefill_done(assignment)
    assert await bench.pending() == {"p": (0, 0), "d": (0, 110)}
    assert len(await bench.router.leftovers()) == 2
    assert await bench.router.settle(assignment)
    assert not await bench.router.settle(assignment)
    await bench.assert_zero()


async def test_who_has_left_is_not_registered_and_who_has_died_is(bench: Bench) -> None:
    for name in ("leaves", "dies", "restarts"):
        await bench.join(name)
    workers = {
        state.info.worker_id: WorkerRef(state.info.worker_id, state.info.epoch, "", "")
        for state in await bench.registry.states()
    }
    await bench.registry.deregister("leaves", bench.epochs["leaves"])
    await bench.join("restarts")
    assert {name: await bench.router.registered(worker) for name, worker in workers.items()} == {
        "leaves": False,
        "dies": True,
        "restarts": False,  # that life is over
    }


async def test_the_shortest_queue_is_joined(bench: Bench) -> None:
    for i in range(3):
        await bench.join(f"p{i}", "prefill")
        await bench.join(f"d{i}", "decode")
    assignments = [await bench.router.route(demand(prompt)) for prompt in (300, 100, 100, 50)]
    assert [chosen(a)[0] for a in assignments] == ["p0", "p1", "p2", "p1"]


@pytest.mark.parametrize(
    ("roles", "whole", "expected", "reason"),
    [
        ({"d": "decode"}, False, (None, "d"), "no_prefill_worker"),
        ({"p": "prefill"}, False, (None, "p"), "no_decode_worker"),
        ({"m": "mixed"}, False, (None, "m"), "mixed"),
        ({"m": "mixed", "p": "prefill"}, False, ("p", "m"), "split"),
        ({"m": "mixed", "d": "decode"}, False, ("m", "d"), "split"),
        ({"p": "prefill", "d": "decode"}, True, (None, "d"), "whole"),
        ({"p": "prefill", "m": "mixed"}, True, (None, "m"), "whole"),
        ({"p": "prefill"}, True, (None, "p"), "whole"),
    ],
)
async def test_fallbacks(
    bench: Bench, roles: dict[str, str], whole: bool, expected: tuple[str | None, str], reason: str
) -> None:
    for worker_id, role in roles.items():
        await bench.join(worker_id, role)
    assignment = await bench.router.route(demand(whole=whole))
    assert (chosen(assignment), assignment.reason) == (expected, reason)
    if assignment.prefill is None:
        assert (await bench.pending())[expected[1]] == (100, 110)
    await bench.router.settle(assignment)
    await bench.assert_zero()


async def test_needs_and_exclusions_filter(bench: Bench) -> None:
    await bench.join("plain", capabilities=frozenset({"replay"}))
    await bench.join("rich", capabilities=frozenset({"replay", "min_p"}), adapters=frozenset({"tone"}))
    for needs in ({"min_p"}, {"lora:tone"}, {"min_p", "replay"}):
        assert chosen(await bench.router.route(demand(needs=frozenset(needs))))[1] == "rich"
    assert chosen(await bench.router.route(demand(exclude=frozenset({"rich"}))))[1] == "plain"
    with pytest.raises(NoWorkerError, match="with min") as caught:
        await bench.router.route(demand(needs=frozenset({"min"})))
    assert caught.value.request_id == "r"
    assert caught.value.retry_after_s
    with pytest.raises(NoWorkerError, match="other"):
        await bench.router.route(demand(model="other"))


async def test_the_search_goes_on_past_many_unfit_workers(bench: Bench) -> None:
    for i in range(40):
        await bench.join(f"a{i:02}", capabilities=frozenset())
    await bench.join("z", capabilities=frozenset({"replay"}))
    assert chosen(await bench.router.route(demand(needs=frozenset({"replay"}))))[1] == "z"


@pytest.mark.parametrize("field", ["prompt_tokens", "max_new_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1 << 31])
def test_absurd_counts_are_refused(field: str, value: int) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        demand(**{field: value})  # type: ignore[arg-type]


# --- admission -------------------------------------------------------------------------------------------------------


async def test_a_full_worker_refuses_with_a_time_to_come_back(bench: Bench) -> None:
    await bench.join("m")
    await bench.measured("m", tokens_per_s=5, step_ms=160)
    first = await bench.router.route(demand(400, 100))
    assert (await bench.pending())["m"] == (400, 500)
    with pytest.raises(OverloadedError) as caught:
        await bench.router.route(demand(100, 100))
    assert caught.value.retry_after_s == 9.0  # 100 tokens too many, of 900 in 400 * 200 ms + 100 * 160 / 16 ms
    assert (await bench.pending())["m"] == (400, 500)
    await bench.router.settle(first)
    await bench.assert_zero()


async def test_an_idle_worker_takes_a_request_beyond_the_limit(bench: Bench) -> None:
    await bench.join("p", "prefill")
    await bench.join("d", "decode")
    await bench.router.route(demand(1900, 100))
    with pytest.raises(OverloadedError):
        await bench.router.route(demand(1, 1))


async def test_a_request_waits_for_room(bench: Bench) -> None:
    await bench.join("m")
    patient = Router(
        bench.client, bench.cluster, bench.settings.model_copy(update={"queue_timeout_s": 5.0}), bench.clock
    )
    first = await patient.route(demand(450, 50))
    waiting = asyncio.create_task(patient.route(demand(450, 50)))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await patient.settle(first)
    assert await waiting


@pytest.mark.parametrize(("wait_ms", "seconds"), [(0, 1.0), (1, 1.0), (2001, 3.0), ("59999", 60.0), (10**12, 60.0)])
def test_retry_after(wait_ms: int | str, seconds: float) -> None:
    assert retry_after_s(wait_ms) == seconds


# --- leases ----------------------------------------------------------------------------------------------------------


async def test_a_lease_expires_unless_renewed(bench: Bench, clock: object) -> None:
    epoch = await bench.join("m")
    kept, lost = [await bench.router.route(demand()) for _ in range(2)]
    for _ in range(3):
        clock.pass_(4)  # type: ignore[attr-defined]
        await bench.registry.heartbeat("m", epoch, WorkerLoad())
        await bench.router.renew([kept])
    assert await bench.router.expire() == 1
    assert (await bench.pending())["m"] == (100, 110)
    assert await bench.router.renew([kept, lost]) == [lost.lease_id]
    assert not await bench.router.settle(lost)
    assert await bench.router.settle(kept)
    await bench.assert_zero()


async def test_another_epoch_settles_nothing(bench: Bench) -> None:
    await bench.join("m")
    lease = await bench.router.route(demand())
    forged = Assignment(lease.lease_id, lease.lease_epoch + 1, None, lease.decode, lease.reason, lease.expires_ms)
    assert not await bench.router.settle(forged)
    assert not await bench.router.prefill_done(forged)
    assert await bench.router.renew([forged]) == [lease.lease_id]
    assert await bench.router.settle(lease)


async def test_a_restarted_worker_owes_nothing_of_its_earlier_life(bench: Bench) -> None:
    await bench.join("m")
    old = await bench.router.route(demand())
    await bench.join("m")
    assert (await bench.pending())["m"] == (0, 0)
    new = await bench.router.route(demand(7, 3))
    assert new.decode.epoch > old.decode.epoch
    assert await bench.router.settle(old)
    assert (await bench.pending())["m"] == (7, 10)
    await bench.router.settle(new)
    await bench.assert_zero()


async def test_a_silent_worker_gets_nothing_and_is_forgotten(bench: Bench, clock: object) -> None:
    await bench.join("a")
    lease = await bench.router.route(demand())
    clock.pass_(5.001)  # type: ignore[attr-defined]
    with pytest.raises(NoWorkerError):
        await bench.router.route(demand())
    assert await bench.router.expire() == 0
    assert not await bench.registry.heartbeat("a", bench.epochs["a"], WorkerLoad())
    assert await bench.router.settle(lease)
    await bench.assert_zero()
    left = [key async for key in bench.client.scan_iter(match=f"*{bench.cluster}}}*")]
    assert {key.removeprefix(Keys(bench.cluster).base) for key in left} == {"epoch", "clock", "decisions"}


async def test_a_changed_role_keeps_what_is_pending(bench: Bench) -> None:
    await bench.join("a", "prefill")
    await bench.join("b", "decode")
    lease = await bench.router.route(demand())
    assert await bench.registry.set_role("a", bench.epochs["a"], "decode")
    assert not await bench.registry.set_role("a", bench.epochs["a"] + 1, "decode")
    assert await bench.pending() == {"a": (100, 0), "b": (0, 110)}
    assert chosen(await bench.router.route(demand(exclude=frozenset({"b"})))) == (None, "a")
    assert await bench.registry.drain("b", bench.epochs["b"])
    assert await bench.pending() == {"a": (200, 110), "b": (0, 110)}
    assert [info.worker_id for info in await bench.registry.list()] == ["a"]
    await bench.router.settle(lease)
    assert await bench.pending() == {"a": (100, 110), "b": (0, 0)}
    assert await bench.registry.set_role("b", bench.epochs["b"], "mixed")
    assert await bench.roles() == {"a": "decode", "b": "mixed"}
    await bench.pending()


async def test_a_repeated_route_call_reserves_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await bench.join("m")
    monkeypatch.setattr("joinwise.cluster.router.router.secrets.token_hex", lambda _: "same")
    assert await bench.router.route(demand()) == await bench.router.route(demand())
    assert (await bench.pending())["m"] == (100, 110)


async def test_a_cancelled_route_leaves_nothing(bench: Bench) -> None:
    await bench.join("m")
    for delay in (0, 0, 0.0002, 0.0005, 0.001, 0.002):
        task = asyncio.create_task(bench.router.route(demand()))
        await asyncio.sleep(delay)
        if not task.done():
            task.cancel()
        try:
            await bench.router.settle(await task)
        except asyncio.CancelledError:
            pass
    await asyncio.sleep(0.1)
    await bench.assert_zero()


async def test_a_flushed_script_cache_is_filled_again(bench: Bench) -> None:
    await bench.join("m")
    await bench.client.script_flush()
    assert await bench.router.settle(await bench.router.route(demand()))


async def test_leases_are_written_again_after_redis_has_lost_its_data(bench: Bench) -> None:
    for name, role in (("p", "prefill"), ("d", "decode")):
        await bench.join(name, role)
    split = await bench.router.route(demand(100, 10))
    many = samples_of(await bench.router.route(demand(50, 5, samples=3)), 3)
    running = [Running(split, demand(100, 10), False)]
    running += [Running(each, demand(50, 5, samples=3), True) for each in many[1:]]  # the first has ended
    await bench.client.delete(*[key async for key in bench.client.scan_iter(match=f"*{bench.cluster}}}*")])
    assert set(await bench.router.renew([split, *many])) == {split.lease_id, many[0].lease_id}
    assert await bench.router.adopt(running) == 0  # no worker is there yet
    bench.clock.pass_(0.01)  # type: ignore[attr-defined]
    for name, role in (("p", "prefill"), ("d", "decode")):
        await bench.join(name, role)
    adopted = await asyncio.gather(*(bench.with_().router.adopt(running) for _ in range(3)))
    assert sum(adopted) == 2  # once, however many say so
    assert await bench.pending() == {"p": (100, 0), "d": (0, 110 + 50 + 2 * 5)}
    assert await bench.router.renew([split, *many]) == []
    assert await bench.router.prefill_done(split)
    for each in (split, *many[1:]):
        assert await bench.router.settle(each)
    await bench.assert_zero()


async def test_a_lease_on_another_process_is_not_written_again(bench: Bench) -> None:
    await bench.join("m")
    lease = await bench.router.route(demand())
    await bench.router.settle(lease)
    await bench.join("m", engine_address="elsewhere:1")
    assert await bench.router.adopt([Running(lease, demand(), False)]) == 0
    assert await bench.router.adopt([]) == 0
    await bench.assert_zero()


async def test_clusters_do_not_see_each_other(bench: Bench) -> None:
    await bench.join("m")
    with pytest.raises(NoWorkerError):
        await Router(bench.client, bench.cluster + "-b", bench.settings, bench.clock).route(demand())


async def test_snapshot(bench: Bench) -> None:
    from joinwise.cluster.client.types import WorkerStatus

    await bench.join("m")
    await bench.router.route(demand())
    snapshot = await bench.router.snapshot()
    assert snapshot["leases"] == 1
    (status,) = (WorkerStatus(**worker) for worker in snapshot["workers"])
    assert (status.worker_id, status.pending_tokens, status.role) == ("m", 210, "mixed")


async def test_a_store_that_is_not_there_is_said_at_once() -> None:
    client = connect("redis://:secret@127.0.0.1:1/0")
    begin = asyncio.get_running_loop().time()
    with pytest.raises(StoreUnavailableError) as caught:
        await Router(client, "c", RouterConfig()).route(demand())
    assert asyncio.get_running_loop().time() - begin < 2
    assert caught.value.http_status == 503
    assert "secret" not in str(caught.value)
    await client.aclose()


# --- races -----------------------------------------------------------------------------------------------------------


async def test_race_of_many_gateways_over_reserves_nobody(
    redis_server: EmbeddedRedis, cluster_name: str, make_worker: Make, clock: Callable[[], int]
) -> None:
    clients = [connect(redis_server.url) for _ in range(4)]
    benches = [Bench(client, cluster_name, clock, make_worker) for client in clients]
    for i in range(4):
        await benches[0].join(f"p{i}", "prefill")
        await benches[0].join(f"d{i}", "decode")
    granted: list[Assignment] = []
    refused = 0

    async def one(number: int) -> None:
        nonlocal refused
        try:
            granted.append(await benches[number % 4].router.route(demand(150, 50)))
        except OverloadedError:
            refused += 1

    await asyncio.gather(*(one(number) for number in range(100)))
    # A decode worker holds 5 x 200 tokens, a prefill worker 6 x 150: decode is the bound.
    assert (len(granted), refused) == (20, 80)
    pending = await benches[0].pending()
    assert {worker: sum(tokens) for worker, tokens in pending.items()} == {
        **{f"p{i}": 750 for i in range(4)},
        **{f"d{i}": 1000 for i in range(4)},
    }
    assert len({lease.lease_epoch for lease in granted}) == 20
    await asyncio.gather(*(benches[i % 4].router.settle(lease) for i, lease in enumerate(granted)))
    await benches[0].assert_zero()
    for client in clients:
        await client.aclose()


async def test_race_of_settle_expire_and_prefill_done_releases_once(bench: Bench, clock: object) -> None:
    await bench.join("p", "prefill")
    await bench.join("d", "decode")
    for _ in range(20):
        leases = [await bench.router.route(demand(20, 5)) for _ in range(10)]
        clock.pass_(10)  # type: ignore[attr-defined]
        for worker_id, epoch in bench.epochs.items():
            await bench.registry.heartbeat(worker_id, epoch, WorkerLoad())
        calls = [call(lease) for lease in leases for call in (bench.router.prefill_done, bench.router.settle)]
        settled = await asyncio.gather(*calls[::2], *calls[1::2], bench.router.expire(), bench.router.expire())
        ended = sum(int(result) for result in settled[10:])
        assert ended == 10
        await bench.assert_zero()
