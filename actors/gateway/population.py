"""Series of who serves: workers by model, pool and role, as the registry had them last, and this gateway's leases."""

from collections import Counter
from collections.abc import Callable, Iterable

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from joinwise.cluster.router.registry import WorkerInfo


class Population(Collector):
    """Collected by the threads that answer at `/metrics`: what they read is replaced whole, never changed.

    Args:
        leases: how many leases this gateway holds now.
    """

    def __init__(self, leases: Callable[[], int]) -> None:
        self._leases = leases
        self._workers: dict[tuple[str, str, str], int] = {}

    def observe(self, workers: Iterable[WorkerInfo]) -> None:
        """Remember who is registered; called by the gateway once a heartbeat."""
        self._workers = dict(Counter((each.model, each.pool, each.role) for each in workers))

    def collect(self) -> Iterable[Metric]:
        """`joinwise:workers` and `joinwise:leases`."""
        workers = GaugeMetricFamily(
            "joinwise:workers", "Live workers by what they do", labels=["model", "pool", "role"]
        )
        for labels, count in sorted(self._workers.items()):
            workers.add_metric(labels, count)
        yield workers
        yield GaugeMetricFamily("joinwise:leases", "Leases that this gateway holds", value=self._leases())
