"""One's own traffic as a trace: when requests came and how long they were, and nothing else of them.

Read from what a gateway tells about its requests: ledgers, a JSON object a line (`x-joinwise-ledger: 1` gives a client
those of its own), or spans as an OpenTelemetry Collector's file exporter writes them (OTLP in JSON, a batch a line).
Neither holds text. Ids only tell repeated lines apart while they are read; what is written has times from zero on.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, NamedTuple

from joinwise.cluster.errors import ConfigError
from joinwise.cluster.ledger import RequestLedger
from joinwise.cluster.simulate.trace import MAX_TOKENS, Arrival, Trace

_ARRIVED_AFTER = 1e8  # seconds since 1970; ledgers of releases before this one do not say when


class _Request(NamedTuple):
    name: str
    at: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Export:
    """What was read.

    Attributes:
        trace: requests by time, the first one at zero.
        repeated: lines about a request that had been read already.
        unanswered: requests without a single token of answer, which a trace cannot hold.
    """

    trace: Trace
    repeated: int
    unanswered: int


def collect(paths: Iterable[Path]) -> Export:
    """Read gateways' ledgers and spans, of any number of files together; `.gz` is known by the name.

    Raises:
        ConfigError: a file that cannot be read, a line that is neither or cannot be, or no request in all of them. The
            message names file and line, and no more of the line than what is wrong with it.
    """
    found: dict[str, _Request] = {}
    repeated = unanswered = 0
    for path in paths:
        for request in _requests(path):
            if request.name in found:
                repeated += 1
            elif request.output < 1:
                unanswered += 1
            else:
                found[request.name] = request
    if not found:
        raise ConfigError(f"no request with an answer in what was read ({unanswered} without one)")
    ordered = sorted(found.values(), key=lambda request: (request.at, request.prompt, request.output))
    start = ordered[0].at
    arrivals = [Arrival(request.at - start, request.prompt, request.output) for request in ordered]
    return Export(Trace("export", arrivals), repeated, unanswered)


def save(trace: Trace, path: Path) -> None:
    """Write a trace as CSV, in the columns of SplitwiseSim: seconds, prompt tokens, answer tokens.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        with _open(path, "w") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("arrival_timestamp", "prompt_size", "token_size"))
            writer.writerows((f"{each.at:.6f}", each.prompt, each.output) for each in trace.arrivals)
    except OSError as error:
        raise ConfigError(f"cannot write the trace {path}: {error.strerror}") from error


def _requests(path: Path) -> Iterator[_Request]:
    try:
        with _open(path, "r") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield from _of_line(json.loads(line))
                    except (ValueError, KeyError, TypeError, AttributeError) as error:
                        what = error if isinstance(error, _BadLineError) else "it does not parse"
                        raise ConfigError(f"{path}, line {number} is no ledger and no batch of spans: {what}") from None
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


class _BadLineError(ValueError):
    """A line with a value that cannot be; the message holds nothing else of it."""


def _of_line(row: Mapping[str, Any]) -> Iterator[_Request]:
    if "resourceSpans" in row:
        for resource in row["resourceSpans"]:
            for scope in resource.get("scopeSpans", ()):
                yield from filter(None, map(_of_span, scope.get("spans", ())))
        return
    ledger = RequestLedger.from_json(json.dumps(row))
    if ledger.arrived < _ARRIVED_AFTER:
        raise _BadLineError("the ledger does not say when its request arrived")
    yield _checked(ledger.request_id, ledger.arrived, ledger.prompt_tokens, ledger.output_tokens)


def _of_span(span: Mapping[str, Any]) -> _Request | None:
    """A request's span; None for those of its parts, and of other programs."""
    values = {each["key"]: each["value"] for each in span.get("attributes", ())}
    if span.get("name") != "request" or "joinwise.request_id" not in values:
        return None
    return _checked(
        str(values["joinwise.request_id"]["stringValue"]),
        int(span["startTimeUnixNano"]) / 1e9,
        int(values["gen_ai.usage.input_tokens"]["intValue"]),
        int(values["gen_ai.usage.output_tokens"]["intValue"]),
    )


def _checked(name: str, at: float, prompt: int, output: int) -> _Request:
    if not 1 <= prompt < MAX_TOKENS or not 0 <= output < MAX_TOKENS:
        raise _BadLineError(f"a request of {prompt} + {output} tokens")
    return _Request(name, at, prompt, output)


def _open(path: Path, mode: str) -> IO[str]:
    if path.suffix != ".gz":
        return path.open(mode, encoding="utf-8", newline="")
    return TextIOWrapper(gzip.GzipFile(path, f"{mode}b"), encoding="utf-8", newline="")
