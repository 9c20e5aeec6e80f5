"""`joinwise bench kv --gpu`: KV whose either end is in a device's memory, and the kernels that run there.

Transfers take turns with blocking TCP between two host memories, kernels with a copy of the same bytes on the device.
Every piece that cannot be measured says why, and the others are measured all the same.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from joinwise.actors.bench.gpu import missing
from joinwise.actors.bench.kv import LARGE_MB, Pair, cores
from joinwise.actors.bench.kv_ends import End, Receiver, Sender, Shape
from joinwise.actors.bench.remote import Remote
from joinwise.actors.kv.blocks import KvBlocks
from joinwise.kernels import kv_codec, kv_pack
from joinwise.kernels.kv_pack import interior_from_views

TRANSPORTS = ("grpc", "tcp", "shm")
HOST = "cpu"
WAYS = (("cuda", HOST), (HOST, "cuda"), ("cuda", "cuda"))
_HEADS, _BLOCK, _HEAD_DIM = 8, 16, 128
"""Of the kernels' cache: Llama-3 8B's, in vLLM's blocks on a GPU."""
Row = dict[str, Any]


def run(
    sizes_mb: Sequence[int], repeats: int, say: Callable[[str], None], shape: Shape | None = None
) -> tuple[dict[str, float | None], list[Row]]:
    """Run the benchmark.

    Args:
        sizes_mb: about how many megabytes (10^6 bytes) are moved at once; the last one's ratios are the figures.
        repeats: pairs of measurements for each.
        say: told what is being done.
        shape: of the caches; by default SmolLM2's, as large as the largest size needs.

    Returns:
        Figures (None: it could not be measured, a row says why), and a row for each median behind them.

    Raises:
        RuntimeError: an end has died, or what landed is not what was sent.
    """
    pieces = [f"{begin}_to_{end}_{transport}_ratio" for begin, end in WAYS for transport in TRANSPORTS]
    pieces += [f"gpu_{kernel}_ratio" for kernel in ("pack", "unpack", "int8", "fp8")]
    if why := missing():
        return dict.fromkeys(pieces), [{"piece": piece, "why": why} for piece in pieces]
    rows: list[Row] = []
    figures: dict[str, float | None] = {}
    for begin, end in WAYS:
        of = between(begin, end, sizes_mb, repeats, say, shape)
        rows += of
        figures |= {f"{begin}_to_{end}_{row['transport']}_ratio": row["ratio"] for row in of}
    kernels = measure("cuda", LARGE_MB * 10**6, 3 * repeats, say)
    for name in ("pack", "unpack", "int8", "fp8"):
        figures[f"gpu_{name}_ratio"] = min(row["ratio"] for row in kernels if row["kernel"].split()[0] == name)
    return {n: v if v is None else round(v, 4) for n, v in figures.items()}, rows + kernels


class _OnDevice(End):
    """An end whose cache is on a device; the baseline keeps the memory of the host."""

    device: str

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__(shape, seed)
        self._host = self.memory
        self.memory = self._host.to(self.device, copy=True)
        layers = self.memory.view(shape.layers, shape.num_blocks, shape.heads, 2 * shape.block_size, shape.head_dim)
        caches = {f"layers.{index}": layer for index, layer in enumerate(layers)}
        self.blocks = KvBlocks(
            caches,
            block_size=shape.block_size,
            interior="bench",
            model_digest="bench",
            num_blocks=shape.num_blocks,
        )

    def bytes(self, size: int) -> memoryview:
        """Host memory for the baseline."""
        return self._host.view(torch.uint8).numpy().data[:size]


class DeviceSender(Sender, _OnDevice):
    """A prefill worker on a device."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.device = device
        super().__init__(shape)


class DeviceReceiver(Receiver, _OnDevice):
    """A decode worker on a device."""

    def __init__(self, shape: Shape, device: str, address: str, baseline_port: int) -> None:
        self.device = device
        super().__init__(shape, TRANSPORTS, address, baseline_port)

    def check(self, transport: str, name: str, block_ids: Sequence[int]) -> tuple[str, int]:
        """See `Receiver.check`: a device's blocks are not written in place, so all of them are wiped."""
        self.memory.zero_()
        return super().check(transport, name, block_ids)


def between(
    begin: str, end: str, sizes_mb: Sequence[int], repeats: int, say: Callable[[str], None], shape: Shape | None = None
) -> list[Row]:
    """Transfers from one memory to another, by each transport; either is `HOST`, or a device as torch names it."""
    shape = shape or Shape(num_blocks=0)
    counts = {size: max(1, round(size * 1e6 / shape.block_bytes)) for size in sizes_mb}
    shape = Shape(max(counts.values()), shape.layers, shape.heads, shape.head_dim, shape.block_size, shape.frame_bytes)
    rows = []
    with ExitStack() as stack:
        first, second = cores()
        sender = Remote(Sender, shape, core=first) if begin == HOST else Remote(DeviceSender, shape, begin, core=first)
        stack.callback(sender.close)
        address, port = sender("addresses")
        receiver = (
            Remote(Receiver, shape, TRANSPORTS, address, port, core=second)
            if end == HOST
            else Remote(DeviceReceiver, shape, end, address, port, core=second)
        )
        stack.callback(receiver.close)
        pair = Pair(sender, receiver, shape)
        for size_mb, count in counts.items():
            ids = random.Random(count).sample(range(shape.num_blocks), count)  # noqa: S311 - reproducible, not secret
            for transport in TRANSPORTS:
                say(f"{size_mb} MB from {begin} to {end} by {transport}")
                rows.append({"way": f"{begin} to {end}", "size_mb": size_mb, **_moved(pair, transport, ids, repeats)})
    return rows


def _moved(pair: Pair, transport: str, ids: Sequence[int], repeats: int) -> Row:
    size = len(ids) * pair.shape.block_bytes
    verified = pair.check(transport, ids)
    times = [(float(pair.receiver("baseline", size)), pair.fetch(transport, ids)) for _ in range(repeats)]
    return {
        "transport": transport,
        "bytes": size,
        "verified_bytes": verified,
        "gb_per_s": size / statistics.median(own for _, own in times) / 1e9,
        "tcp_baseline_gb_per_s": size / statistics.median(base for base, _ in times) / 1e9,
        "ratio": statistics.median(base / own for base, own in times),
    }


def measure(device: str, size: int, repeats: int, say: Callable[[str], None]) -> list[Row]:
    """Kernels on a device against a copy of about `size` bytes there.

    Raises:
        RuntimeError: what was packed and unpacked again is not what it was.
    """
    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        say(f"kernels on {device}: {dtype}")
        rows += [{"device": device, "dtype": str(dtype), **row} for row in _kernels(device, dtype, size, repeats)]
    return rows


def _kernels(device: str, dtype: torch.dtype, size: int, repeats: int) -> list[Row]:
    blocks = max(1, size // (2 * _BLOCK * _HEADS * _HEAD_DIM * dtype.itemsize))
    cache = torch.randn(blocks, 2, _BLOCK, _HEADS, _HEAD_DIM, device=device).to(dtype)
    target = torch.zeros_like(cache)
    inside = interior_from_views(cache, cache[:, 0], cache[:, 1])
    total, tokens = cache.numel() * dtype.itemsize, blocks * _BLOCK
    wire, copy = torch.ones(2, total, dtype=torch.uint8, device=device).unbind()
    ids, heads, rows = torch.randperm(blocks).tolist(), range(_HEADS), cache.numel() // _HEAD_DIM
    coded = {
        codec: torch.ones(kv_codec.max_encoded_bytes(codec, rows, _HEAD_DIM, dtype), dtype=torch.uint8, device=device)
        for codec in kv_codec.LOSSY
    }

    def pack() -> None:
        kv_pack.pack(cache, inside, ids, first_token=0, num_tokens=tokens, heads=heads, out=wire)

    def unpack() -> None:
        kv_pack.unpack(wire, inside, target, ids, first_token=0, heads=heads)

    def encode(codec: str) -> None:
        kv_codec.encode(codec, wire, head_dim=_HEAD_DIM, dtype=dtype, out=coded[codec])

    def decode(codec: str) -> None:
        kv_codec.decode(codec, coded[codec], rows=rows, head_dim=_HEAD_DIM, dtype=dtype, out=copy)

    pack()
    unpack()
    if not torch.equal(cache, target):
        raise RuntimeError(f"{device}, {dtype}: unpacking does not undo packing")
    kernels: dict[str, Callable[[], None]] = {"pack": pack, "unpack": unpack}
    for codec in kv_codec.LOSSY:
        kernels |= {f"{codec} encode": partial(encode, codec), f"{codec} decode": partial(decode, codec)}
    return [
        {"kernel": name, "bytes": total, **_compare(lambda: copy.copy_(wire), kernel, total, repeats, device)}
        for name, kernel in kernels.items()
    ]


def _compare(
    baseline: Callable[[], object], measured: Callable[[], object], size: int, repeats: int, device: str
) -> Row:
    """GB/s of both, and the median of the ratios; they take turns, and the device is waited for."""
    times = [(_seconds(baseline, device), _seconds(measured, device)) for _ in range(repeats + 1)][1:]
    return {
        "gb_per_s": size / statistics.median(own for _, own in times) / 1e9,
        "copy_gb_per_s": size / statistics.median(base for base, _ in times) / 1e9,
        "ratio": statistics.median(base / own for base, own in times),
    }


def _seconds(work: Callable[[], object], device: str) -> float:
    _wait(device)
    begin = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: str) -> None:
    if device != HOST:
        torch.cuda.synchronize(device)
