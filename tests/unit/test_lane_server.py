"""Who may have a lane, how many there are, and who has which: strangers, limits, claims, leases, restarts."""

import errno
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.certificates import Authority
from helpers.lane_rig import TOKEN, Call, Rig, eventually, header, nothing_leaks

from joinwise.actors.kv.lanes import shm
from joinwise.actors.kv.lanes.lane import MAX_RING_BYTES, LaneClosedError, LaneOptions, LaneRefusedError
from joinwise.actors.kv.lanes.pool import LanePool
from joinwise.actors.kv.lanes.server import LaneServer
from joinwise.actors.kv.lanes.tcp import TcpReceive, TcpSend
from joinwise.actors.kv.lanes.wire import LANE_VERSION, split_address
from joinwise.actors.tls import Certificates


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    with nothing_leaks():
        yield


@pytest.fixture
def rigs() -> Iterator[Callable[..., Rig]]:
    """Makes rigs; they are closed afterwards."""
    made: list[Rig] = []

    def make(kind: str = "tcp", **changes: Any) -> Rig:
        made.append(Rig(kind, **changes))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


def envelope(message: object, *, version: int = LANE_VERSION, magic: bytes = b"JWLN", size: int | None = None) -> bytes:
    """A message of the handshake as it travels."""
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    return struct.pack("<4sHHI", magic, version, 0, len(body) if size is None else size) + body


def ring_hello(**changes: object) -> bytes:
    """A greeting with a ring of this process, or what `changes` make of it."""
    ring = {"pid": os.getpid(), "fd": 0, "slots": 2, "slot_bytes": 4096, "nonce": "00" * 16, **changes}
    return envelope({"kind": "shm", "token": TOKEN, "ring": ring})


def answer(rig: Rig, data: bytes) -> dict[str, Any] | None:
    """What the server says to these bytes; None when it hangs up."""
    with socket.create_connection(split_address(rig.server.address), 10) as stranger:
        stranger.sendall(data)
        reply = stranger.makefile("rb").read()
        return json.loads(reply[12:]) if reply else None


# Strangers.


def test_a_wrong_token_is_refused_and_counted(rigs: Callable[..., Rig]) -> None:
    rig = rigs(pool={"token": "another"})
    with pytest.raises(LaneRefusedError, match="no token, or one that is not known") as refused:
        rig.lease()
    assert refused.value.reason == "token"
    assert rig.server.refused == {"token": 1}
    assert len(rig.server) == 0


def test_a_server_without_a_token_lets_everybody_in(rigs: Callable[..., Rig]) -> None:
    rig = rigs(server={"token": ""}, pool={"token": "any"})
    rig.give_back(*rig.pair())


def test_another_version_is_refused_by_name(rigs: Callable[..., Rig]) -> None:
    rig = rigs()
    said = answer(rig, envelope({"kind": "tcp", "token": TOKEN}, version=LANE_VERSION + 1))
    assert said == {"refused": "version", "detail": "the peer speaks version 2 of lanes, this end 1"}
    assert rig.server.refused == {"version": 1}


def test_a_kind_that_is_not_offered_is_refused(rigs: Callable[..., Rig]) -> None:
    rig = rigs("shm", server={"kinds": ["tcp"]})
    with pytest.raises(LaneRefusedError, match="no lanes of kind 'shm' here, only tcp") as refused:
        rig.lease()
    assert refused.value.reason == "kind"


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        envelope({}, magic=b"JWKV"),
        envelope(b"", size=1 << 31),
        envelope(b"\xff\xfe"),
        envelope(b"[" * 4096),
        envelope(["tcp", TOKEN]),
        envelope({"kind": "tcp"}),
        envelope({"kind": 1, "token": TOKEN}),
        envelope({"kind": "tcp", "token": [TOKEN]}),
        envelope({"kind": "shm", "token": TOKEN}),
        envelope({"kind": "shm", "token": TOKEN, "ring": {"pid": 1}}),
        envelope({"kind": "shm", "token": TOKEN, "ring": "ring"}),
        ring_hello(slots=0),
        ring_hello(slots=-1, slot_bytes=-1),
        ring_hello(slots=1 << 40),
        ring_hello(slot_bytes=MAX_RING_BYTES),
        ring_hello(nonce="xyz"),
        ring_hello(pid="x"),
    ],
    ids=lambda garbage: repr(garbage).replace(f'"pid": {os.getpid()}', '"pid": ours'),  # the same in every process
)
def test_garbage_is_dropped_without_an_answer(rigs: Callable[..., Rig], garbage: bytes) -> None:
    rig = rigs()
    try:
        assert answer(rig, garbage) is None
    except ConnectionResetError:
        pass  # it has not even been read
    assert rig.server.refused == {"garbage": 1}
    assert len(rig.server) == 0
    rig.give_back(*rig.pair())


def test_one_who_hangs_up_is_counted(rigs: Callable[..., Rig]) -> None:
    rig = rigs()
    socket.create_connection(split_address(rig.server.address), 10).close()
    eventually(lambda: rig.server.refused == {"gone": 1}, "the server has noticed")


def test_those_who_say_nothing_hold_up_nobody_and_have_to_go(rigs: Callable[..., Rig]) -> None:
    rig = rigs(server={"max_strangers": 3, "handshake_timeout_s": 60.0})
    address = split_address(rig.server.address)
    silent = [socket.create_connection(address, 10) for _ in range(8)]
    for stranger in silent[:5]:  # the first come have to go first
        assert stranger.recv(1) == b""
    rig.give_back(*rig.pair())
    eventually(lambda: rig.server.refused == {"gone": 6}, "the one before the lane too")
    for stranger in silent:
        stranger.close()


def test_one_who_dribbles_is_out_of_time(rigs: Callable[..., Rig]) -> None:
    rig = rigs(server={"handshake_timeout_s": 0.3})
    begin = time.monotonic()
    with socket.create_connection(split_address(rig.server.address), 10) as slow:
        hello = envelope({"kind": "tcp", "token": TOKEN})
        slow.settimeout(0.02)
        for byte in hello[:-1]:
            try:
                slow.sendall(bytes([byte]))
                if slow.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        else:
            pytest.fail("the server waits on")
    assert time.monotonic() - begin < 5
    eventually(lambda: rig.server.refused == {"timeout": 1}, "it is counted")


def test_a_peer_that_accepts_and_says_nothing_is_given_up() -> None:
    pool = LanePool(connect_timeout_s=0.1)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(LaneClosedError, match="timed out"):
            pool.lease(address, "tcp")
    with pytest.raises(LaneClosedError, match="cannot be reached"):
        pool.lease(address, "tcp")
    pool.close()


@pytest.mark.parametrize("said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", envelope({"lane_id": "x", "instance": "y"})])
def test_a_peer_that_is_no_worker_is_recognised(said: bytes) -> None:
    pool = LanePool(token=TOKEN)
    with socket.create_server(("127.0.0.1", 0)) as other:

        def talk() -> None:
            accepted, _ = other.accept()
            with accepted:
                accepted.recv(4096)
                accepted.sendall(said)
                accepted.recv(1)

        talking = Call(talk)
        with pytest.raises(LaneClosedError, match="does not answer as a worker with lanes"):
            pool.lease(f"127.0.0.1:{other.getsockname()[1]}", "tcp")
        talking.result()
    pool.close()


# TLS.


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """One for both ends, who trust each other."""
    files = Authority().issue(tmp_path_factory.mktemp("lanes"))
    return Certificates(files.cert, files.key, files.ca, server_name="joinwise")


def test_tls_wants_a_certificate_of_the_receiver(
    rigs: Callable[..., Rig], certificates: Certificates, tmp_path: Path
) -> None:
    files = Authority("stranger").issue(tmp_path, ca=certificates._ca.read_bytes())  # type: ignore[union-attr]
    stranger = Certificates(files.cert, files.key, files.ca, server_name="joinwise")
    rig = rigs(certificates=certificates, pool={"tls": stranger.client_context})
    with pytest.raises(LaneClosedError):
        rig.lease()
    eventually(lambda: rig.server.refused == {"tls": 1}, "it is counted")


def test_tls_wants_the_right_name_of_the_sender(rigs: Callable[..., Rig], certificates: Certificates) -> None:
    rig = rigs(certificates=certificates, pool={"server_name": "another"})
    with pytest.raises(LaneClosedError, match="not valid for 'another'"):
        rig.lease()


def test_ends_of_which_one_has_tls_do_not_meet(rigs: Callable[..., Rig], certificates: Certificates) -> None:
    rig = rigs(certificates=certificates, pool={"tls": None})
    with pytest.raises(LaneClosedError):
        rig.lease()
    eventually(lambda: rig.server.refused == {"tls": 1}, "it is counted")
    other = rigs(certificates=certificates, server={"tls": None})
    with pytest.raises(LaneClosedError):
        other.lease()
    eventually(lambda: other.server.refused == {"garbage": 1}, "it is counted")


# The ring of an shm lane.


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"pid": 1 << 30}, "no /proc/1073741824/fd/0: the receiver is on another host or in another container"),
        ({"fd": 1 << 30}, "the receiver is on another host or in another container"),
    ],
)
def test_a_ring_that_is_not_here_is_refused(rigs: Callable[..., Rig], changes: dict[str, int], detail: str) -> None:
    said = answer(rigs("shm"), ring_hello(**changes))
    assert said is not None
    assert said["refused"] == "host"
    assert detail in said["detail"]


def test_memory_that_is_no_ring_is_refused_and_left_alone(rigs: Callable[..., Rig], tmp_path: Path) -> None:
    rig = rigs("shm")
    size = shm._SLOTS_AT + 2 * 4096

    def refusal(descriptor: int, **changes: object) -> str:
        said = answer(rig, ring_hello(fd=descriptor, **changes))
        assert said is not None
        assert said["refused"] == "host"
        return said["detail"]

    with (tmp_path / "file").open("wb") as file:
        file.truncate(size)
        assert "is no ring" in refusal(file.fileno())
    for name, seal, length, found in (
        ("other", True, size, "is no ring"),
        (shm._NAME, False, size, "is not sealed"),
        (shm._NAME, True, size + 1, "has another size"),
        (shm._NAME, True, size, "is another than the receiver's"),
    ):
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.truncate(descriptor, length)
        if seal:
            shm.fcntl.fcntl(descriptor, shm.fcntl.F_ADD_SEALS, shm._SEALS)
        assert found in refusal(descriptor, nonce="ab" * 16)
        assert os.pread(descriptor, length, 0) == bytes(length)
        os.close(descriptor)


def test_a_ring_of_another_user_is_refused(rigs: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    rig = rigs("shm")

    def denied(path: str) -> str:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(shm.os, "readlink", denied)
    with pytest.raises(LaneRefusedError, match="belongs to another user: Permission denied") as refused:
        rig.lease()
    assert refused.value.reason == "host"


def test_no_memory_for_a_ring_is_said_at_the_receiver(
    rigs: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rigs("shm")

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shm.os, "posix_fallocate", full)
    with pytest.raises(LaneRefusedError, match="no memory for a ring: No space left on device"):
        rig.lease()
    eventually(lambda: rig.server.refused == {"gone": 1}, "the server has noticed")


def test_a_ring_cannot_be_configured_to_take_all_memory() -> None:
    for slots, slot_bytes in ((1, MAX_RING_BYTES + 1), (MAX_RING_BYTES, 2), (0, 1), (1, 0), (-1, -1)):
        with pytest.raises(ValueError, match="bytes together"):
            LaneOptions(slots=slots, slot_bytes=slot_bytes)


# Limits.


def test_no_more_lanes_than_allowed(rigs: Callable[..., Rig]) -> None:
    rig = rigs(server={"max_lanes": 2})
    pairs = [rig.pair() for _ in range(2)]
    with pytest.raises(LaneRefusedError, match="2 lanes are in use") as refused:
        rig.lease()
    assert refused.value.reason == "full"
    rig.give_back(*pairs[0], clean=False)
    pairs[0] = rig.pair()
    for pair in pairs:
        rig.give_back(*pair)


def test_the_lane_idle_for_longest_makes_room(rigs: Callable[..., Rig]) -> None:
    rig = rigs(server={"max_lanes": 2})
    first, second = rig.pair(), rig.pair()
    rig.server.give_back(second[0], clean=True)
    rig.server.give_back(first[0], clean=True)
    third = rig.pair()
    with pytest.raises(LaneClosedError, match="there is no lane"):
        rig.server.claim(second[0].lane_id, 1.0)
    assert rig.server.claim(first[0].lane_id, 1.0) is first[0]
    rig.give_back(*third)
    rig.give_back(*first)
    rig.pool.give_back(second[1], clean=False)


def test_idle_lanes_are_closed_at_both_ends(rigs: Callable[..., Rig]) -> None:
    for changes in ({"server": {"idle_s": 0.02}}, {"pool": {"idle_s": 0.02}}):
        rig = rigs("shm", **changes)
        send, receive = rig.pair()
        rig.give_back(send, receive)
        eventually(lambda send=send: send.wire.interrupted, "the sender's end is closed")  # type: ignore[misc]
        eventually(lambda rig=rig: len(rig.server) == 0, "the server has forgotten it")  # type: ignore[misc]
        eventually(lambda receive=receive: not receive.healthy(), "the receiver's end is of no use")  # type: ignore[misc]
        rig.give_back(*rig.pair())


def test_a_lane_in_use_is_not_idle(rigs: Callable[..., Rig]) -> None:
    rig = rigs(server={"idle_s": 0.02}, pool={"idle_s": 0.02})
    used, idle = rig.pair(), rig.pair()
    rig.give_back(*idle)
    eventually(lambda: len(rig.server) == 1, "the idle one is closed")
    sending = Call(used[0].send, header(1), [memoryview(b"x")])
    assert used[1].receive_header() == header(1)
    sending.result()
    rig.give_back(*used, clean=False)


# Claims and leases.


def test_a_lane_is_claimed_by_one_at_a_time(rigs: Callable[..., Rig]) -> None:
    rig = rigs()
    send, receive = rig.pair()
    with pytest.raises(LaneClosedError, match="in use by another transfer"):
        rig.server.claim(send.lane_id, 0.01)
    waiting = Call(rig.server.claim, send.lane_id, 10.0)
    waiting.wait_until_stuck()
    rig.server.give_back(send, clean=True)
    assert waiting.result() is send
    waiting = Call(rig.server.claim, send.lane_id, 10.0)
    waiting.wait_until_stuck()
    rig.server.give_back(send, clean=False)
    assert isinstance(waiting.error(), LaneClosedError)
    rig.pool.give_back(receive, clean=False)


def test_what_is_not_held_cannot_be_given_back(rigs: Callable[..., Rig]) -> None:
    rig = rigs()
    send, receive = rig.pair()
    rig.give_back(send, receive)
    with pytest.raises(ValueError, match="not claimed"):
        rig.server.give_back(send, clean=True)
    with pytest.raises(ValueError, match="not leased"):
        rig.pool.give_back(receive, clean=True)
    assert rig.pair() == (send, receive)
    rig.give_back(send, receive)


def test_claims_and_leases_race(rigs: Callable[..., Rig]) -> None:
    rig = rigs(server={"max_lanes": 64})
    users: dict[TcpSend | TcpReceive, int] = {}
    lock, wrong = threading.Lock(), list[str]()

    def using(lane: TcpSend | TcpReceive, change: int) -> None:
        with lock:
            users[lane] = users.get(lane, 0) + change
            if users[lane] not in (0, 1):
                wrong.append(f"{users[lane]} users")

    def transfers(worker: int) -> None:
        for turn in range(25):
            receive = rig.lease()
            using(receive, 1)
            claims = [Call(claim, receive.lane_id) for _ in range(2)]  # a Fetch and its impostor
            number = 100 * worker + turn
            assert receive.receive_header() == header(receive.lane_id)
            assert receive.receive_header() == header(receive.lane_id)
            assert sorted(call.result() for call in claims) == [True, True]
            clean = number % 5 != 0
            using(receive, -1)
            rig.pool.give_back(receive, clean=clean)

    def claim(lane_id: int) -> bool:
        send = rig.server.claim(lane_id, 10.0)
        using(send, 1)
        send.send(header(lane_id), [])
        using(send, -1)
        rig.server.give_back(send, clean=True)
        return True

    for call in [Call(transfers, worker) for worker in range(6)]:
        call.result(60)
    assert not wrong
    assert len(rig.server) <= 64


def test_one_claim_wins_however_many_race(rigs: Callable[..., Rig]) -> None:
    rig = rigs()
    receive = rig.lease()
    start = threading.Barrier(8)

    def claim() -> TcpSend | None:
        start.wait()
        try:
            return rig.server.claim(receive.lane_id, 0.0)
        except LaneClosedError:
            return None

    eventually(lambda: _idle(rig, receive), "the handshake is over at the server too")
    winners = [lane for lane in [call.result() for call in [Call(claim) for _ in range(8)]] if lane is not None]
    assert len(winners) == 1
    rig.give_back(winners[0], receive)


def _idle(rig: Rig, receive: TcpReceive) -> bool:
    rig.server.give_back(rig.server.claim(receive.lane_id, 5.0), clean=True)
    return True


# Ends and restarts.


def test_stop_and_close_interrupt_what_is_in_use(rigs: Callable[..., Rig]) -> None:
    rig = rigs()
    (first, theirs), idle = rig.pair(), rig.pair()
    rig.give_back(*idle)
    waiting = Call(theirs.receive_header)
    rig.server.stop()
    assert isinstance(waiting.error(1.0), LaneClosedError)
    with pytest.raises(LaneClosedError, match="interrupted"):
        first.send(header(1), [])
    assert len(rig.server) == 1
    rig.server.give_back(first, clean=True)
    assert len(rig.server) == 0
    with pytest.raises(LaneClosedError):
        rig.server.claim(first.lane_id, 1.0)
    with pytest.raises(LaneClosedError):
        rig.lease()
    rig.pool.close()
    rig.pool.give_back(theirs, clean=True)


def test_a_closed_pool_leases_nothing(rigs: Callable[..., Rig]) -> None:
    rig = rigs()
    send, receive = rig.pair()
    waiting = Call(receive.receive_header)
    rig.pool.close()
    assert isinstance(waiting.error(1.0), LaneClosedError)
    with pytest.raises(LaneClosedError, match="the pool is closed"):
        rig.lease()
    rig.give_back(send, receive)
    eventually(lambda: len(rig.server) == 0, "the server sees its end")


def test_stop_ends_handshakes() -> None:
    server = LaneServer("127.0.0.1:0", handshake_timeout_s=60.0)
    silent = [socket.create_connection(split_address(server.address), 10) for _ in range(3)]
    eventually(lambda: len(server._handshakes) == 3, "all have been let in")
    Call(server.stop).result(5.0)
    for stranger in silent:
        stranger.close()


def test_no_lane_survives_its_server(rigs: Callable[..., Rig]) -> None:
    rig = rigs()
    old = [rig.pair() for _ in range(2)]
    for pair in old:
        rig.give_back(*pair)
    rig.server.stop()
    again = LaneServer(rig.server.address, token=TOKEN)
    assert again.address == rig.server.address
    lane = rig.lease()
    assert lane.instance == again.instance != old[0][1].instance
    with pytest.raises(LaneClosedError, match="there is no lane"):
        again.claim(old[0][1].lane_id, 0.1)
    rig.pool.give_back(lane, clean=True)
    rig.server = again


def test_a_restarted_peer_is_known_by_its_name(rigs: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    rig = rigs()
    first, second = rig.pair(), rig.pair()
    rig.give_back(*second)
    monkeypatch.setattr(rig.server, "instance", "restarted")
    third, fourth = rig.pair(), rig.pair()
    assert third[1] is second[1], "nobody knows yet"
    assert fourth[1].instance == "restarted"
    assert not third[1].wire.interrupted, "what is in use ends by itself"
    rig.give_back(*third)
    rig.give_back(*fourth)
    fifth = rig.pair()
    assert fifth[1] is fourth[1]
    rig.give_back(*fifth)
    rig.give_back(*first, clean=False)


def test_a_port_that_is_taken_is_an_error(rigs: Callable[..., Rig]) -> None:
    rig = rigs()
    with pytest.raises(OSError, match="in use"):
        LaneServer(rig.server.address)
