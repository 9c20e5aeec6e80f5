"""KV in a device's memory: its layers, and imports between a device and a CPU over real ports.

Where there is no CUDA device the same layers work on tensors of the CPU, so that what is not CUDA's own is tested
everywhere.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from helpers import gpu, kv_interiors, kv_rig
from helpers.kv_rig import Receiver, Sender

from joinwise.actors.kv import blocks
from joinwise.actors.kv.layers import DeviceLayer, HostLayer, KvLayer, make_layer
from joinwise.actors.kv.layout import LayerGeometry
from joinwise.kernels.kv_pack import BlockInterior
from joinwise.proto import kv_pb2

BLOCKS, HEADS, BLOCK, HEAD_DIM, TOKENS = 12, 2, 16, 32, 75
NAMES = ("layers.0", "layers.1", "layers.2")
CUDA = [pytest.mark.gpu, gpu.needs_cuda("KV in device memory")]
DEVICES = [pytest.param("cpu", id="stand-in"), pytest.param("cuda", marks=CUDA)]

Shape = tuple[tuple[int, ...], BlockInterior]
GPU: Shape = ((2, BLOCK, HEADS, HEAD_DIM), kv_interiors.gpu("nhd_by_block", BLOCKS, HEADS, BLOCK, HEAD_DIM))
CPU: Shape = ((HEADS, BLOCK, 2 * HEAD_DIM), kv_interiors.cpu_vec(HEADS, BLOCK, HEAD_DIM))


# One layer.


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def geometry(interior: BlockInterior) -> LayerGeometry:
    return LayerGeometry(HEADS, 0, HEADS, 2, HEAD_DIM, interior)


def layers(device: str, dtype: torch.dtype) -> tuple[torch.Tensor, DeviceLayer, torch.Tensor, HostLayer]:
    """The same numbers on a device and in main memory."""
    shape, interior = GPU
    host = torch.randn(BLOCKS, *shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    there = host.to(device, copy=True)
    place = geometry(interior)
    return there, DeviceLayer("layer", there, BLOCKS, place), host, HostLayer("layer", host, place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_blocks(device: str, dtype: torch.dtype) -> None:
    there, layer, host, reference = layers(device, dtype)
    ids = [7, 2, 3, 4, 0]
    assert layer.place(ids) is None, "a device's memory is not written in place"
    read = b"".join(layer.read(ids))
    assert read == b"".join(reference.read(ids))
    layer.write([1, 5, 6, 9, 11], memoryview(read))
    reference.write([1, 5, 6, 9, 11], memoryview(read))
    assert torch.equal(there.cpu(), host)


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [range(HEADS), range(1, 2)])
def test_the_canonical_layout(device: str, wire: torch.dtype, heads: range) -> None:
    there, layer, host, reference = layers(device, torch.float32)
    ids, first, tokens = [7, 2, 5], 9, 37
    packed = layer.pack(ids, first, tokens, heads, wire)
    assert packed == reference.pack(ids, first, tokens, heads, wire)
    layer.unpack([1, 8, 3], first, heads, packed, wire)
    reference.unpack([1, 8, 3], first, heads, packed, wire)
    assert torch.equal(there.cpu(), host)


@pytest.mark.gpu
@gpu.needs_cuda("what a reader waits for on a device")
def test_a_read_waits_for_the_step_that_writes() -> None:
    """The step's kernels are still under way when it is marked, on another stream than the reader's."""
    there, layer, _, _ = layers("cuda", torch.float32)
    there.zero_()
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)  # cycles: a quarter of a second
    there.fill_(7.0)
    layer.mark()
    assert not torch.cuda.current_stream().query(), "it is not over yet"
    found = torch.frombuffer(bytearray(b"".join(layer.read([0, 3]))), dtype=torch.float32)
    assert torch.equal(found, torch.full_like(found, 7.0))


@pytest.mark.gpu
@gpu.needs_cuda("readers and writers of one device at once")
def test_threads_read_and_write_other_blocks_at_once() -> None:
    there, layer, host, _ = layers("cuda", torch.float32)
    failed: list[BaseException] = []

    def work(block: int) -> None:
        try:
            for turn in range(50):
                content = host[block] + turn
                layer.write([block], memoryview(content.contiguous().view(torch.uint8).numpy()).cast("B"))
                (read,) = layer.read([block])
                assert torch.equal(torch.frombuffer(bytearray(read), dtype=torch.float32), content.flatten())
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(block,)) for block in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
    assert torch.equal(there.cpu()[8:], host[8:]), "nothing else has changed"


# Between two workers.


class Ends:
    """Makes both ends, each in main memory or on a device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
        self._patch, self._device = monkeypatch, device
        self._made: list[Sender | Receiver] = []

    def make(self, kind: type, where: str, dtype: torch.dtype, **more: object) -> Sender | Receiver:
        """An end; `where` is "cpu", or "device" for the device or its stand-in."""
        shape, interior = GPU if where == "device" else CPU
        caches = kv_rig.make_caches
        with self._patch.context() as patch:
            if where == "device":
                patch.setattr(kv_rig, "make_caches", lambda *a: {n: c.to(self._device) for n, c in caches(*a).items()})
                patch.setattr(blocks, "make_layer", _device_layer)
            end = kind(
                BLOCKS,
                layers=dict.fromkeys(NAMES, shape),
                dtype=dtype,
                block_size=BLOCK,
                interior=where,
                geometry=dict.fromkeys(NAMES, geometry(interior)),
                **more,
            )
        self._made.append(end)
        return end

    def stop(self) -> None:
        for end in self._made:
            end.assert_idle()
            end.stop()


def _device_layer(name: str, cache: torch.Tensor, num_blocks: int | None, place: LayerGeometry | None) -> KvLayer:
    if cache.is_cuda:
        return make_layer(name, cache, num_blocks, place)
    return DeviceLayer(name, cache, BLOCKS, place)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch, device: str) -> Iterator[Ends]:
    each = Ends(monkeypatch, device)
    yield each
    each.stop()


def canonical(end: Sender | Receiver, ids: list[int], dtype: torch.dtype) -> list[torch.Tensor]:
    """All numbers of a transfer, as its own kernels on a CPU find them."""
    place = next(iter(end.blocks._geometry))
    assert place is not None
    return [
        torch.frombuffer(
            bytearray(HostLayer("copy", cache.cpu().contiguous(), place).pack(ids, 0, TOKENS, range(HEADS), dtype)),
            dtype=dtype,
        )
        for cache in end.caches.values()
    ]


def hand_off(sender: Sender, receiver: Receiver, name: str = "t") -> tuple[list[int], list[int]]:
    """Half of a prompt is computed, then the rest; it crosses meanwhile. The blocks at both ends."""
    there, here = [5, 6, 7, 1, 9], [2, 11, 0, 4, 8]
    transfer = sender.open(name, there, num_tokens=TOKENS)
    fetch = receiver.fetch(name, here, sender.server.address, num_tokens=TOKENS)
    for until in (2, 5):
        for layer, cache in enumerate(sender.caches.values()):
            begin = transfer.ready[layer]
            cache[there[begin:until]] = torch.randn_like(cache[there[begin:until]])
            sender.blocks.mark(layer)
            sender.table.advance(transfer, layer, until)
    sender.finish(transfer)
    fetch.succeed()
    return there, here


@pytest.mark.parametrize("transport", ["grpc", "tcp", "shm"])
@pytest.mark.parametrize("way", ["device to cpu", "cpu to device", "device to device"])
def test_imports(ends: Ends, way: str, transport: str) -> None:
    begin, end = way.split(" to ")
    sender = ends.make(Sender, begin, torch.bfloat16)
    receiver = ends.make(Receiver, end, torch.bfloat16, transport=transport)
    before = {name: cache.cpu().clone() for name, cache in receiver.caches.items()}
    there, here = hand_off(sender, receiver)
    for sent, landed in zip(
        canonical(sender, there, torch.bfloat16), canonical(receiver, here, torch.bfloat16), strict=True
    ):
        assert torch.equal(sent, landed)
    others = [block for block in range(BLOCKS) if block not in here]
    for name, cache in receiver.caches.items():
        assert torch.equal(cache.cpu()[others], before[name][others]), "nothing else has changed"
    (link,) = receiver.client.link_status()
    assert (link.transport, link.total("failed")) == (transport, 0)
    encodings = {kv_pb2.ENCODING_BLOCKS} if begin == end else {kv_pb2.ENCODING_PLAIN}
    assert {plan.encoding for agreed in receiver.client._agreed.values() for plan in agreed.plans} == encodings


@pytest.mark.parametrize("codec", ["lossless", "int8", "fp8"])
@pytest.mark.parametrize("way", ["device to cpu", "cpu to device"])
def test_coded_imports(ends: Ends, way: str, codec: str) -> None:
    begin, end = way.split(" to ")
    sender = ends.make(Sender, begin, torch.bfloat16)
    receiver = ends.make(Receiver, end, torch.bfloat16, transport="tcp", codec=codec)
    there, here = hand_off(sender, receiver)
    tolerance = {"lossless": 0.0, "int8": 0.05, "fp8": 0.4}[codec]
    for sent, landed in zip(
        canonical(sender, there, torch.bfloat16), canonical(receiver, here, torch.bfloat16), strict=True
    ):
        assert (sent.float() - landed.float()).abs().max() <= tolerance
    (link,) = receiver.client.link_status()
    assert link.codec == codec


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrower_cache_on_the_other_side(ends: Ends, dtype: torch.dtype) -> None:
    """A device with 16 bits feeds a CPU with 32, and the other way round."""
    for begin, end, one, other in (("device", "cpu", dtype, torch.float32), ("cpu", "device", torch.float32, dtype)):
        sender, receiver = ends.make(Sender, begin, one), ends.make(Receiver, end, other)
        there, here = hand_off(sender, receiver, begin)
        for sent, landed in zip(canonical(sender, there, dtype), canonical(receiver, here, dtype), strict=True):
            assert torch.equal(sent, landed)
