"""`kv.codec: auto`: taken up, kept and dropped by what is measured, and never with a loss that nobody allowed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from helpers.kv_interiors import cpu_vec
from helpers.kv_rig import Receiver, Sender

from joinwise.actors.kv.codecs import CodecChoice, CodingSpeeds
from joinwise.actors.kv.layout import PLAIN, WHOLE, LayerGeometry, PeerPlan
from joinwise.actors.kv.links import Link
from joinwise.proto import kv_pb2

INT8, FP8, LOSSLESS = kv_pb2.ENCODING_INT8, kv_pb2.ENCODING_FP8, kv_pb2.ENCODING_LOSSLESS
FAST = {INT8: 1e15, FP8: 1e15, LOSSLESS: 1e15}
SLOW_WIRE, FAST_WIRE = 1e3, 1e18
HEADS, BLOCK, HEAD_DIM = 2, 32, 64


def layout(dtype: torch.dtype = torch.bfloat16, *, known: bool = True) -> dict[str, object]:
    names = ["layers.0", "layers.1"]
    interior = cpu_vec(HEADS, BLOCK, HEAD_DIM)
    geometry = {name: LayerGeometry(HEADS, 0, HEADS, 2, HEAD_DIM, interior) for name in names} if known else {}
    shape = (HEADS, BLOCK, 2 * HEAD_DIM)
    return {"layers": dict.fromkeys(names, shape), "block_size": BLOCK, "geometry": geometry, "dtype": dtype}


def plan(dtype: torch.dtype = torch.bfloat16, encoding: int = WHOLE) -> PeerPlan:
    return PeerPlan(0, encoding, 0, HEADS, ((0, 0), (1, 1)), dtype)


@pytest.fixture(scope="module")
def receivers() -> Iterator[dict[str, Receiver]]:
    made = {
        "bf16": Receiver(8, **layout()),
        "f32": Receiver(8, **layout(torch.float32)),
        "opaque": Receiver(8, **layout(known=False)),
    }
    yield made
    for each in made.values():
        each.stop()


def choice(receivers: dict[str, Receiver], codec: str = "auto", lossy: str = "none", kind: str = "bf16") -> CodecChoice:
    made = CodecChoice(receivers[kind].blocks, codec, lossy)
    made._speeds.decoding = FAST  # type: ignore[misc]
    return made


def link(wire: float, transport: str = "tcp") -> Link:
    return Link("p", transport, bytes_per_s=wire)


# Which, and why.


@pytest.mark.parametrize(
    ("codec", "lossy", "kind", "wire", "expected", "why"),
    [
        ("none", "none", "bf16", SLOW_WIRE, None, ""),
        ("auto", "none", "bf16", SLOW_WIRE, LOSSLESS, "lossless: the wire carries 0 MB/s"),
        ("auto", "none", "bf16", FAST_WIRE, None, "uncoded: the wire carries"),
        ("auto", "none", "bf16", 0, None, "not measured yet"),
        ("auto", "none", "f32", SLOW_WIRE, None, "nothing codes float32 without loss"),
        ("auto", "int8", "f32", SLOW_WIRE, INT8, "int8: the wire carries"),
        ("auto", "fp8", "bf16", SLOW_WIRE, FP8, "fp8: "),
        ("auto", "int8", "opaque", SLOW_WIRE, None, "the inside of blocks is not known"),
        ("int8", "none", "bf16", FAST_WIRE, INT8, "int8: configured"),
        ("lossless", "none", "bf16", FAST_WIRE, LOSSLESS, "lossless: configured"),
        ("lossless", "none", "f32", SLOW_WIRE, None, "nothing codes float32 without loss"),
    ],
)
def test_what_is_chosen_and_why(receivers, codec, lossy, kind, wire, expected, why) -> None:
    dtype = torch.float32 if kind == "f32" else torch.bfloat16
    wanted, to = plan(dtype), link(wire)
    coded = choice(receivers, codec, lossy, kind).apply(wanted, to, FAST)
    assert coded.encoding == (WHOLE if expected is None else expected)
    assert why in to.codec_why
    names = {None: "none", INT8: "int8", FP8: "fp8", LOSSLESS: "lossless"}
    assert to.codec == names[expected]
    assert (coded.layers, coded.num_heads) == (wanted.layers, wanted.num_heads)


def test_canonical_payloads_stay_so_where_no_codec_pays(receivers) -> None:
    assert choice(receivers).apply(plan(encoding=PLAIN), link(FAST_WIRE), FAST).encoding == PLAIN


def test_a_sender_that_says_nothing_of_its_speed_sends_as_it_is(receivers) -> None:
    to = link(SLOW_WIRE)
    assert choice(receivers).apply(plan(), to, {}).encoding == WHOLE
    assert "does not say" in to.codec_why
    assert choice(receivers, lossy="int8").apply(plan(), to, {INT8: 1e15}).encoding == INT8


def test_the_slower_end_decides(receivers) -> None:
    """Coding at 100 MB/s pays on a wire of 50, and not on one of 200; whichever end it is that is slow."""
    slow = dict.fromkeys(FAST, 100e6 / 2)
    for there, back in ((slow, FAST), (FAST, slow)):
        made = choice(receivers)
        made._speeds.decoding = back  # type: ignore[misc]
        assert made.apply(plan(), link(50e6), there).encoding == LOSSLESS
        assert made.apply(plan(), link(200e6), there).encoding == WHOLE


def test_of_two_the_faster(receivers) -> None:
    made = choice(receivers, lossy="int8")
    assert made.apply(plan(), link(1e6), FAST).encoding == INT8, "half the bytes"
    slow = {**FAST, INT8: 1.1e6 / 2}
    assert made.apply(plan(), link(1e6), slow).encoding == LOSSLESS


def test_a_measurement_that_wavers_changes_nothing(receivers) -> None:
    speed = dict.fromkeys(FAST, 100e6 / 2)
    made, to = choice(receivers), link(0)

    def chosen(wire: float) -> bool:
        to.bytes_per_s = wire
        return made.apply(plan(), to, speed).encoding == LOSSLESS

    assert [chosen(wire) for wire in (95e6, 105e6, 95e6)] == [False] * 3, "not taken up at the edge"
    assert chosen(70e6)
    assert [chosen(wire) for wire in (95e6, 105e6, 115e6)] == [True] * 3, "nor dropped there"
    assert not chosen(130e6)
    assert not chosen(95e6)


def test_grpc_is_measured_again_and_again(receivers) -> None:
    made, to = choice(receivers), link(SLOW_WIRE, "grpc")
    codes = [made.apply(plan(), to, FAST).encoding for _ in range(100)]
    gaps = [len(list(run)) for code, run in itertools.groupby(codes) if code == LOSSLESS]
    assert gaps == [32, 32, 32, 1]
    assert [len(list(run)) for code, run in itertools.groupby(codes) if code == WHOLE] == [1, 1, 1]
    lane = link(SLOW_WIRE)
    assert {made.apply(plan(), lane, FAST).encoding for _ in range(100)} == {LOSSLESS}


def test_both_ways_are_measured_once(receivers) -> None:
    cache = receivers["bf16"].caches["layers.0"].clone()
    speeds = CodingSpeeds(receivers["bf16"].blocks)
    assert speeds.encoding.keys() == speeds.decoding.keys() == {INT8, FP8, LOSSLESS}
    assert all(1e5 < each < 1e12 for each in (*speeds.encoding.values(), *speeds.decoding.values()))
    assert speeds.encoding is speeds.encoding
    assert torch.equal(receivers["bf16"].caches["layers.0"], cache), "the cache is only read"
    assert CodingSpeeds(receivers["opaque"].blocks).encoding == {}


# On real ports.


@pytest.fixture
def sender() -> Iterator[Sender]:
    each = Sender(16, frame_bytes=4096, **layout())
    yield each
    each.stop()


@pytest.mark.parametrize("transport", ["grpc", "tcp", "shm"])
def test_the_codec_changes_between_transfers_and_no_number_does(sender: Sender, transport: str) -> None:
    """One transfer is under way while the codec changes; each keeps what it began with."""
    receiver = Receiver(16, transport=transport, codec="auto", **layout())
    try:
        receiver.client._codecs._speeds.decoding = FAST  # type: ignore[misc]
        sender.server._coding.encoding = FAST  # type: ignore[misc]
        transfers = [sender.open(name, [2 * index, 2 * index + 1]) for index, name in enumerate("abc")]
        fetches = []
        for index, name in enumerate("abc"):
            targets = [2 * index + 1, 2 * index]
            fetches.append(receiver.fetch(name, targets, sender.server.address))
            assert fetches[-1].importer.plan.encoding == (LOSSLESS if name == "b" else WHOLE)
            (met,) = receiver.client.links.values()
            met.bytes_per_s = SLOW_WIRE if name == "a" else FAST_WIRE
        for index, transfer in enumerate(transfers):
            sender.compute(transfer)
            fetches[index].succeed()
            sender.finish(transfer)
            receiver.expect(sender.content(transfer), [2 * index + 1, 2 * index])
        receiver.assert_cache()
        (met,) = receiver.client.link_status()
        assert {codec: counts["streams"] for (_, codec), counts in met.series.items()} == {"none": 2, "lossless": 1}
        assert 0.5 < receiver.client.links.of(met.peer).ratio < 0.9, "learnt from what has come"
    finally:
        receiver.stop()


def test_speeds_are_told_to_those_who_ask(sender: Sender) -> None:
    auto, fixed = Receiver(16, codec="auto", **layout()), Receiver(16, **layout())
    try:
        for receiver, name in ((fixed, "a"), (auto, "b")):
            transfer = sender.open(name, [1])
            sender.compute(transfer)
            receiver.fetch(name, [1], sender.server.address).succeed()
            sender.finish(transfer)
        assert next(iter(fixed.client._agreed.values())).coding == ({},)
        (told,) = next(iter(auto.client._agreed.values())).coding
        assert told.keys() == {INT8, FP8, LOSSLESS}
    finally:
        auto.stop()
        fixed.stop()


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan")])
def test_a_speed_that_is_none_is_not_believed(sender: Sender, speed: float) -> None:
    receiver = Receiver(16, codec="auto", **layout())
    sender.server._coding.encoding = dict.fromkeys(FAST, speed)  # type: ignore[misc]
    try:
        for name in ("a", "b"):
            transfer = sender.open(name, [1])
            sender.compute(transfer)
            receiver.fetch(name, [1], sender.server.address).succeed()
            sender.finish(transfer)
            (met,) = receiver.client.links.values()
            met.bytes_per_s = SLOW_WIRE
        assert "does not say how fast" in met.codec_why
    finally:
        receiver.stop()


def test_grpc_is_measured_by_frames_that_follow_at_once(sender: Sender) -> None:
    """Not by those that waited for their layer's computation."""
    receiver = Receiver(16, codec="auto", **layout())
    sender.server._producer._frame_bytes = 1 << 20
    try:
        transfer = sender.open("a", range(8))
        fetch = receiver.fetch("a", range(8), sender.server.address)
        sender.compute(transfer, pause_s=0.05)
        fetch.succeed()
        sender.finish(transfer)
        (met,) = receiver.client.links.values()
        assert met.bytes_per_s == 0, "a frame a layer: each has waited"
        sender.server._producer._frame_bytes = 70_000
        transfer = sender.open("b", range(16))
        sender.compute(transfer)
        receiver.fetch("b", range(16), sender.server.address).succeed()
        sender.finish(transfer)
        assert met.bytes_per_s > 1e6
    finally:
        receiver.stop()
