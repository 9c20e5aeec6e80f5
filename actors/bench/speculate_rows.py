"""Rows and figures of `joinwise bench speculate`: samples of several runs put together, and what they come to."""

import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

BASELINE = "none"
OWN = {"own_device": 0.0, "own_device_1ms": 0.001, "own_device_5ms": 0.005, "own_device_20ms": 0.02}
"""Sides that replay, and seconds of their round trip."""
RECALLING = ("recall", "again")
"""Adaptive sides that draft from earlier answers as well."""
ADAPTIVE = ("adaptive", *RECALLING)
SIDES = ("silent", "lookup", "fixed", "ahead", *ADAPTIVE, *OWN)

Row = dict[str, Any]
_KEY = (
    "target",
    "draft",
    "dtype",
    "draft_dtype",
    "engine",
    "draft_core",
    "draft_device",
    "dataset",
    "batch",
    "side",
    "k",
)
_SUMMED = ("tokens", "rounds", "drafted", "missed", "divergences")
_MEDIANS = ("tokens_per_s", "speedup", "accepted_length", "step_ms", "step_ratio", "draft_ms", "wait_ms", "round_bytes")


def merged(before: Sequence[Row], fresh: Sequence[Row]) -> list[Row]:
    """Rows with the samples of both; where both have one of the same prompts the fresh one counts."""
    samples: dict[tuple[Any, ...], dict[tuple[int, ...], Row]] = {}
    for row in [*before, *fresh]:
        mine = samples.setdefault(tuple(row.get(name) for name in _KEY), {})
        mine.update({tuple(sample["places"]): sample for sample in row["samples"]})
    order = (BASELINE, *SIDES)

    def place(key: tuple[Any, ...]) -> tuple[Any, ...]:
        *what, side, k = key
        return *((each is not None, each) for each in what), order.index(side), k

    keys = sorted(samples, key=place)
    return [_row(dict(zip(_KEY, key, strict=True)), list(samples[key].values())) for key in keys]


def _row(what: Row, samples: list[Row]) -> Row:
    row = {**what, "prompts": sum(len(sample["places"]) for sample in samples)}
    for name in _MEDIANS:
        values = [sample[name] for sample in samples if sample[name] is not None]
        row[name] = round(statistics.median(values), 4) if values else None
    row |= {name: sum(sample[name] for sample in samples) for name in _SUMMED}
    return row | {"samples": samples}


def figures(rows: Sequence[Row]) -> dict[str, float | None]:
    """The benchmark's figures; None where the rows behind one are not there yet."""

    def speedups(side: str, **wanted: Any) -> list[float]:
        wanted = {"side": side, "dtype": "bfloat16", "draft_core": None, "draft_device": None} | wanted
        return [
            row["speedup"]
            for row in rows
            if row["speedup"] is not None and all(row[name] == value for name, value in wanted.items())
        ]

    single = {"dataset": "humaneval", "batch": 1}
    exact = [row["divergences"] for row in rows if row["dtype"] == "float32"]
    named: dict[str, float | None] = {
        "speedup_adaptive_humaneval_bf16": min(speedups("adaptive", **single), default=None),
        "speedup_adaptive_min": min(speedups("adaptive"), default=None),
        "divergences_float32": sum(exact) if exact else None,
        "speedup_recall_min": min(speedups("recall"), default=None),
        "speedup_again_min": min(speedups("again"), default=None),
        "speedup_silent_min": min(speedups("silent"), default=None),
        "speedup_gpu_draft_humaneval_bf16": min(speedups("adaptive", draft_device="gpu", **single), default=None),
    }
    for side in OWN:
        named[f"speedup_projected_{side}"] = min(speedups(side, **single), default=None)
    return named


_SHOWN = {
    "dataset": "dataset",
    "batch": "batch",
    "side": "side",
    "k": "k",
    "prompts": "prompts",
    "tokens_per_s": "tokens/s",
    "speedup": "speedup",
    "accepted_length": "tokens a step",
    "step_ratio": "V(k)/V(1)",
    "draft_ms": "draft ms",
    "round_bytes": "bytes a round",
    "divergences": "divergences",
}


def table(rows: Sequence[Row]) -> Table:
    """Rows for a terminal."""
    shown = Table("target / draft", *_SHOWN.values(), title="joinwise bench speculate")
    for row in rows:
        cells = (row[name] for name in _SHOWN)
        shown.add_row(
            f"{row['dtype']} / {row['draft_dtype']}",
            *("" if cell is None else f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells),
        )
    return shown
