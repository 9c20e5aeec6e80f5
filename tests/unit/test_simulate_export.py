"""One's own traffic as a trace: times and lengths come through, nothing else does, and bad lines are named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from typer.testing import CliRunner

from joinwise.actors.gateway.ledgers import LedgerBuilder
from joinwise.actors.gateway.tracing import Traces
from joinwise.cluster.cli.main import app
from joinwise.cluster.config_model import TracingConfig
from joinwise.cluster.errors import ConfigError
from joinwise.cluster.ledger import RequestLedger
from joinwise.cluster.simulate.export import collect, save
from joinwise.cluster.simulate.trace import load

T0 = 1_763_740_000.0
SECRET = "chatcmpl-of-somebody"


def ledger(name: str, at: float, prompt: int = 10, output: int = 5, **more: Any) -> str:
    request = RequestLedger(request_id=name, arrived=at, prompt_tokens=prompt, output_tokens=output, **more)
    return request.to_json()


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_what_a_gateway_builds_can_be_exported(tmp_path: Path) -> None:
    import time

    before = time.time()
    builder = LedgerBuilder(
        request_id=SECRET, call_id="c", model="m", created=time.monotonic(), routed_s=0.0, prompt_tokens=7
    )
    made = builder.build()
    made.output_tokens = 3
    assert before - 0.1 <= made.arrived <= time.time() + 0.1
    trace = collect([written(tmp_path / "l", made.to_json())]).trace
    assert [tuple(each) for each in trace.arrivals] == [(0.0, 7, 3, ())]


def test_spans_of_the_collector_s_file_are_read(tmp_path: Path) -> None:
    """The spans that the gateway writes, in the JSON that OTLP prescribes."""
    exporter = InMemorySpanExporter()
    traces = Traces(TracingConfig(endpoint="http://nowhere:1"), "c", "g", SimpleSpanProcessor(exporter))
    for name, prompt in (("a", 100), ("b", 200)):
        ended = RequestLedger(request_id=name, prompt_tokens=prompt, output_tokens=4, total_s=2.0, ttft_s=1.0)
        traces.end(traces.begin(created=1000.0 + prompt / 100), ended)
    traces.close()
    batch = {"resourceSpans": [{"scopeSpans": [{"spans": [otlp(span) for span in exporter.get_finished_spans()]}]}]}
    foreign = {"resourceSpans": [{"scopeSpans": [{"spans": [{"name": "request", "attributes": []}]}, {}]}]}
    found = collect([written(tmp_path / "spans.json", json.dumps(batch), "", json.dumps(foreign))])
    assert [(each.prompt, each.output) for each in found.trace.arrivals] == [(100, 4), (200, 4)]
    assert found.trace.arrivals[1].at == pytest.approx(1.0, abs=0.05)


def otlp(span: Any) -> dict[str, Any]:
    def value(found: object) -> dict[str, object]:
        if isinstance(found, bool):
            return {"boolValue": found}
        return {"intValue": str(found)} if isinstance(found, int) else {"stringValue": str(found)}

    attributes = [{"key": key, "value": value(found)} for key, found in span.attributes.items()]
    return {"name": span.name, "startTimeUnixNano": str(span.start_time), "attributes": attributes}


def test_times_from_zero_and_lengths_and_nothing_else(tmp_path: Path) -> None:
    lines = [ledger(SECRET, T0 + 3, 20, 2, model="private-model"), ledger("b", T0, 10, 1), ledger("c", T0 + 1, 9, 0)]
    with gzip.open(tmp_path / "more.jsonl.gz", "wt") as file:
        file.write(lines[0] + "\n" + ledger("d", T0 + 9.25, 4, 4))
    found = collect([written(tmp_path / "l.jsonl", *lines), tmp_path / "more.jsonl.gz"])
    assert (found.repeated, found.unanswered) == (1, 1)
    save(found.trace, tmp_path / "t.csv")
    text = (tmp_path / "t.csv").read_text()
    assert text.splitlines() == [
        "arrival_timestamp,prompt_size,token_size",
        "0.000000,10,1",
        "3.000000,20,2",
        "9.250000,4,4",
    ]
    save(found.trace, tmp_path / "t.csv.gz")
    for name in ("t.csv", "t.csv.gz"):
        assert load(tmp_path / name).arrivals == found.trace.arrivals


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 9999), st.integers(1, 9999)), min_size=1, max_size=20))
def test_any_traffic_comes_back_sorted(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Any, ...]]) -> None:
    folder = tmp_path_factory.mktemp("export")
    lines = [ledger(f"r{n}", T0 + at, prompt, output) for n, (at, prompt, output) in enumerate(rows)]
    found = collect([written(folder / "l", *lines)]).trace
    save(found, folder / "t.csv")
    again = load(folder / "t.csv")
    assert [each.at for each in again.arrivals] == pytest.approx(
        sorted(at - min(at for at, _, _ in rows) for at, _, _ in rows), abs=1e-5
    )
    assert sorted((each.prompt, each.output) for each in again.arrivals) == sorted((p, o) for _, p, o in rows)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (ledger(SECRET, 0.0), "line 2 .* does not say when its request arrived"),
        (ledger(SECRET, T0, prompt=0), "line 2 .* a request of 0 \\+ 5 tokens"),
        (ledger(SECRET, T0, output=-1), "a request of 10 \\+ -1 tokens"),
        (f'{{"prompt": "{SECRET}"}}', "line 2 is no ledger and no batch of spans"),
        (f"[{SECRET}", "it does not parse"),
        ('{"resourceSpans": [{"scopeSpans": 3}]}', "it does not parse"),
        (f'"{SECRET}"', "it does not parse"),
    ],
)
def test_bad_lines_are_named_and_not_shown(tmp_path: Path, line: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        collect([written(tmp_path / "l", ledger("a", T0), line)])
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_files_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        collect([tmp_path / "none"])
    with pytest.raises(ConfigError, match=r"no request with an answer .*\(1 without one\)"):
        collect([written(tmp_path / "l", ledger("a", T0, output=0))])
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"x" * 100)[:20])
    with pytest.raises(ConfigError, match="cannot read"):
        collect([tmp_path / "cut.gz"])
    found = collect([written(tmp_path / "l", ledger("a", T0))])
    with pytest.raises(ConfigError, match="cannot write"):
        save(found.trace, tmp_path / "none" / "t.csv")


def test_the_command(tmp_path: Path) -> None:
    lines = written(
        tmp_path / "l", ledger("a", T0), ledger("b", T0 + 2), ledger("b", T0 + 2), ledger("c", T0, output=0)
    )
    out = tmp_path / "t.csv"
    ran = CliRunner().invoke(app, ["trace", "export", str(lines), "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    said = " ".join(ran.output.split())
    assert said == "2 requests in 2 s; 1 that came twice left out; 1 without an answer left out"
    assert len(load(out).arrivals) == 2
    ran = CliRunner().invoke(app, ["trace", "export", str(lines), "--out", str(lines)])
    assert isinstance(ran.exception, SystemExit) and "one of the files to read" in ran.output + ran.stderr
    assert collect([lines]).repeated == 1  # and it is still there
