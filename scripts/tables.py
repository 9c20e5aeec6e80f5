"""Write tables of benchmarks' results into the documentation.

    python scripts/tables.py docs/results/fidelity.json

A result's table goes between the lines `<!-- table: <name of the file> -->` and `<!-- end of table -->` of
docs/benchmarks.md.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
PERCENTILES = (50, 90, 99)
_FITTED = "median_error_fitted"
_RATIO, _MARGIN, _GAP = "goodput_ratio_best_other_", "attainment_margin_min_", "p99_gap_ratio_plain_pair_"

Rows = Sequence[dict[str, Any]]


def fidelity(figures: Mapping[str, float], _: Rows) -> Iterator[str]:
    """Percentiles of the cluster and of its simulation, side by side."""
    yield "| | p50: cluster, simulated | error | p90: cluster, simulated | error | p99: cluster, simulated | error |"
    yield "|---|---|---|---|---|---|---|"
    labels = {"ttft_s": "to the first token, s", "tpot_s": "between tokens, s", "e2e_s": "in all, s"}
    for metric, label in labels.items():
        cells = []
        for name in (f"{metric}_p{percent}" for percent in PERCENTILES):
            cells.append(f"{figures[f'{name}_real']:.3f}, {figures[f'{name}_simulated']:.3f}")
            cells.append(f"{figures[f'{name}_error']:+.1%}")
        yield f"| {label} | {' | '.join(cells)} |"
    yield ""
    median, alone, itself = (f"{figures[name]:.1%}" for name in ("median_error", "median_error_alone", _FITTED))
    send, front = (f"{1000 * figures[name]:.0f} ms" for name in ("send_s", "front_s"))
    yield f"{figures['requests']:.0f} requests. Median error over the nine: **{median}** (aim: under 10%),"
    yield f"{alone} with the profile alone, {itself} for the first trace itself. From that one: {send} more for"
    yield f"a step that sends its layers, {front} in front of the engines."


def verify(figures: Mapping[str, float], _: Rows) -> Iterator[str]:
    """Shares of bandwidth by rows, and what steps with more rows cost."""
    counts = (1, 4, 8, 16, 32)
    for weights in ("bfloat16", "int8"):
        yield f"| {weights}, rows: | {' | '.join(map(str, counts))} | cost of 4, 8 and 16 rows against one |"
        yield "|---|---|---|---|---|---|---|"
        for side, label in {"torch": "torch", "vllm": "vLLM's own", "joinwise": "joinwise"}.items():
            shares = (f"{figures[f'{side}_{weights}_share_{count}']:.2f}" for count in counts)
            costs = ", ".join(f"{figures[f'{side}_{weights}_cost_{count}']:.2f}" for count in (4, 8, 16))
            yield f"| {label} | {' | '.join(shares)} | {costs} |"
        yield ""
    yield f"Share of the bandwidth of a plain read, {figures['read_gb_per_s']:.1f} GB/s, over all layers of a step."


def goodput(figures: Mapping[str, float], rows: Rows) -> Iterator[str]:
    """For each trace what every side attained at each rate, medians over seeds, and the trace's figures."""
    sides = ("joinwise auto", "plain pair", "joinwise always split", "plain pair, short steps")
    for trace in dict.fromkeys(row["trace"] for row in rows):
        mine = [row for row in rows if row["trace"] == trace]
        limits = f"{mine[0]['ttft_limit_s']:.2f} s to the first token, {1000 * mine[0]['tpot_limit_s']:.0f} ms a token"
        plain = next(row["rate"] for row in mine if row["share"] == 1)
        yield f"**{trace}** (limits: {limits}; 1.0 is {plain:.2f} requests/s)"
        yield ""
        yield "| rate | attained: auto, plain pair, always split, short steps | P99 token gap, s | P90 TTFT, s |"
        yield "|---|---|---|---|"
        for share in sorted({row["share"] for row in mine}):
            cells = []
            for name, shown in (("attained", "{:.0%}"), ("gap_p99_s", "{:.2f}"), ("ttft_p90_s", "{:.2f}")):
                values = ([row[name] for row in mine if (row["side"], row["share"]) == (side, share)] for side in sides)
                cells.append(", ".join(shown.format(statistics.median(each)) for each in values))
            yield f"| {share:g} | {' | '.join(cells)} |"
        yield ""
    traces = [name.removeprefix(_GAP) for name in figures if name.startswith(_GAP) and name != _GAP]
    yield f"| figure | aim | {' | '.join(traces)} |"
    yield f"|---|---|{'---|' * len(traces)}"
    for name, aim in {_RATIO: "above 1.0", _MARGIN: "-0.03", _GAP: "0.5"}.items():
        yield f"| `{name.rstrip('_')}` | {aim} | {' | '.join(f'{figures[name + each]:.2f}' for each in traces)} |"


def speculate(_: Mapping[str, float], rows: Rows) -> Iterator[str]:
    """A row for each dataset, batch and side."""
    columns = {
        "prompts": "{:d}",
        "tokens_per_s": "{:.2f}",
        "speedup": "{:.2f}",
        "accepted_length": "{:.2f}",
        "step_ratio": "{:.2f}",
        "draft_ms": "{:.0f}",
        "round_bytes": "{:.0f}",
        "divergences": "{:d}",
    }
    yield (
        "| dataset | at once | side, most drafts | prompts | tokens/s | speedup | tokens a step | V(k)/V(1) "
        "| draft, ms | bytes a round | divergences |"
    )
    yield f"|{'---|' * (3 + len(columns))}"
    for row in rows:
        side = f"{row['side']}, {row['k']}" if row["k"] else row["side"]
        cells = ("–" if row[name] is None else shown.format(row[name]) for name, shown in columns.items())
        yield f"| {row['dataset']} | {row['batch']} | {side} | {' | '.join(cells)} |"


Table = Callable[[Mapping[str, float], Rows], Iterator[str]]
TABLES: dict[str, Table] = {"fidelity": fidelity, "goodput": goodput, "speculate": speculate, "verify": verify}


def put(page: str, name: str, lines: list[str]) -> str:
    """A page with a table replaced.

    Raises:
        ValueError: the page has no place for it.
    """
    table = "\n".join(lines)
    pattern = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end of table -->)", re.DOTALL)
    changed, count = pattern.subn(lambda found: f"{found[1]}{table}\n{found[2]}", page)
    if count != 1:
        raise ValueError(f"there are {count} places for the table {name!r}")
    return changed


def main(file: Path) -> None:
    """Read a result, and write its table."""
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    lines = list(TABLES[result["bench"]](result["figures"], result["rows"]))
    PAGE.write_text(put(PAGE.read_text(encoding="utf-8"), file.stem, lines), encoding="utf-8")


if __name__ == "__main__":
    for given in sys.argv[1:]:
        main(Path(given))
