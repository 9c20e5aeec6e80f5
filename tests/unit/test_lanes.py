"""The contract of a lane, over every kind: what goes in comes out, waiting ends, and nothing is left behind."""

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from helpers import lane_peer
from helpers.certificates import Authority
from helpers.gpu import needs_cuda
from helpers.lane_rig import Call, Rig, eventually, header, nothing_leaks, send_header_only

from joinwise.actors.kv.lanes.lane import LaneClosedError, LaneOptions, LaneRefusedError
from joinwise.actors.kv.lanes.tcp import TcpReceive, TcpSend
from joinwise.actors.tls import Certificates

KINDS = ["tcp", "tcp+tls", "shm", "shm+tls", "nccl"]
PLAIN_KINDS = ["tcp", "shm", "nccl"]
MB = 1 << 20
TWO_GPUS = needs_cuda("nccl lanes, which connect two devices", devices=2)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """One for both ends, who trust each other."""
    files = Authority().issue(tmp_path_factory.mktemp("lanes"))
    return Certificates(files.cert, files.key, files.ca, server_name="joinwise")


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    with nothing_leaks():
        yield


@pytest.fixture
def rig(request: pytest.FixtureRequest, certificates: Certificates) -> Iterator[Rig]:
    """Both ends of the parametrised kind."""
    kind, _, tls = request.param.partition("+")
    if kind == "cuda":
        options = [{"options": LaneOptions(device=f"cuda:{index}")} for index in range(2)]
        each = Rig("nccl", server=options[0], pool=options[1])
    else:
        each = Rig(kind, certificates=certificates if tls else None)
    yield each
    each.close()


@pytest.fixture
def lane(rig: Rig) -> Iterator[tuple[TcpSend, TcpReceive]]:
    """Both ends of a lane, which the test leaves unusable or idle."""
    send, receive = rig.pair()
    yield send, receive
    rig.give_back(send, receive, clean=False)


all_kinds = pytest.mark.parametrize(
    "rig", [*KINDS, pytest.param("cuda", marks=[pytest.mark.gpu, TWO_GPUS])], indirect=True
)
plain_kinds = pytest.mark.parametrize("rig", PLAIN_KINDS, indirect=True)


def noise(size: int, seed: int) -> np.ndarray:
    """Bytes that are the same for the same seed."""
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def cut(data: np.ndarray, pieces: int, seed: int) -> list[memoryview]:
    """Views of all of it, in order, cut at random places: empty ones too."""
    places = sorted(random.Random(seed).randint(0, len(data)) for _ in range(pieces - 1))
    return [data[start:end].data for start, end in zip([0, *places], [*places, len(data)], strict=True)]


def send_frames(lane: TcpSend, sizes: list[tuple[int, int]], base: int = 0) -> None:
    """Send a frame for each (size, pieces)."""
    for number, (size, pieces) in enumerate(sizes, base):
        lane.send(header(number), cut(noise(size, number), pieces, seed=number) if size else [])


def assert_frames(lane: TcpReceive, sizes: list[tuple[int, int]], base: int = 0) -> None:
    """Take a frame for each (size, pieces), and find it as it was sent."""
    for number, (size, pieces) in enumerate(sizes, base):
        assert lane.receive_header() == header(number)
        landing = np.zeros(size, np.uint8)
        lane.receive(cut(landing, pieces, seed=-number))
        assert np.array_equal(landing, noise(size, number)), f"frame {number} of {size} bytes"


# What goes in comes out.


@all_kinds
def test_frames_of_any_size_and_cut_arrive_in_order(rig: Rig, lane: tuple[TcpSend, TcpReceive]) -> None:
    odd = [0, 1, 63, 64, 65, 4095, 4097, 65_537, 999_999, MB - 1, MB]
    sizes = [(size, pieces) for size in odd for pieces in (1, 2, 37)] + [(300_000, 2500), (0, 1), (2500, 2500)]
    random.Random(1).shuffle(sizes)
    send, receive = lane
    sending = Call(send_frames, send, sizes)
    assert_frames(receive, sizes)
    sending.result()
    assert send.payload_bytes == receive.payload_bytes == sum(size for size, _ in sizes)
    assert send.healthy()
    assert receive.healthy()


@all_kinds
def test_read_only_memory_can_be_sent(rig: Rig, lane: tuple[TcpSend, TcpReceive]) -> None:
    send, receive = lane
    sending = Call(send.send, header(1), [memoryview(b"read-only")])
    assert receive.receive_header() == header(1)
    landing = bytearray(9)
    receive.receive([memoryview(landing)])
    sending.result()
    assert landing == b"read-only"


@all_kinds
def test_both_ends_tell_the_checksum_of_what_they_read(rig: Rig, lane: tuple[TcpSend, TcpReceive]) -> None:
    send, receive = lane
    for number, (size, pieces) in enumerate([(1, 1), (240, 3), (241, 1), (999_999, 37), (MB, 2500)]):
        payload = cut(noise(size, number), pieces, seed=number)
        wanted = xxhash.xxh3_64_intdigest(noise(size, number))
        assert send.load(payload) == wanted
        sending = Call(send.send, header(number), payload)
        assert receive.receive_header() == header(number)
        landing = np.zeros(size, np.uint8)
        assert receive.receive(cut(landing, pieces, seed=-number)) == wanted
        sending.result()
        assert np.array_equal(landing, noise(size, number))


@all_kinds
def test_what_was_loaded_is_used_once_and_for_its_own_frame_only(rig: Rig, lane: tuple[TcpSend, TcpReceive]) -> None:
    send, receive = lane
    first, second = ([noise(1000, seed).data] for seed in (1, 2))

    def run() -> None:
        send.load(first)
        send.send(header(0), second)  # the first is dropped
        send.load(second)
        send.load(first)
        send.send(header(1), first)
        second[0][:] = first[0]
        send.send(header(2), second)  # read anew
        first[0][:] = bytes(1000)
        send.send(header(3), first)  # and this

    sending = Call(run)
    for number, expected in enumerate([noise(1000, 2), noise(1000, 1), noise(1000, 1), np.zeros(1000, np.uint8)]):
        assert receive.receive_header() == header(number)
        landing = np.ones(1000, np.uint8)
        receive.receive([landing.data])
        assert np.array_equal(landing, expected)
    sending.result()
    assert send.payload_bytes == receive.payload_bytes == 4000


def test_shm_does_not_read_a_payload_again_that_it_has_loaded() -> None:
    rig = Rig("shm")
    send, receive = rig.pair()
    payload = [noise(1000, 1).data]
    send.load(payload)
    payload[0][:] = bytes(1000)  # somebody else's by now
    send.send(header(1), payload)
    assert receive.receive_header() == header(1)
    landing = np.zeros(1000, np.uint8)
    receive.receive([landing.data])
    assert np.array_equal(landing, noise(1000, 1))
    rig.give_back(send, receive)
    rig.close()


@all_kinds
def test_lanes_do_not_mix(rig: Rig) -> None:
    pairs = [rig.pair() for _ in range(3)]
    assert len({send.lane_id for send, _ in pairs}) == 3
    sizes = [(size, 3) for size in (100_001, 7, MB, 12_345)] * 4
    sending = [Call(send_frames, send, sizes, 1000 * number) for number, (send, _) in enumerate(pairs)]
    taking = [Call(assert_frames, receive, sizes, 1000 * number) for number, (_, receive) in enumerate(pairs)]
    for call in sending + taking:
        call.result()
    for pair in pairs:
        rig.give_back(*pair)


# Back pressure.


@all_kinds
def test_a_sender_waits_for_a_receiver_that_does_not_read(rig: Rig, lane: tuple[TcpSend, TcpReceive]) -> None:
    send, receive = lane
    payload, sent, most, frames = noise(MB // 2, 1), 0, 20, 60

    def run() -> None:
        nonlocal sent
        for number in range(frames):
            send.send(header(number), [payload.data])
            sent += 1

    sending = Call(run)
    sending.wait_until_stuck()
    assert sending.running
    landing = np.zeros_like(payload)
    for number in range(frames):
        assert sent - number <= most, "more is under way than slots and socket buffers hold"
        assert receive.receive_header() == header(number)
        receive.receive([landing.data])
    sending.result()
    assert np.array_equal(landing, payload)


# Waiting ends.


def wait_in_send(send: TcpSend, receive: TcpReceive) -> Call:
    """A sender whose receiver does not read."""

    def run() -> None:
        while True:
            send.send(header(0), [memoryview(bytes(MB // 2))])

    return Call(run)


def wait_in_receive_header(send: TcpSend, receive: TcpReceive) -> Call:
    """A receiver between frames."""
    return Call(receive.receive_header)


def wait_in_receive(send: TcpSend, receive: TcpReceive) -> Call:
    """A receiver in the middle of a frame."""
    send_header_only(send, 5, 1000)
    assert receive.receive_header() == header(5)
    return Call(receive.receive, [memoryview(bytearray(1000))])


def use(lane: TcpSend | TcpReceive) -> None:
    """Send a frame or take one, of any size."""
    if isinstance(lane, TcpSend):
        lane.send(header(1), [memoryview(bytes(MB))])
    else:
        lane.receive_header()


def use_until_it_ends(lane: TcpSend | TcpReceive) -> None:
    """Do so again and again."""
    while True:
        use(lane)


def phases(kinds: list[str]) -> Callable[[Callable], Callable]:
    """Every kind in every phase in which it can wait: payloads of `shm` are there before their headers."""
    waits = [wait_in_send, wait_in_receive_header, wait_in_receive]
    cases = [
        (kind, wait) for kind in kinds for wait in waits if not (kind.startswith("shm") and wait is wait_in_receive)
    ]
    return pytest.mark.parametrize(("rig", "wait"), cases, indirect=["rig"])


@pytest.mark.parametrize("interrupter", ["send", "receive"])
@phases(KINDS)
def test_an_interrupt_at_either_end_ends_what_waits(
    rig: Rig, lane: tuple[TcpSend, TcpReceive], wait: Callable[[TcpSend, TcpReceive], Call], interrupter: str
) -> None:
    send, receive = lane
    call = wait(send, receive)
    call.wait_until_stuck()
    assert call.running
    (send if interrupter == "send" else receive).interrupt()
    assert isinstance(call.error(seconds=1.0), LaneClosedError)
    ours, theirs = (send, receive) if interrupter == "send" else (receive, send)
    with pytest.raises(LaneClosedError, match="interrupted"):
        use(ours)
    after = Call(use_until_it_ends, theirs)  # what was under way may still come
    assert isinstance(after.error(seconds=1.0), LaneClosedError)
    assert not send.healthy()
    assert not receive.healthy()


@all_kinds
def test_interrupts_race_with_frames_and_with_each_other(rig: Rig) -> None:
    for after in range(6):
        send, receive = rig.pair()
        reached = threading.Event()

        def take(receive: TcpReceive = receive, after: int = after, reached: threading.Event = reached) -> None:
            landing = memoryview(bytearray(MB))
            for number in range(1000):
                if number == after:
                    reached.set()
                assert receive.receive_header() == header(number)
                receive.receive([landing])

        taking = Call(take)
        sending = Call(send_frames, send, [(MB, 2)] * 1000)
        assert reached.wait(10)
        interrupts = [Call(end.interrupt) for end in (send, receive, send, receive)]
        for call in interrupts:
            call.result(1.0)
        assert isinstance(taking.error(seconds=1.0), LaneClosedError)
        assert isinstance(sending.error(seconds=1.0), LaneClosedError)
        rig.give_back(send, receive, clean=False)
        receive.interrupt()  # of a closed lane: nothing


@plain_kinds
def test_nothing_is_written_once_receive_has_raised(rig: Rig, lane: tuple[TcpSend, TcpReceive]) -> None:
    send, receive = lane
    sending = wait_in_send(send, receive)
    sending.wait_until_stuck()
    landing = bytearray(MB // 2)
    assert receive.receive_header() == header(0)
    receive.interrupt()
    with pytest.raises(LaneClosedError):
        for _ in range(100):  # a socket may still hold some
            receive.receive([memoryview(landing)])
            receive.receive_header()
    before = bytes(landing)
    sending.error()
    assert landing == before


# The peer's process ends.


@pytest.fixture
def peer() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `lane_peer.py`; whatever still runs is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        path = Path(lane_peer.__file__)
        process = subprocess.Popen(
            [sys.executable, str(path), *arguments],
            env={**os.environ, "PYTHONPATH": str(path.parents[1]), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@plain_kinds
def test_a_receiver_notices_that_its_sender_was_killed(rig: Rig, peer: Callable[..., subprocess.Popen[str]]) -> None:
    process = peer("send", rig.kind)
    assert process.stdout is not None and process.stdin is not None
    lane = rig.pool.lease(process.stdout.readline().strip(), rig.kind)
    print(lane.lane_id, file=process.stdin, flush=True)
    assert lane.receive_header() == header(1)
    landing = bytearray(5)
    lane.receive([memoryview(landing)])
    assert landing == b"first"
    assert process.stdout.readline() == "sent\n"
    waiting = Call(lane.receive_header)
    waiting.wait_until_stuck()
    process.kill()
    assert isinstance(waiting.error(seconds=5.0), LaneClosedError)
    rig.pool.give_back(lane, clean=False)


@plain_kinds
def test_a_sender_notices_that_its_receiver_was_killed(rig: Rig, peer: Callable[..., subprocess.Popen[str]]) -> None:
    process = peer("receive", rig.kind, rig.server.address)
    assert process.stdout is not None
    lane = rig.server.claim(int(process.stdout.readline()), 5.0)
    lane.send(header(1), [memoryview(b"first")])
    assert process.stdout.readline() == "received\n"
    waiting = Call(send_frames, lane, [(MB, 1)] * 100)
    waiting.wait_until_stuck()
    process.kill()
    assert isinstance(waiting.error(seconds=5.0), LaneClosedError)
    rig.server.give_back(lane, clean=False)


# Used again, or not.


@all_kinds
def test_a_clean_lane_is_used_again(rig: Rig) -> None:
    ids = set()
    for turn in range(5):
        send, receive = rig.pair()
        ids.add(send.lane_id)
        sending = Call(send_frames, send, [(70_001, 3)] * 20, 100 * turn)
        assert_frames(receive, [(70_001, 5)] * 20, 100 * turn)
        sending.result()
        rig.give_back(send, receive)
    assert len(ids) == len(rig.server) == 1


@plain_kinds
def test_a_lane_that_is_not_clean_is_never_used_again(rig: Rig) -> None:
    send, receive = rig.pair()
    rig.pool.give_back(receive, clean=False)
    rig.server.give_back(send, clean=True)  # its end has seen nothing wrong
    again = rig.lease()
    assert again.lane_id != receive.lane_id
    with pytest.raises(LaneClosedError):
        rig.server.claim(receive.lane_id, 1.0)
    rig.pool.give_back(again, clean=True)


@plain_kinds
def test_a_lane_that_its_sender_has_closed_is_replaced(rig: Rig) -> None:
    send, receive = rig.pair()
    rig.pool.give_back(receive, clean=True)
    rig.server.give_back(send, clean=False)
    again = rig.lease()
    assert again.lane_id != receive.lane_id
    rig.pool.give_back(again, clean=True)


@plain_kinds
def test_a_lane_with_a_frame_that_nobody_took_is_replaced(rig: Rig) -> None:
    send, receive = rig.pair()
    send.send(header(1), [])
    rig.give_back(send, receive)
    eventually(lambda: not receive.healthy(), "the frame is there")
    again = rig.lease()
    assert again.lane_id != receive.lane_id
    rig.pool.give_back(again, clean=True)


# What only some kinds have.


@pytest.mark.parametrize("rig", ["shm", "shm+tls"], indirect=True)
def test_shm_refuses_a_payload_larger_than_a_slot_before_anything_is_sent(
    rig: Rig, lane: tuple[TcpSend, TcpReceive]
) -> None:
    send, receive = lane
    size = LaneOptions().slot_bytes
    with pytest.raises(ValueError, match=f"{size + 1} bytes"):
        send.send(header(1), [memoryview(bytes(size)), memoryview(b"x")])
    with pytest.raises(ValueError, match=f"{size + 1} bytes"):
        receive.receive([memoryview(bytearray(size + 1))])
    send_frames(send, [(100, 1)])
    assert_frames(receive, [(100, 1)])


def test_shm_sends_as_many_payloads_ahead_as_there_are_slots() -> None:
    options = LaneOptions(slots=3, slot_bytes=4096)
    rig = Rig("shm", pool={"options": options})
    send, receive = rig.pair()
    sent = threading.Semaphore(0)

    def run() -> None:
        for number in range(7):
            send_frames(send, [(4096, 2)], number)
            sent.release()

    sending = Call(run)
    for _ in range(3):
        assert sent.acquire(timeout=10)
    for number in range(4):
        sending.wait_until_stuck()
        assert not sent.acquire(blocking=False), "more payloads than slots"
        assert_frames(receive, [(4096, 3)], number)
        assert sent.acquire(timeout=10)
    assert_frames(receive, [(4096, 1)] * 3, 4)
    sending.result()
    rig.give_back(send, receive)
    rig.close()


def test_a_receiver_that_gives_back_slots_it_never_had_loses_the_lane() -> None:
    rig = Rig("shm")
    send, receive = rig.pair()
    send.load([memoryview(b"read, and never sent")])  # takes no slot
    receive.wire.send([b"\x01"])
    eventually(lambda: not send.healthy(), "the sender sees it")
    rig.give_back(send, receive)
    rig.close()


def test_nccl_carries_tensors_without_copies() -> None:
    rig = Rig("nccl")
    send, receive = rig.pair()
    sent = noise(100_000, 1)
    sending = Call(send.send_tensor, header(1), torch.from_numpy(sent))  # type: ignore[attr-defined]
    assert receive.receive_header() == header(1)
    landing = np.zeros_like(sent)
    receive.receive_tensor(torch.from_numpy(landing))  # type: ignore[attr-defined]
    sending.result()
    assert np.array_equal(landing, sent)
    rig.give_back(send, receive)
    rig.close()


def test_nccl_says_so_when_there_is_room_for_another_payload() -> None:
    rig = Rig("nccl")
    send, receive = rig.pair()
    sending = Call(send_frames, send, [(100, 1)])
    receive.receive_header()
    with pytest.raises(ValueError, match="room for 99 bytes, the payload has 100"):
        receive.receive([memoryview(bytearray(99))])
    landing = np.zeros(100, np.uint8)
    receive.receive([landing.data])
    sending.result()
    assert np.array_equal(landing, noise(100, 0))
    rig.give_back(send, receive)
    rig.close()


def test_nccl_is_refused_where_nothing_connects_the_devices() -> None:
    rig = Rig("nccl", server={"options": LaneOptions(device="meta")})
    with pytest.raises(LaneRefusedError, match="the KV is on meta here and on cpu there") as refused:
        rig.lease()
    assert refused.value.reason == "device"
    assert rig.server.refused == {"device": 1}
    rig.close()
