"""One OpenTelemetry trace per request: begun when it is, and filled from its ledger when it has ended.

The ledger knows where a request's time went, on the gateway and on both workers, so the spans are written afterwards,
with the times that they had; nothing is measured twice, and a request that is not sampled costs next to nothing. A
caller's W3C context (`traceparent`, `tracestate`) is the parent, and its decision whether to sample holds. The own
context of a request goes on to the engines, in vLLM's request, so that spans which vLLM makes join the same trace.

    request                    the whole call, as the gateway saw it
      route                    choosing workers, one round trip to Redis
      queue                    until a worker began with it
      prefill                  until the first token
      transfer                 KV on the wire, and how much of that was hidden behind prefill
      decode                   until the last token
        draft                  where drafts were verified: how many, and how many of them were right
      llm_request              vLLM's own, where its `otlp_traces_endpoint` is set
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from joinwise.cluster.config_model import TracingConfig
from joinwise.cluster.ledger import RequestLedger

_PROPAGATOR = TraceContextTextMapPropagator()
#: W3C headers of the call that is being served.
trace_headers: ContextVar[Mapping[str, str]] = ContextVar("joinwise_trace_headers", default=MappingProxyType({}))
_HEADERS = ("traceparent", "tracestate")


def headers_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """The W3C headers among those of a call, names in lower case; none where they do not parse."""
    found = {name: metadata[name] for name in _HEADERS if name in metadata}
    return found if "traceparent" in found else {}


@dataclass(frozen=True)
class Root:
    """A request's span while it runs.

    Attributes:
        span: not recording where the request is not sampled.
        begin: wall-clock seconds at which the request was rendered.
        headers: its W3C context, for whoever has a part in it.
    """

    span: Span
    begin: float
    headers: Mapping[str, str]

    @property
    def sampled(self) -> bool:
        """Whether anything is written of this request."""
        return self.span.is_recording()


class Traces:
    """Writes spans to a collector.

    Args:
        settings: where the collector is, and how many requests to trace.
        cluster: name of the cluster, part of every span's resource.
        gateway_id: this gateway.
        processor: gets the spans in place of the collector; for tests.
    """

    def __init__(
        self, settings: TracingConfig, cluster: str, gateway_id: str, processor: SpanProcessor | None = None
    ) -> None:
        resource = Resource.create(
            {"service.name": "joinwise", "service.namespace": cluster, "service.instance.id": gateway_id}
        )
        sampler = ParentBased(TraceIdRatioBased(settings.sample_ratio))
        self._provider = TracerProvider(resource=resource, sampler=sampler, shutdown_on_exit=False)
        self._provider.add_span_processor(processor or BatchSpanProcessor(_exporter(settings.endpoint)))
        self._tracer = self._provider.get_tracer("joinwise")

    def begin(self, created: float) -> Root:
        """Begin the trace of a request, below the context of the call that is being served.

        Args:
            created: monotonic time at which it was rendered.
        """
        begin = time.time() - time.monotonic() + created
        parent = _PROPAGATOR.extract(trace_headers.get(), Context())
        span = self._tracer.start_span("request", context=parent, kind=SpanKind.SERVER, start_time=_ns(begin))
        headers: dict[str, str] = {}
        _PROPAGATOR.inject(headers, set_span_in_context(span, Context()))
        return Root(span, begin, headers)

    def end(self, root: Root, ledger: RequestLedger) -> None:
        """Write a finished request's spans: `ledger` says where its time went."""
        if not root.sampled:
            return
        span, begin = root.span, root.begin
        span.set_attributes(
            {
                "gen_ai.request.model": ledger.model,
                "gen_ai.usage.input_tokens": ledger.prompt_tokens,
                "gen_ai.usage.output_tokens": ledger.output_tokens,
                "joinwise.request_id": ledger.request_id,
                "joinwise.reason": ledger.assignment_reason,
                "joinwise.finish_reason": ledger.finish_reason,
                "joinwise.attempt": ledger.attempt,
                "joinwise.recomputed": ledger.recomputed,
                "joinwise.cached_tokens": ledger.cached_tokens,
            }
        )
        if ledger.finish_reason == "error":
            span.set_status(Status(StatusCode.ERROR))
        self._phases(ledger, begin, set_span_in_context(span, Context()))
        span.end(_ns(begin + ledger.total_s))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _phases(self, ledger: RequestLedger, begin: float, parent: Context) -> None:
        routed = begin + ledger.routed_s
        scheduled, first = routed + ledger.queued_s, begin + ledger.ttft_s
        prefill = ledger.prefill_worker or ledger.decode_worker or ""
        self._phase("route", begin, routed, parent, {})
        self._phase("queue", routed, scheduled, parent, {"joinwise.worker": prefill})
        self._phase("prefill", scheduled, first, parent, {"joinwise.worker": prefill})
        if ledger.wire_bytes:
            end = first + ledger.wire_seconds_exposed
            start = end - ledger.wire_seconds_exposed - ledger.wire_seconds_hidden
            self._phase(
                "transfer",
                start,
                end,
                parent,
                {
                    "joinwise.from": ledger.prefill_worker or "",
                    "joinwise.to": ledger.decode_worker or "",
                    "joinwise.transport": ledger.transport or "",
                    "joinwise.bytes": ledger.wire_bytes,
                    "joinwise.exposed_s": ledger.wire_seconds_exposed,
                    "joinwise.import_s": ledger.import_s,
                },
            )
        end, worker = begin + ledger.total_s, ledger.decode_worker or ""
        replayed = ledger.replayed_steps
        within = self._phase("decode", first, end, parent, {"joinwise.worker": worker, "joinwise.replayed": replayed})
        if ledger.draft_rounds:
            drafts = {
                "joinwise.draft.rounds": ledger.draft_rounds,
                "joinwise.draft.tokens": ledger.draft_tokens,
                "joinwise.draft.accepted": ledger.accepted_drafts,
            }
            self._phase("draft", first, end, within, drafts)

    def _phase(
        self, name: str, start: float, end: float, parent: Context, attributes: Mapping[str, str | int | float]
    ) -> Context:
        """Write one span; returns the context for spans below it."""
        span = self._tracer.start_span(name, context=parent, start_time=_ns(start), attributes=attributes)
        span.end(_ns(max(start, end)))
        return set_span_in_context(span, parent)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def _exporter(endpoint: str) -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))
