"""How a request's ledger is printed: where the time went, in the order in which it went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

# Field, label, note. What a ledger has beyond these is added below them under its own name.
_ROWS = (
    ("assignment_reason", "routed as", ""),
    ("prefill_worker", "prefill worker", ""),
    ("decode_worker", "decode worker", ""),
    ("transport", "transport", ""),
    ("queued_s", "queued", "waiting for an engine step"),
    ("routed_s", "routed", "asking Redis"),
    ("prefill_s", "prefill", "scheduled to first token"),
    ("ttft_s", "first token", "since the request was rendered"),
    ("wire_bytes", "KV sent", ""),
    ("wire_seconds_hidden", "on the wire, hidden", "while prefill still ran"),
    ("wire_seconds_exposed", "on the wire, exposed", "after prefill had ended"),
    ("import_s", "import", "copying into KV blocks"),
    ("second_token_gap_s", "second token", "after the first"),
    ("replayed_steps", "replayed steps", ""),
    ("replayed_step_s", "replayed step", ""),
    ("token_gap_median_s", "later tokens, median", ""),
    ("token_gap_max_s", "later tokens, longest", ""),
    ("prompt_tokens", "prompt tokens", ""),
    ("cached_tokens", "of them cached", ""),
    ("output_tokens", "output tokens", ""),
    ("draft_rounds", "steps with drafts", ""),
    ("draft_tokens", "drafts", ""),
    ("accepted_drafts", "of them right", ""),
    ("finish_reason", "ended by", ""),
    ("recomputed", "recomputed", ""),
    ("total_s", "total", ""),
)
_HIDDEN = frozenset({"version", "request_id", "model", "attempt", "arrived"})
_ONLY_IF_ANY = frozenset({"recomputed", "draft_rounds", "draft_tokens", "accepted_drafts"})


def render_ledger(ledger: Mapping[str, Any]) -> Table:
    """A table of a ledger, as `Generation.ledger` or the trailer's JSON give it. Fields that are null are left out."""
    from rich.table import Table

    table = Table(title="where the time went", title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column(style="dim")
    known = {name for name, _, _ in _ROWS}
    extra = tuple((name, name.replace("_", " "), "") for name in ledger if name not in known | _HIDDEN)
    for name, label, note in (*_ROWS, *extra):
        value = ledger.get(name)
        if value is None or value == "" or (name in _ONLY_IF_ANY and not value):
            continue
        table.add_row(label, quantity(name, value), note)
    return table


def quantity(name: str, value: object) -> str:
    """A value with its unit, which the name ends in: `_s` and `seconds` are seconds, `bytes` are bytes."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        if name.endswith("_s") or "seconds" in name:
            return seconds(float(value))
        if name.endswith("bytes"):
            return size(float(value))
        return f"{value:g}" if isinstance(value, float) else f"{value:,}"
    return str(value)


def seconds(value: float) -> str:
    """Seconds in the unit that reads best."""
    if abs(value) >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.1f} ms" if abs(value) >= 1e-3 or value == 0 else f"{value * 1e6:.0f} µs"


def size(value: float) -> str:
    """Bytes in the unit that reads best."""
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
