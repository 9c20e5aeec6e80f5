"""`joinwise chaos`."""

import signal
import sys
from json import loads
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def chaos(
    requests: Annotated[int, typer.Option(help="Requests for each seed, at least", min=1)] = 200,
    seed: Annotated[int, typer.Option(help="The first seed")] = 0,
    seeds: Annotated[int, typer.Option(help="Seeds, from the first on; each draws a schedule", min=1)] = 1,
    fault: Annotated[list[str] | None, typer.Option(help="Only these faults; all by default")] = None,
    faults: Annotated[
        int | None, typer.Option(help="So many of them for each seed, drawn by it; all by default", min=1)
    ] = None,
    prefill: Annotated[int, typer.Option(help="Prefill engines", min=1)] = 1,
    decode: Annotated[int, typer.Option(help="Decode engines", min=1)] = 2,
    draft: Annotated[
        bool, typer.Option("--draft", help="One more engine, which verifies what a draft actor proposes")
    ] = False,
    rate: Annotated[float, typer.Option(help="Requests a second", min=0.1)] = 2.0,
    soak: Annotated[
        bool, typer.Option("--soak", help="Break nothing: memory, files, keys and KV may not grow")
    ] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write figures, faults and the machine here")] = None,
    add: Annotated[bool, typer.Option("--add", help="Add to what the file has: other seeds, run before")] = False,
) -> None:
    """Break a cluster of its own under load, and count what its clients notice. Fails unless that is nothing."""
    from joinwise.actors.bench import report
    from joinwise.actors.chaos import partition
    from joinwise.actors.chaos import soak as calm
    from joinwise.actors.chaos.run import MUST_BE_ZERO, Settings, run, together
    from joinwise.actors.chaos.schedule import KINDS
    from joinwise.cluster.errors import ConfigError

    if unknown := [name for name in fault or () if name not in KINDS]:
        raise ConfigError(f"no fault {unknown[0]!r}; there are {', '.join(KINDS)}")
    impossible = {} if draft else {"kill-draft": "without --draft there is no draft actor"}
    if said := partition.refused():
        impossible |= {"cut-kv": said, "fill-landing": said}
    if add and (soak or json is None):
        raise ConfigError("--add goes with --json, and not with --soak")
    before = report.rows_of(json, "chaos") if add and json is not None and json.exists() else []
    kinds = [kind for kind in KINDS if (not fault or kind in fault) and kind not in impossible]
    stderr = Console(stderr=True, highlight=False)
    for name, why in impossible.items():
        if not soak and (not fault or name in fault):
            stderr.print(f"not tried: {name}: {why}", markup=False)
    if not kinds:
        raise ConfigError("nothing is left to be broken")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what it has started must end with it
    settings = Settings(requests, range(seed, seed + seeds), kinds, faults, prefill, decode, draft, rate=rate)
    work, zero = (calm.soak, calm.MUST_BE_ZERO) if soak else (run, MUST_BE_ZERO)
    figures, rows = work(settings, lambda line: stderr.print(line, markup=False))
    table = Table("figure", "value", title="joinwise chaos")
    for name, value in figures.items():
        style = "bold red" if value and name in zero else ""
        table.add_row(name, f"{value:g}", style=style)
    Console().print(table)
    if json is not None:
        engines = f"{prefill} prefill and {decode} decode engines{' and one that speculates' if draft else ''}"
        sides = f"{engines} in float32, one gateway, one Redis; all share the cores"
        found = together([loads(json.read_text())["figures"], figures]) if before else figures
        described = report.machine(sides=sides, rate=rate)
        report.write(json, "soak" if soak else "chaos", found, [*before, *rows], described)
    for row in rows if soak else ():
        if not row.get("flat"):
            stderr.print(f"FAIL: {row}", markup=False)
    if any(figures[name] for name in zero):
        raise typer.Exit(1)
