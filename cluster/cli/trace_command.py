"""`joinwise trace`: traces of one's own traffic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Traces of your own traffic, for `joinwise simulate` and `joinwise plan`.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Traces of your own traffic, for `joinwise simulate` and `joinwise plan`."""


@app.command()
def export(
    files: Annotated[
        list[Path],
        typer.Argument(help="Ledgers as JSON lines, or spans as an OpenTelemetry Collector writes them to a file."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The trace, a CSV; .gz too.")],
) -> None:
    """Make a trace of what gateways told of their requests: times and lengths, no text, no ids, no dates."""
    from rich.console import Console

    from joinwise.cluster.errors import ConfigError
    from joinwise.cluster.simulate.export import collect, save

    if any(out.exists() and file.exists() and out.samefile(file) for file in files):
        raise ConfigError(f"{out} is one of the files to read")
    found = collect(files)
    save(found.trace, out)
    lines = [f"{len(found.trace.arrivals)} requests in {found.trace.seconds:.0f} s"]
    if found.repeated:
        lines.append(f"{found.repeated} that came twice left out")
    if found.unanswered:
        lines.append(f"{found.unanswered} without an answer left out")
    Console().print("; ".join(lines))
