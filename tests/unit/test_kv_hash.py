"""Hashing while copying: native code, vectors and plain, against the library `xxhash`, for every cut of the bytes."""

from __future__ import annotations

import ctypes
import itertools
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator

import pytest
import xxhash

from joinwise.kernels import kv_hash, native

NOISE = random.Random(1).randbytes(200_000)
SIZES = (0, 1, 16, 64, 240, 241, 255, 256, 257, 320, 1023, 1024, 1025, 1087, 1088, 1089, 2048, 2049, 5000, 99_999)


@pytest.fixture(scope="module")
def plain_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The same source without this processor's vector instructions."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    target = tmp_path_factory.mktemp("plain") / "plain.so"
    (source,) = [str(file) for file in native.sources() if file.parent.name == "kv_hash"]
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-DJOINWISE_PLAIN"]
    subprocess.run(["g++", *options, source, "-o", str(target)], check=True, timeout=100)
    return ctypes.CDLL(str(target))


@pytest.fixture(params=["vectors", "plain", "reference"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Native code as built, native code in its portable form, and none."""
    if request.param == "vectors" and native.library() is None:
        pytest.skip("the native kernels were not built (no g++?)")
    if request.param != "vectors":
        library = None if request.param == "reference" else request.getfixturevalue("plain_library")
        monkeypatch.setattr(native, "library", lambda: library)
    return request.param


def cuts(size: int, seed: int) -> list[slice]:
    """Everything, in up to seven pieces; some are empty."""
    dice = random.Random(seed)
    places = [0, *sorted(dice.randint(0, size) for _ in range(dice.randint(0, 6))), size]
    return [slice(start, end) for start, end in itertools.pairwise(places)]


@pytest.mark.parametrize("size", SIZES)
def test_a_hash_is_that_of_the_library_however_the_bytes_are_cut(way: str, size: int) -> None:
    for seed in range(20):
        data = memoryview(NOISE)[seed : seed + size]
        pieces = [data[cut] for cut in cuts(size, seed)]
        wanted = xxhash.xxh3_64_intdigest(data)
        assert kv_hash.digest(pieces) == wanted

        flat = bytearray(size + 2 + seed)  # begins anywhere, and is longer
        assert kv_hash.gather(pieces, memoryview(flat)[seed:]) == wanted
        assert flat == bytes(seed) + bytes(data) + bytes(2)

        landing = bytearray(size + 2 * seed)
        views = [memoryview(landing)[seed : seed + size][cut] for cut in cuts(size, ~seed)]
        assert kv_hash.scatter(NOISE[seed : seed + size + 3], views) == wanted
        assert landing == bytes(seed) + bytes(data) + bytes(seed), "nothing beside it is written"


def test_pieces_far_apart_are_scattered_and_gathered(way: str) -> None:
    block, order = 4096, random.Random(2).sample(range(40), 40)
    cache = bytearray(NOISE[: 40 * block])
    blocks = [memoryview(cache)[index * block :][:block] for index in order]
    ring = memoryview(bytearray(40 * block))
    checksum = kv_hash.gather(blocks, ring)
    assert ring == b"".join(blocks)
    other = bytearray(40 * block)
    assert kv_hash.scatter(ring, [memoryview(other)[index * block :][:block] for index in order]) == checksum
    assert other == cache


@pytest.mark.parametrize("size", [100, 1000])
def test_what_does_not_fit_is_refused_and_nothing_is_written(way: str, size: int) -> None:
    target = bytearray(size - 1)
    with pytest.raises(ValueError, match=f"{size} bytes in pieces, {size - 1}"):
        kv_hash.gather([memoryview(NOISE)[:size]], memoryview(target))
    with pytest.raises(ValueError, match=f"{size - 1} bytes in pieces, {size - 2}"):
        kv_hash.scatter(NOISE[: size - 2], [memoryview(target)])
    with pytest.raises(ValueError, match="cannot be written"):
        kv_hash.gather([memoryview(NOISE)[:size]], memoryview(bytes(size)))
    with pytest.raises(ValueError, match="cannot be written"):
        kv_hash.scatter(NOISE, [memoryview(target), memoryview(bytes(size))])
    assert not any(target)


def test_native_code_hashes_what_it_copies_while_somebody_writes() -> None:
    if native.library() is None:
        pytest.skip("the native kernels were not built (no g++?)")
    source, stop = bytearray(NOISE[:65_536]), threading.Event()

    def write() -> None:
        dice = random.Random(3)
        while not stop.is_set():
            place = dice.randrange(len(source))
            source[place : place + 1] = dice.randbytes(1)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for round_ in range(2000):
            copy, cut = memoryview(bytearray(65_536)), 100 + round_
            checksum = kv_hash.gather([memoryview(source)[:cut], memoryview(source)[cut:]], copy)
            assert checksum == xxhash.xxh3_64_intdigest(copy)
    finally:
        stop.set()
        writer.join()
