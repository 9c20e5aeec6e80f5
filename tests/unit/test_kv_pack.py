"""Packing: the reference against plain indexing, native code against the reference, the ways between engines."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import kv_interiors
from helpers.kv_interiors import any_interior, cache_for, without_native
from hypothesis import given, settings
from hypothesis import strategies as st

from joinwise.kernels import kv_pack, native
from joinwise.kernels.kv_pack import BlockInterior, native_calls

BLOCKS = 7
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OPAQUE = (torch.uint8, torch.int16, torch.float64)


@pytest.fixture(scope="module")
def plain_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The same sources without this processor's vector instructions."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    target = tmp_path_factory.mktemp("plain") / "plain.so"
    sources = [str(file) for file in native.sources() if file.parent.name == "kv_pack"]
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-DJOINWISE_PLAIN"]
    subprocess.run(["g++", *options, *sources, "-o", str(target)], check=True, timeout=100)
    return native_calls._declared(ctypes.CDLL(str(target)))


@pytest.fixture(params=["vectors", "plain"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """The native kernels, as built and in their portable form."""
    if request.param == "plain":
        plain = request.getfixturevalue("plain_library")
        monkeypatch.setattr(native_calls, "library", lambda: plain)
    found = native_calls.library()
    if found is None:
        pytest.skip("the native kernels were not built (no g++?)")
    return found


def packed(
    cache: torch.Tensor,
    interior: BlockInterior,
    ids: list[int],
    first: int,
    count: int,
    heads: range,
    **options: Any,
) -> torch.Tensor:
    """`pack` into a new tensor."""
    dtype = options.get("wire_dtype") or cache.dtype
    out = torch.empty(kv_pack.wire_bytes(interior, count, len(heads), dtype), dtype=torch.uint8)
    kv_pack.pack(cache, interior, ids, first_token=first, num_tokens=count, heads=heads, out=out, **options)
    return out


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


# ---- the reference, against plain indexing ----------------------------------------------------------------------


def test_cpu_blocks_hold_transposed_keys_then_values() -> None:
    heads, size, dim = 3, 32, 64
    cache = torch.randn(BLOCKS, heads, size, 2 * dim)
    halves = cache.view(BLOCKS, heads, 2, size * dim)
    keys = halves[:, :, 0].reshape(BLOCKS, heads, dim, size).transpose(2, 3)
    values = halves[:, :, 1].reshape(BLOCKS, heads, size, dim)
    ids = [5, 0, 3]
    # [heads, tokens, part, dim]
    wanted = torch.stack([keys, values], dim=3)[ids].transpose(0, 1).reshape(heads, 3 * size, 2, dim)[1:3, 20:80]
    interior = kv_interiors.cpu_vec(heads, size, dim)
    for path in (packed, reference_packed):
        assert torch.equal(path(cache, interior, ids, 20, 60, range(1, 3)), bits(wanted))


@pytest.mark.parametrize("layout", ["nhd", "nhd_by_block", "hnd"])
def test_gpu_blocks(layout: str) -> None:
    heads, size, dim = 4, 16, 32
    keys, values = torch.randn(2, BLOCKS, size, heads, dim).unbind()
    if layout == "nhd":
        cache = torch.stack([keys, values])
    elif layout == "nhd_by_block":
        cache = torch.stack([keys, values], dim=1)
    else:
        cache = torch.stack([keys.transpose(1, 2), values.transpose(1, 2)], dim=1)
    ids = [6, 2]
    wanted = torch.stack([keys, values], dim=3)[ids].reshape(2 * size, heads, 2, dim).transpose(0, 1)[:, 7:30]
    interior = kv_interiors.gpu(layout, BLOCKS, heads, size, dim)
    assert interior.blocks_in(cache) == BLOCKS
    for path in (packed, reference_packed):
        assert torch.equal(path(cache, interior, ids, 7, 23, range(4)), bits(wanted))


def test_latents() -> None:
    cache = torch.randn(BLOCKS, 16, 576).to(torch.bfloat16)
    interior = kv_interiors.mla(BLOCKS, 16, 576)
    for path in (packed, reference_packed):
        assert torch.equal(path(cache, interior, [4, 1], 3, 20, range(1)), bits(cache[[4, 1]].view(32, 576)[3:23]))


def reference_packed(*arguments: object, **options: object) -> torch.Tensor:
    with without_native():
        return packed(*arguments, **options)


# ---- native against the reference -------------------------------------------------------------------------------


@st.composite
def jobs(draw: st.DrawFn) -> tuple[BlockInterior, list[int], int, int, range, int]:
    """Interior, block ids, first token, tokens, heads and a seed."""
    interior = draw(any_interior())
    ids = draw(st.permutations(range(BLOCKS)))[: draw(st.integers(1, BLOCKS))]
    first = draw(st.integers(0, len(ids) * interior.block_size - 1))
    count = draw(st.integers(1, len(ids) * interior.block_size - first))
    start = draw(st.integers(0, interior.heads - 1))
    heads = range(start, draw(st.integers(start + 1, interior.heads)))
    return interior, ids, first, count, heads, draw(st.integers(0, 9))


SETTINGS = settings(deadline=None, max_examples=60)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("around_the_caches", [False, True])
@SETTINGS
@given(job=jobs(), dtype=st.sampled_from(FLOATS + OPAQUE), threads=st.integers(1, 3))
def test_native_moves_every_bit_as_the_reference_does(
    around_the_caches: bool, job: tuple, dtype: torch.dtype, threads: int
) -> None:
    interior, ids, first, count, heads, seed = job
    with mock.patch.object(native_calls, "STREAM_FROM", 0 if around_the_caches else 1 << 40):
        check_bits(interior, ids, first, count, heads, seed, dtype, threads)


def check_bits(
    interior: BlockInterior,
    ids: list[int],
    first: int,
    count: int,
    heads: range,
    seed: int,
    dtype: torch.dtype,
    threads: int,
) -> None:
    """Pack, and unpack into another cache, with native code and the reference."""
    cache = cache_for(interior, BLOCKS, dtype, seed)
    wire = packed(cache, interior, ids, first, count, heads, threads=threads)
    assert torch.equal(wire, reference_packed(cache, interior, ids, first, count, heads))

    landed = cache_for(interior, BLOCKS, dtype, seed + 1)
    wanted = landed.clone()
    where = {"first_token": first, "heads": heads}
    assert kv_pack.unpack(wire, interior, landed, ids, threads=threads, **where) == count
    with without_native():
        kv_pack.unpack(wire, interior, wanted, ids, **where)
    assert torch.equal(bits(landed), bits(wanted))
    assert torch.equal(packed(landed, interior, ids, first, count, heads), wire)


@pytest.mark.usefixtures("library")
@SETTINGS
@given(job=jobs(), dtype=st.sampled_from(FLOATS), wire_dtype=st.sampled_from(FLOATS))
def test_native_converts_as_the_reference_does(job: tuple, dtype: torch.dtype, wire_dtype: torch.dtype) -> None:
    interior, ids, first, count, heads, seed = job
    cache = cache_for(interior, BLOCKS, dtype, seed)
    wire = packed(cache, interior, ids, first, count, heads, wire_dtype=wire_dtype)
    expect = reference_packed(cache, interior, ids, first, count, heads, wire_dtype=wire_dtype)
    assert same_numbers(wire.view(wire_dtype), expect.view(wire_dtype))

    landed = cache_for(interior, BLOCKS, dtype, seed + 1)
    wanted = landed.clone()
    where = {"first_token": first, "heads": heads, "wire_dtype": wire_dtype}
    kv_pack.unpack(wire, interior, landed, ids, **where)
    with without_native():
        kv_pack.unpack(wire, interior, wanted, ids, **where)
    assert same_numbers(landed, wanted)


def same_numbers(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal bit for bit, but for what a NaN looks like."""
    nan = one.isnan()
    return torch.equal(nan, other.isnan()) and torch.equal(bits(one[~nan]), bits(other[~nan]))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_every_number_is_rounded_to_the_nearest_even(source: torch.dtype, to: torch.dtype) -> None:
    if source == torch.float32:  # every half, the middle between it and the next one, and their neighbours
        middle = torch.arange(1 << 16, dtype=torch.int64).repeat_interleave(5) << 16
        middle += torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001]).repeat(1 << 16)
        halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).to(torch.float32)
        steps = halves.view(torch.int32)[:, None] + torch.tensor([-1, 0, 1, 0xFFF, 0x1000, 0x1001], dtype=torch.int32)
        numbers = torch.cat([middle.to(torch.int32), steps.flatten()]).view(torch.float32)
    else:
        numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(source)
    interior = BlockInterior(1, 16, 16, kv_interiors.mla(1, 16, 16).parts, 256)
    wire = packed(numbers, interior, list(range(len(numbers) // 256)), 0, len(numbers) // 16, range(1), wire_dtype=to)
    assert len(numbers) % 256 == 0
    assert same_numbers(wire.view(to), numbers.to(to))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("around_the_caches", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", FLOATS)
def test_known_backends(dtype: torch.dtype, block_size: int, around_the_caches: bool) -> None:
    """Sizes of real models, where the vector paths have no edges."""
    with mock.patch.object(native_calls, "STREAM_FROM", 0 if around_the_caches else 1 << 40):
        for interior in kv_interiors.known(BLOCKS, 2, block_size, 64).values():
            assert interior.blocks_in(cache_for(interior, BLOCKS, dtype, 1)) == BLOCKS
            check_bits(interior, [3, 6, 0], 0, 3 * block_size, range(2), 1, dtype, 1)
            check_bits(interior, [3, 6, 0], 5, 3 * block_size - 9, range(2), 1, dtype, 1)


# ---- between engines --------------------------------------------------------------------------------------------


@SETTINGS
@given(data=st.data(), sizes=st.tuples(*[st.sampled_from([32, 48, 64, 128])] * 2), count=st.integers(1, 200))
def test_from_any_block_size_and_interior_into_any_other(
    data: st.DataObject, sizes: tuple[int, int], count: int
) -> None:
    heads, dim = 2, 32
    names = st.sampled_from(sorted(kv_interiors.known(1, 1, 16, 16)))
    ends = []
    for size in sizes:
        interior = kv_interiors.known(BLOCKS, heads, size, dim)[data.draw(names)]
        need = -(-count // size)
        ends.append((interior, data.draw(st.permutations(range(BLOCKS)))[:need]))
    (sender, sent_ids), (receiver, landed_ids) = ends
    sent, landed = (cache_for(interior, BLOCKS, torch.bfloat16, 3) for interior in (sender, receiver))
    wire = packed(sent, sender, sent_ids, 0, count, range(heads))
    # It arrives in two pieces, cut anywhere.
    cut = data.draw(st.integers(0, count))
    rows = wire.view(heads, count, -1)
    for first, piece in ((0, rows[:, :cut]), (cut, rows[:, cut:])):
        kv_pack.unpack(bits(piece), receiver, landed, landed_ids, first_token=first, heads=range(heads))
    assert torch.equal(packed(landed, receiver, landed_ids, 0, count, range(heads)), wire)


def heads_of(rank: int, width: int, heads: int) -> range:
    """Which of the model's KV heads a rank holds; they are replicated where there are more ranks than heads."""
    if width <= heads:
        return range(rank * heads // width, (rank + 1) * heads // width)
    return range(rank * heads // width, rank * heads // width + 1)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("decode_width", [1, 2, 4])
@pytest.mark.parametrize("prefill_width", [1, 2, 4])
def test_tensor_parallel_widths(prefill_width: int, decode_width: int, heads: int) -> None:
    dim, count = 16, 75
    truth = torch.randn(heads, count, 2, dim).to(torch.bfloat16)
    senders = []
    for rank in range(prefill_width):
        mine = heads_of(rank, prefill_width, heads)
        interior = kv_interiors.cpu_vec(len(mine), 32, dim)
        cache = cache_for(interior, BLOCKS, torch.bfloat16, rank)
        ids = [6, rank, 5]
        kv_pack.unpack(bits(truth[mine.start : mine.stop]), interior, cache, ids, first_token=0, heads=range(len(mine)))
        senders.append((mine, interior, cache, ids))
    for rank in range(decode_width):
        wanted = heads_of(rank, decode_width, heads)
        interior = kv_interiors.gpu("hnd", BLOCKS, len(wanted), 48, dim)
        cache = cache_for(interior, BLOCKS, torch.bfloat16, 9)
        missing = set(wanted)
        for mine, sender, sent, sent_ids in senders:
            here = sorted(missing & set(mine))
            if not here:
                continue
            from_sender = range(here[0] - mine.start, here[-1] + 1 - mine.start)
            wire = packed(sent, sender, sent_ids, 0, count, from_sender)
            into = range(here[0] - wanted.start, here[-1] + 1 - wanted.start)
            kv_pack.unpack(wire, interior, cache, [2, 4], first_token=0, heads=into)
            missing -= set(here)
        assert not missing
        whole = packed(cache, interior, [2, 4], 0, count, range(len(wanted)))
        assert torch.equal(whole, bits(truth[wanted.start : wanted.stop]))


@pytest.mark.usefixtures("library")
def test_calls_on_different_blocks_may_run_at_once() -> None:
    interior = kv_interiors.cpu_vec(3, 32, 64)
    cache = cache_for(interior, 64, torch.float32, 1)
    landed = torch.zeros_like(cache)
    wires = [packed(cache, interior, list(range(n, n + 8)), 0, 256, range(3)) for n in range(0, 64, 8)]
    barrier = threading.Barrier(8)

    def work(n: int) -> None:
        barrier.wait()
        for _ in range(20):
            ids = list(range(8 * n, 8 * n + 8))
            kv_pack.unpack(wires[n], interior, landed, ids, first_token=0, heads=range(3), threads=2)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(bits(landed), bits(cache))


NO_ROOM_FOR_THREADS = """
import resource, threading, torch
from helpers import kv_interiors
from joinwise.kernels import kv_pack
from joinwise.kernels.kv_pack import native_calls

interior = kv_interiors.cpu_vec(3, 32, 64)
cache = kv_interiors.cache_for(interior, 8, torch.float32, 1)
alone, shared = torch.zeros(2, kv_pack.wire_bytes(interior, 256, 3, cache.dtype), dtype=torch.uint8).unbind()
job = {"first_token": 0, "num_tokens": 256, "heads": range(3)}
assert native_calls.library() is not None
kv_pack.pack(cache, interior, range(8), out=alone, **job)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 20), resource.RLIM_INFINITY))
try:
    threading.Thread(target=print).start()
except RuntimeError:
    kv_pack.pack(cache, interior, range(8), out=shared, threads=4, **job)
    print("equal" if torch.equal(alone, shared) else "different")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit is counted from /proc")
def test_threads_that_cannot_be_started_are_done_without() -> None:
    if native_calls.library() is None:
        pytest.skip("the native kernels were not built (no g++?)")
    paths = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", NO_ROOM_FOR_THREADS]
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout == "equal\n", done.stdout + done.stderr


# ---- buffers and bad input --------------------------------------------------------------------------------------

INTERIOR = kv_interiors.cpu_vec(2, 8, 4)
TOKEN = 2 * 2 * 4 * 4  # bytes, both heads, float32


@pytest.fixture(params=["native", "reference"])
def path(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "native":
        yield
    else:
        with without_native():
            yield


@pytest.mark.usefixtures("path")
def test_buffers_of_every_kind_and_address() -> None:
    cache = cache_for(INTERIOR, BLOCKS, torch.float32, 1)
    job = {"first_token": 3, "heads": range(2)}
    wanted = packed(cache, INTERIOR, [1, 2], 3, 10, range(2))
    size = wanted.numel()
    for shift in (0, 1, 7):
        frame = bytearray(size + 8)
        piece = memoryview(frame)[shift : shift + size]
        kv_pack.pack(cache, INTERIOR, [1, 2], num_tokens=10, out=piece, **job)
        assert bytes(piece) == wanted.numpy().tobytes()
        for payload in (piece, bytes(piece), piece.toreadonly(), bytearray(piece)):
            landed = torch.zeros_like(cache)
            assert kv_pack.unpack(payload, INTERIOR, landed, [1, 2], **job) == 10
            assert torch.equal(packed(landed, INTERIOR, [1, 2], 3, 10, range(2)), wanted)


@pytest.mark.usefixtures("path")
def test_a_cache_that_begins_inside_another_tensor() -> None:
    whole = cache_for(INTERIOR, 2 * BLOCKS, torch.float32, 1)
    cache = whole[BLOCKS * INTERIOR.block_stride :]
    assert INTERIOR.blocks_in(cache) == BLOCKS
    ids = [0, 5]
    beyond = [BLOCKS + i for i in ids]
    assert torch.equal(packed(cache, INTERIOR, ids, 0, 16, range(2)), packed(whole, INTERIOR, beyond, 0, 16, range(2)))


@pytest.mark.usefixtures("path")
def test_nothing_to_do() -> None:
    cache = cache_for(INTERIOR, BLOCKS, torch.float32, 1)
    before = cache.clone()
    assert packed(cache, INTERIOR, [], 0, 0, range(2)).numel() == 0
    assert packed(cache, INTERIOR, [1], 8, 0, range(2)).numel() == 0
    assert kv_pack.unpack(b"", INTERIOR, cache, [1], first_token=0, heads=range(2)) == 0
    assert torch.equal(bits(cache), bits(before))


GOOD = {"block_ids": [1, 2], "first_token": 3, "heads": range(2)}


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"block_ids": [1, BLOCKS]}, IndexError, f"KV blocks 1 to {BLOCKS} of {BLOCKS}"),
        ({"block_ids": [-1, 2]}, IndexError, "KV blocks -1 to 2"),
        ({"block_ids": [1]}, IndexError, "tokens 3 to 13 of 1 blocks, 8 tokens"),
        ({"first_token": -1}, IndexError, "tokens -1 to 9"),
        ({"first_token": 7}, IndexError, "tokens 7 to 17 of 2 blocks, 16 tokens"),
        ({"heads": range(1, 3)}, IndexError, "heads 1 to 3 of 2"),
        ({"heads": range(-1, 1)}, IndexError, "heads -1 to 1 of 2"),
        ({"heads": range(0)}, ValueError, "at least one"),
        ({"heads": range(0, 2, 2)}, ValueError, "without a gap"),
        ({"threads": 0}, ValueError, "0 threads"),
        ({"wire_dtype": torch.int32}, ValueError, "not converted into each other"),
        ({"block_ids": [1.5, 2]}, TypeError, "integer"),
    ],
)
def test_what_is_not_there_is_never_touched(change: dict, error: type[Exception], says: str) -> None:
    cache = cache_for(INTERIOR, BLOCKS, torch.float32, 1)
    before = cache.clone()
    call = {**GOOD, **change}
    ids = call.pop("block_ids")
    wire = torch.full((10 * TOKEN,), 7, dtype=torch.uint8)
    with pytest.raises(error, match=says):
        kv_pack.unpack(wire, INTERIOR, cache, ids, **call)
    with pytest.raises(error, match=says):
        kv_pack.pack(cache, INTERIOR, ids, num_tokens=10, out=wire, **call)
    assert torch.equal(bits(cache), bits(before))
    assert bool((wire == 7).all())


@pytest.mark.usefixtures("path")
def test_wrong_buffers_are_refused() -> None:
    cache = cache_for(INTERIOR, BLOCKS, torch.float32, 1)
    before = cache.clone()
    job = {"first_token": 3, "heads": range(2)}

    def pack_into(out: object) -> None:
        kv_pack.pack(cache, INTERIOR, [1, 2], num_tokens=10, out=out, **job)

    for size in (10 * TOKEN - 1, 10 * TOKEN + 1, 0):
        with pytest.raises(ValueError, match=f"a buffer of {size} bytes for {10 * TOKEN}"):
            pack_into(bytearray(size))
    with pytest.raises(ValueError, match="cannot be written"):
        pack_into(bytes(10 * TOKEN))
    with pytest.raises(ValueError, match="contiguous"):
        pack_into(memoryview(bytearray(20 * TOKEN))[::2])
    for wrong in (torch.zeros(10, TOKEN, dtype=torch.uint8), torch.zeros(10 * TOKEN), torch.zeros(20 * TOKEN)[::2]):
        with pytest.raises(ValueError, match="a flat contiguous uint8 tensor is needed"):
            pack_into(wrong)
    with pytest.raises(ValueError, match="on meta for a cache on cpu"):
        pack_into(torch.zeros(10 * TOKEN, dtype=torch.uint8, device="meta"))
    with pytest.raises(ValueError, match=f"a buffer of {TOKEN + 1} bytes"):
        kv_pack.unpack(bytes(TOKEN + 1), INTERIOR, cache, [1, 2], **job)
    with pytest.raises(ValueError, match="a block twice"):
        kv_pack.unpack(bytes(TOKEN), INTERIOR, cache, [1, 1], **job)
    with pytest.raises(ValueError, match="elements of 16 bytes"):
        packed(torch.zeros(512, dtype=torch.complex128), INTERIOR, [0], 0, 1, range(2))
    assert torch.equal(bits(cache), bits(before))


# ---- whole blocks -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("path")
@settings(deadline=None)
@given(st.permutations(range(BLOCKS)), st.integers(0, BLOCKS), st.sampled_from([0, 5]))
def test_whole_blocks_there_and_back(order: list[int], count: int, gap: int) -> None:
    ids, size = order[:count], 24
    cache = torch.randint(0, 256, (BLOCKS, size + gap), dtype=torch.uint8)[:, :size]
    flat = bytearray(count * size)
    kv_pack.gather_blocks(cache, ids, flat)
    assert bytes(flat) == cache[ids].numpy().tobytes()
    landed = torch.zeros(BLOCKS, size + gap, dtype=torch.uint8)
    kv_pack.scatter_blocks(bytes(flat), landed[:, :size], ids)
    wanted = torch.zeros_like(landed)
    wanted[ids, :size] = cache[ids]
    assert torch.equal(landed, wanted)


@pytest.mark.usefixtures("path")
def test_whole_blocks_that_do_not_fit_are_refused() -> None:
    cache = torch.zeros(BLOCKS, 24, dtype=torch.uint8)
    for ids in ([BLOCKS], [-1, 2]):
        with pytest.raises(IndexError):
            kv_pack.gather_blocks(cache, ids, bytearray(24 * len(ids)))
        with pytest.raises(IndexError):
            kv_pack.scatter_blocks(b"\1" * 24 * len(ids), cache, ids)
    with pytest.raises(ValueError, match="a buffer of 23 bytes for 24"):
        kv_pack.scatter_blocks(b"\1" * 23, cache, [3])
    with pytest.raises(ValueError, match="a block twice"):
        kv_pack.scatter_blocks(b"\1" * 48, cache, [3, 3])
    for wrong in (cache.view(-1), cache.float(), cache.t()):
        with pytest.raises(ValueError, match="a uint8 matrix with contiguous rows is needed"):
            kv_pack.gather_blocks(wrong, [0], bytearray(24))
    assert not cache.any()
