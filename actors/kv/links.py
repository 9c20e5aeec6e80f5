"""What a receiver knows of its senders: how each is reached, how fast, and what went wrong."""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

_MEASURABLE = 1 << 16
_SMOOTHING = 0.2


@dataclass
class Link:
    """One sender's rank, as seen from here.

    Attributes:
        peer: its KV address.
        transport: "grpc", or the kind of lane in use.
        why: why that one.
        bytes_per_s: measured speed of payloads on lanes; 0 before there is one.
        counts: bytes, transfers, seconds by name, and refusals as "refused_<reason>".
    """

    peer: str
    transport: str = "grpc"
    why: str = ""
    bytes_per_s: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, **counts: float) -> None:
        """Count what one stream did."""
        with self._lock:
            for name, value in counts.items():
                self.counts[name] += value  # type: ignore[assignment]

    def measure(self, size: int, seconds: float) -> None:
        """A payload of `size` bytes was read in `seconds`, from when its header was here."""
        if size >= _MEASURABLE and seconds > 0:
            rate = size / seconds
            self.bytes_per_s += (_SMOOTHING if self.bytes_per_s else 1.0) * (rate - self.bytes_per_s)


@dataclass(frozen=True)
class Preference:
    """Which transports to try, in order, and why that order."""

    kinds: tuple[str, ...]
    why: str


def preference(transport: str) -> Preference:
    """The order in which a configured transport is tried.

    `auto`: shared memory needs no socket for the bytes, and only a worker on the same host can open
    it; TCP lanes copy less than gRPC, which is always there.
    """
    if transport == "auto":
        return Preference(("shm", "tcp", "grpc"), "auto")
    return Preference((transport,), "configured")


def settle(wanted: Preference, offered: tuple[str, ...], attempt: Callable[[str], None]) -> tuple[str, str]:
    """Try transports in order.

    Args:
        wanted: the order.
        offered: kinds of lane that the sender accepts.
        attempt: opens a lane of a kind; raises OSError where that fails.

    Returns:
        The transport, and why that one.

    Raises:
        ConnectionError: none works; the message has every reason.
    """
    refused = []
    for kind in wanted.kinds:
        if kind != "grpc" and kind not in offered:
            refused.append(f"{kind}: the sender offers {', '.join(offered) or 'no lanes'}")
            continue
        try:
            attempt(kind)
        except OSError as error:
            refused.append(f"{kind}: {error}")
            continue
        return kind, "; ".join([wanted.why, *refused])
    raise ConnectionError("no KV transport works: " + "; ".join(refused))
