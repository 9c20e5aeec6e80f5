"""Transfers over real loopback gRPC between fake caches; each test ends by proving nothing is held."""

import random
import threading
import time
from collections.abc import Iterator

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.kv_rig import (
    BLOCK_SIZE,
    LAYERS,
    Fetch,
    FrameProxy,
    Receiver,
    Sender,
    TamperedLanes,
    decode,
    eventually,
    make_caches,
)

from joinwise.actors.kv.frames import FLAG_END, FrameHeader, FrameRefusedError, encode, transfer_tag
from joinwise.actors.kv.lanes.lane import LaneClosedError
from joinwise.actors.kv.layout import PLAIN, WHOLE, LayoutMismatchError, plan
from joinwise.actors.kv.receiving import FetchSpec, Importer, LandingBudget
from joinwise.actors.kv.sending import SendTable, SendTransfer
from joinwise.actors.kv.server import FETCH
from joinwise.kernels import kv_hash
from joinwise.proto import kv_pb2


@pytest.fixture(params=["grpc", "tcp", "shm", "nccl"])
def transport(request: pytest.FixtureRequest) -> str:
    """Every transport keeps the same promises."""
    return request.param


@pytest.fixture
def sender(transport: str) -> Iterator[Sender]:
    each = Sender(kinds=(transport,))
    yield each
    each.assert_idle()
    each.stop()


@pytest.fixture
def receiver(transport: str) -> Iterator[Receiver]:
    each = Receiver(transport=transport)
    yield each
    each.assert_idle()
    each.stop()


def _landed(fetch: Fetch, blocks: int = 1) -> None:
    eventually(lambda: sum(fetch.landed) >= blocks, f"{blocks} blocks land")


# The good ways.


def test_layers_land_while_prefill_runs(sender: Sender, receiver: Receiver) -> None:
    transfer = sender.open("t", [5, 6, 7, 30, 2])
    fetch = receiver.fetch("t", [40, 41, 9, 8, 1], sender.server.address)
    sender.compute(transfer, until=2)
    eventually(lambda: fetch.landed == [2, 2, 2, 2], "the first chunk lands before the second is computed")
    assert not fetch.importer.complete
    sender.compute(transfer, until=3)
    sender.compute(transfer, pause_s=0.01)
    computed = time.monotonic()
    fetch.succeed()
    sender.finish(transfer)
    eventually(lambda: sender.sweep() == {"t.p"}, "the blocks are given back")
    receiver.expect(sender.content(transfer), [40, 41, 9, 8, 1])
    receiver.assert_cache()
    assert fetch.bytes == 5 * sum(sender.blocks.block_bytes)
    assert fetch.importer.exposed_us / 1e6 < time.monotonic() - computed + 0.1


def test_a_layer_lands_before_the_next_is_computed(sender: Sender, receiver: Receiver) -> None:
    transfer = sender.open("t", [1, 2])
    fetch = receiver.fetch("t", [3, 4], sender.server.address)
    for layer in range(len(LAYERS)):
        sender.table.advance(transfer, layer, 2)
        eventually(lambda: sum(fetch.landed) == 2 * (layer + 1), f"layer {layer} lands")  # noqa: B023
    fetch.succeed()
    sender.finish(transfer)


def test_computed_long_before_it_is_fetched(sender: Sender, receiver: Receiver) -> None:
    transfer = sender.open("t", range(20))
    sender.compute(transfer)
    sender.finish(transfer)
    assert sender.sweep() == set(), "the blocks wait for their receiver"
    fetch = receiver.fetch("t", range(20, 40), sender.server.address)
    fetch.succeed()
    receiver.expect(sender.content(transfer), range(20, 40))
    receiver.assert_cache()
    eventually(lambda: sender.sweep() == {"t.p"}, "the blocks are given back")


def test_asked_for_before_it_is_opened(sender: Sender, receiver: Receiver) -> None:
    fetch = receiver.fetch("t", [1, 2], sender.server.address)
    eventually(lambda: sender.server.open_streams == 1, "the stream waits")
    transfer = sender.open("t", [3, 4])
    sender.compute(transfer)
    fetch.succeed()
    sender.finish(transfer)
    receiver.expect(sender.content(transfer), [1, 2])
    receiver.assert_cache()


@pytest.mark.parametrize("first_block", [1, 3, 5])
def test_only_the_tail_is_sent(sender: Sender, receiver: Receiver, first_block: int) -> None:
    transfer = sender.open("t", [9, 8, 7, 20, 21, 22])
    targets = range(50, 56 - first_block)
    fetch = receiver.fetch("t", targets, sender.server.address, first_block=first_block)
    sender.compute(transfer, until=2)
    sender.compute(transfer, until=4)
    sender.compute(transfer)
    fetch.succeed()
    sender.finish(transfer)
    receiver.expect(sender.content(transfer), targets, first_block)
    receiver.assert_cache()
    assert fetch.bytes == (6 - first_block) * sum(sender.blocks.block_bytes)


@pytest.mark.parametrize("frame_bytes", [1, 257, 1 << 20])
def test_any_frame_size(receiver: Receiver, frame_bytes: int) -> None:
    sender = Sender(frame_bytes=frame_bytes)
    transfer = sender.open("t", [5, 6, 7, 30, 2])
    sender.compute(transfer)
    fetch = receiver.fetch("t", range(5), sender.server.address)
    fetch.succeed()
    sender.finish(transfer)
    receiver.expect(sender.content(transfer), range(5))
    receiver.assert_cache()
    sender.assert_idle()
    sender.stop()


@pytest.mark.parametrize("seed", [1, 2])
def test_many_at_once_each_to_its_own_blocks(seed: int) -> None:
    """32 transfers race, with random blocks, tails and chunks, through a budget of two frames."""
    dice = random.Random(seed)
    sender = Sender(600, seed=seed, frame_bytes=1200)
    receiver = Receiver(600, seed=seed + 50, landing_bytes=2600)
    there, here = dice.sample(range(600), 600), dice.sample(range(600), 600)
    transfers, fetches = [], []
    for index in range(32):
        count = dice.randint(1, 16)
        first = dice.randint(0, count - 1)
        ids, there = there[:count], there[count:]
        targets, here = here[: count - first], here[count - first :]
        transfers.append((f"t{index}", ids, first, targets))

    opened: dict[str, SendTransfer] = {}

    def prefill() -> None:
        waiting = list(transfers)
        while waiting or any(not each.computed for each in opened.values()):
            if waiting and dice.random() < 0.5:
                name, ids, _, _ = waiting.pop()
                opened[name] = sender.open(name, ids)
            elif unfinished := [each for each in opened.values() if not each.computed]:
                each = dice.choice(unfinished)
                sender.compute(each, dice.randint(each.ready[0], each.num_blocks))
        for each in opened.values():
            sender.finish(each)

    engine = threading.Thread(target=prefill)
    engine.start()
    order = random.Random(seed + 1).sample(transfers, len(transfers))
    for name, _, first, targets in order:
        fetches.append(receiver.fetch(name, targets, sender.server.address, first_block=first))
    engine.join()
    for fetch in fetches:
        fetch.succeed()
    for name, _, first, targets in transfers:
        receiver.expect(sender.content(opened[name]), targets, first)
    receiver.assert_cache()
    released: set[str] = set()
    eventually(lambda: len(released.update(sender.sweep()) or released) == 32, "all blocks are given back")
    sender.assert_idle()
    receiver.assert_idle()
    receiver.stop()
    sender.stop()


# Ends of every kind.


def test_closed_before_it_is_fetched(sender: Sender, receiver: Receiver) -> None:
    transfer = sender.open("t", [1, 2])
    sender.table.close("t.p", "cancelled")
    error = receiver.fetch("t", [1, 2], sender.server.address).fail(grpc.StatusCode.NOT_FOUND)
    assert "cancelled" in str(error)
    sender.finish(transfer)
    assert sender.sweep() == {"t.p"}
    receiver.assert_cache()


def test_a_transfer_that_is_over_is_refused_at_once(sender: Sender, receiver: Receiver) -> None:
    """Its receiver waited for blocks while its sender was preempted: it must not wait for the lease too."""
    transfer = sender.open("t", [1, 2])
    sender.table.close("t.p", "preempted")
    sender.finish(transfer)
    assert sender.sweep() == {"t.p"}
    begin = time.monotonic()
    error = receiver.fetch("t", [1, 2], sender.server.address).fail(grpc.StatusCode.NOT_FOUND)
    assert "preempted" in str(error)
    assert time.monotonic() - begin < 2.0


def test_closed_mid_way(sender: Sender, receiver: Receiver) -> None:
    transfer = sender.open("t", [1, 2, 3])
    fetch = receiver.fetch("t", [7, 8, 9], sender.server.address)
    sender.compute(transfer, until=1)
    _landed(fetch)
    sender.table.close("t.p", "preempted")
    error = fetch.fail(grpc.StatusCode.ABORTED)
    assert "preempted" in str(error)
    assert sender.sweep() == set(), "vLLM still has the request"
    sender.finish(transfer)
    eventually(lambda: sender.sweep() == {"t.p"}, "the blocks are given back")
    receiver.assert_unchanged_but([7, 8, 9])


def test_a_copy_made_while_its_blocks_were_taken_back_is_never_sent(sender: Sender, receiver: Receiver) -> None:
    """Preemption: close comes before the blocks are reused, and the sender looks again after copying."""
    transfer = sender.open("t", [1, 2, 3])
    fetch = receiver.fetch("t", [7, 8, 9], sender.server.address)
    eventually(lambda: transfer.streaming, "the stream is open")
    read = sender.blocks.read

    def read_while_preempted(layer: int, block_ids: list[int]) -> list[memoryview]:
        pieces = read(layer, block_ids)
        sender.table.close("t.p", "preempted")
        for cache in sender.caches.values():
            cache[:] = 0
        return pieces

    sender.blocks.read = read_while_preempted
    sender.compute(transfer)
    fetch.fail(grpc.StatusCode.ABORTED)
    sender.finish(transfer)
    receiver.assert_cache()


def test_the_receiver_cancels_mid_way(sender: Sender, receiver: Receiver) -> None:
    transfer = sender.open("t", [1, 2, 3])
    fetch = receiver.fetch("t", [7, 8, 9], sender.server.address)
    sender.compute(transfer, until=1)
    _landed(fetch)
    fetch.importer.fence()
    fetch.cancel()
    fetch.fail()
    eventually(lambda: not transfer.streaming, "the sender notices")
    assert transfer.closed
    assert sender.idle_calls, "and its engine is woken"
    sender.finish(transfer)
    eventually(lambda: sender.sweep() == {"t.p"}, "the blocks are given back")
    receiver.assert_unchanged_but([7, 8, 9])


def test_the_receiver_cancels_before_the_transfer_is_opened(sender: Sender, receiver: Receiver) -> None:
    fetch = receiver.fetch("t", [7], sender.server.address)
    eventually(lambda: sender.server.open_streams == 1, "the stream waits")
    fetch.cancel()
    fetch.fail(grpc.StatusCode.CANCELLED)
    eventually(lambda: sender.server.open_streams == 0, "the waiting stream ends", seconds=2)


def test_a_receiver_that_does_not_read_is_bounded_by_its_deadline(receiver: Receiver) -> None:
    layers = {"layers.0": (4, 64, 64)}
    sender = Sender(256, layers=layers)
    transfer = sender.open("t", range(256))
    sender.compute(transfer)
    sender.finish(transfer)
    with grpc.insecure_channel(sender.server.address) as channel:
        request = kv_pb2.FetchRequest(
            transfer_id="t", epoch=1, num_tokens=1024, instance=sender.server.instance, encoding=WHOLE
        )
        call = channel.unary_stream(FETCH, kv_pb2.FetchRequest.SerializeToString)(request, timeout=1.0)
        next(call)
        eventually(lambda: transfer.streaming, "the stream is open")
        assert sender.sweep() == set()
        eventually(lambda: sender.sweep() == {"t.p"}, "the blocks come back at the deadline", seconds=4)
    sender.assert_idle()
    sender.stop()


def test_a_fetch_without_a_deadline_is_refused(sender: Sender) -> None:
    transfer = sender.open("t", [1])
    request = kv_pb2.FetchRequest(transfer_id="t", epoch=1, instance=sender.server.instance, encoding=WHOLE)
    with grpc.insecure_channel(sender.server.address) as channel, pytest.raises(grpc.RpcError) as refused:
        list(channel.unary_stream(FETCH, kv_pb2.FetchRequest.SerializeToString)(request))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not transfer.closed
    sender.finish(transfer)


def test_the_sender_stops_mid_way(receiver: Receiver) -> None:
    sender = Sender()
    transfer = sender.open("t", [1, 2, 3])
    fetch = receiver.fetch("t", [7, 8, 9], sender.server.address)
    waiting = receiver.fetch("never opened", [10], sender.server.address)
    sender.compute(transfer, until=1)
    _landed(fetch)
    begin = time.monotonic()
    sender.stop()
    fetch.fail()
    waiting.fail()
    assert time.monotonic() - begin < 5.0
    sender.finish(transfer)
    sender.assert_idle()
    receiver.assert_unchanged_but([7, 8, 9])


def test_a_sender_that_is_not_there(receiver: Receiver) -> None:
    sender = Sender()
    sender.stop()
    receiver.fetch("t", [1], sender.server.address).fail(grpc.StatusCode.UNAVAILABLE)
    receiver.assert_cache()


def test_a_restarted_sender_knows_nothing_of_before(receiver: Receiver) -> None:
    first = Sender()
    transfer = first.open("t", [1])
    first.compute(transfer)
    fetch = receiver.fetch("t", [3], first.server.address)
    fetch.succeed()
    receiver.expect(first.content(transfer), [3])
    first.stop()
    second = Sender(bind=first.server.address, claim_timeout_s=0.1, interior="other build")
    error = receiver.fetch("t2", [4], second.server.address).fail()
    assert "interior" in str(error), "it shows its layout again"
    receiver.assert_cache()
    second.assert_idle()
    second.stop()


def test_a_port_that_is_taken_is_an_error(sender: Sender) -> None:
    with pytest.raises(RuntimeError):
        Sender(bind=sender.server.address)


def test_an_unknown_transfer(receiver: Receiver) -> None:
    sender = Sender(claim_timeout_s=0.2)
    error = receiver.fetch("t", [1], sender.server.address).fail(grpc.StatusCode.NOT_FOUND)
    assert "no open transfer t" in str(error)
    sender.assert_idle()
    sender.stop()


def test_a_stale_receiver_is_refused_and_harms_nobody(sender: Sender, receiver: Receiver) -> None:
    transfer = sender.open("t", [1, 2], epoch=8)
    error = receiver.fetch("t", [5, 6], sender.server.address, epoch=7).fail(grpc.StatusCode.FAILED_PRECONDITION)
    assert "epoch 7, this worker has 8" in str(error)
    receiver.assert_cache()
    sender.compute(transfer)
    receiver.fetch("t", [5, 6], sender.server.address, epoch=8).succeed()
    receiver.expect(sender.content(transfer), [5, 6])
    receiver.assert_cache()
    sender.finish(transfer)


_OTHER_LAYERS = {**LAYERS, "layers.2": (2, 4, 8)}
_RENAMED = {("layers.9" if name == "layers.3" else name): shape for name, shape in LAYERS.items()}


@pytest.mark.parametrize(
    ("layout", "error", "named"),
    [
        ({"block_size": 16}, LayoutMismatchError, "block_size: 16 here, 4 there"),
        ({"interior": "avx2"}, LayoutMismatchError, "interior: 'avx2' here, 'test' there"),
        ({"model_digest": "another"}, grpc.RpcError, "model_digest: 'another' here 'model'"),
        ({"layers": _OTHER_LAYERS}, LayoutMismatchError, "layer 'layers.2': 256 bytes a block here, 128 there"),
        ({"layers": _RENAMED}, LayoutMismatchError, "no layer 'layers.9'"),
    ],
)
def test_another_layout_is_refused_and_named(sender: Sender, layout: dict, error: type, named: str) -> None:
    receiver = Receiver(**layout)
    transfer = sender.open("t", [1])
    failure = receiver.fetch("t", [1], sender.server.address).fail()
    assert isinstance(failure, error)
    assert named in str(failure)
    assert not transfer.closed, "the transfer is untouched"
    sender.finish(transfer)
    receiver.assert_cache()
    receiver.assert_idle()
    receiver.stop()


def test_another_dtype_is_refused_and_named(sender: Sender, receiver: Receiver) -> None:
    receiver.blocks.layout.dtype = "torch.bfloat16"
    error = receiver.fetch("t", [1], sender.server.address).fail()
    assert "dtype: 'torch.bfloat16' here, 'torch.float32' there" in str(error)


def test_a_sender_that_has_restarted_is_agreed_with_again(receiver: Receiver) -> None:
    first = Sender()
    transfer = first.open("t", [1])
    first.compute(transfer)
    receiver.fetch("t", [3], first.server.address).succeed()
    receiver.expect(first.content(transfer), [3])
    first.stop()
    second = Sender(bind=first.server.address, seed=9)
    transfer = second.open("t", [2])
    second.compute(transfer)
    receiver.fetch("t", [4], second.server.address).succeed()
    receiver.expect(second.content(transfer), [4])
    receiver.assert_cache()
    second.finish(transfer)
    second.assert_idle()
    second.stop()


@pytest.mark.parametrize(
    ("first_block", "blocks", "tokens"),
    [(0, 4, 16), (3, 0, 12), (4, 1, 12), (0, 3, 11)],
)
def test_a_receiver_with_another_prompt_is_refused(
    sender: Sender, receiver: Receiver, first_block: int, blocks: int, tokens: int
) -> None:
    transfer = sender.open("t", [1, 2, 3])
    sender.compute(transfer)
    fetch = receiver.fetch("t", range(blocks), sender.server.address, first_block=first_block, num_tokens=tokens)
    fetch.fail(grpc.StatusCode.OUT_OF_RANGE)
    sender.finish(transfer)
    eventually(lambda: sender.sweep() == {"t.p"}, "the blocks are given back")
    receiver.assert_cache()


def test_a_transfer_is_fetched_once(sender: Sender, receiver: Receiver) -> None:
    transfer = sender.open("t", [1, 2])
    first = receiver.fetch("t", [5, 6], sender.server.address)
    eventually(lambda: transfer.streaming, "the first stream has it")
    error = receiver.fetch("t", [7, 8], sender.server.address).fail(grpc.StatusCode.NOT_FOUND)
    assert "another stream has it" in str(error)
    sender.compute(transfer)
    first.succeed()
    eventually(lambda: bool(transfer.closed), "the stream is over")
    error = receiver.fetch("t", [7, 8], sender.server.address).fail(grpc.StatusCode.NOT_FOUND)
    assert "sent" in str(error)
    sender.finish(transfer)
    receiver.expect(sender.content(transfer), [5, 6])
    receiver.assert_cache()


def test_an_id_that_was_used_before_sends_nothing(sender: Sender, receiver: Receiver) -> None:
    transfer = sender.open("t", [1])
    twin = SendTransfer("t", "twin.p", 1, 1, len(LAYERS), BLOCK_SIZE, 60.0, BLOCK_SIZE)
    sender.table.open(twin)
    assert twin.closed
    sender.table.end("twin.p")
    assert sender.sweep() == {"twin.p"}, "the engine lives, and gets the twin's blocks back"
    sender.compute(transfer)
    receiver.fetch("t", [3], sender.server.address).succeed()
    sender.finish(transfer)
    eventually(lambda: sender.sweep() == {"t.p"}, "the blocks are given back")
    late = SendTransfer("t", "late.p", 1, 1, len(LAYERS), BLOCK_SIZE, 60.0, BLOCK_SIZE)
    sender.table.open(late)
    assert late.closed
    sender.table.end("late.p")


def test_a_lease_begins_when_vllm_has_finished(sender: Sender, receiver: Receiver) -> None:
    transfer = sender.open("t", [1], lease_s=0.15)
    time.sleep(0.2)
    assert sender.sweep() == set(), "prefill may queue for longer than a lease"
    sender.compute(transfer)
    sender.finish(transfer)
    assert sender.sweep() == set()
    assert sender.table.held() == ["send t of request t.p"]
    time.sleep(0.2)
    assert sender.sweep() == {"t.p"}
    error = receiver.fetch("t", [1], sender.server.address).fail(grpc.StatusCode.NOT_FOUND)
    assert "lease" in str(error)
    receiver.assert_cache()


def test_a_lease_does_not_end_a_stream(sender: Sender, receiver: Receiver) -> None:
    transfer = sender.open("t", [1, 2], lease_s=0.0)
    fetch = receiver.fetch("t", [5, 6], sender.server.address)
    eventually(lambda: transfer.streaming, "the stream is open")
    gate = threading.Event()
    read = sender.blocks.read
    sender.blocks.read = lambda *args: gate.wait(5) and read(*args)
    sender.compute(transfer)
    sender.finish(transfer)
    assert sender.sweep() == set()
    gate.set()
    fetch.succeed()
    eventually(lambda: sender.sweep() == {"t.p"}, "the blocks are given back")


@pytest.mark.parametrize("begun", [True, False])
def test_a_transfer_that_stalls(sender: Sender, receiver: Receiver, begun: bool) -> None:
    limits = {"timeout_s": 0.4} if begun else {"start_s": 0.4}
    transfer = sender.open("t", [1, 2])
    fetch = receiver.fetch("t", [5, 6], sender.server.address, **limits)
    if begun:
        sender.compute(transfer, until=1)
    assert isinstance(fetch.fail(), TimeoutError)
    eventually(lambda: bool(transfer.closed) and not transfer.streaming, "the sender notices")
    sender.finish(transfer)
    assert sender.sweep() == {"t.p"}
    receiver.assert_unchanged_but([5, 6])


def test_a_request_that_ends_before_its_prompt_is_computed(sender: Sender, receiver: Receiver) -> None:
    transfer = sender.open("t", [1, 2])
    fetch = receiver.fetch("t", [5, 6], sender.server.address)
    sender.compute(transfer, until=1)
    _landed(fetch)
    sender.finish(transfer)
    error = fetch.fail(grpc.StatusCode.ABORTED)
    assert "before its prompt was computed" in str(error)
    receiver.assert_unchanged_but([5, 6])


def test_too_many_streams_are_refused_never_queued(receiver: Receiver) -> None:
    """Queued behind streams that wait for prefill, a finished transfer would hold the blocks that it needs."""
    sender = Sender(max_streams=2)
    first = sender.open("first", [20])  # the handshake is a call too, and would take a stream's place
    sender.compute(first)
    sender.finish(first)
    receiver.fetch("first", [30], sender.server.address).succeed()
    eventually(lambda: sender.server.open_streams == 0, "the first stream ends")
    waiting = [sender.open(f"w{index}", [index]) for index in range(2)]
    fetches = [receiver.fetch(each.transfer_id, [10 + each.block_ids[0]], sender.server.address) for each in waiting]
    eventually(lambda: sender.server.open_streams == 2, "both wait")
    begin = time.monotonic()
    receiver.fetch("more", [20], sender.server.address).fail(grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert time.monotonic() - begin < 2.0
    for each in waiting:
        sender.compute(each)
        sender.finish(each)
    for fetch in fetches:
        fetch.succeed()
    sender.assert_idle()
    sender.stop()


def test_waiting_streams_never_hold_up_one_that_is_ready() -> None:
    """100 transfers wait for their prefill, and the last to come is served at once."""
    sender, receiver = Sender(200, max_streams=1024), Receiver(200)
    waiting = [sender.open(f"w{index}", [index]) for index in range(100)]
    fetches = [receiver.fetch(each.transfer_id, each.block_ids, sender.server.address) for each in waiting]
    eventually(lambda: sender.server.open_streams == 100, "all wait")
    ready = sender.open("ready", [150])
    sender.compute(ready)
    receiver.fetch("ready", [150], sender.server.address).succeed()
    for each in [ready, *waiting]:
        sender.table.close(each.request_id, "end of test")
        sender.finish(each)
    for fetch in fetches:
        fetch.fail(grpc.StatusCode.ABORTED)
    sender.assert_idle()
    receiver.assert_idle()
    receiver.stop()
    sender.stop()


# Fencing and the landing budget.


@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_written_once_the_fence_stands(sender: Sender, receiver: Receiver, seed: int) -> None:
    transfer = sender.open("t", range(60))
    sender.compute(transfer)
    fetch = receiver.fetch("t", range(60), sender.server.address)
    _landed(fetch, random.Random(seed).randint(1, 200))
    fetch.importer.fence()
    for cache in receiver.caches.values():  # vLLM gives the blocks to somebody else
        cache[:] = seed
    complete = fetch.importer.complete
    fetch.join()
    sender.finish(transfer)
    assert fetch.importer.complete == complete, "`complete` is final once the fence stands"
    assert all((cache == seed).all() for cache in receiver.caches.values())


def test_the_fence_waits_for_a_write_under_way(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, gate = threading.Event(), threading.Event()
    scatter = kv_hash.scatter

    def slow(*args) -> int:
        entered.set()
        assert gate.wait(5)
        return scatter(*args)

    monkeypatch.setattr(kv_hash, "scatter", slow)
    importer = _importer("t", [1], receiver)
    frame = _frame(0, 0, bytes(receiver.blocks.block_bytes[0]))
    accepting = threading.Thread(target=importer.accept, args=(frame,))
    accepting.start()
    entered.wait(5)
    fencing = threading.Thread(target=importer.fence)
    fencing.start()
    fencing.join(0.1)
    assert fencing.is_alive(), "the write has not ended"
    gate.set()
    fencing.join(5)
    accepting.join(5)
    assert not fencing.is_alive()


def test_the_end_after_the_fence_completes_nothing(receiver: Receiver) -> None:
    importer = _importer("t", [1], receiver)
    frames = _frames_of("t", receiver)
    for frame in frames[:-1]:
        importer.accept(frame)
    importer.fence()
    with pytest.raises(FrameRefusedError) as refused:
        importer.accept(frames[-1])
    assert refused.value.reason == "fenced"
    assert not importer.complete


def test_the_landing_budget_bounds_and_never_deadlocks() -> None:
    budget, limit = LandingBudget(100), 100
    peak, lock = [0], threading.Lock()

    def land(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(200):
            size = dice.choice((1, 30, 70, 100, 250))  # 250 never fits: it goes alone
            with budget.hold(size), lock:
                used = budget.used
                assert used <= limit or used == 250, used
                peak[0] = max(peak[0], used)

    threads = [threading.Thread(target=land, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert budget.used == 0
    assert peak[0] == 250


@pytest.mark.parametrize("transport", ["grpc", "nccl"], indirect=True)  # the others fill the blocks themselves
def test_a_full_landing_budget_stops_the_sender_not_for_ever(sender: Sender, receiver: Receiver) -> None:
    with receiver.budget.hold(1 << 20):
        transfer = sender.open("t", range(8))
        sender.compute(transfer)
        fetch = receiver.fetch("t", range(8), sender.server.address)
        eventually(lambda: bool(transfer.claimed), "the stream has begun")
        time.sleep(0.1)
        assert fetch.landed == [0, 0, 0, 0]
        assert receiver.budget.waits == 1
    fetch.succeed()
    sender.finish(transfer)
    receiver.expect(sender.content(transfer), range(8))
    receiver.assert_cache()


# A bad wire, and bad peers.


def _flip(frames: list[bytes]) -> list[bytes]:
    damaged = bytearray(frames[2])
    damaged[-1] ^= 0x10
    return [*frames[:2], bytes(damaged), *frames[3:]]


def _remade(change: dict, index: int = 1):
    """A frame that says something else, with a checksum that is right."""

    def tamper(frames: list[bytes]) -> list[bytes]:
        header, payload = decode(frames[index])
        fields = {name: getattr(header, name) for name in header.__dataclass_fields__}
        for name, value in change.items():
            if name == "payload":
                payload = value(payload)
            else:
                fields[name] = value(fields[name]) if callable(value) else value
        remade = list(frames)
        remade[index] = encode(FrameHeader(**fields), [payload])
        return remade

    return tamper


FAULTS = {
    "a flipped byte": (_flip, "checksum"),
    "a flipped byte in the header": (
        lambda f: [*f[:1], f[1][:20] + bytes([f[1][20] ^ 1]) + f[1][21:], *f[2:]],
        "checksum",
    ),
    "a dropped frame": (lambda f: [*f[:1], *f[2:]], "out_of_order"),
    "the first frame dropped": (lambda f: f[1:], "out_of_order"),
    "a frame sent twice": (lambda f: [*f[:2], f[1], *f[2:]], "out_of_order"),
    "two frames swapped": (lambda f: [f[0], f[2], f[1], *f[3:]], "out_of_order"),
    "all frames reversed": (lambda f: f[::-1], "out_of_order"),
    "a truncated frame": (lambda f: [*f[:2], f[2][:-1], *f[3:]], "truncated"),
    "half a header": (lambda f: [*f[:2], f[2][:20], *f[3:]], "truncated"),
    "an empty frame": (lambda f: [*f[:2], b"", *f[3:]], "truncated"),
    "a frame grown": (lambda f: [*f[:2], f[2] + b"\0", *f[3:]], "truncated"),
    "another magic": (lambda f: [b"KVJW" + f[0][4:], *f[1:]], "version"),
    "a newer version": (lambda f: [f[0][:4] + b"\3" + f[0][5:], *f[1:]], "version"),
    "an unknown flag": (_remade({"flags": 4}), "flags"),
    "a stale epoch": (_remade({"epoch": 6}), "stale_epoch"),
    "another transfer's frame": (_remade({"tag": transfer_tag("other")}), "misaddressed"),
    "a layer that is not there": (_remade({"layer": 4}), "layer"),
    "another layer": (_remade({"layer": 1}), "range"),
    "tokens out of place": (_remade({"first_token": lambda t: t + BLOCK_SIZE}), "range"),
    "tokens before the first": (_remade({"first_token": 0}, index=0), "range"),
    "no tokens": (_remade({"num_tokens": 0, "payload": lambda _: b""}), "range"),
    "more tokens than asked for": (_remade({"num_tokens": 100 * BLOCK_SIZE}), "range"),
    "a broken block": (_remade({"num_tokens": BLOCK_SIZE - 1}), "range"),
    "other heads": (_remade({"num_heads": 9}), "range"),
    "another encoding": (_remade({"encoding": PLAIN}), "encoding"),
    "fewer bytes than tokens": (_remade({"payload": lambda p: p[:-4]}), "size"),
    "the end too early": (lambda f: [f[0], _end(1)], "incomplete"),
    "the end with a payload": (_remade({"payload": lambda _: b"x"}, index=-1), "size"),
}


def _end(sequence: int) -> bytes:
    return encode(FrameHeader(transfer_tag("t"), 7, sequence, flags=FLAG_END))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_frame_is_refused_for_its_reason(sender: Sender, receiver: Receiver, transport: str, fault: str) -> None:
    tamper, reason = FAULTS[fault]
    wire = _bad_wire(sender, transport, tamper)
    transfer = sender.open("t", [1, 2, 3, 4, 5, 6], epoch=7)
    sender.compute(transfer)
    sender.finish(transfer)
    fetch = receiver.fetch("t", [21, 30, 22, 31], wire.address, first_block=2, epoch=7, timeout_s=0.5)
    if transport == "shm" and fault == "a frame grown":
        fetch.succeed()  # a slot has what its header says; what lies behind that is never read
        wire.stop()
        return
    error = fetch.fail()
    assert wire.fired == 1
    if transport != "grpc" and fault in _BROKEN_STREAMS:
        # On a stream of bytes what follows is out of step: found by its checksum, or never complete.
        assert isinstance(error, FrameRefusedError | LaneClosedError | TimeoutError | grpc.RpcError), error
    else:
        assert isinstance(error, FrameRefusedError), error
        assert error.reason == reason
    eventually(lambda: sender.sweep() == {"t.p"}, "the blocks are given back")
    receiver.assert_unchanged_but([21, 30, 22, 31])
    wire.stop()


_BROKEN_STREAMS = {"a truncated frame", "half a header", "an empty frame", "a frame grown"}


def _bad_wire(sender: Sender, transport: str, tamper) -> FrameProxy | TamperedLanes:
    if transport == "grpc":
        return FrameProxy(sender.server.address, tamper)
    return TamperedLanes(sender, tamper)


def test_a_stream_that_ends_without_its_last_frame_is_not_complete(
    sender: Sender, receiver: Receiver, transport: str
) -> None:
    wire = _bad_wire(sender, transport, lambda frames: frames[:-1])
    transfer = sender.open("t", [1, 2])
    sender.compute(transfer)
    sender.finish(transfer)
    fetch = receiver.fetch("t", [5, 6], wire.address, timeout_s=0.5)
    fetch.join()
    assert wire.fired == 1
    assert not fetch.importer.complete
    wire.stop()


def test_frames_of_a_concurrent_transfer_are_refused(sender: Sender, receiver: Receiver, transport: str) -> None:
    """Real frames of a real transfer of the same shape, in the wrong stream."""
    stolen: list[list[bytes]] = []
    wire = _bad_wire(sender, transport, lambda frames: stolen.append(frames) or stolen[0])
    for name, ids in (("a", [1, 2]), ("b", [3, 4])):
        transfer = sender.open(name, ids)
        sender.compute(transfer)
        sender.finish(transfer)
        if name == "a":
            receiver.fetch(name, [5, 6], wire.address).succeed()
            receiver.expect(sender.content(transfer), [5, 6])
    error = receiver.fetch("b", [7, 8], wire.address).fail()
    assert isinstance(error, FrameRefusedError)
    assert error.reason == "misaddressed"
    receiver.assert_unchanged_but([7, 8])
    wire.stop()


def test_no_frame_after_the_end(receiver: Receiver) -> None:
    importer = _importer("t", [1], receiver)
    for frame in _frames_of("t", receiver):
        importer.accept(frame)
    assert importer.complete
    with pytest.raises(FrameRefusedError) as refused:
        importer.accept(encode(FrameHeader(transfer_tag("t"), 1, 5, flags=FLAG_END)))
    assert refused.value.reason == "after_end"


def _importer(name: str, block_ids: list[int], receiver: Receiver) -> Importer:
    spec = FetchSpec(f"{name}.d", name, 1, ("nowhere",), 0, tuple(block_ids), len(block_ids) * BLOCK_SIZE, 5.0)
    (whole,) = plan([receiver.blocks.layout], 0, [receiver.blocks.layout]).parts
    return Importer(spec, receiver.blocks, whole, receiver.budget)


def _frames_of(name: str, receiver: Receiver) -> list[bytes]:
    """All frames of a transfer of one block."""
    tag = transfer_tag(name)
    frames = [_frame(layer, layer, bytes(size)) for layer, size in enumerate(receiver.blocks.block_bytes)]
    return [*frames, encode(FrameHeader(tag, 1, len(frames), flags=FLAG_END))]


def _frame(sequence: int, layer: int, payload: bytes) -> bytes:
    """The first block of a layer of transfer "t"."""
    header = FrameHeader(transfer_tag("t"), 1, sequence, layer, 0, BLOCK_SIZE, encoding=WHOLE)
    return encode(header, [payload])


def test_a_long_wait_does_not_overflow_the_last_frame(sender: Sender, receiver: Receiver) -> None:
    transfer = sender.open("t", [1])
    sender.compute(transfer)
    transfer.computed_at -= 100_000.0
    fetch = receiver.fetch("t", [1], sender.server.address)
    fetch.succeed()
    assert fetch.importer.exposed_us == (1 << 32) - 1
    sender.finish(transfer)


def test_the_table_remembers_only_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("joinwise.actors.kv.sending._REMEMBERED", 10)
    table = SendTable(lambda: None)
    for index in range(50):
        table.open(SendTransfer(f"t{index}", f"r{index}", 1, 1, 1, 1, 60.0, BLOCK_SIZE))
        table.end(f"r{index}")
    table.take_releasable(time.monotonic())
    assert len(table._over) == 10
    assert table.held() == []


def test_fakes_are_noise() -> None:
    """The caches differ everywhere, so that a byte which did not travel shows."""
    one, two = make_caches(8, 1), make_caches(8, 2)
    assert not any(torch.equal(one[name][block], two[name][block]) for name in one for block in range(8))


def test_the_kv_port_answers_health_checks(sender: Sender) -> None:
    with grpc.insecure_channel(sender.server.address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="joinwise.v1.KvService"), timeout=5
        )
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
