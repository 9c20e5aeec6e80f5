"""A plan as one page: HTML with its plots drawn in it, and nothing that has to be loaded from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from joinwise.cluster.plan.search import Candidate, Plan
from joinwise.cluster.simulate.report import PERCENTILES, SLOS

_WIDTH, _HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 16, 44
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --dim: #6b7485; --line: #d9dee7; --good: #0b7a4b; --bad: #b3261e;
  --front: #1f5fbf; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --dim: #98a2b3; --line: #323a48; --good: #4cc38a;
  --bad: #f2857d; --front: #7aa9f7; --paper: #12161d; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.best { color: var(--good); font-weight: 600; } .dim { color: var(--dim); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--dim); }
.axis { stroke: var(--line); } .front { fill: var(--front); stroke: var(--front); } .met { fill: var(--good); }
.missed { fill: none; stroke: var(--bad); } .over { fill: var(--bad); } .limit { stroke: var(--ink); }
"""


@dataclass(frozen=True)
class Story:
    """What the page tells besides the plan itself.

    Attributes:
        trace: name of the trace, with its rate in requests a second.
        rate: requests a second.
        iso: what was given: throughput, cost or power.
        best: what is recommended.
        spare: machines that any one pool may lose.
        tried: every cluster that was simulated.
        router: whether the router that serves keeps the objectives on it; None if it was not asked.
        command: how this page was made.
    """

    trace: str
    rate: float
    iso: str
    best: Candidate
    spare: int
    tried: Sequence[Candidate]
    router: bool | None
    command: str


def page(found: Plan, story: Story) -> str:
    """The page's text."""
    best = story.best
    what = f"{best.price:.0f} an hour, {best.power:.0f} kW, {best.rate * story.rate:.1f} requests a second"
    parts = [
        f"<h1>Machines for {escape(story.trace)}</h1>",
        f'<p class="best">{escape(str(best))}: {what}</p>',
        "<ul>" + "".join(f"<li>{line}</li>" for line in reasons(found, story)) + "</ul>",
        "<h2>What was tried</h2>",
        _map(found, story),
        "<h2>How close the recommended cluster is to its limits</h2>",
        _limits(best),
        "<h2>The best of each shape</h2>",
        _table(found, story),
        f'<p class="dim">{len(story.tried)} clusters were simulated. Made by <code>{escape(story.command)}</code></p>',
    ]
    head = f'<meta charset="utf-8"><title>joinwise plan: {escape(story.trace)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def reasons(found: Plan, story: Story) -> list[str]:
    """Why this one, a sentence each, as HTML."""
    best, lines = story.best, []
    whole = [each for each in found.feasible if each.shape.mixed]
    split = [each for each in found.feasible if not each.shape.mixed]
    other = split if best.shape.mixed else whole
    verb = "Do not split" if best.shape.mixed else "Split"
    if not other:
        nothing = "no split cluster" if best.shape.mixed else "no cluster of machines that do everything"
        lines.append(f"{verb}: {nothing} was found that keeps the objectives.")
    elif story.iso == "throughput":
        least = min(each.price for each in other)
        lines.append(f"{verb}: the best that does otherwise costs {least / best.price:.2f} times as much.")
    else:
        most = max(each.rate for each in other)
        lines.append(f"{verb}: it bears {best.rate / most:.2f} times the rate of the best that does otherwise.")
    more = " or more" if story.spare == 3 else ""
    lines.append(f"Any one pool may lose {story.spare} machines{more} and the nine objectives are still kept.")
    if story.router is not None:
        verdict = "keeps" if story.router else "<b>misses</b>"
        lines.append(f"The router that serves {verdict} the nine objectives on it.")
    return lines


def _map(found: Plan, story: Story) -> str:
    """Every cluster by price, and by power or, for a budget, by the rate that it bears."""
    over_rate = story.iso != "throughput"
    label = "requests a second" if over_rate else "kW"

    def value(each: Candidate) -> float:
        return each.rate * story.rate if over_rate else each.power

    shown = [*story.tried, *found.candidates]
    x = _Scale([each.price for each in shown], _LEFT, _WIDTH - _RIGHT)
    y = _Scale([value(each) for each in shown], _HEIGHT - _BOTTOM, _TOP)
    marks = []
    for each in story.tried:
        kind, radius = ("met", 3) if each.meets else ("missed", 3)
        marks.append(_dot(x(each.price), y(value(each)), radius, kind, f"{each}{'' if each.meets else ', misses'}"))
    for each in found.front:
        marks.append(_dot(x(each.price), y(value(each)), 6, "front", f"{each}: on the front"))
        marks.append(_label(x(each.price), y(value(each)) + 4, str(each)))
    legend = "filled: keeps the objectives; hollow: misses one; large: the front, which nothing beats"
    return (
        _figure(_axes(x, y, "price an hour", label) + marks, "clusters by price and " + label)
        + f'<p class="dim">{legend}</p>'
    )


def _limits(best: Candidate) -> str:
    """Each of the nine slowdowns over its limit."""
    rows = [
        (f"{name} p{percent}", best.figures[f"{name}_slowdown_p{percent}"], limit)
        for name, limits in SLOS.items()
        for percent, limit in zip(PERCENTILES, limits, strict=True)
    ]
    x = _Scale([0.0, 1.25, *(value / limit for _, value, limit in rows)], 110, _WIDTH - 90)
    step, marks = 26, []
    for place, (name, value, limit) in enumerate(rows):
        y, share = place * step + 8, value / limit
        kind = "met" if share <= 1 else "over"
        marks.append(f'<text x="100" y="{y + 13}" text-anchor="end">{name}</text>')
        marks.append(f'<rect class="{kind}" x="110" y="{y}" width="{max(1.0, x(share) - 110):.1f}" height="17"/>')
        marks.append(f'<text x="{x(share) + 6:.1f}" y="{y + 13}">{value:.2f} of {limit:g}</text>')
    bottom = len(rows) * step + 8
    marks.append(f'<line class="limit" x1="{x(1):.1f}" x2="{x(1):.1f}" y1="0" y2="{bottom}"/>')
    return _figure(marks, "slowdown of the recommended cluster over its limits", bottom + 4)


def _table(found: Plan, story: Story) -> str:
    rows = []
    for each in sorted(found.candidates, key=lambda each: (not each.meets, each.price, each.power)):
        verdict = "kept" if each.meets else f"{each.worst:.2f} times over"
        cells = [
            ("* " if each in found.front else "") + escape(str(each)),
            f"{each.rate * story.rate:.1f}",
            f"{each.machines}",
            f"{each.price:.0f}",
            f"{each.power:.0f}",
            verdict,
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    names = ("pools", "requests/s", "machines", "price/h", "kW", "objectives")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


class _Scale:
    """From values to places on a drawing, with room at both ends."""

    def __init__(self, values: Iterable[float], begin: float, end: float) -> None:
        found = list(values)
        self.low, self.high = min(0.0, *found), max(found) * 1.05 or 1.0
        self._begin, self._end = begin, end

    def __call__(self, value: float) -> float:
        return self._begin + (value - self.low) / (self.high - self.low) * (self._end - self._begin)

    def ticks(self) -> list[float]:
        return [self.low + (self.high - self.low) * part / 4 for part in range(5)]


def _axes(x: _Scale, y: _Scale, across: str, up: str) -> list[str]:
    bottom = _HEIGHT - _BOTTOM
    marks = []
    for tick in y.ticks():
        marks.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        marks.append(f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    marks += [f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:.4g}</text>' for tick in x.ticks()]
    marks.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{across}</text>')
    marks.append(f'<text transform="translate(14 {bottom / 2:.0f}) rotate(-90)" text-anchor="middle">{up}</text>')
    return marks


def _dot(x: float, y: float, radius: int, kind: str, title: str) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(title)}</title></circle>'


def _label(x: float, y: float, text: str) -> str:
    """Beside a dot, on the side where there is room."""
    right = x < _WIDTH / 2
    anchor = "start" if right else "end"
    return f'<text x="{x + (9 if right else -9):.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _figure(marks: Sequence[str], title: str, height: int = _HEIGHT) -> str:
    inside = "".join(marks)
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">{inside}</svg>'
