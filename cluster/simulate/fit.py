"""From timings of an engine to a profile: medians by point, rising where more work cannot take less time.

Pure functions; `joinwise profile` takes the timings, and `profile.load` reads what is written here.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from joinwise.cluster.errors import ConfigError
from joinwise.cluster.simulate.profile import TABLES


class Timing(NamedTuple):
    """One step of an engine.

    Attributes:
        kind: a whole prompt, or a token for each sequence of a batch.
        batch: sequences.
        tokens: of each prompt, or of each sequence's context.
        seconds: that it took.
    """

    kind: Literal["prefill", "step"]
    batch: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Facts:
    """What a profile says besides times.

    Attributes:
        kind: a name for the machine, such as "h100".
        llm: a name for the model.
        weight_bytes: that the model's weights take.
        kv_bytes: of a token's KV cache.
        kv_tokens: tokens of KV cache that fit.
        layers: of the model.
        link_bytes_s: bytes a second of the network card, each way.
        price: per hour.
        power: kilowatts.
    """

    kind: str
    llm: str
    weight_bytes: int
    kv_bytes: int
    kv_tokens: int
    layers: int
    link_bytes_s: float
    price: float
    power: float


@dataclass(frozen=True)
class Fit:
    """Tables in the form of `splitwise.yaml`, milliseconds by count.

    Attributes:
        tables: name of the table -> count -> milliseconds.
        batch_context: tokens of context of each sequence in `step_by_batch_ms`.
        spread: the typical distance between the quartiles of a point's timings, over its median: how noisy it was.
        lifted: the furthest that a median was moved so that the tables rise, over the median.
    """

    tables: Mapping[str, Mapping[int, float]]
    batch_context: int
    spread: float
    lifted: float


def fit(timings: Iterable[Timing], batch_context: int) -> Fit:
    """Make the tables of a profile.

    Args:
        timings: single prompts; steps of one sequence over contexts; steps of batches with `batch_context` tokens each.

    Raises:
        ConfigError: there is no timing for one of the tables, or one of no time at all.
    """
    points: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in TABLES}
    for each in timings:
        if not each.seconds > 0:
            raise ConfigError(f"a step cannot take {each.seconds} s: {each}")
        if each.kind == "prefill":
            points["prefill_ms"][each.batch * each.tokens].append(each.seconds * 1000)
            continue
        points["step_by_tokens_ms"][each.batch * each.tokens].append(each.seconds * 1000)
        if each.batch == 1:
            points["step_by_context_ms"][each.tokens].append(each.seconds * 1000)
        if each.tokens == batch_context:
            points["step_by_batch_ms"][each.batch].append(each.seconds * 1000)
    missing = [name for name, table in points.items() if not table]
    if missing:
        raise ConfigError(f"nothing was measured for {', '.join(missing)}")
    tables, lifted = {}, 0.0
    for name, table in points.items():
        medians = {count: statistics.median(values) for count, values in sorted(table.items())}
        weights = [len(table[count]) for count in medians]
        tables[name] = dict(zip(medians, rising(list(medians.values()), weights), strict=True))
        lifted = max(lifted, *(abs(tables[name][count] / value - 1) for count, value in medians.items()))
    spreads = [_spread(values) for table in points.values() for values in table.values() if len(values) > 1]
    return Fit(tables, batch_context, statistics.median(spreads) if spreads else 0.0, lifted)


def rising(values: list[float], weights: list[int]) -> list[float]:
    """The nearest values, by weighted squares, that never fall (pool adjacent violators, Ayer et al. 1955)."""
    pooled: list[tuple[float, int, int]] = []  # mean, weight, how many
    for value, weight in zip(values, weights, strict=True):
        mean, total, many = value, weight, 1
        while pooled and pooled[-1][0] > mean:
            before, heavy, more = pooled.pop()
            mean = (before * heavy + mean * total) / (heavy + total)
            total, many = total + heavy, many + more
        pooled.append((mean, total, many))
    return [mean for mean, _, many in pooled for _ in range(many)]


def save(path: Path, facts: Facts, found: Fit) -> None:
    """Write a profile, or add a machine to one that is there.

    Raises:
        ConfigError: what is there is no profile, or has this model with other weights or another cache; or the file
            cannot be written.
    """
    tree = _there(path)
    about = {"weight_bytes": facts.weight_bytes, "layers": facts.layers, "kv_bytes_per_token": facts.kv_bytes}
    known = tree["models"].setdefault(facts.llm, {**about, "reference": facts.kind, "measured": {}})
    for name, value in about.items():
        if known.get(name) != value:
            raise ConfigError(f"{path} has {facts.llm} with {name} {known.get(name)}, and it is {value} here")
    tree["machines"][facts.kind] = {
        "memory_bytes": facts.weight_bytes + facts.kv_tokens * facts.kv_bytes,
        "link_bytes_per_s": facts.link_bytes_s,
        "price_per_hour": facts.price,
        "power_kw": facts.power,
    }
    rounded = {name: {count: round(ms, 4) for count, ms in found.tables[name].items()} for name in TABLES}
    known["measured"][facts.kind] = {"batch_context": found.batch_context, **rounded}
    try:
        path.write_text(yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=120), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the profile {path}: {error.strerror}") from error


def _there(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"machines": {}, "models": {}}
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the profile {path}: {error}") from error
    if not isinstance(tree, dict) or not all(isinstance(tree.get(key), dict) for key in ("machines", "models")):
        raise ConfigError(f"{path} is there and is no profile; name another file")
    return tree


def _spread(values: list[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / statistics.median(values)
