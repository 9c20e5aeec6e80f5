"""Splitwise's scheduler against a real Redis: pools, spilling, role moves, and costs in milliseconds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from helpers.router_rig import Bench, Make, chosen, demand
from redis.asyncio import Redis

from joinwise.cluster.errors import NoWorkerError, OverloadedError
from joinwise.cluster.router.decision import Held
from joinwise.cluster.router.registry import WorkerLoad
from joinwise.cluster.router.router import samples_of
from joinwise.cluster.router.terms import Terms
from joinwise.cluster.store.keys import Keys


@pytest.fixture
def bench(redis_client: Redis, cluster_name: str, clock: Callable[[], int], make_worker: Make) -> Bench:
    return Bench(redis_client, cluster_name, clock, make_worker, max_pending_tokens=100_000, spill_ms=500)


@pytest.fixture
def auto(bench: Bench) -> Bench:
    return bench.with_(split="auto")


async def fleet(bench: Bench, **roles: str) -> None:
    for worker_id, role in roles.items():
        await bench.join(worker_id, role)
        await bench.measured(worker_id, tokens_per_s=1000, step_ms=10)


# --- pools ------------------------------------------------------------------------------------------------------------


async def test_a_long_queue_spills_into_the_mixed_pool(bench: Bench) -> None:
    await fleet(bench, p="prefill", d="decode", m="mixed")
    first = await bench.router.route(demand(600))
    assert (chosen(first), first.reason) == (("p", "d"), "split")
    second = await bench.router.route(demand(600))
    assert (chosen(second), second.reason) == (("m", "d"), "split_spilled")


async def test_below_the_threshold_nothing_spills(bench: Bench) -> None:
    await fleet(bench, p="prefill", d="decode", m="mixed")
    for _ in range(3):
        assert chosen(await bench.router.route(demand(240))) == ("p", "d")


async def test_then_a_worker_of_the_other_pool_is_pulled_and_goes_home(bench: Bench) -> None:
    await fleet(bench, p="prefill", d1="decode", d2="decode")
    first = await bench.router.route(demand(900, 10, exclude=frozenset({"d2"})))
    assert chosen(first) == ("p", "d1")
    # At p it waits 900 ms; at d2 it harms the neighbour that a decode worker always has, for 300 ms.
    second = await bench.router.route(demand(300, 1000, exclude=frozenset({"d1"})))
    assert (chosen(second), second.reason) == ((None, "d2"), "mixed")
    assert (await bench.roles())["d2"] == "mixed"
    await bench.router.settle(second)
    assert (await bench.roles())["d2"] == "decode"
    await bench.measured("d1", tokens_per_s=500, step_ms=10)
    busy = await bench.router.route(demand(1, 500, whole=True, exclude=frozenset({"d1"})))
    second = await bench.router.route(demand(300, 400))
    assert (chosen(second), second.reason) == (("d2", "d1"), "split_pulled")
    assert await bench.roles() == {"p": "prefill", "d1": "decode", "d2": "mixed"}
    await bench.pending()
    assert await bench.router.prefill_done(second)
    assert (await bench.roles())["d2"] == "mixed"  # the other prompt is still to be computed
    assert await bench.router.prefill_done(busy)
    assert await bench.roles() == {"p": "prefill", "d1": "decode", "d2": "decode"}
    for lease in (first, busy, second):
        await bench.router.settle(lease)
    await bench.pending()
    await bench.assert_zero()


async def test_a_prefill_worker_is_pulled_when_decode_has_no_slot(bench: Bench) -> None:
    await bench.join("d", "decode", max_num_seqs=1)
    await bench.measured("d", tokens_per_s=1000, step_ms=10)
    await fleet(bench, p1="prefill", p2="prefill")
    first = await bench.router.route(demand(100, 100))
    assert chosen(first) == ("p1", "d")
    second = await bench.router.route(demand(100, 100))
    assert (chosen(second), second.reason) == ((None, "p2"), "mixed")
    assert (await bench.roles())["p2"] == "mixed"
    await bench.router.prefill_done(second)
    assert (await bench.roles())["p2"] == "mixed"
    await bench.router.settle(second)
    assert (await bench.roles())["p2"] == "prefill"
    await bench.router.settle(first)
    await bench.assert_zero()


async def test_only_equal_fingerprints_change_roles(bench: Bench) -> None:
    await bench.join("p", "prefill")
    for name in ("d1", "d2"):
        await bench.join(name, "decode", fingerprint="another")
    for _ in range(3):
        assert chosen(await bench.router.route(demand(2000)))[0] == "p"
    assert set((await bench.roles()).values()) == {"prefill", "decode"}


async def test_without_moves_every_worker_keeps_to_its_pool(bench: Bench) -> None:
    await fleet(bench, p="prefill", d="decode")
    fixed = bench.with_(moves=False, max_pending_tokens=1000)
    first = await fixed.router.route(demand(400, 500))
    assert chosen(first) == ("p", "d")
    await fixed.router.prefill_done(first)
    for whole in (False, True):
        with pytest.raises(OverloadedError):
            await fixed.router.route(demand(400, 500, whole=whole, exclude=frozenset({"p"} if whole else ())))
    free = bench.with_(max_pending_tokens=1000)
    assert chosen(await free.router.route(demand(100, 50))) == (None, "p")


async def test_an_operators_mixed_worker_stays_mixed(bench: Bench) -> None:
    await fleet(bench, a="prefill")
    assert await bench.registry.set_role("a", bench.epochs["a"], "mixed")
    await bench.router.settle(await bench.router.route(demand()))
    assert await bench.roles() == {"a": "mixed"}


# --- milliseconds -----------------------------------------------------------------------------------------------------


async def test_the_cost_is_time_not_tokens(bench: Bench) -> None:
    for worker_id, speed in (("box", 500.0), ("old", 5_000.0), ("new", 20_000.0)):
        await bench.join(worker_id, "prefill")
        await bench.measured(worker_id, tokens_per_s=speed, step_ms=10)
    await bench.join("d", "decode")
    patient = bench.with_(spill_ms=1e6)
    taken = [chosen(await patient.router.route(demand(400, 1)))[0] for _ in range(30)]
    assert taken[:3] == ["new", "new", "new"]
    # Shares follow the speeds: 20 : 5 : 0.5.
    assert [taken.count(name) for name in ("new", "old", "box")] == [24, 6, 0]


async def test_a_slow_decoder_gets_less(bench: Bench) -> None:
    await fleet(bench, p="prefill")
    for worker_id, step in (("fast", 10.0), ("slow", 40.0)):
        await bench.join(worker_id, "decode", max_num_seqs=64, num_blocks=100_000)
        await bench.measured(worker_id, tokens_per_s=1e6, step_ms=step)
    taken = [chosen(await bench.with_(spill_ms=1e6).router.route(demand(1, 100)))[1] for _ in range(20)]
    assert taken.count("fast") == 16


async def test_a_full_cache_counts_as_waiting(bench: Bench) -> None:
    await fleet(bench, p="prefill")
    await bench.join("small", "decode", num_blocks=4, block_size=100)
    await bench.join("large", "decode", num_blocks=4000, block_size=100)
    for name in ("small", "large"):
        await bench.measured(name, tokens_per_s=1000, step_ms=10)
    await bench.router.route(demand(10, 1000, exclude=frozenset({"small"})))  # large has the longer queue
    first = await bench.router.route(demand(300, 50))
    assert chosen(first)[1] == "small"
    assert chosen(await bench.router.route(demand(300, 50)))[1] == "large"


@pytest.mark.parametrize("lie", [-1.0, 0.0, 1e300, float("inf"), float("nan")])
async def test_a_worker_that_lies_of_its_speed_is_not_believed(bench: Bench, lie: float) -> None:
    await fleet(bench, honest="mixed", liar="mixed")
    await bench.measured("liar", tokens_per_s=lie, step_ms=lie)
    await bench.pending()
    taken = [chosen(await bench.router.route(demand()))[1] for _ in range(10)]
    assert taken.count("honest") == 5


# --- conditional split ------------------------------------------------------------------------------------------------


async def test_a_short_prompt_runs_whole_and_a_long_one_is_split(auto: Bench) -> None:
    await fleet(auto, p="prefill", d="decode")
    short = await auto.router.route(demand(5))
    assert (chosen(short), short.reason) == ((None, "d"), "whole_cheaper")
    await auto.router.settle(short)
    assert (await auto.router.route(demand(500))).reason == "split"


async def test_the_neighbours_gaps_decide(auto: Bench) -> None:
    await fleet(auto, p="prefill", d="decode")
    busy = [await auto.router.route(demand(1, 10)) for _ in range(4)]
    assert {lease.reason for lease in busy[1:]} == {"whole_cheaper"}
    anxious = auto.with_(gap_weight=1)
    assert (
        await anxious.router.route(demand(8))
    ).reason == "split"  # 8 ms on four neighbours, against a hand-off of 10
    indifferent = auto.with_(gap_weight=0)
    assert (await indifferent.router.route(demand(8))).reason == "whole_cheaper"


async def test_a_prefix_that_decode_holds_is_not_computed_again(auto: Bench) -> None:
    await fleet(auto, p="prefill", d="decode")
    held = {"d": Held(auto.epochs["d"], 980)}
    lease = await auto.router.route(demand(1000, held=held))
    assert (chosen(lease), lease.reason) == ((None, "d"), "whole_cheaper")
    assert (await auto.pending())["d"] == (20, 1010)
    assert lease.ttft_ms == 20
    await auto.router.settle(lease)
    await auto.assert_zero()


@pytest.mark.parametrize("tokens", [-5, 1000, 10**9])
async def test_of_a_prompt_one_token_is_always_computed(auto: Bench, tokens: int) -> None:
    await fleet(auto, p="prefill", d="decode")
    await auto.router.route(demand(1000, held={"d": Held(auto.epochs["d"], tokens)}))
    assert sum(prefill for prefill, _ in (await auto.pending()).values()) == (1 if tokens > 0 else 1000)


async def test_another_life_of_a_worker_holds_nothing(auto: Bench) -> None:
    await fleet(auto, p="prefill", d="decode")
    assert (await auto.router.route(demand(1000, held={"d": Held(auto.epochs["d"] - 1, 980)}))).reason == "split"


async def test_a_holder_is_found_behind_many_idle_workers(auto: Bench) -> None:
    await fleet(auto, **{f"a{i}": "mixed" for i in range(20)}, z="mixed")
    blocker = await auto.router.route(demand(100, 10, exclude=frozenset(f"a{i}" for i in range(20))))
    assert chosen(blocker)[1] == "z"
    lease = await auto.router.route(demand(1000, held={"z": Held(auto.epochs["z"], 900)}))
    assert chosen(lease)[1] == "z"


# --- capabilities and samples -----------------------------------------------------------------------------------------


async def test_a_needed_capability_is_found_among_a_thousand_others_at_once(bench: Bench) -> None:
    for i in range(60):
        await bench.join(f"a{i:02}", capabilities=frozenset({"replay"}))
    await bench.join("z", capabilities=frozenset({"replay", "min_p"}))
    assert chosen(await bench.router.route(demand(needs=frozenset({"min_p"}))))[1] == "z"
    (profiles,) = [
        await bench.client.hgetall(key) async for key in bench.client.scan_iter(f"*{bench.cluster}*profiles*")
    ]
    assert len(profiles) == 2
    await bench.registry.deregister("z", bench.epochs["z"])
    (profiles,) = [
        await bench.client.hgetall(key) async for key in bench.client.scan_iter(f"*{bench.cluster}*profiles*")
    ]
    assert len(profiles) == 1  # what nobody has is not looked for any more


async def test_models_have_pools_of_their_own(bench: Bench) -> None:
    await bench.join("a", "mixed")
    await bench.join("b", "mixed", model="other", model_digest="2", kv_layout="2")
    assert chosen(await bench.router.route(demand()))[1] == "a"
    assert [chosen(await bench.router.route(demand(model="other")))[1] for _ in range(3)] == ["b"] * 3


async def test_samples_share_one_prefill_and_are_settled_one_by_one(bench: Bench) -> None:
    await fleet(bench, p="prefill", d="decode")
    parts = samples_of(await bench.router.route(demand(100, 10, samples=3)), 3)
    assert await bench.pending() == {"p": (100, 0), "d": (0, 130)}
    await bench.router.prefill_done(parts[0])
    assert not await bench.router.prefill_done(parts[1])
    assert await bench.router.settle(parts[1])
    assert not await bench.router.settle(parts[1])
    assert await bench.pending() == {"p": (0, 0), "d": (0, 120)}
    assert await bench.router.settle(parts[0])
    assert await bench.router.settle(parts[2])
    await bench.assert_zero()


async def test_samples_settled_at_once_by_many_end_the_lease_once(bench: Bench) -> None:
    await fleet(bench, p="prefill", d="decode")
    parts = samples_of(await bench.router.route(demand(100, 10, samples=16)), 16)
    ended = await asyncio.gather(*(bench.router.settle(part) for part in parts for _ in range(3)))
    assert sum(ended) == 16
    await bench.assert_zero()


async def test_samples_that_are_not_settled_expire_together(bench: Bench, clock: object) -> None:
    await fleet(bench, m="mixed")
    parts = samples_of(await bench.router.route(demand(100, 10, samples=4)), 4)
    await bench.router.settle(parts[0])
    clock.pass_(10)  # type: ignore[attr-defined]
    await bench.measured("m", tokens_per_s=1000, step_ms=10)
    assert await bench.router.expire() == 1
    assert not await bench.router.settle(parts[1])
    await bench.assert_zero()


# --- clocks and lost keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [3600, -3600])
async def test_a_clock_that_jumps_kills_nobody(bench: Bench, clock: object, seconds: int) -> None:
    await fleet(bench, m="mixed")
    lease = await bench.router.route(demand())
    await bench.router.expire()
    clock.pass_(seconds)  # type: ignore[attr-defined]
    assert await bench.router.expire() == 0
    assert await bench.router.renew([lease]) == []
    other = await bench.router.route(demand())
    assert other.decode.epoch == lease.decode.epoch
    assert await bench.router.settle(other)
    await bench.measured("m", tokens_per_s=1000, step_ms=10)
    for _ in range(3):  # the grace passes; now silence counts again
        clock.pass_(4)  # type: ignore[attr-defined]
        assert await bench.router.expire() == 0
        await bench.router.renew([lease])
        await bench.measured("m", tokens_per_s=1000, step_ms=10)
    clock.pass_(11)  # type: ignore[attr-defined]
    assert await bench.router.expire() == 1
    await bench.assert_zero()


async def test_a_session_and_a_prefix_of_another_model_draw_nothing_there(bench: Bench) -> None:
    await fleet(bench, other="mixed")
    epoch = bench.epochs["other"]
    session = Terms(session="s")
    assert chosen(await bench.router.route(demand(terms=session))) == (None, "other")
    await bench.join("mine", "mixed", model="n")
    for _ in range(3):  # though the other model's worker is the faster one, and says that it has all of the prompt
        lease = await bench.router.route(demand(model="n", terms=session, held={"other": Held(epoch, 90)}))
        assert chosen(lease) == (None, "mine")
        await bench.registry.drain("mine", bench.epochs["mine"])
        with pytest.raises(NoWorkerError):
            await bench.router.route(demand(model="n", terms=session, held={"other": Held(epoch, 90)}))
        await bench.registry.set_role("mine", bench.epochs["mine"], "mixed")


async def test_a_worker_whose_state_was_lost_is_passed_over(bench: Bench) -> None:
    await fleet(bench, a="mixed", b="mixed")
    await bench.client.hdel(Keys(bench.cluster).workers, "a")
    assert chosen(await bench.router.route(demand()))[1] == "b"
    assert not await bench.registry.heartbeat("a", bench.epochs["a"], WorkerLoad())
    await bench.join("a", "mixed")
    assert chosen(await bench.router.route(demand()))[1] == "a"
