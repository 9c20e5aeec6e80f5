"""A sender that is told to stop: it serves what peers still need, takes nothing new, and waits for nobody for ever."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import grpc
import pytest
from helpers.kv_rig import Receiver, Sender, eventually

from joinwise.actors.kv.draining import Drained, Pending, drain
from joinwise.actors.kv.sending import SendTransfer
from joinwise.actors.kv.server import FETCH
from joinwise.actors.vllm.connector.scheduler import SchedulerConnector
from joinwise.actors.vllm.handoff import Handoff
from joinwise.proto import kv_pb2

STOPPING = "this worker is stopping"


class Stopping:
    """A sender's drain, on a thread of its own."""

    def __init__(self, sender: Sender, patience_s: float = 10.0) -> None:
        self._sender, self._patience_s = sender, patience_s
        sender.table.stop_opening(STOPPING)
        self.looked = threading.Event()
        self.result: Drained | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self.looked.wait(10)

    def _run(self) -> None:
        async def look() -> Pending:
            self._sender.sweep()
            pending = Pending(transfers=frozenset(self._sender.table.needed(time.monotonic())))
            self.looked.set()
            return pending

        self.result = asyncio.run(drain(look, self._patience_s))

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()

    def ended(self) -> Drained:
        self._thread.join(20)
        assert self.result is not None
        return self.result


@pytest.fixture(params=["grpc", "tcp", "shm"])
def receiver(request: pytest.FixtureRequest) -> Iterator[Receiver]:
    each = Receiver(transport=request.param)
    yield each
    each.assert_idle()
    each.stop()


@pytest.fixture
def sender() -> Iterator[Sender]:
    each = Sender()
    yield each
    each.stop()


def test_a_transfer_in_progress_survives(sender: Sender, receiver: Receiver) -> None:
    transfer = sender.open("t", range(6))
    fetch = receiver.fetch("t", range(10, 16), sender.server.address)
    sender.compute(transfer, until=3)
    eventually(lambda: fetch.landed == [3] * 4, "half of it lands")
    stopping = Stopping(sender)
    sender.compute(transfer)
    sender.finish(transfer)
    fetch.succeed()
    ended = stopping.ended()
    assert (ended.awaited, ended.left, ended.answered) == (1, Pending(), True)
    assert "for 1 KV transfers" in str(ended)
    receiver.expect(sender.content(transfer), range(10, 16))
    receiver.assert_cache()
    sender.assert_idle()


def test_what_is_pinned_is_served_when_its_peer_comes(sender: Sender, receiver: Receiver) -> None:
    transfers = [sender.open(name, [index]) for index, name in enumerate("ab")]
    for transfer in transfers:
        sender.compute(transfer)
        sender.finish(transfer)
    stopping = Stopping(sender)
    receiver.fetch("a", [5], sender.server.address).succeed()
    assert stopping.waits
    receiver.fetch("b", [6], sender.server.address).succeed()
    assert stopping.ended().awaited == 2
    for transfer, block in zip(transfers, (5, 6), strict=True):
        receiver.expect(sender.content(transfer), [block])
    receiver.assert_cache()
    sender.assert_idle()


def test_new_transfers_are_refused_at_once(sender: Sender, receiver: Receiver) -> None:
    waiting = receiver.fetch("early", [1], sender.server.address)
    eventually(lambda: sender.server.open_streams == 1, "a stream waits for its transfer")
    sender.table.stop_opening(STOPPING)
    begin = time.monotonic()
    assert STOPPING in str(waiting.fail(grpc.StatusCode.NOT_FOUND))
    transfer = sender.open("late", [2])
    assert transfer.closed == STOPPING
    assert STOPPING in str(receiver.fetch("late", [2], sender.server.address).fail(grpc.StatusCode.NOT_FOUND))
    assert time.monotonic() - begin < 4, "neither has waited for a transfer that will never be"
    sender.finish(transfer)
    assert sender.sweep() == {"late.p"}, "its request ends like any other"
    assert Stopping(sender).ended().awaited == 0


def test_a_peer_that_never_comes_holds_it_for_its_lease(sender: Sender) -> None:
    transfer = sender.open("t", [1], lease_s=0.3)
    sender.compute(transfer)
    sender.finish(transfer)
    ended = Stopping(sender).ended()
    assert (ended.awaited, ended.left) == (1, Pending())
    assert 0.2 < ended.seconds < 5


def test_a_stalled_peer_holds_it_for_no_longer_than_its_lease() -> None:
    """It has asked, and reads nothing: the sender's stream is full, and nothing would end it for an hour."""
    sender = Sender(num_blocks=8192)
    transfer = sender.open("t", range(8192), lease_s=0.4)
    for layer in range(len(sender.caches)):
        sender.table.advance(transfer, layer, 8192)
    sender.finish(transfer)
    with grpc.insecure_channel(sender.server.address) as channel:
        call = channel.unary_stream(FETCH, kv_pb2.FetchRequest.SerializeToString)(
            _request(sender, transfer), timeout=60
        )
        eventually(lambda: _stands_still(transfer), "the stream is full")
        ended = Stopping(sender).ended()
        assert ended.left == Pending() and ended.seconds < 5
        assert transfer.streaming == 1 and not transfer.closed, "it was left as it was"
        begin = time.monotonic()
        sender.stop()
        assert time.monotonic() - begin < 5, "and does not hold the port either"
        call.cancel()
    eventually(lambda: transfer.streaming == 0, "its stream ends")


def _request(sender: Sender, transfer: SendTransfer) -> kv_pb2.FetchRequest:
    return kv_pb2.FetchRequest(
        transfer_id=transfer.transfer_id,
        epoch=transfer.epoch,
        num_tokens=transfer.num_tokens,
        instance=sender.server.instance,
        encoding=kv_pb2.ENCODING_BLOCKS,
    )


def _stands_still(transfer: SendTransfer) -> bool:
    return transfer.moved_at > 0 and time.monotonic() - transfer.moved_at > 0.2


def test_a_slow_peer_that_moves_is_waited_for_beyond_one_lease(sender: Sender) -> None:
    transfer = sender.open("t", [1], lease_s=0.2)
    sender.compute(transfer)
    sender.finish(transfer)
    claimed = sender.table.claim("t", 1, time.monotonic() + 1, lambda: True)
    moved = time.monotonic() + 100
    claimed.moved_at = moved
    assert sender.table.needed(moved + 0.1) == {"t"}
    assert sender.table.needed(moved + 0.3) == set()
    sender.table.release(claimed, "sent", delivered_of=1)
    assert sender.table.needed(moved) == set(), "sent"


def test_patience_is_the_upper_bound(sender: Sender) -> None:
    transfer = sender.open("t", [1])
    sender.compute(transfer)
    sender.finish(transfer)
    ended = Stopping(sender, patience_s=0.2).ended()
    assert ended.left == Pending(transfers=frozenset({"t"}))
    assert 0.15 < ended.seconds < 5
    assert "0 requests and 1 transfers were left behind" in str(ended)


async def test_an_engine_that_hangs_is_not_waited_for() -> None:
    async def look() -> Pending:
        await asyncio.Event().wait()
        raise AssertionError

    ended = await drain(look, 0.1)
    assert not ended.answered and ended.seconds < 5
    assert "did not answer" in str(ended)


async def test_requests_are_awaited_too() -> None:
    seen = iter([Pending(2, frozenset({"a"})), Pending(1, frozenset({"a", "b"})), Pending()])

    async def look() -> Pending:
        return next(seen)

    assert (await drain(look, 10)).awaited == 2


def test_the_scheduler_half_opens_nothing_more() -> None:
    scheduler = SchedulerConnector(4)
    scheduler.on_new_request(_sending("before"))
    scheduler.stop_sending()
    scheduler.on_new_request(_sending("after"))
    nothing = SimpleNamespace(
        preempted_req_ids=None,
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[]),
        num_scheduled_tokens={},
    )
    metadata = scheduler.build_metadata(nothing)
    assert metadata.stopping
    assert [each.request_id for each in metadata.open_sends] == ["before"]
    assert not scheduler.request_finished(_sending("after")), "nothing of it is kept"
    assert scheduler.request_finished(_sending("before"))


def _sending(name: str) -> SimpleNamespace:
    handoff = Handoff("send", f"{name}-t", 1, "peer:1", 9.0)
    return SimpleNamespace(request_id=name, num_prompt_tokens=8, kv_transfer_params=handoff.to_params())
