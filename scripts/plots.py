"""Draw what benchmarks have written, for the documentation.

    python scripts/plots.py docs/results/*.json

Each result becomes `docs/images/<name of the file>.svg`. Benchmarks without a picture are left alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
Rows = list[dict[str, Any]]


def kv(figure: Figure, rows: Rows) -> None:
    """Speed of each transport, as a share of blocking TCP's, by size."""
    axes = figure.subplots()
    lines(axes, [row for row in rows if "transport" in row and "ratio" in row], "transport", "size_mb", "ratio")
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle="--")
    axes.set(
        xscale="log", xlabel="MB at once", ylabel="GB/s over those of blocking TCP", title="KV transports, one host"
    )
    axes.set_ylim(bottom=0)


def handoff(figure: Figure, rows: Rows) -> None:
    """By prompt length, one panel for each link: what is exposed there; without a link, what a client waits for."""
    links = list(dict.fromkeys(row["link"] for row in rows))
    panels = figure.subplots(1, len(links), squeeze=False)[0]
    for axes, link in zip(panels, links, strict=True):
        mine = [row | {"side": f"{row['transport']} {row['codec']}"} for row in rows if row["link"] == link]
        what = "gap_ms" if link == "none" else "exposed_ms"
        lines(axes, mine, "side", "prompt_tokens", what)
        axes.set(xlabel="prompt tokens", title=f"link: {link}", ylabel="ms after prefill")


def goodput(figure: Figure, rows: Rows) -> None:
    """For each trace the share of requests that kept their limits, and the P99 gap between tokens, by rate; medians."""
    traces = list(dict.fromkeys(row["trace"] for row in rows))
    panels = figure.subplots(len(traces), 2, squeeze=False)
    for (attained, gap), trace in zip(panels, traces, strict=True):
        for side in dict.fromkeys(row["side"] for row in rows):
            mine = [row for row in rows if row["trace"] == trace and row["side"] == side]
            rates = sorted({row["rate"] for row in mine})
            for axes, name, factor in ((attained, "attained", 100), (gap, "gap_p99_s", 1000)):
                values = [median(row[name] * factor for row in mine if row["rate"] == rate) for rate in rates]
                axes.plot(rates, values, marker="o", markersize=3, label=side)
        attained.axhline(90, color="grey", linewidth=0.8, linestyle="--")
        attained.set(xlabel="requests/s", ylabel="% within limits", title=trace, ylim=(0, 102))
        gap.set(xlabel="requests/s", ylabel="P99 ms between tokens", title=trace, ylim=(0, None))
        attained.legend(fontsize=8)
        for axes in (attained, gap):
            axes.grid(alpha=0.3)


def fidelity(figure: Figure, rows: Rows) -> None:
    """How many requests were that quick: the cluster, and the simulator of it."""
    names = {"ttft_s": "to the first token", "tpot_s": "between tokens", "e2e_s": "in all"}
    for axes, (metric, label) in zip(figure.subplots(1, len(names), sharey=True), names.items(), strict=True):
        for side, style in (("real", "-"), ("simulated", "--")):
            values = sorted(row[f"{side}_{metric}"] for row in rows if row[f"{side}_{metric}"] is not None)
            shares = [place / len(values) for place in range(1, len(values) + 1)]
            axes.plot(values, shares, style, label={"real": "cluster"}.get(side, side), drawstyle="steps-post")
        axes.set(xlabel=f"seconds {label}", xlim=(0, None), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


def speculate(figure: Figure, rows: Rows) -> None:
    """Speed of each side over no speculation, by dataset and answers at once."""
    axes = figure.subplots()
    mine = [row for row in rows if row["speedup"] is not None and row["side"] != "none"]
    sides = list(dict.fromkeys(row["side"] for row in mine))
    for dataset, batch in dict.fromkeys((row["dataset"], row["batch"]) for row in mine):
        found = {row["side"]: row["speedup"] for row in mine if (row["dataset"], row["batch"]) == (dataset, batch)}
        places = [place for place, side in enumerate(sides) if side in found]
        axes.plot(places, [found[sides[place]] for place in places], "o", label=f"{dataset}, {batch} at once")
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(sides)), sides, rotation=30, ha="right", fontsize=8)
    axes.set(ylabel="speed over no speculation", title="Speculation; own_device: a projection")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def verify(figure: Figure, rows: Rows) -> None:
    """Share of memory bandwidth by rows, over a whole step; one panel for each type of weights."""
    kinds = list(dict.fromkeys(row["weights"] for row in rows))
    for axes, kind in zip(figure.subplots(1, len(kinds), sharey=True), kinds, strict=True):
        mine = []
        for side, count in dict.fromkeys((row["side"], row["rows"]) for row in rows):
            here = [row for row in rows if (row["side"], row["rows"], row["weights"]) == (side, count, kind)]
            spent = [row["times"] * row["seconds"] for row in here]
            share = sum(row["share"] * each for row, each in zip(here, spent, strict=True)) / sum(spent)
            mine.append({"side": side, "rows": count, "share": share})
        lines(axes, mine, "side", "rows", "share")
        axes.axhline(0.85, color="grey", linewidth=0.8, linestyle="--")
        axes.set(xlabel="rows", title=f"weights: {kind}", ylabel="share of memory bandwidth")
        axes.set_ylim(bottom=0)


def scaling(figure: Figure, rows: Rows) -> None:
    """Pools that follow their work: what there is to do, how well it is done, and by how many workers."""
    queue, attained, workers = figure.subplots(3, 1, sharex=True)
    times = [row["t"] for row in rows]
    queue.plot(times, [row["requests"] for row in rows], label="requests under way")
    queue.plot(times, [10 * row["rate"] for row in rows], label="arrivals in 10 s", linewidth=0.8)
    shares = [(row["t"], 100 * row["attained"]) for row in rows if row["attained"] is not None]
    attained.plot(*zip(*shares, strict=True), color="tab:green", label="% of these within limits")
    attained.set_ylim(0, 102)
    for pool in [name.removesuffix("_workers") for name in rows[0] if name.endswith("_workers")]:
        (line,) = workers.step(times, [row[f"{pool}_workers"] for row in rows], where="post", label=f"{pool} workers")
        for what, style in (("starting", ":"), ("pulled", "--")):
            if any(counts := [row[f"{pool}_{what}"] for row in rows]):
                label = {"starting": "of these to come", "pulled": "that do the other pool's work"}[what]
                workers.step(times, counts, style, where="post", color=line.get_color(), label=f"{pool}: {label}")
    workers.set(xlabel="seconds", ylim=(0, None))
    workers.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axes, place in ((queue, "upper right"), (attained, "lower right"), (workers, "upper left")):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc=place)
    queue.set_title("Simulated: one prefill worker, decode workers as they are needed")


PICTURES: dict[str, Callable[[Figure, Rows], None]] = {
    "speculate": speculate,
    "kv": kv,
    "handoff": handoff,
    "goodput": goodput,
    "verify": verify,
    "fidelity": fidelity,
    "scaling": scaling,
}


def lines(axes: Axes, rows: Rows, key: str, x: str, y: str) -> None:
    """One line for each value of `key`."""
    for value in dict.fromkeys(row[key] for row in rows):
        points = sorted((row[x], row[y]) for row in rows if row[key] == value)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=value)
    places = sorted({row[x] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def draw(file: Path) -> Path | None:
    """Draw one result; returns the picture's path, or None where there is none to draw."""
    result = json.loads(file.read_text(encoding="utf-8"))
    picture = PICTURES.get(result["bench"])
    if picture is None:
        return None
    links = len({row.get("link") for row in result["rows"]})
    down, across = (len({row["trace"] for row in result["rows"]}), 2) if picture is goodput else (1, links)
    across = 2 if picture is verify else across
    across = 3 if picture is fidelity else across
    down, across = (2, 2) if picture is scaling else (down, across)
    figure = Figure(figsize=(5 + 3 * (across - 1), 3.6 * down), layout="constrained")
    picture(figure, result["rows"])
    IMAGES.mkdir(parents=True, exist_ok=True)
    target = IMAGES / f"{file.stem}.svg"
    mpl.rcParams["svg.hashsalt"] = "joinwise"  # the same picture gives the same file
    figure.savefig(target, metadata={"Date": None})
    return target


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(draw(Path(name)) or f"{name}: nothing to draw")
