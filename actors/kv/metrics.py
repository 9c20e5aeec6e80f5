"""What a worker's `/metrics` says of its KV transfers, by link.

A link's labels are its peer's address, the transport and the codec; a peer that is forgotten (see `links.Link.gone`)
takes its series along, so that their number is bounded by the workers that there are.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from joinwise.actors.kv.links import LinkStatus

_LINK = ("peer", "transport", "codec")
_COUNTS = {
    "bytes": "Payload bytes received",
    "streams": "Streams that have ended",
    "failed": "Streams that ended without all of their KV, cancelled ones too",
    "seconds": "Seconds that streams were open, the wait for the prefill among them",
    "wire_seconds": "Seconds from the first frame to the last",
    "exposed_seconds": "Seconds from the last computed layer to the last frame",
}


@dataclass(frozen=True)
class KvFigures:
    """What the ranks of one worker hold and have done, at one moment."""

    links: Sequence[LinkStatus] = ()
    streams: int = 0
    landing_bytes: int = 0
    landing_limit: int = 0
    outcomes: Mapping[str, int] = field(default_factory=dict)
    """Imports by how they ended: "completed", "failed", and the failed ones again by reason."""
    landing_waits: int = 0


class KvMetrics(Collector):
    """Shows the figures that were noted last; from any thread."""

    def __init__(self) -> None:
        self._figures = KvFigures()
        self._lock = threading.Lock()

    def note(self, figures: KvFigures) -> None:
        """Show these from now on."""
        with self._lock:
            self._figures = figures

    @property
    def figures(self) -> KvFigures:
        """What was noted last."""
        with self._lock:
            return self._figures

    def collect(self) -> Iterable[Metric]:
        """prometheus-client's hook; every family is there, with or without links."""
        now = self.figures
        for name, text in _COUNTS.items():
            family = CounterMetricFamily(f"joinwise:kv_link_{name}", text, labels=_LINK)
            for link in now.links:
                for key, counts in link.series.items():
                    family.add_metric((link.peer, *key), counts.get(name, 0))
            yield family
        yield self._refused(now)
        speed = GaugeMetricFamily("joinwise:kv_link_bytes_per_second", "Measured speed of the wire", labels=_LINK)
        retries = CounterMetricFamily("joinwise:kv_link_retries", "Transfers asked for again", labels=["peer"])
        for link in now.links:
            speed.add_metric((link.peer, link.transport, link.codec), link.bytes_per_s)
            retries.add_metric((link.peer,), link.retries)
        yield speed
        yield retries
        imports = CounterMetricFamily("joinwise:kv_imports", "Imports that have ended", labels=["outcome"])
        failures = CounterMetricFamily("joinwise:kv_import_failures", "Failed imports by reason", labels=["reason"])
        for name, count in sorted(now.outcomes.items()):
            (imports if name in ("completed", "failed") else failures).add_metric((name,), count)
        yield imports
        yield failures
        yield GaugeMetricFamily("joinwise:kv_streams", "Open KV streams, both directions", now.streams)
        yield GaugeMetricFamily("joinwise:kv_landing_bytes", "KV received and not yet in its blocks", now.landing_bytes)
        yield GaugeMetricFamily("joinwise:kv_landing_limit_bytes", "What kv.landing_bytes allows", now.landing_limit)
        yield CounterMetricFamily(
            "joinwise:kv_landing_waits", "Frames that found the landing buffer full", now.landing_waits
        )

    @staticmethod
    def _refused(now: KvFigures) -> Metric:
        labels = [*_LINK, "reason"]
        family = CounterMetricFamily("joinwise:kv_link_refused_frames", "Frames that were refused", labels=labels)
        for link in now.links:
            for key, counts in link.series.items():
                for name, count in counts.items():
                    if name.startswith("refused_"):
                        family.add_metric((link.peer, *key, name.removeprefix("refused_")), count)
        return family
