"""Random transfers, each of which meets a fault: right or failed, never wrong; nothing leaked, nobody else harmed.

FUZZ_SEED and FUZZ_ROUNDS change the seed and the number of rounds; FUZZ_ROUND plays one round of a seed alone.
"""

import contextlib
import gc
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.kv_faults import _BUDGETS, _LANE_ONLY, FAULTS, PAIRINGS, Fault, World, play
from helpers.kv_rig import Receiver, Sender, eventually

SEED = int(os.environ.get("FUZZ_SEED", "3"))
ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "1000"))
AT_ONCE = 4


class Worlds:
    """Made when first needed, and used by one round at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worlds: dict[tuple, World] = {}

    def get(self, *what) -> World:
        with self._lock:
            if what not in self._worlds:
                self._worlds[what] = World(*what)
            return self._worlds[what]

    def assert_idle(self) -> None:
        for world in self._worlds.values():
            world.assert_idle()

    def stop(self) -> None:
        for world in self._worlds.values():
            world.stop()


@pytest.fixture
def nothing_leaks() -> Iterator[None]:
    """The data plane's threads, rings and files are as before; other tests of the session have threads of theirs."""
    before = _held()
    yield
    eventually(lambda: _held() <= before, f"no more than {before}", 20.0)


def _held() -> Counter[str]:
    gc.collect()
    held = Counter(thread.name.rstrip("0123456789_-") for thread in threading.enumerate() if thread.name[:3] == "kv-")
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            held["memfd"] += os.readlink(f"/proc/self/fd/{descriptor}").startswith("/memfd:")
    held["shared memory"] = sum(path.name.startswith("joinwise") for path in Path("/dev/shm").iterdir())
    return held


def _round(worlds: Worlds, index: int, fired: Counter[Fault], ends: Counter[str]) -> None:
    dice = random.Random(f"{SEED}/{index}")
    fault = FAULTS[index % len(FAULTS)]
    lap = index // len(FAULTS) + index
    transport = ("tcp", "shm")[lap % 2] if fault.name in _LANE_ONLY else ("grpc", "tcp", "shm")[lap % 3]
    pairing = dice.choice(list(PAIRINGS))
    if index % 25 == 0:
        transport, pairing = "nccl", dice.choice(["equal", "block size"])
    landing = _BUDGETS.get(fault.name, 1 << 20)
    if fault.name in _BUDGETS:
        pairing = "block size"
    world = worlds.get(pairing, transport, landing)
    try:
        with world.lock:
            ends.update(play(world, f"r{index}", fault, dice))
    except BaseException as error:
        error.add_note(f"FUZZ_SEED={SEED} FUZZ_ROUND={index}: {fault} on {transport}, {pairing!r}")
        raise
    fired[fault] += 1


def test_right_or_failed_never_wrong(nothing_leaks: None) -> None:
    worlds, fired, ends = Worlds(), Counter[Fault](), Counter[str]()
    rounds = [int(os.environ["FUZZ_ROUND"])] if "FUZZ_ROUND" in os.environ else range(ROUNDS)
    begin = time.monotonic()
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            running = [pool.submit(_round, worlds, index, fired, ends) for index in rounds]
            try:
                for each in running:
                    each.result()
            finally:
                pool.shutdown(cancel_futures=True)
        worlds.assert_idle()
    finally:
        worlds.stop()
    print(f"{len(rounds)} rounds in {time.monotonic() - begin:.1f} s, seed {SEED}: {dict(ends)}")
    if len(rounds) >= len(FAULTS):
        assert ends["not reached"] <= len(rounds) // 50
        assert min(fired[fault] for fault in FAULTS) >= len(rounds) // len(FAULTS) - ends["not reached"]
        assert ends["good"] > len(rounds) // 2


def test_first_fetches_at_once_count_on_one_link() -> None:
    sender, receiver = Sender(), Receiver(transport="tcp")
    together, lease, first = threading.Barrier(2, timeout=10), receiver.lanes.lease, threading.Semaphore(2)

    def lease_together(address: str, kind: str):
        if first.acquire(blocking=False):
            together.wait()
        return lease(address, kind)

    receiver.lanes.lease = lease_together
    transfers = [sender.open(f"t{index}", [index]) for index in range(2)]
    fetches = [receiver.fetch(f"t{index}", [index], sender.server.address) for index in range(2)]
    for transfer in transfers:
        sender.compute(transfer)
        sender.finish(transfer)
    for fetch in fetches:
        fetch.succeed()
    (link,) = receiver.client.links.values()
    assert link.counts["streams"] == 2
    eventually(lambda: len(sender.sweep() | {"over"}) == 1 and not sender.table.held(), "the blocks are given back")
    receiver.stop()
    sender.stop()
