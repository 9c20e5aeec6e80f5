"""What is known of KV links: counted by receivers on real ports, shown on `/metrics`, gathered for `status`."""

from __future__ import annotations

import time
from collections.abc import Iterator

import grpc
import pytest
from helpers.kv_rig import FrameProxy, Receiver, Sender
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from joinwise.actors.engine_service import EngineService, WorkerIdentity
from joinwise.actors.gateway.inference import InferenceService
from joinwise.actors.gateway.kv_links import kv_links
from joinwise.actors.gateway.links import Links
from joinwise.actors.gateway.models import Models
from joinwise.actors.kv.links import Link, LinkStatus, LinkTable, merged
from joinwise.actors.kv.metrics import KvFigures, KvMetrics
from joinwise.cluster.client.types import ClusterStatus, KvLinkStatus, WorkerStatus
from joinwise.cluster.client.wire import read_status
from joinwise.proto import engine_pb2_grpc, inference_pb2


@pytest.fixture
def sender() -> Iterator[Sender]:
    each = Sender()
    yield each
    each.stop()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    each = Receiver(transport="tcp")
    yield each
    each.stop()


def hand_off(sender: Sender, receiver: Receiver, name: str, peer: str = "") -> int:
    """One good transfer; its bytes."""
    transfer = sender.open(name, [1, 2])
    sender.compute(transfer)
    sender.finish(transfer)
    fetch = receiver.fetch(name, [3, 4], peer or sender.server.address)
    fetch.succeed()
    return fetch.bytes


def flipped(frames: list[bytes]) -> list[bytes]:
    return [frames[0][:-1] + bytes([frames[0][-1] ^ 1]), *frames[1:]]


# Counted.


def test_a_link_says_what_crossed_it_and_how(sender: Sender, receiver: Receiver) -> None:
    sent = hand_off(sender, receiver, "a") + hand_off(sender, receiver, "b")
    (link,) = receiver.client.link_status()
    assert (link.peer, link.transport, link.codec, link.why) == (sender.server.address, "tcp", "none", "configured")
    (counts,) = link.series.values()
    assert (counts["bytes"], counts["streams"], counts["failed"]) == (sent, 2, 0)
    assert 0 < counts["wire_seconds"] <= counts["seconds"]
    assert link.refused() == {} and link.retries == 0


def test_refused_frames_are_counted_by_reason(sender: Sender) -> None:
    receiver, proxy = Receiver(), FrameProxy(sender.server.address, flipped)
    try:
        for name in ("a", "b"):
            transfer = sender.open(name, [1])
            sender.compute(transfer)
            receiver.fetch(name, [3], proxy.address).fail()
        assert proxy.fired == 2
        (link,) = receiver.client.link_status()
        assert link.refused() == {"checksum": 2}
        assert link.total("failed") == 2
        hand_off(sender, receiver, "c")
        assert [each.total("failed") for each in receiver.client.link_status()] == [2, 0]
    finally:
        receiver.stop()
        proxy.stop()


def test_a_fenced_frame_is_no_refused_one(sender: Sender, receiver: Receiver) -> None:
    transfer = sender.open("a", [1])
    fetch = receiver.fetch("a", [3], sender.server.address)
    fetch.importer.fence()
    sender.compute(transfer)
    assert fetch.fail() is not None
    (link,) = receiver.client.link_status()
    assert link.refused() == {} and link.total("failed") == 1


def test_asking_again_is_counted(sender: Sender, receiver: Receiver) -> None:
    hand_off(sender, receiver, "a")
    sender.server.instance += 1  # as if it had restarted at the same address
    hand_off(sender, receiver, "b")
    (link,) = receiver.client.link_status()
    assert link.retries == 1
    assert link.total("streams") == 3, "the refused one is a stream too"


def test_transports_are_counted_apart() -> None:
    link = Link("p")
    link.add("shm", "none", bytes=3, streams=1)
    link.add("tcp", "lossless", bytes=4, streams=1)
    link.add("tcp", "lossless", bytes=5, streams=1)
    assert link.status().series == {
        ("shm", "none"): {"bytes": 3, "streams": 1},
        ("tcp", "lossless"): {"bytes": 9, "streams": 2},
    }
    assert link.status().total("bytes") == link.counts["bytes"] == 12


def test_one_payload_that_was_here_before_says_little_of_the_wire() -> None:
    link = Link("p")
    for _ in range(20):
        link.measure(1 << 20, 0.01)
    link.measure(1 << 20, 1e-5)
    assert 100e6 < link.bytes_per_s < 140e6
    link.measure(100, 1e-9)
    assert link.bytes_per_s < 140e6, "too small to be measured"


# Forgotten.


def test_a_peer_that_has_gone_disappears(sender: Sender, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    hand_off(sender, receiver, "a")
    sender.stop()
    receiver.fetch("b", [3], sender.server.address).fail(grpc.StatusCode.UNAVAILABLE)
    assert len(receiver.client.link_status()) == 1, "its last figures are shown for a while"
    now = time.monotonic()
    monkeypatch.setattr("joinwise.actors.kv.client.time.monotonic", lambda: now + 61)
    assert receiver.client.link_status() == []
    assert not receiver.client._channels and not receiver.client._agreed


def test_an_idle_peer_is_kept_longer_and_met_again(
    sender: Sender, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_off(sender, receiver, "a")
    now = time.monotonic()
    with monkeypatch.context() as later:
        later.setattr("joinwise.actors.kv.client.time.monotonic", lambda: now + 61)
        assert len(receiver.client.link_status()) == 1
        later.setattr("joinwise.actors.kv.client.time.monotonic", lambda: now + 901)
        assert receiver.client.link_status() == []
    hand_off(sender, receiver, "b")
    (link,) = receiver.client.link_status()
    assert link.total("streams") == 1


def test_a_link_in_use_is_never_forgotten() -> None:
    table = LinkTable()
    with table.using(["p", "q"]), table.using(["p"]):
        assert table.take_gone(time.monotonic() + 1e6) == set()
    assert table.take_gone(time.monotonic() + 1e6) == {"p", "q"}
    assert table.values() == []


# Shown.


def status(peer: str = "10.0.0.1:7", transport: str = "tcp", **counts: float) -> LinkStatus:
    return LinkStatus(peer, transport, "auto", "none", "", 2e9, {(transport, "none"): counts}, retries=1)


def test_ranks_are_added_up() -> None:
    one = [status(bytes=1, streams=1), status("q", bytes=5)]
    other = [status(bytes=2, refused_layer=3), status("r", bytes=9)]
    found = {link.peer: link for link in merged(one, other)}
    assert found.keys() == {"10.0.0.1:7", "q", "r"}
    assert found["10.0.0.1:7"].series == {("tcp", "none"): {"bytes": 3, "streams": 1, "refused_layer": 3}}
    assert found["10.0.0.1:7"].retries == 2
    assert one[0].total("bytes") == 1, "what was given is left alone"


def exposed(metrics: KvMetrics) -> dict[tuple[str, frozenset[str]], float]:
    registry = CollectorRegistry()
    registry.register(metrics)
    return {
        (sample.name.removeprefix("joinwise:kv_"), frozenset(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def test_metrics_have_a_series_for_each_link_and_drop_it_with_the_peer() -> None:
    metrics = KvMetrics()
    link = status(bytes=30, streams=2, failed=1, seconds=1.5, exposed_seconds=0.25, refused_checksum=4)
    metrics.note(KvFigures([link], 3, 100, 1000, {"completed": 5, "failed": 2, "stalled": 1}, 6))
    where = {"10.0.0.1:7", "tcp", "none"}
    expected = {
        ("link_bytes_total", frozenset(where)): 30,
        ("link_seconds_total", frozenset(where)): 1.5,
        ("link_exposed_seconds_total", frozenset(where)): 0.25,
        ("link_failed_total", frozenset(where)): 1,
        ("link_refused_frames_total", frozenset({*where, "checksum"})): 4,
        ("link_bytes_per_second", frozenset(where)): 2e9,
        ("link_retries_total", frozenset({"10.0.0.1:7"})): 1,
        ("imports_total", frozenset({"completed"})): 5,
        ("import_failures_total", frozenset({"stalled"})): 1,
        ("streams", frozenset()): 3,
        ("landing_bytes", frozenset()): 100,
        ("landing_limit_bytes", frozenset()): 1000,
        ("landing_waits_total", frozenset()): 6,
    }
    found = exposed(metrics)
    assert {key: found.get(key) for key in expected} == expected
    metrics.note(KvFigures())
    assert not [key for key in exposed(metrics) if "10.0.0.1:7" in key[1]]


# Gathered.


async def test_status_names_the_pair_and_leaves_out_who_is_silent(make_worker) -> None:
    metrics = KvMetrics()
    metrics.note(KvFigures([status("p:9", bytes=7, streams=2, failed=1, refused_size=1), status("gone:1")]))
    server = grpc.aio.server()
    engine_pb2_grpc.add_EngineServiceServicer_to_server(EngineService(WorkerIdentity("c", "d-0", 1), metrics), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    links = Links("c", "gateway", on_message=lambda *_: None, on_lost=_nobody_listens)
    try:
        workers = [
            make_worker("d-0", engine_address=f"127.0.0.1:{port}", kv_address="d:1"),
            make_worker("p-0", engine_address="127.0.0.1:9", kv_address="p:8,p:9"),
        ]
        gone, found = await kv_links(workers, links)
        assert (found.sender, found.receiver, found.transport) == ("p-0", "d-0", "tcp")
        assert (found.bytes, found.streams, found.failed, found.retries) == (7, 2, 1, 1)
        assert found.refused == {"size": 1}
        assert (gone.sender, gone.receiver) == ("gone:1", "d-0"), "a sender that is no live worker keeps its address"
    finally:
        await links.close()
        await server.stop(None)


async def test_all_of_it_reaches_the_client() -> None:
    link = KvLinkStatus("p-0", "d-0", "tcp", "auto", "int8", "int8: slow wire", 1.5e8, 70, 4, 1, 2, {"size": 3})
    snapshot = ClusterStatus(
        "c", (WorkerStatus("d-0", "decode", "decode", "m", 1),), 2, (link,), ("it dies",), ("spare",)
    )

    async def now() -> ClusterStatus:
        return snapshot

    service = InferenceService(Models({}), status=now)
    answer = await service.ClusterStatus(inference_pb2.ClusterStatusRequest(), None)  # type: ignore[arg-type]
    assert read_status(inference_pb2.ClusterStatusResponse.FromString(answer.SerializeToString())) == snapshot


async def _nobody_listens(worker: object, reason: str) -> None:
    raise AssertionError("no stream was opened")
