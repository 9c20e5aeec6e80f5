"""What a receiver knows of its senders: how each is reached, how fast, and what went wrong."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

_MEASURABLE = 1 << 16
_KEPT = 0.8
"""Share of a link's measurement that stays when a new payload joins it."""
_LOST_S = 60.0
_IDLE_S = 900.0
"""Links that nobody used for so long are forgotten, and sooner where the peer could not be reached."""


@dataclass(frozen=True)
class LinkStatus:
    """A link at one moment. Everything but `bytes_per_s` adds up over the link's life.

    Attributes:
        peer: the sender's KV address.
        transport, why: in use now, and why that one.
        codec, codec_why: of the last transfer, and why that one.
        bytes_per_s: measured speed of the wire; 0 before there is one.
        series: by (transport, codec): `bytes` of payload, `streams` that have ended, `failed` ones among them,
            `seconds` that they took, the prefill's among them, `wire_seconds` from first to last frame,
            `exposed_seconds` after the prefill's last layer, and `refused_<reason>` frames.
        retries: transfers asked for again, because the sender had restarted or a lane was gone.
    """

    peer: str
    transport: str
    why: str
    codec: str
    codec_why: str
    bytes_per_s: float
    series: dict[tuple[str, str], dict[str, float]]
    retries: int = 0

    def total(self, name: str) -> float:
        """One count, over all transports and codecs."""
        return sum(counts.get(name, 0) for counts in self.series.values())

    def refused(self) -> dict[str, int]:
        """Refused frames by reason."""
        found: Counter[str] = Counter()
        for counts in self.series.values():
            found.update({name[8:]: int(value) for name, value in counts.items() if name.startswith("refused_")})
        return dict(found)


@dataclass
class Link:
    """One sender's rank, as seen from here; see `LinkStatus`."""

    peer: str
    transport: str = "grpc"
    why: str = "nothing is agreed yet"
    codec: str = "none"
    codec_why: str = ""
    bytes_per_s: float = 0.0
    retries: int = 0
    ratio: float = 0.7
    """Coded bytes per plain byte of the lossless codec, as far as it has been seen."""
    coded: int = 0
    """Coded transfers since the last one that was not."""
    users: int = 0
    """Transfers that are under way on it."""
    used_at: float = field(default_factory=time.monotonic)
    reachable: bool = True
    _series: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    _measured: tuple[float, float] = (0.0, 0.0)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def counts(self) -> Counter[str]:
        """What all streams have done, over all transports and codecs."""
        total: Counter[str] = Counter()
        with self._lock:
            for counts in self._series.values():
                total.update(counts)
        return total

    def add(self, transport: str, codec: str, **counts: float) -> None:
        """Count what one stream did."""
        with self._lock:
            mine = self._series.setdefault((transport, codec), Counter())
            for name, value in counts.items():
                mine[name] += value  # type: ignore[assignment]

    def measure(self, size: int, seconds: float) -> None:
        """A payload of `size` bytes was waited for, for `seconds`, while it was on the wire.

        Bytes and seconds are smoothed apart: one payload that had arrived before it was asked for says little.
        """
        if size < _MEASURABLE or seconds <= 0:
            return
        with self._lock:
            bytes_, waited = self._measured
            self._measured = bytes_ * _KEPT + size, waited * _KEPT + seconds
            self.bytes_per_s = self._measured[0] / self._measured[1]

    def compressed(self, coded: int, plain: int) -> None:
        """The lossless codec has made so many bytes of `plain`."""
        if plain:
            self.ratio = _KEPT * self.ratio + (1 - _KEPT) * coded / plain

    def status(self) -> LinkStatus:
        """How it stands now."""
        with self._lock:
            series: dict[tuple[str, str], dict[str, float]] = {
                key: dict(counts) for key, counts in self._series.items()
            }
        return LinkStatus(
            self.peer, self.transport, self.why, self.codec, self.codec_why, self.bytes_per_s, series, self.retries
        )

    def gone(self, now: float) -> bool:
        """Whether to forget it: nobody uses it, and has not for long."""
        return not self.users and now - self.used_at > (_IDLE_S if self.reachable else _LOST_S)


class LinkTable:
    """All links of one receiver, by the peer's address; from any thread. Their number is bounded by who is there."""

    def __init__(self) -> None:
        self._links: dict[str, Link] = {}
        self._lock = threading.Lock()

    def values(self) -> list[Link]:
        """All of them."""
        with self._lock:
            return list(self._links.values())

    @contextmanager
    def using(self, peers: Sequence[str]) -> Iterator[list[Link]]:
        """The links to these peers; none of them is forgotten while this lasts."""
        with self._lock:
            links = [self._links.setdefault(peer, Link(peer)) for peer in peers]
            for link in links:
                link.users += 1
        try:
            yield links
        finally:
            with self._lock:
                for link in links:
                    link.users -= 1
                    link.used_at = time.monotonic()

    def of(self, peer: str) -> Link:
        """The link to a peer, inside `using`."""
        return self._links[peer]

    def take_gone(self, now: float) -> set[str]:
        """Forget links that are gone (see `Link.gone`); their peers."""
        with self._lock:
            gone = {peer for peer, link in self._links.items() if link.gone(now)}
            for peer in gone:
                del self._links[peer]
        return gone


def merged(ones: Sequence[LinkStatus], others: Sequence[LinkStatus]) -> list[LinkStatus]:
    """The links of two ranks of one worker, those to the same peer added up."""
    links = {link.peer: link for link in ones}
    for other in others:
        mine = links.setdefault(other.peer, other)
        if mine is other:
            continue
        series = {key: dict(counts) for key, counts in mine.series.items()}
        for key, counts in other.series.items():
            sums = series.setdefault(key, {})
            for name, value in counts.items():
                sums[name] = sums.get(name, 0) + value
        speed, retries = max(mine.bytes_per_s, other.bytes_per_s), mine.retries + other.retries
        links[other.peer] = replace(mine, bytes_per_s=speed, series=series, retries=retries)
    return list(links.values())


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
