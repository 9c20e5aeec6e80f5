"""SIGKILL to either end of a transfer, in each phase: the other end notices soon, fails typed, and holds nothing."""

import time

import pytest
from helpers.kv_children import BLOCKS, PHASES, TARGETS, child, hold_end
from helpers.kv_faults import TYPED
from helpers.kv_rig import Receiver, Sender, eventually

NOTICED_S = 5.0

each = [pytest.mark.parametrize("phase", PHASES), pytest.mark.parametrize("transport", ["grpc", "tcp", "shm"])]
pytestmark = each


def test_the_sender_is_killed(transport: str, phase: str) -> None:
    receiver = Receiver(transport=transport)
    with child("sender", transport, phase) as (process, pipe):
        assert pipe.poll(20)
        fetch = receiver.fetch("t", TARGETS, pipe.recv())
        assert pipe.poll(20), "it has got there"
        pipe.recv()
        if phase == "middle":
            eventually(lambda: sum(fetch.landed) > 0, "frames land")
        process.kill()
        begin = time.monotonic()
        assert isinstance(fetch.fail(), TYPED)
        assert time.monotonic() - begin < NOTICED_S
    assert sum(link.counts["failed"] for link in receiver.client.links.values()) == 1
    assert not receiver.lanes._leased
    receiver.assert_idle()
    receiver.assert_unchanged_but(TARGETS)
    receiver.stop()


def test_the_receiver_is_killed(transport: str, phase: str) -> None:
    sender = Sender(kinds=(transport,))
    _, go = hold_end(sender)
    transfer = sender.open("t", BLOCKS)
    with child("receiver", transport, phase) as (process, pipe):
        pipe.send(sender.server.address)
        eventually(lambda: bool(transfer.streaming), "it asks", 20)
        if phase != "waiting":
            sender.compute(transfer, until=2 if phase == "middle" else None)
            assert pipe.poll(20), "it has got there"
        process.kill()
        process.join()
        go.set()
        eventually(lambda: bool(transfer.closed) and not transfer.streaming, "the sender notices", NOTICED_S)
    sender.finish(transfer)
    assert sender.sweep() == {"t.p"}, "the blocks are given back"
    eventually(lambda: len(sender.lanes) == 0, "its lane is closed", NOTICED_S)
    sender.assert_idle()
    sender.stop()
