"""The prefix index: exact whatever is lost, restarted or late, over a real Redis where one is in between."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
from helpers.router_rig import Bench, Make
from redis.asyncio import Redis

from joinwise.cluster.errors import StoreUnavailableError
from joinwise.cluster.router.decision import Held
from joinwise.cluster.router.prefix_index import PrefixFollower, PrefixIndex, decode_blocks, encode_blocks
from joinwise.cluster.router.prefix_log import PrefixLog
from joinwise.cluster.store.client import connect
from joinwise.cluster.store.keys import Keys


def event(sequence: int, stored: list[int], removed: list[int] | None = None, **changes: str) -> dict[str, str]:
    base = {"w": "w", "e": "1", "s": str(sequence), "all": "0", "in": encode_blocks(stored)}
    return {**base, "out": encode_blocks(removed or []), **changes}


def depth(index: PrefixIndex, blocks: list[int], worker: str = "w") -> int:
    held = index.held(blocks, 1, 10)
    return held[worker].tokens if worker in held else 0


# --- the index alone --------------------------------------------------------------------------------------------------


def test_the_longest_prefix_of_each_worker() -> None:
    index = PrefixIndex()
    index.apply(event(1, [1, 2, 3, 4]))
    index.apply(event(1, [1, 2], w="v", e="7"))
    index.apply(event(1, [2, 3, 4], w="u"))  # holds no beginning
    assert index.held([1, 2, 3, 9], 32, 10) == {"w": Held(1, 96), "v": Held(7, 64)}
    assert index.held([1, 2, 3, 9], 32, 1) == {"w": Held(1, 96)}
    assert index.held([9, 1], 32, 10) == {}
    assert index.held([], 32, 10) == {}


def test_workers_of_another_model_hold_nothing() -> None:
    """Two models with one vocabulary have equal names for equal prompts."""
    index = PrefixIndex()
    index.apply(event(1, [1, 2, 3]))
    index.apply(event(1, [1, 2], w="v"))
    assert index.held([1, 2, 3], 1, 1, {"v"}) == {"v": Held(1, 2)}
    assert index.held([1, 2, 3], 1, 1, set()) == {}
    assert index.held([1, 2, 3], 1, 1, {"elsewhere"}) == {}
    assert index.held([1, 2, 3], 1, 1) == {"w": Held(1, 3)}


def test_blocks_are_taken_only_as_far_as_somebody_holds_them() -> None:
    index = PrefixIndex()
    index.apply(event(1, [1, 2]))
    taken = []

    def blocks() -> object:
        for block in range(1, 100):
            taken.append(block)
            yield block

    assert index.held(blocks(), 1, 1)["w"].tokens == 2  # type: ignore[arg-type]
    assert taken == [1, 2, 3]


def test_evicted_blocks_are_gone() -> None:
    index = PrefixIndex()
    index.apply(event(1, [1, 2, 3]))
    index.apply(event(2, [4], [2]))
    assert depth(index, [1, 2, 3]) == 1
    index.apply(event(3, [2]))
    assert depth(index, [1, 2, 3, 4]) == 4


def test_a_gap_makes_a_worker_unknown_until_its_snapshot() -> None:
    index = PrefixIndex()
    index.apply(event(1, [1, 2]))
    assert index.apply(event(3, [5])) == "w"
    assert depth(index, [1]) == 0
    assert index.apply(event(4, [6])) is None  # asked already
    assert len(index) == 0
    assert index.apply(event(5, [1, 6], all="1")) is None
    assert depth(index, [1]) == 1
    index.apply(event(6, [2]))
    assert depth(index, [1, 2]) == 2


def test_a_repeated_or_late_event_changes_nothing() -> None:
    index = PrefixIndex()
    index.apply(event(1, [1]))
    index.apply(event(2, [2], [1]))
    for late in (event(1, [1]), event(2, [2], [1])):
        assert index.apply(late) is None
    assert (depth(index, [1]), depth(index, [2])) == (0, 1)


def test_another_life_has_nothing_of_the_one_before() -> None:
    index = PrefixIndex()
    index.apply(event(1, [1, 2]))
    index.apply(event(1, [3], e="2"))
    assert (depth(index, [1]), index.held([3], 1, 1)["w"].epoch) == (0, 2)
    index.apply(event(2, [1]))  # a word from beyond the grave
    assert depth(index, [1]) == 0


def test_who_is_gone_or_restarted_is_forgotten_at_once() -> None:
    index = PrefixIndex()
    for name in ("a", "b", "c"):
        index.apply(event(1, [1], w=name))
    index.keep({"a": 1, "b": 2})
    assert set(index.held([1], 1, 10)) == {"a"}
    index.keep({})
    assert not index


@pytest.mark.parametrize(
    "broken", [{}, {"w": "w"}, event(1, [], e="x"), event(1, [], **{"in": "***"}), event(1, [], out="AAA=")]
)
def test_what_is_no_event_is_refused(broken: dict[str, str]) -> None:
    index = PrefixIndex()
    with pytest.raises(ValueError):
        index.apply(broken)
    assert not index


def test_blocks_as_text() -> None:
    blocks = [0, 1, (1 << 64) - 1]
    assert list(decode_blocks(encode_blocks(blocks))) == blocks


# --- over Redis -------------------------------------------------------------------------------------------------------


class Rig:
    """One worker's cache, and a gateway that follows it."""

    def __init__(self, bench: Bench, worker: str = "w", kept: int = 10_000) -> None:
        self.bench, self.worker = bench, worker
        self.log = PrefixLog(bench.client, bench.cluster, kept)
        self.index, self.cache = PrefixIndex(), set[int]()
        self.follower = PrefixFollower(bench.client, bench.cluster, self.index)

    async def change(self, present: set[int], absent: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        self.cache = (self.cache - absent) | present
        self.log.note(present, absent)
        await self.log.flush(self.worker, self.bench.epochs[self.worker])

    def known(self, index: PrefixIndex | None = None) -> set[int]:
        index = index or self.index
        return {block for block in range(200) if self.worker in index.held([block], 1, 10)}


@pytest.fixture
async def bench(redis_client: Redis, cluster_name: str, clock: Callable[[], int], make_worker: Make) -> Bench:
    bench = Bench(redis_client, cluster_name, clock, make_worker)
    await bench.join("w")
    return bench


async def test_the_index_follows_a_cache_step_by_step(bench: Bench) -> None:
    rig, rng = Rig(bench), random.Random(1)
    for _ in range(100):
        present, absent = (set(rng.sample(range(200), 5)) for _ in range(2))
        await rig.change(present, absent - present)
        if rng.random() < 0.5:
            await rig.follower.read()
            assert rig.known() == rig.cache


async def test_what_comes_and_goes_between_two_flushes_is_not_said(bench: Bench) -> None:
    rig = Rig(bench)
    await rig.change({1})
    before = await bench.client.xlen(Keys(bench.cluster).blocks)
    rig.log.note({2}, set())
    rig.log.note(set(), {2})
    await rig.log.flush("w", bench.epochs["w"])
    assert await bench.client.xlen(Keys(bench.cluster).blocks) == before


async def test_a_cleared_cache(bench: Bench) -> None:
    rig = Rig(bench)
    await rig.change({1, 2})
    rig.log.note({3}, set(), cleared=True)
    await rig.log.flush("w", bench.epochs["w"])
    await rig.follower.read()
    assert rig.known() == {3}


async def test_a_gateway_that_comes_late_or_falls_behind_resynchronises(bench: Bench) -> None:
    rig = Rig(bench, kept=100)
    await rig.change({1, 2, 3})
    await rig.follower.read()
    for number in range(2500):  # far more than the stream keeps
        await rig.change({4 + number % 100}, {3})
    late = PrefixIndex()
    newcomer = PrefixFollower(bench.client, bench.cluster, late)
    await newcomer.read()
    await rig.follower.read()
    assert rig.known() in (set(), rig.cache)  # unknown, or right
    await rig.log.flush("w", bench.epochs["w"])  # the next heartbeat sees that it is asked
    await newcomer.read()
    await rig.follower.read()
    assert rig.known() == rig.cache
    assert rig.known(late) == rig.cache


async def test_a_restarted_worker_begins_with_nothing(bench: Bench) -> None:
    rig = Rig(bench)
    await rig.change({1, 2})
    await rig.follower.read()
    await bench.join("w")
    reborn = Rig(bench)
    await reborn.change({2})
    await rig.log.flush("w", bench.epochs["w"] - 1)  # its former life speaks up: not heard
    await rig.follower.read()
    assert rig.known() == {2}
    assert rig.index.held([2], 1, 1)["w"].epoch == bench.epochs["w"]


async def test_a_worker_that_registers_again_says_everything_again(bench: Bench) -> None:
    rig = Rig(bench)
    await rig.change({1, 2})
    await bench.join("w")  # Redis had lost its data, not the worker its cache
    await rig.change({3})
    await rig.follower.read()
    assert rig.known() == {1, 2, 3}


async def test_an_event_that_may_be_lost_is_followed_by_everything(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(bench)
    await rig.change({1})
    gone = connect("redis://127.0.0.1:1/0")
    working = rig.log._scripts
    rig.log._scripts = PrefixLog(gone, bench.cluster, 10)._scripts
    with pytest.raises(StoreUnavailableError):
        await rig.change({2}, {1})
    rig.log._scripts = working
    await rig.change({3})
    await rig.follower.read()
    assert rig.known() == {2, 3}
    await gone.aclose()


async def test_a_thread_that_notes_and_a_loop_that_flushes_agree(bench: Bench) -> None:
    rig, rng = Rig(bench), random.Random(2)

    def step() -> None:
        for _ in range(3000):
            present, absent = {rng.randrange(200)}, {rng.randrange(200)}
            absent -= present
            rig.cache = (rig.cache - absent) | present
            rig.log.note(present, absent)

    stepping = asyncio.create_task(asyncio.to_thread(step))
    while not stepping.done():
        await rig.log.flush("w", bench.epochs["w"])
        await rig.follower.read()
    await rig.log.flush("w", bench.epochs["w"])
    await rig.follower.read()
    assert rig.known() == rig.cache


async def test_following_wakes_at_once(bench: Bench) -> None:
    rig = Rig(bench)
    following = asyncio.create_task(rig.follower.follow())
    telling = asyncio.create_task(rig.log.tell(lambda: ("w", bench.epochs["w"]), 30))
    for blocks in ({1}, {1, 2}):
        await asyncio.sleep(0.05)
        await asyncio.to_thread(rig.log.note, blocks, set())
        async with asyncio.timeout(5):
            while rig.known() != blocks:
                await asyncio.sleep(0.001)
    following.cancel()
    telling.cancel()
