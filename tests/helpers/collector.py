"""An OpenTelemetry collector that keeps what it gets, for tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as services


class Collector(services.TraceServiceServicer):
    """Keeps spans; `wait_for` returns those of one trace."""

    def __init__(self) -> None:
        self._spans: list[Any] = []
        self._changed = threading.Condition()
        self.endpoint = ""

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._changed:
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    self._spans += scope.spans
            self._changed.notify_all()
        return messages.ExportTraceServiceResponse()

    def wait_for(self, trace_id: bytes, names: set[str], timeout_s: float = 30.0) -> dict[str, Any]:
        """The spans of a trace by name, once all of `names` have come."""

        def found() -> dict[str, Any]:
            return {span.name: span for span in self._spans if span.trace_id == trace_id}

        with self._changed:
            assert self._changed.wait_for(lambda: found().keys() >= names, timeout_s), f"only {found().keys()}"
            return found()


@contextmanager
def collector() -> Iterator[Collector]:
    """A collector that listens on loopback."""
    keeps = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    services.add_TraceServiceServicer_to_server(keeps, server)
    keeps.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield keeps
    finally:
        server.stop(1).wait()
