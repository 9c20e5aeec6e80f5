"""`joinwise bench kv --tls`: what mutual TLS costs the KV transports; both ways take turns, in one run.

Memory shared on one host is no wire and has no TLS, so it is not among them.
"""

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from joinwise.actors.bench.kv import LARGE_MB, Pair, Row, cores, scattered
from joinwise.actors.bench.kv_ends import Receiver, Sender, Shape
from joinwise.actors.bench.remote import Remote
from joinwise.actors.tls import peers
from joinwise.cluster.config import PeerTlsConfig

TRANSPORTS = ("tcp", "grpc")
SIZES_MB = (16, 64)


def settings(folder: Path) -> PeerTlsConfig:
    """Certificates in a folder: `tls.crt`, `tls.key` and `ca.crt`, for the name joinwise."""
    cert, key, ca = (str(folder / name) for name in ("tls.crt", "tls.key", "ca.crt"))
    return PeerTlsConfig(cert=cert, key=key, ca=ca)


def run(
    folder: Path, sizes_mb: Sequence[int], repeats: int, say: Callable[[str], None], shape: Shape | None = None
) -> tuple[dict[str, float], list[Row]]:
    """Run the comparison.

    Args:
        folder: of the certificates, see `settings`.
        sizes_mb: about how many megabytes (10^6 bytes) are moved at once.
        repeats: pairs of measurements for each size and transport.
        say: told what is being done.
        shape: of the caches; by default SmolLM2's.

    Returns:
        Figures: `tls_<transport>_ratio`, the speed with TLS over that without, and `tls_<transport>_cpu_ratio`, of both
        ends' CPU seconds a byte; and a row for each size and transport.

    Raises:
        ConfigError: the certificates cannot be used.
        RuntimeError: an end has died, or what landed is not what was sent.
    """
    peers(settings(folder))  # raises here what would be raised in an end
    unit = (shape or Shape(0)).block_bytes
    counts = {size: max(1, round(size * 1e6 / unit)) for size in sizes_mb}
    shape = shape or Shape(max(counts.values()))
    rows: list[Row] = []
    with ExitStack() as stack:
        plain, secured = (_pair(stack, shape, tls) for tls in (None, settings(folder)))
        for size, count in counts.items():
            blocks = scattered(shape, min(count, shape.num_blocks))
            for transport in TRANSPORTS:
                rows.append(_turns(plain, secured, transport, size, blocks, repeats, say))
    figures = {}
    for transport in TRANSPORTS:
        mine = [row for row in rows if row["transport"] == transport]
        large = [row for row in mine if row["size_mb"] >= LARGE_MB] or mine
        for name in ("ratio", "cpu_ratio"):
            figures[f"tls_{transport}_{name}"] = round(statistics.median(row[name] for row in large), 4)
    return figures, rows


def _pair(stack: ExitStack, shape: Shape, tls: PeerTlsConfig | None) -> Pair:
    first, second = cores()
    sender = Remote(Sender, shape, tls, core=first)
    stack.callback(sender.close)
    receiver = Remote(Receiver, shape, TRANSPORTS, *sender("addresses"), tls, core=second)
    stack.callback(receiver.close)
    return Pair(sender, receiver, shape)


def _turns(
    plain: Pair,
    secured: Pair,
    transport: str,
    size_mb: int,
    blocks: list[int],
    repeats: int,
    say: Callable[[str], None],
) -> Row:
    say(f"{size_mb} MB by {transport}: comparing what lands")
    size = plain.check(transport, blocks)
    secured.check(transport, blocks)
    seconds: dict[str, list[float]] = {"plain": [], "tls": []}
    cpu: dict[str, list[float]] = {"plain": [], "tls": []}
    for turn in range(1, repeats + 1):
        say(f"{size_mb} MB by {transport}, with and without TLS: {turn} of {repeats}")
        sides = [("plain", plain), ("tls", secured)]
        for name, pair in sides if turn % 2 else reversed(sides):
            before = pair.cpu_seconds()
            seconds[name].append(pair.fetch(transport, blocks))
            cpu[name].append(pair.cpu_seconds() - before)
    return {
        "transport": transport,
        "size_mb": size_mb,
        "bytes": size,
        "repeats": repeats,
        "gb_per_s": size / statistics.median(seconds["plain"]) / 1e9,
        "tls_gb_per_s": size / statistics.median(seconds["tls"]) / 1e9,
        "cpu_s_per_gb": sum(cpu["plain"]) / repeats / size * 1e9,
        "tls_cpu_s_per_gb": sum(cpu["tls"]) / repeats / size * 1e9,
        "ratio": statistics.median(a / b for a, b in zip(seconds["plain"], seconds["tls"], strict=True)),
        "cpu_ratio": sum(cpu["tls"]) / (sum(cpu["plain"]) or 1e-9),
    }
