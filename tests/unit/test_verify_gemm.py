"""Linear layers for a few rows: against sums in float64, row by row, from several threads, and badly asked."""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from helpers.threads import single_thread

from joinwise.kernels import native
from joinwise.kernels.verify_gemm import Packed, is_native, linear, native_calls, pack, reference
from joinwise.kernels.verify_gemm.packed import slices

TYPES = (torch.float32, torch.bfloat16)
KINDS = ("float32", "bfloat16", "int8")
# Channels and inputs: less than a register, its ends, a tile's ends, more than a chunk, enough to share among threads.
SHAPES = (
    *((1, 1), (3, 7), (5, 8), (6, 31), (11, 32), (21, 33), (40, 64), (64, 576), (41, 1100), (333, 1537)),
    *((15, 1), (16, 31), (17, 33), (31, 63), (32, 65), (33, 95), (100, 100), (1, 129)),
)


def native_paths() -> tuple[str, ...]:
    library = native_calls.library()
    return () if library is None else native_calls.paths(library)


one_thread = pytest.fixture(single_thread, autouse=True)


@pytest.fixture(scope="module")
def plain_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The same source as a processor of another kind gets it."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    target = tmp_path_factory.mktemp("plain") / "plain.so"
    sources = [str(file) for file in native.sources() if file.parent.name == "verify_gemm"]
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-DJOINWISE_PLAIN"]
    subprocess.run(["g++", *options, *sources, "-o", str(target)], check=True, timeout=100)
    return ctypes.CDLL(str(target))


@pytest.fixture(params=["amx", "avx512", "avx2", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way on a CPU; those for bfloat16 leave float32 to AVX2."""
    if request.param == "reference":
        monkeypatch.setattr(native_calls, "library", lambda: None)
    elif request.param not in native_paths():
        pytest.skip(f"the native kernels were not built (no g++?), or this processor has no {request.param}")
    else:
        monkeypatch.setattr(native_calls, "paths", lambda _: (request.param, "avx2"))
    return request.param


def weights(kind: str, channels: int, inputs: int, seed: int = 0) -> Packed:
    made = torch.randn(channels, inputs, generator=torch.Generator().manual_seed(seed))
    return pack(made.bfloat16() if kind == "bfloat16" else made, int8=kind == "int8")


def rows_of(count: int, inputs: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, and the sum of the magnitudes of what was added."""
    wide = packed.weight.double()
    if packed.scale is not None:
        wide = wide * packed.scale.double()[:, None]
    added = torch.zeros(()) if bias is None else bias.double()
    return x.double() @ wide.T + added, x.double().abs() @ wide.abs().T + added.abs()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_sum_in_float64_but_for_rounding(path: str, kind: str, dtype: torch.dtype) -> None:
    for channels, inputs in SHAPES:
        packed, bias = weights(kind, channels, inputs), rows_of(1, channels, dtype, 2)[0]
        for count, with_bias in ((1, None), (2, bias), (5, bias), (17, bias), (33, None), (100, bias)):
            x = rows_of(count, inputs, dtype)
            y = linear(x, packed, with_bias)
            wanted, size = exact(x, packed, with_bias)
            assert y.dtype == dtype
            rounding = 2.0**-8 * wanted.abs() if dtype == torch.bfloat16 else 0.0
            assert bool(((y.double() - wanted).abs() <= rounding + 1e-6 * size).all()), (channels, inputs, count)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_bit_for_bit_whatever_is_beside_it(path: str, kind: str, dtype: torch.dtype) -> None:
    channels, inputs = 101, 2500
    packed, bias, x = weights(kind, channels, inputs), rows_of(1, channels, dtype, 2)[0], rows_of(33, inputs, dtype)
    alone = torch.cat([linear(x[i : i + 1], packed, bias, threads=1) for i in range(len(x))])
    for count in (*range(2, 10), 15, 16, 17, 31, 32, 33):
        for threads in (1, 2, 3):
            assert torch.equal(linear(x[:count], packed, bias, threads=threads), alone[:count])
    other = torch.full_like(x, float("nan"))
    other[17] = x[17]
    assert torch.equal(linear(other, packed, bias)[17], alone[17])


def test_both_ways_agree_but_for_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_native():
        pytest.skip("nothing to compare")
    packed, x = weights("int8", 70, 1000), rows_of(9, 1000, torch.float32)
    fast = linear(x, packed)
    monkeypatch.setattr(native_calls, "library", lambda: None)
    torch.testing.assert_close(fast, linear(x, packed), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_row_is_the_same_among_more_rows_than_are_put_in_order_at_once(path: str, kind: str) -> None:
    packed, x = weights(kind, 40, 20001), rows_of(70, 20001, torch.bfloat16)
    together = linear(x, packed, threads=2)
    for row in (0, 31, 32, 63, 64, 69):
        assert torch.equal(linear(x[row], packed), together[row])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_special_numbers_stay_in_their_row_and_channel(path: str, dtype: torch.dtype) -> None:
    packed, x = pack(torch.eye(40).bfloat16()), torch.ones(4, 40, dtype=dtype)
    x[1] = float("nan")
    x[2] = float("inf")
    y = linear(x, packed)
    assert torch.equal(y[0], torch.ones(40, dtype=dtype))
    assert torch.equal(y[3], torch.ones(40, dtype=dtype))
    assert bool(y[1].isnan().all())
    assert bool(y[2].isnan().all())  # 0 * inf
    spoilt = torch.zeros(7, 33, dtype=dtype)
    spoilt[4, 32] = float("nan")
    assert linear(torch.ones(3, 33, dtype=dtype), pack(spoilt)).isnan().nonzero()[:, 1].tolist() == [4, 4, 4]
    ones = pack(torch.ones(19, 70), int8=True)
    assert linear(torch.full((2, 70), float("-inf"), dtype=dtype), ones).tolist() == [[float("-inf")] * 19] * 2


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_large_and_small_numbers(path: str, kind: str, scale: float) -> None:
    packed, x = weights(kind, 20, 100), (rows_of(3, 100, torch.float32) * scale).bfloat16()
    wanted, size = exact(x, packed, None)
    assert bool(((linear(x, packed).double() - wanted).abs() <= 2.0**-8 * wanted.abs() + 1e-6 * size).all())


def test_paths_for_bfloat16_take_denormal_numbers_for_zeros(path: str) -> None:
    tiny = torch.full((1, 8), 2.0**-130, dtype=torch.bfloat16)
    y = linear(tiny, pack(torch.full((3, 8), 2.0**20).bfloat16()))
    assert y.tolist() == [[0.0 if path in ("amx", "avx512") else 2.0**-107] * 3]


def at_the_edge(values: torch.Tensor) -> torch.Tensor:
    """The same where the next byte belongs to nobody."""
    page = mmap.PAGESIZE
    room = -(-values.nbytes // page) * page
    memory = mmap.mmap(-1, room + page)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(begin + room), ctypes.c_size_t(page), 0) == 0
    at = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=room - values.nbytes)
    return at.view(values.shape).copy_(values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", [1, 33, 64, 129])
@pytest.mark.skipif(sys.platform != "linux", reason="guards a page by Linux's mprotect")
def test_nothing_behind_x_and_weights_is_read(path: str, kind: str, inputs: int) -> None:
    made = weights(kind, 37, inputs)
    packed = Packed(at_the_edge(made.weight), None if made.scale is None else at_the_edge(made.scale))
    for count in (1, 3, 17, 38):
        x = rows_of(count, inputs, torch.bfloat16)
        bias = rows_of(1, 37, torch.bfloat16)[0]
        assert torch.equal(linear(at_the_edge(x), packed, at_the_edge(bias)), linear(x, made, bias))


def test_every_int8_weight_becomes_what_it_is(path: str) -> None:
    codes = torch.arange(-128, 128).to(torch.int8).repeat(2, 1)
    packed = Packed(codes, torch.tensor([1.0, 0.5]))
    y = linear(torch.eye(256).bfloat16(), packed)
    assert torch.equal(y.float(), torch.stack([codes[0].float(), codes[1] * 0.5], dim=1))


def test_float32_is_computed_in_avx2_on_every_processor() -> None:
    library = native_calls.library()
    if library is None:
        pytest.skip("no native kernels here")
    best = native_calls.paths(library)[0]
    assert native_calls.path_of(library, torch.bfloat16, torch.int8) == best
    assert native_calls.path_of(library, torch.bfloat16, torch.bfloat16) == best
    assert native_calls.path_of(library, torch.float32, torch.bfloat16) == "avx2"
    assert native_calls.path_of(library, torch.bfloat16, torch.float32) == "avx2"


# How the tiles of this thread are cut, of a thread that may use them.
_TILES = """
extern "C" void cut(const char* shapes) { __asm__ volatile("ldtilecfg %0" : : "m"(*(const char(*)[64])shapes)); }
extern "C" void uncut() { __asm__ volatile("tilerelease"); }
extern "C" void look(char* shapes) { __asm__ volatile("sttilecfg %0" : "=m"(*(char(*)[64])shapes)); }
"""


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None or "amx" not in native_paths():
        pytest.skip("no g++, or no AMX, on this machine")
    source = tmp_path_factory.mktemp("tiles") / "tiles.cpp"
    source.write_text(_TILES)
    options = ["-O1", "-fPIC", "-shared"]
    subprocess.run(["g++", *options, str(source), "-o", str(source.with_suffix(".so"))], check=True, timeout=100)
    return ctypes.CDLL(str(source.with_suffix(".so")))


def test_a_thread_keeps_its_tiles_as_others_cut_them(tiles: ctypes.CDLL) -> None:
    """OneDNN computes in AMX too, and may load a thread's shapes only where its own were others the last time."""
    packed, x = weights("int8", 50, 70), rows_of(3, 70, torch.bfloat16)
    mine = bytes([1, *[0] * 15, 8, 0, 12, *[0] * 29, 3, 5, *[0] * 14])
    found = ctypes.create_string_buffer(64)
    tiles.cut(mine)
    try:
        linear(x, packed, threads=1)
        tiles.look(found)
    finally:
        tiles.uncut()
    assert found.raw == mine
    linear(x, packed, threads=1)
    tiles.look(found)
    assert found.raw == bytes(64)


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_computes_the_same_between_calls(path: str, threads: int) -> None:
    torch.set_num_threads(threads)
    packed = [weights("bfloat16", 700, 600), weights("int8", 719, 600)]
    x, y = rows_of(19, 600, torch.bfloat16), rows_of(600, 512, torch.bfloat16, 3)
    wanted, ours = x @ y, [linear(x, each) for each in packed]
    for _ in range(5):
        for each, expected in zip(packed, ours, strict=True):
            assert torch.equal(linear(x, each), expected)
            assert torch.equal(x @ y, wanted)


def test_bfloat16_results_are_rounded_to_nearest_even(path: str) -> None:
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    parts = torch.tensor([[1.0, 2.0**-8], [1.0 + 2.0**-7, 2.0**-8], [1.0, 2.0**-8 + 2.0**-16]])
    assert linear(x, pack(parts)).tolist() == [[1.0, 1.0 + 2.0**-6, 1.0 + 2.0**-7]]


def test_nothing_is_copied_of_contiguous_weights_and_no_gradient_is_kept() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 6))
    packed = pack(weight)
    assert packed.weight.data_ptr() == weight.data_ptr()
    assert not packed.weight.requires_grad
    across = torch.randn(6, 4).T
    assert torch.equal(pack(across).weight, across)


def test_int8_weights_are_within_half_a_step_and_zeros_stay_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 300)
    weight[3] = 0.0
    weight[4] *= 1e-30
    packed = pack(weight, int8=True)
    assert packed.scale is not None
    assert packed.weight.abs().amax(1).tolist() == [0 if n == 3 else 127 for n in range(50)]
    error = (packed.weight.double() * packed.scale.double()[:, None] - weight.double()).abs()
    assert bool((error <= 0.5001 * packed.scale.double()[:, None]).all())
    # Cut otherwise, they are the same.
    monkeypatch.setattr(
        "joinwise.kernels.verify_gemm.packed.slices", lambda made: [slice(n, n + 1) for n in range(len(made))]
    )
    again = pack(weight, int8=True)
    assert torch.equal(again.weight, packed.weight)


def test_slices_cover_every_channel_once() -> None:
    for channels, inputs in ((1, 1), (1000, 5000), (3, 2 << 20)):
        cut = slices(torch.empty(channels, inputs, device="meta"))
        assert [n for at in cut for n in range(*at.indices(channels))] == list(range(channels))


def test_leading_dimensions_strides_and_no_rows(path: str) -> None:
    packed, x = weights("bfloat16", 9, 20), rows_of(12, 20, torch.bfloat16)
    flat = linear(x, packed)
    assert torch.equal(linear(x.view(3, 4, 20), packed), flat.view(3, 4, 9))
    assert torch.equal(linear(x[5], packed), flat[5])
    assert torch.equal(linear(x[::2], packed), flat[::2])
    assert torch.equal(linear(x.T.contiguous().T, packed), flat)
    assert linear(x[:0], packed).shape == (0, 9)
    assert linear(x, Packed(torch.empty(0, 20))).shape == (12, 0)


@pytest.mark.parametrize("team", ["OpenMP", "own threads"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_calls_from_several_threads_do_not_mix(
    path: str, dtype: torch.dtype, team: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "reference":
        pytest.skip("native code is what runs without the GIL")
    if team == "own threads":
        monkeypatch.setattr(native_calls, "_team", lambda: None)
    packed = [weights(kind, 700, 600, seed) for seed, kind in enumerate(KINDS)]
    x = [rows_of(count, 600, dtype, count) for count in (1, 8, 40)]
    wanted = [[linear(rows, each, threads=1) for rows in x] for each in packed]
    start, wrong = threading.Barrier(3), []

    def work(which: int) -> None:
        start.wait(10)
        for turn in range(60):
            at = (which + turn) % 3
            if not torch.equal(linear(x[at], packed[which], threads=2), wanted[which][at]):
                wrong.append((which, turn))

    threads = [threading.Thread(target=work, args=(which,)) for which in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def test_torch_lends_its_threads() -> None:
    assert "OpenMP" not in torch.__config__.parallel_info() or native_calls._team()


def test_another_processor_gets_the_reference(plain_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: plain_library)
    assert not is_native()
    packed, x = weights("bfloat16", 5, 6), rows_of(2, 6, torch.float32)
    assert torch.equal(linear(x, packed), reference.linear(x, packed, None))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: pack(torch.zeros(2, 2, dtype=torch.float16)), "weights of torch.float16"),
        (lambda: pack(torch.zeros(2, 2, dtype=torch.int8)), "weights of torch.int8"),
        (lambda: pack(torch.zeros(4)), r"shape \(4,\)"),
        (lambda: pack(torch.zeros(4, 0)), "at least one input"),
        (lambda: pack(torch.zeros(4, 4, device="meta")), "on meta"),
        (lambda: pack(torch.tensor([[1.0, float("nan")]]), int8=True), "a NaN or an infinity"),
        (lambda: pack(torch.tensor([[1.0, float("inf")]]), int8=True), "a NaN or an infinity"),
        (lambda: Packed(torch.zeros(4, 4).T[1:]), "contiguous"),
        (lambda: Packed(torch.zeros(4, 4, dtype=torch.int8)), "without a scale"),
        (lambda: Packed(torch.zeros(4, 4), torch.ones(4)), "with a scale"),
        (lambda: Packed(torch.zeros(4, 4, dtype=torch.int8), torch.ones(3)), "for 4 channels"),
        (lambda: Packed(torch.zeros(4, 4, dtype=torch.int8), torch.ones(4).double()), "one float32 each"),
    ],
)
def test_weights_that_cannot_be_are_refused(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("x", "bias", "threads", "said"),
    [
        (torch.zeros(2, 5), None, None, "for weights of 4 inputs"),
        (torch.zeros(()), None, None, "for weights of 4 inputs"),
        (torch.zeros(2, 4, dtype=torch.float16), None, None, "float32 or bfloat16"),
        (torch.zeros(2, 4, device="meta"), None, None, "on the CPU"),
        (torch.zeros(2, 4), torch.zeros(4), None, "for 3 channels"),
        (torch.zeros(2, 4), torch.zeros(3).bfloat16(), None, "a bias of torch.bfloat16"),
        (torch.zeros(2, 4), torch.zeros(3, device="meta"), None, "on meta"),
        (torch.zeros(2, 4), None, 0, "0 threads"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    x: torch.Tensor, bias: torch.Tensor | None, threads: int | None, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        linear(x, pack(torch.zeros(3, 4)), bias, threads=threads)
