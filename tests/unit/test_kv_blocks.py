import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from joinwise.actors.kv.blocks import KvBlocks
from joinwise.actors.kv.layers import DeviceLayer, UnsupportedKvCacheError, _runs

BLOCKS = 24


def _blocks(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[KvBlocks, dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    shapes = {"layers.0": (BLOCKS, 2, 4, 6), "layers.1": (BLOCKS, 1, 4, 6)}
    caches = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    return KvBlocks(caches, block_size=4, interior="test", model_digest="m"), caches


@pytest.mark.parametrize(
    ("ids", "runs"),
    [
        ([], []),
        ([0], [(0, 1)]),
        ([7], [(7, 1)]),
        ([0, 1, 2], [(0, 3)]),
        ([3, 4, 9, 10, 11, 2], [(3, 2), (9, 3), (2, 1)]),
        ([5, 4, 3], [(5, 1), (4, 1), (3, 1)]),
        ([1, 0], [(1, 1), (0, 1)]),
    ],
)
def test_runs(ids: list[int], runs: list[tuple[int, int]]) -> None:
    assert list(_runs(ids)) == runs


@settings(deadline=None)
@given(st.permutations(range(BLOCKS)), st.integers(0, BLOCKS))
def test_runs_keep_order_and_every_block(order: list[int], count: int) -> None:
    ids = order[:count]
    runs = list(_runs(ids))
    assert [block for start, length in runs for block in range(start, start + length)] == ids
    assert all(a + n != b for (a, n), (b, _) in itertools.pairwise(runs)), "neighbours are one run"


@settings(deadline=None)
@given(st.permutations(range(BLOCKS)), st.permutations(range(BLOCKS)), st.integers(1, BLOCKS), st.integers(0, 1))
def test_what_one_cache_reads_another_writes(source: list[int], target: list[int], count: int, layer: int) -> None:
    sender, sent = _blocks(1)
    receiver, landed = _blocks(2)
    before = {name: cache.clone() for name, cache in landed.items()}
    payload = b"".join(sender.read(layer, source[:count]))
    assert len(payload) == count * sender.block_bytes[layer]
    receiver.write(layer, target[:count], memoryview(payload))
    for index, name in enumerate(sent):
        expected = before[name]
        if index == layer:
            for a, b in zip(source[:count], target[:count], strict=True):
                expected[b] = sent[name][a]
        assert torch.equal(landed[name], expected)


def test_read_gives_views_of_the_cache() -> None:
    blocks, caches = _blocks()
    (piece,) = blocks.read(0, [2, 3])
    caches["layers.0"][2:4] = 0
    assert not any(piece)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layout_names_what_must_be_equal(dtype: torch.dtype) -> None:
    blocks, _ = _blocks(dtype=dtype)
    size = torch.tensor([], dtype=dtype).element_size()
    assert blocks.layout.dtype == str(dtype)
    assert [(layer.name, layer.block_bytes) for layer in blocks.layout.layers] == [
        ("layers.0", 48 * size),
        ("layers.1", 24 * size),
    ]
    assert blocks.layout == _blocks(seed=9, dtype=dtype)[0].layout, "the content is no part of the layout"


def test_a_cache_that_is_not_contiguous_is_refused_by_name() -> None:
    caches = {"layers.0": torch.zeros(8, 2, 4, 6), "layers.1.attn": torch.zeros(2, 8, 4, 6).transpose(0, 1)}
    with pytest.raises(UnsupportedKvCacheError, match=r"layers\.1\.attn.*not contiguous"):
        KvBlocks(caches, block_size=4, interior="test", model_digest="m")


def test_a_cache_on_another_device_is_refused_by_name() -> None:
    caches = {"layers.3.attn": torch.zeros(8, 2, 4, 6, device="meta")}
    with pytest.raises(UnsupportedKvCacheError, match=r"layers\.3\.attn.*on meta"):
        KvBlocks(caches, block_size=4, interior="test", model_digest="m")


@pytest.mark.parametrize("ids", [[BLOCKS], [BLOCKS - 1, BLOCKS], [-1], [0, BLOCKS + 5]])
def test_blocks_that_do_not_exist_are_never_touched(ids: list[int]) -> None:
    blocks, caches = _blocks()
    before = {name: cache.clone() for name, cache in caches.items()}
    with pytest.raises(IndexError):
        blocks.read(0, ids)
    with pytest.raises(IndexError):
        blocks.write(0, ids, memoryview(bytes(len(ids) * blocks.block_bytes[0])))
    assert all(torch.equal(caches[name], before[name]) for name in caches)


@pytest.mark.parametrize("error", [-1, 1])
def test_a_payload_of_another_size_writes_nothing(error: int) -> None:
    blocks, caches = _blocks()
    before = caches["layers.0"].clone()
    with pytest.raises(ValueError):
        blocks.write(0, [1, 2, 3], memoryview(bytes(np.ones(3 * blocks.block_bytes[0] + error, np.uint8))))
    assert torch.equal(caches["layers.0"], before)


@pytest.mark.parametrize("shape", [(2, 6, 4, 3), (6, 2, 4, 3), (4, 3, 6)])
def test_a_device_layer_finds_its_block_dimension(shape: tuple[int, ...]) -> None:
    cache = torch.arange(torch.tensor(shape).prod().item(), dtype=torch.float32).reshape(shape)
    before, dimension = cache.clone(), shape.index(6)
    layer = DeviceLayer("layer", cache, 6)
    assert layer.block_bytes == cache.numel() // 6 * 4
    (read,) = layer.read([4, 1])
    wanted = before.movedim(dimension, 0)[[4, 1]].contiguous()
    assert bytes(read) == wanted.numpy().tobytes()
    layer.write([0, 5], read)
    after = cache.movedim(dimension, 0)
    assert torch.equal(after[[0, 5]], wanted)
    untouched = [1, 2, 3, 4]
    assert torch.equal(after[untouched], before.movedim(dimension, 0)[untouched])


def test_a_device_layer_without_blocks_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedKvCacheError, match=r"'odd' has shape"):
        DeviceLayer("odd", torch.zeros(2, 3), 6)
