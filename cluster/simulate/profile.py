"""What a machine needs for a prompt and for a step of decoding: measured tables, interpolated.

A profile says how far it was measured. What lies beyond is extrapolated along the last segment and counted, so that a
report can flag it. Tables: a CSV in the form of SplitwiseSim's `perf_model.csv`, or YAML as in `splitwise.yaml`.
"""

from __future__ import annotations

import csv
import statistics
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from joinwise.cluster.errors import ConfigError

TABLES = ("prefill_ms", "step_by_tokens_ms", "step_by_batch_ms", "step_by_context_ms")
_LEAST_S = 1e-6
_BATCH_CONTEXT = 512


class Curve:
    """Seconds over a count, linear between measured points and beyond them.

    Args:
        points: count -> seconds, at least one; all seconds above zero.
    """

    def __init__(self, points: Mapping[int, float]) -> None:
        self.points = dict(sorted(points.items()))
        self._x, self._y = list(self.points), list(self.points.values())
        if not self._x or self._x[0] < 0 or min(self._y) <= 0:
            raise ConfigError(f"a curve needs points, none below 0 and all with a time above 0, not {dict(points)}")
        self.least = max(_LEAST_S, min(min(self._y), self._line(1)))
        self._known: dict[float, float] = {}

    def __call__(self, count: float) -> float:
        """Seconds, never less than `least`."""
        known = self._known.get(count)
        if known is None:
            known = self._known[count] = max(self.least, self._line(count))
        return known

    def covers(self, count: float) -> bool:
        """Whether it was measured that far."""
        return count <= self._x[-1]

    def _line(self, count: float) -> float:
        if len(self._x) == 1:
            return self._y[0]
        right = min(max(bisect_right(self._x, count), 1), len(self._x) - 1)
        left = right - 1
        slope = (self._y[right] - self._y[left]) / (self._x[right] - self._x[left])
        return self._y[left] + slope * (count - self._x[left])


@dataclass(frozen=True)
class Kind:
    """A kind of machine as it runs one model.

    Attributes:
        name: such as "h100".
        prefill: seconds over prompt tokens of a step.
        tokens: seconds of a decode step over tokens of a step, as SplitwiseSim reads its table (prompt size x batch).
        batch: seconds of a decode step over sequences, each with about `batch_context` tokens.
        context_s: seconds that a token of context adds to a decode step.
        kv_bytes: bytes of KV cache of a token.
        kv_tokens: tokens of KV cache that fit.
        link_bytes_s: bytes a second of its network card, each way.
        layers: of the model; KV is sent a layer at a time.
        price: per hour.
        power: kilowatts provisioned.
        send_s: seconds that a step takes longer whose layers are sent as it computes them.
    """

    name: str
    prefill: Curve
    tokens: Curve
    batch: Curve
    context_s: float
    kv_bytes: int
    kv_tokens: int
    link_bytes_s: float
    layers: int
    price: float
    power: float
    batch_context: int = _BATCH_CONTEXT
    send_s: float = 0.0

    @property
    def least_s(self) -> float:
        """No step is shorter."""
        return min(self.prefill.least, self.tokens.least, self.batch.least)


#: Names of devices in measured tables -> kinds.
_HARDWARE = {"a100-80gb": "a100", "h100-80gb": "h100", "h100-80gb-pcap": "h100cap"}


@dataclass
class Coverage:
    """How often a profile was asked for more than it covers: what it was -> times."""

    beyond: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def look(self, what: str, curve: Curve, count: float) -> None:
        """Count it where `count` lies beyond the curve."""
        if not curve.covers(count):
            self.beyond[what] += 1


@dataclass(frozen=True)
class Profile:
    """Every kind of machine for one model; `reference` is the kind that slowdowns are over."""

    model: str
    kinds: Mapping[str, Kind]
    reference: str

    def kind(self, name: str) -> Kind:
        """A kind by name, the measured devices' names too. Raises ConfigError for one that is not there."""
        try:
            return self.kinds[_HARDWARE.get(name, name)]
        except KeyError:
            raise ConfigError(
                f"no machine of the kind {name!r} runs {self.model} in this profile; there are {', '.join(self.kinds)}"
            ) from None


@cache
def shipped(model: str = "bloom-176b") -> Profile:
    """The profile that comes with joinwise, `splitwise.yaml`."""
    text = (files("joinwise.cluster.simulate") / "splitwise.yaml").read_text(encoding="utf-8")
    return _from_yaml(text, "splitwise.yaml", model)


def load(path: Path, model: str = "bloom-176b") -> Profile:
    """Read a profile: YAML, or a `perf_model.csv` whose machines are those of the shipped profile.

    Raises:
        ConfigError: a file that cannot be read, lacks the model, or has a value that cannot be.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the profile {path}: {error}") from error
    if path.suffix == ".csv":
        return _from_table(text, str(path), model)
    return _from_yaml(text, str(path), model)


def _from_yaml(text: str, source: str, model: str) -> Profile:
    try:
        whole = yaml.safe_load(text)
        about, machines = whole["models"][model], whole["machines"]
        measured = about["measured"]
        kinds = {name: _kind(name, about, machines[name], measured[name]) for name in machines if name in measured}
        reference = str(about["reference"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{source} is no profile of {model}: {type(error).__name__}: {error}") from error
    return Profile(model, kinds, reference)


def _kind(name: str, about: Mapping[str, Any], machine: Mapping[str, Any], measured: Mapping[str, Any]) -> Kind:
    kv_bytes = int(about["kv_bytes_per_token"])
    curves = {key: _seconds(measured[key]) for key in TABLES}
    return Kind(
        name=name,
        prefill=curves["prefill_ms"],
        tokens=curves["step_by_tokens_ms"],
        batch=curves["step_by_batch_ms"],
        context_s=_slope(curves["step_by_context_ms"]),
        kv_bytes=kv_bytes,
        kv_tokens=int((float(machine["memory_bytes"]) - float(about["weight_bytes"])) // kv_bytes),
        link_bytes_s=float(machine["link_bytes_per_s"]),
        layers=int(about["layers"]),
        price=float(machine["price_per_hour"]),
        power=float(machine["power_kw"]),
        batch_context=int(measured.get("batch_context", _BATCH_CONTEXT)),
        send_s=float(measured.get("send_ms", 0.0)) / 1000,
    )


def _seconds(table: Mapping[int, float]) -> Curve:
    return Curve({int(count): float(ms) / 1000 for count, ms in table.items()})


def _slope(curve: Curve) -> float:
    """Seconds a token of context, from the first to the last point; never below zero."""
    (first, low), (last, high) = next(iter(curve.points.items())), list(curve.points.items())[-1]
    return max(0.0, (high - low) / (last - first)) if last > first else 0.0


def _from_table(text: str, source: str, model: str) -> Profile:
    """Medians of each configuration, tensor parallel over all eight devices of a machine."""
    base = shipped(model)
    rows: dict[str, list[Mapping[str, str]]] = defaultdict(list)
    try:
        for row in csv.DictReader(text.splitlines()):
            if row["model"] == model and row["tensor_parallel"] == "8":
                rows[_HARDWARE.get(row["hardware"], row["hardware"])].append(row)
        kinds = {}
        for name, mine in rows.items():
            curves = {key: _seconds(table) for key, table in tables(mine).items()}
            machine = base.kind(name)
            kinds[name] = Kind(
                **{
                    **machine.__dict__,
                    "prefill": curves["prefill_ms"],
                    "tokens": curves["step_by_tokens_ms"],
                    "batch": curves["step_by_batch_ms"],
                    "context_s": _slope(curves["step_by_context_ms"]),
                }
            )
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"{source} is no table of prompt and token times: {type(error).__name__}: {error}") from error
    if base.reference not in kinds:
        raise ConfigError(f"{source} has no rows of {model} on {base.reference}, over which slowdowns are taken")
    return Profile(model, kinds, base.reference)


def tables(rows: Iterable[Mapping[str, str]]) -> dict[str, dict[int, float]]:
    """Median milliseconds by tokens, batch and context, from the rows of one model on one kind of machine."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        prompt, batch = int(row["prompt_size"]), int(row["batch_size"])
        step = float(row["token_time"])
        found["prefill_ms"][prompt * batch].append(float(row["prompt_time"]))
        found["step_by_tokens_ms"][prompt * batch].append(step)
        if prompt == _BATCH_CONTEXT:
            found["step_by_batch_ms"][batch].append(step)
        if batch == 1:
            found["step_by_context_ms"][prompt].append(step)
    return {
        name: {count: statistics.median(values) for count, values in sorted(table.items())}
        for name, table in found.items()
    }
