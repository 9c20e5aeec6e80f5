"""What can be seen: traces of a request, merged metrics, and dashboards and alerts that name metrics which exist."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from fastapi import FastAPI
from fastapi.testclient import TestClient
from helpers.certificates import Authority
from opentelemetry import trace
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from vllm.tracing import extract_trace_context
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics

from joinwise.actors.gateway.federate import Federation
from joinwise.actors.gateway.ledgers import LedgerBuilder, Ledgers
from joinwise.actors.gateway.population import Population
from joinwise.actors.gateway.tracing import Root, Traces, headers_of, trace_headers
from joinwise.actors.kv.metrics import KvMetrics
from joinwise.actors.ops import OpsServer
from joinwise.actors.tls import Certificates
from joinwise.cluster.config import TracingConfig
from joinwise.cluster.ledger import RequestLedger

FILES = Path(__file__).parents[2] / "helm" / "joinwise" / "files"
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


def traces(spans: InMemorySpanExporter, ratio: float = 1.0) -> Traces:
    settings = TracingConfig(endpoint="http://collector:4317", sample_ratio=ratio)
    return Traces(settings, "demo", "gateway-1", SimpleSpanProcessor(spans))


def ledger(**changes: Any) -> RequestLedger:
    usual = {
        "request_id": "r",
        "prefill_worker": "p",
        "decode_worker": "d",
        "transport": "grpc",
        "routed_s": 0.01,
        "queued_s": 0.02,
        "prefill_s": 0.17,
        "ttft_s": 0.2,
        "wire_bytes": 1000,
        "wire_seconds_hidden": 0.05,
        "wire_seconds_exposed": 0.01,
        "total_s": 1.0,
        "finish_reason": "stop",
    }
    return RequestLedger(**{**usual, **changes})


def write(traced: Traces, account: RequestLedger, headers: dict[str, str]) -> Root:
    """The trace of a request that has just ended, below `headers`."""
    token = trace_headers.set(headers_of(headers))
    try:
        root = traced.begin(time.monotonic() - account.total_s)
    finally:
        trace_headers.reset(token)
    traced.end(root, account)
    return root


# Traces.


def test_a_split_request_is_one_trace(spans: InMemorySpanExporter) -> None:
    write(traces(spans), ledger(), {"traceparent": f"{PARENT}1", "x-api-key": "secret"})
    found = {span.name: span for span in spans.get_finished_spans()}
    assert found.keys() == {"request", "route", "queue", "prefill", "transfer", "decode"}
    root = found["request"]
    assert {f"{span.context.trace_id:032x}" for span in found.values()} == {PARENT.split("-")[1]}
    assert root.parent is not None and f"{root.parent.span_id:016x}" == PARENT.split("-")[2]
    assert {span.parent.span_id for name, span in found.items() if name != "request"} == {root.context.span_id}

    def at(name: str) -> tuple[float, float]:
        span = found[name]
        return round((span.start_time - root.start_time) / 1e9, 3), round((span.end_time - root.start_time) / 1e9, 3)

    expected = {"route": (0, 0.01), "queue": (0.01, 0.03), "prefill": (0.03, 0.2), "decode": (0.2, 1.0)}
    assert {name: at(name) for name in expected} == expected
    assert at("transfer") == (0.15, 0.21)  # most of it hidden behind prefill
    assert abs(root.end_time / 1e9 - time.time()) < 5
    assert found["transfer"].attributes["joinwise.bytes"] == 1000
    assert (found["prefill"].attributes["joinwise.worker"], found["decode"].attributes["joinwise.worker"]) == ("p", "d")
    assert "secret" not in "".join(span.to_json() for span in found.values())


def test_drafts_are_seen_below_decode(spans: InMemorySpanExporter) -> None:
    write(traces(spans), ledger(draft_rounds=5, draft_tokens=20, accepted_drafts=12), {})
    found = {span.name: span for span in spans.get_finished_spans()}
    draft, decode = found["draft"], found["decode"]
    assert draft.parent.span_id == decode.context.span_id and draft.context.trace_id == decode.context.trace_id
    assert dict(draft.attributes) == {
        "joinwise.draft.rounds": 5,
        "joinwise.draft.tokens": 20,
        "joinwise.draft.accepted": 12,
    }
    assert (draft.start_time, draft.end_time) == (decode.start_time, decode.end_time)


@pytest.mark.parametrize("flag", ["1", "0"])
def test_the_context_that_goes_on_is_the_request_s(spans: InMemorySpanExporter, flag: str) -> None:
    """With the caller's trace, our span, and the decision that was made; as vLLM reads it."""
    root = write(traces(spans), ledger(), {"traceparent": f"{PARENT}{flag}", "tracestate": "them=1"})
    context = trace.get_current_span(extract_trace_context(root.headers)).get_span_context()
    assert f"{context.trace_id:032x}" == PARENT.split("-")[1] and f"{context.span_id:016x}" != PARENT.split("-")[2]
    assert (context.trace_flags.sampled, root.sampled, root.headers["tracestate"]) == (flag == "1", False, "them=1")
    assert {span.context.span_id for span in spans.get_finished_spans() if span.name == "request"} == (
        {context.span_id} if flag == "1" else set()
    )


def test_a_request_on_one_worker_has_no_transfer(spans: InMemorySpanExporter) -> None:
    write(traces(spans), ledger(prefill_worker=None, wire_bytes=0, finish_reason="error"), {})
    found = {span.name: span for span in spans.get_finished_spans()}
    assert "transfer" not in found and not found["request"].status.is_ok
    assert found["prefill"].attributes["joinwise.worker"] == "d"


@pytest.mark.parametrize(("flag", "ratio", "count"), [("1", 0.0, 6), ("0", 1.0, 0), (None, 0.0, 0), (None, 1.0, 6)])
def test_the_caller_s_decision_holds(spans: InMemorySpanExporter, flag: str | None, ratio: float, count: int) -> None:
    headers = {"traceparent": f"{PARENT}{flag}"} if flag else {}
    write(traces(spans, ratio), ledger(), headers)
    assert len(spans.get_finished_spans()) == count


@pytest.mark.parametrize(
    "parent", ["", "nonsense", "00-0-0-01", "ff-" + PARENT[3:] + "1", "00-" + "0" * 32 + PARENT[35:] + "1"]
)
def test_a_parent_that_is_none(spans: InMemorySpanExporter, parent: str) -> None:
    write(traces(spans), ledger(), {"traceparent": parent, "other": "x"})
    (root,) = (span for span in spans.get_finished_spans() if span.name == "request")
    assert root.parent is None


def test_a_ledger_counts_drafts() -> None:
    builder = LedgerBuilder(request_id="r", call_id="r", model="m", created=0.0, routed_s=0.0, prompt_tokens=1)
    drafts = RequestSpecDecodeMetrics.new(4)
    for proposed, right in ((4, 4), (4, 0), (3, 2)):
        drafts.observe(proposed, right)
    builder.produced(EngineCoreOutput("r", [1, 2]), 1.0)
    builder.produced(EngineCoreOutput("r", [3], spec_decode_metrics=drafts), 2.0)
    account = builder.build()
    assert (account.draft_rounds, account.draft_tokens, account.accepted_drafts) == (3, 11, 6)


# Who serves.


def test_workers_are_counted_by_what_they_do() -> None:
    def worker(name: str, pool: str, role: str) -> Any:
        return SimpleNamespace(worker_id=name, model="m", pool=pool, role=role)

    leases = 3
    population, registry = Population(lambda: leases), CollectorRegistry()
    registry.register(population)
    population.observe(
        [worker("p0", "prefill", "prefill"), worker("d0", "decode", "decode"), worker("d1", "decode", "decode")]
    )

    def shown(role: str, pool: str) -> float | None:
        return registry.get_sample_value("joinwise:workers", {"model": "m", "pool": pool, "role": role})

    assert (shown("prefill", "prefill"), shown("decode", "decode"), shown("mixed", "decode")) == (1, 2, None)
    population.observe([worker("d0", "decode", "mixed")])  # one has moved, the others are gone
    assert (shown("prefill", "prefill"), shown("decode", "decode"), shown("mixed", "decode")) == (None, None, 1)
    assert registry.get_sample_value("joinwise:leases") == 3
    leases = 0
    assert registry.get_sample_value("joinwise:leases") == 0


# Ledgers and merged metrics.


def test_ledgers_are_given_a_line_each() -> None:
    ledgers = Ledgers(CollectorRegistry())
    app = FastAPI()
    app.include_router(ledgers.routes())
    client = TestClient(app)
    assert client.get("/ledgers").text == ""
    for number in range(3):
        name = f"r{number}"
        builder = LedgerBuilder(
            request_id=name, call_id=name, model="m", created=time.monotonic(), routed_s=0.0, prompt_tokens=number
        )
        ledgers.add(name, builder)
    lines = client.get("/ledgers").text.splitlines()
    assert [RequestLedger.from_json(line).request_id for line in lines] == ["r0", "r1", "r2"]


@pytest.fixture
def worker() -> Iterator[Any]:
    server = OpsServer("127.0.0.1", 0, live=str, ready=str, drain=lambda: None)
    yield server
    server.close()


def info(worker_id: str, port: int) -> Any:
    return SimpleNamespace(worker_id=worker_id, pool="decode", model="m", metrics_address=f"127.0.0.1:{port}")


async def test_federate(worker: OpsServer) -> None:
    async def workers() -> Any:
        return [info("d-0", worker.port), info("gone", 1)]

    text = (await Federation(workers, None).merged()).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {sample.labels["worker"]: sample.value for sample in families["joinwise:federated"].samples} == {
        "d-0": 1.0,
        "gone": 0.0,
    }
    labels = [sample.labels for sample in families["python_info"].samples]
    assert len(labels) == 2 and [each.get("worker") for each in labels] == [None, "d-0"]
    assert text.count("# TYPE python_info ") == 1
    assert families["joinwise:federate_failures"].samples


async def test_federate_over_tls(tmp_path: Path) -> None:
    files = Authority().issue(tmp_path)
    certificates = Certificates(files.cert, files.key, files.ca, server_name="joinwise")
    tls = certificates.server_context(clients=False)
    server = OpsServer("127.0.0.1", 0, live=str, ready=str, drain=lambda: None, tls=tls)
    try:

        async def workers() -> Any:
            return [info("d-0", server.port)]

        assert (
            'joinwise:federated{model="m",pool="decode",worker="d-0"} 1.0'
            in (await Federation(workers, certificates).merged()).decode()
        )
        assert (
            'joinwise:federated{model="m",pool="decode",worker="d-0"} 0.0'
            in (await Federation(workers, None).merged()).decode()
        )
    finally:
        server.close()


# Dashboards and alerts.


def known_metrics() -> set[str]:
    """Series that gateways and engines can expose: ours as they are registered, vLLM's as its source names them."""
    import vllm.v1.metrics.loggers as loggers
    from prometheus_client import REGISTRY

    import joinwise.actors.gateway.gateway  # noqa: F401 - registers what is made with the module

    registry = CollectorRegistry()
    Ledgers(registry)
    registry.register(KvMetrics())
    names = set(re.findall(r'"(vllm:[a-z_]+)"', Path(loggers.__file__).read_text(encoding="utf-8")))
    names |= {family.name for source in (registry, REGISTRY) for family in source.collect()}
    suffixes = ("", "_total", "_bucket", "_sum", "_count")
    return {f"{name}{suffix}" for name in names for suffix in suffixes}


def expressions() -> Iterator[tuple[str, str]]:
    for path in (FILES / "dashboards").glob("*.json"):
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            for target in panel.get("targets", ()):
                yield f"{path.name}: {panel['title']}", target["expr"]
    for group in yaml.safe_load((FILES / "alerts.yaml").read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def test_queries_name_metrics_that_exist() -> None:
    known = known_metrics()
    seen = 0
    for where, expression in expressions():
        names = re.findall(r"\b(?:joinwise|vllm):[a-zA-Z_:]+", expression)
        assert names, where
        for name in names:
            assert name in known, f"{where}: {name}"
            if f"rate({name}" in expression:
                assert name.endswith(("_total", "_bucket", "_sum", "_count")), f"{where}: a rate of no counter, {name}"
        seen += 1
    assert seen > 20


def test_every_alert_has_a_run_book() -> None:
    guide = (FILES.parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    anchors = {heading.lower() for heading in re.findall(r"^#+ (\w+)$", guide, re.MULTILINE)}
    for group in yaml.safe_load((FILES / "alerts.yaml").read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            page, _, anchor = rule["annotations"]["runbook"].partition("#")
            assert page == "docs/operations.md" and anchor == rule["alert"].lower()
            assert anchor in anchors, rule["alert"]


def test_dashboards_do_not_overlap() -> None:
    for path in (FILES / "dashboards").glob("*.json"):
        board = json.loads(path.read_text(encoding="utf-8"))
        taken: dict[tuple[int, int], str] = {}
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        for panel in board["panels"]:
            place = panel["gridPos"]
            for x in range(place["x"], place["x"] + place["w"]):
                for y in range(place["y"], place["y"] + place["h"]):
                    assert x < 24 and taken.setdefault((x, y), panel["title"]) == panel["title"]
