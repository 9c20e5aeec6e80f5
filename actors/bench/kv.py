"""`joinwise bench kv`: the KV data plane against blocking TCP, memcpy and NIXL, in one run, on one machine.

Two processes, each on a core of its own, hold caches of one shape; every block to be moved is computed
beforehand. Before anything is timed, what lands is compared with what was sent. Then each transport
and its baseline take turns, and every ratio is of two measurements that follow one another.
"""

import itertools
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from joinwise.actors.bench import kv_kernels, kv_nixl
from joinwise.actors.bench.kv_ends import Receiver, Sender, Shape
from joinwise.actors.bench.remote import Remote

TRANSPORTS = ("grpc", "tcp", "shm", "nccl")
SIZES_MB = (1, 4, 16, 64, 256)
LARGE_MB = 16
"""From this size on, sizes count for the figures."""
TARGETS = {
    "tcp_ratio": 0.85,
    "shm_ratio": 1.5,
    "grpc_ratio": 0.35,
    "nixl_ratio": 1.0,
    "pack_memcpy_ratio": 0.5,
    "unpack_memcpy_ratio": 0.5,
    "int8_memcpy_ratio": 0.25,
}
_UNPRINTED = ("bytes", "blocks", "repeats", "verified_bytes", "in_figure")
Row = dict[str, Any]


def run(
    sizes_mb: Sequence[int], repeats: int, say: Callable[[str], None], shape: Shape | None = None
) -> tuple[dict[str, float | None], list[Row]]:
    """Run the benchmark.

    Args:
        sizes_mb: about how many megabytes (10^6 bytes) are moved at once.
        repeats: pairs of measurements for each size and transport.
        say: told what is being done.
        shape: of the caches; by default SmolLM2's, as large as the largest size needs.

    Returns:
        Figures (None: it could not be measured, a row says why), and a row for each median behind them.

    Raises:
        RuntimeError: an end has died, or what landed is not what was sent.
    """
    shape = shape or Shape(num_blocks=0)
    counts = {size: max(1, round(size * 1e6 / shape.block_bytes)) for size in sizes_mb}
    shape = Shape(max(counts.values()), shape.layers, shape.heads, shape.head_dim, shape.block_size, shape.frame_bytes)
    figures: dict[str, float | None] = {}
    with _ends(shape) as (sender, receiver), tempfile.TemporaryDirectory(prefix="joinwise-bench-") as folder:
        pair = Pair(sender, receiver, shape)
        rows = [
            row
            for size, count in counts.items()
            for row in _against_tcp(pair, size, scattered(shape, count), repeats, say)
        ]
        for transport in TRANSPORTS:
            figures[f"{transport}_ratio"] = _median(rows, "transport", transport)
        found, nixl_rows = _against_nixl(
            pair, {s: scattered(shape, c) for s, c in counts.items()}, repeats, say, Path(folder)
        )
    kernel_figures, kernel_rows = kv_kernels.measure(LARGE_MB * 10**6, 3 * repeats, say)
    figures = {**figures, "nixl_ratio": found, **kernel_figures}
    return {n: v if v is None else round(v, 4) for n, v in figures.items()}, rows + nixl_rows + kernel_rows


class Pair:
    """Both ends, and one transfer after the other between them."""

    def __init__(self, sender: Remote, receiver: Remote, shape: Shape) -> None:
        self.sender, self.receiver, self.shape = sender, receiver, shape
        self._names = itertools.count()

    def fetch(self, transport: str, block_ids: Sequence[int]) -> float:
        """Seconds of one transfer."""
        return float(self.receiver("fetch", transport, self._offer(block_ids), block_ids))

    def check(self, transport: str, block_ids: Sequence[int]) -> int:
        """Compare what lands with what was sent, untimed; bytes whose checksums were compared on the way.

        Raises:
            RuntimeError: they are not the same, or not all checksums were compared.
        """
        landed, checked = self.receiver("check", transport, self._offer(block_ids), block_ids)
        if landed != self.sender("digest", block_ids):
            raise RuntimeError(f"{transport}: what has landed is not what was sent")
        if checked != len(block_ids) * self.shape.block_bytes:
            raise RuntimeError(f"{transport}: the checksums of {checked} bytes only were compared")
        return int(checked)

    def cpu_seconds(self) -> float:
        """CPU that both ends have used so far."""
        return float(self.sender("cpu_seconds") + self.receiver("cpu_seconds"))

    def _offer(self, block_ids: Sequence[int]) -> str:
        name = f"transfer-{next(self._names)}"
        self.sender("offer", name, block_ids)
        return name


def _against_tcp(
    pair: Pair, size_mb: int, block_ids: Sequence[int], repeats: int, say: Callable[[str], None]
) -> Iterator[Row]:
    """One size by each transport, the baseline's turn before each."""
    size = len(block_ids) * pair.shape.block_bytes
    say(f"{size_mb} MB: comparing what lands")
    verified = {transport: pair.check(transport, block_ids) for transport in TRANSPORTS}
    times: dict[str, list[tuple[float, float, float]]] = {transport: [] for transport in TRANSPORTS}
    for turn in range(1, repeats + 1):
        for transport in TRANSPORTS:
            say(f"{size_mb} MB by {transport}: {turn} of {repeats}")
            baseline = pair.receiver("baseline", size)
            before = pair.cpu_seconds()
            seconds = pair.fetch(transport, block_ids)
            times[transport].append((baseline, seconds, pair.cpu_seconds() - before))
    for transport, measured in times.items():
        yield {
            "transport": transport,
            "size_mb": size_mb,
            "bytes": size,
            "blocks": len(block_ids),
            "repeats": repeats,
            "verified_bytes": verified[transport],
            "gb_per_s": size / statistics.median(own for _, own, _ in measured) / 1e9,
            "tcp_baseline_gb_per_s": size / statistics.median(base for base, _, _ in measured) / 1e9,
            "cpu_s_per_gb": sum(cpu for _, _, cpu in measured) / repeats / size * 1e9,
            "ratio": statistics.median(base / own for base, own, _ in measured),
            "in_figure": size_mb >= LARGE_MB,
        }


def _against_nixl(
    pair: Pair, ids: dict[int, list[int]], repeats: int, say: Callable[[str], None], folder: Path
) -> tuple[float | None, list[Row]]:
    """Ours against NIXL's: `tcp` against UCX told to use TCP, `shm` against UCX left to choose."""
    if why := kv_nixl.missing():
        return None, [{"nixl": "not measured", "why": why}]
    rows: list[Row] = []
    for ours, tls in (("tcp", "tcp"), ("shm", "")):
        logs = folder / ours
        logs.mkdir()
        with _agents(pair.shape, kv_nixl.environment(tls, logs)) as (source, reader):
            for size_mb, block_ids in ids.items():
                with source.awake(), reader.awake():
                    reader("read", block_ids)
                    landed, sent = reader("digest", block_ids), source("digest", block_ids)
                if landed != sent:
                    raise RuntimeError(f"NIXL with UCX_TLS={tls}: what has landed is not what was sent")
                times = []
                for turn in range(1, repeats + 1):
                    say(f"{size_mb} MB, {ours} against NIXL: {turn} of {repeats}")
                    with source.awake(), reader.awake():
                        theirs = reader("read", block_ids)
                    times.append((theirs, pair.fetch(ours, block_ids)))
                size = len(block_ids) * pair.shape.block_bytes
                rows.append(
                    {
                        "nixl_against": ours,
                        "ucx_tls": tls or "(UCX's default)",
                        "size_mb": size_mb,
                        "bytes": size,
                        "gb_per_s": size / statistics.median(own for _, own in times) / 1e9,
                        "nixl_gb_per_s": size / statistics.median(theirs for theirs, _ in times) / 1e9,
                        "ratio": statistics.median(theirs / own for theirs, own in times),
                        "in_figure": size_mb >= LARGE_MB,
                    }
                )
        for row in rows:
            if row["nixl_against"] == ours:
                row["ucx_chose"] = kv_nixl.chosen(logs)
    both = [_median(rows, "nixl_against", ours) for ours in ("tcp", "shm")]
    return min(both), rows


def _median(rows: Sequence[Row], key: str, value: str) -> float:
    """Of the ratios of the sizes that count; of the largest where none does."""
    of = [row for row in rows if row.get(key) == value]
    return statistics.median([row["ratio"] for row in of if row["in_figure"]] or [of[-1]["ratio"]])


def scattered(shape: Shape, count: int) -> list[int]:
    """Blocks as a cache in use gives them out: scattered."""
    return random.Random(count).sample(range(shape.num_blocks), count)  # noqa: S311 - reproducible, not secret


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """The rows, for people: one table for each kind."""
    for title, key in (("transports", "transport"), ("NIXL", "nixl_against"), ("kernels", "kernel"), ("", "why")):
        if not (of := [row for row in rows if key in row]):
            continue
        names = [name for name in of[0] if name not in _UNPRINTED]
        table = Table(*names, title=title)
        for row in of:
            table.add_row(*(f"{v:.3g}" if isinstance(v := row[name], float) else str(v) for name in names))
        yield table


@contextmanager
def _ends(shape: Shape) -> Iterator[tuple[Remote, Remote]]:
    with ExitStack() as stack:
        first, second = cores()
        sender = Remote(Sender, shape, core=first)
        stack.callback(sender.close)
        address, port = sender("addresses")
        receiver = Remote(Receiver, shape, TRANSPORTS, address, port, core=second)
        stack.callback(receiver.close)
        yield sender, receiver


@contextmanager
def _agents(shape: Shape, environment: dict[str, str]) -> Iterator[tuple[Remote, Remote]]:
    with ExitStack() as stack:
        first, second = cores()
        source = Remote(kv_nixl.Agent, shape, "sender", True, core=first, environment=environment)
        stack.callback(source.close)
        reader = Remote(kv_nixl.Agent, shape, "receiver", False, core=second, environment=environment)
        stack.callback(reader.close)
        reader("connect", *source("describe"))
        yield source, reader


def cores() -> tuple[int | None, int | None]:
    """One for each end, where there are two."""
    ours = sorted(os.sched_getaffinity(0))
    return (ours[0], ours[1]) if len(ours) > 1 else (None, None)
