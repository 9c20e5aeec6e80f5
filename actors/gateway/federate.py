"""`/federate`: this gateway's metrics and those of every live worker, in one answer.

For sites where Prometheus cannot reach the workers. Each worker's samples get the labels `worker`, `pool` and `model`,
so that nothing of two processes is ever added up by accident. A worker that does not answer in time is left out and
counted in `joinwise:federate_failures_total`; its absence is visible as `joinwise:federated` of 0.
"""

from __future__ import annotations

import asyncio
import http.client
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, Counter, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from joinwise.actors.tls import Certificates
from joinwise.cluster.router.registry import WorkerInfo

_TIMEOUT_S = 3.0
_LARGEST = 8 << 20
_FAILURES = Counter("joinwise:federate_failures", "Workers that did not answer when metrics were merged")


class Federation:
    """Merges metrics.

    Args:
        workers: the live workers.
        certificates: of the cluster, where its processes speak TLS.
    """

    def __init__(
        self, workers: Callable[[], Awaitable[Sequence[WorkerInfo]]], certificates: Certificates | None
    ) -> None:
        self._workers = workers
        self._certificates = certificates

    def routes(self) -> APIRouter:
        """The path of the HTTP interface."""
        router = APIRouter()
        router.add_api_route("/federate", self.answer, methods=["GET"], include_in_schema=False)
        return router

    async def answer(self) -> Response:
        """Prometheus text."""
        return Response(await self.merged(), media_type=CONTENT_TYPE_LATEST)

    async def merged(self) -> bytes:
        """This process's metrics, then every worker's. Raises StoreUnavailableError when Redis does not answer."""
        workers = await self._workers()
        texts = await asyncio.gather(*(asyncio.to_thread(self.ask, worker) for worker in workers))
        here = CollectorRegistry()
        here.register(_Merged([*REGISTRY.collect()], list(zip(workers, texts, strict=True))))
        return await asyncio.to_thread(generate_latest, here)

    def ask(self, worker: WorkerInfo) -> str | None:
        """A worker's metrics; None where it does not answer in time. Waits: call it on a thread."""
        host, _, port = worker.metrics_address.rpartition(":")
        connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=_TIMEOUT_S)
        try:
            connection.sock = socket.create_connection((connection.host, connection.port), _TIMEOUT_S)
            if (peers := self._certificates) is not None:
                name = peers.server_name or connection.host
                connection.sock = peers.client_context().wrap_socket(connection.sock, server_hostname=name)
            connection.request("GET", "/metrics")
            response = connection.getresponse()
            text = response.read(_LARGEST).decode()
            return text if response.status == 200 else self._failed()
        except (OSError, http.client.HTTPException, UnicodeDecodeError):
            return self._failed()
        finally:
            connection.close()

    @staticmethod
    def _failed() -> None:
        _FAILURES.inc()


class _Merged(Collector):
    """Families of several processes, each name once."""

    def __init__(self, own: Iterable[Metric], others: Sequence[tuple[WorkerInfo, str | None]]) -> None:
        self._families = {family.name: _copy(family, {}) for family in own}
        answered = Metric("joinwise:federated", "Whether a worker's metrics are in this answer", "gauge")
        for worker, text in others:
            labels = {"worker": worker.worker_id, "pool": worker.pool, "model": worker.model}
            families = _parsed(text)
            answered.add_sample(answered.name, labels, float(families is not None))
            for family in families or ():
                merged = _copy(family, labels)
                known = self._families.setdefault(merged.name, merged)
                if known is not merged and known.type == merged.type:
                    known.samples += merged.samples
        self._families[answered.name] = answered

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        return self._families.values()


def _parsed(text: str | None) -> list[Metric] | None:
    try:
        return None if text is None else list(text_string_to_metric_families(text))
    except (ValueError, IndexError):
        _FAILURES.inc()
        return None


def _copy(family: Metric, labels: dict[str, str]) -> Metric:
    copy = Metric(family.name, family.documentation, family.type)
    copy.samples = [
        Sample(sample.name, {**sample.labels, **labels}, sample.value)
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]
    return copy
