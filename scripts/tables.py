"""Write tables of benchmarks' results into the documentation.

    python scripts/tables.py docs/results/fidelity.json

A result's table goes between the lines `<!-- table: <name of the file> -->` and `<!-- end of table -->` of
docs/benchmarks.md.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
PERCENTILES = (50, 90, 99)
_FITTED = "median_error_fitted"


def fidelity(figures: Mapping[str, float]) -> Iterator[str]:
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


def verify(figures: Mapping[str, float]) -> Iterator[str]:
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


TABLES: dict[str, Callable[[Mapping[str, float]], Iterator[str]]] = {"fidelity": fidelity, "verify": verify}


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
    lines = list(TABLES[result["bench"]](result["figures"]))
    PAGE.write_text(put(PAGE.read_text(encoding="utf-8"), file.stem, lines), encoding="utf-8")


if __name__ == "__main__":
    for given in sys.argv[1:]:
        main(Path(given))
