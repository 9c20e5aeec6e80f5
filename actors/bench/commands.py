"""`joinwise bench ...`: every claim about speed comes from one of these."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

bench = typer.Typer(help="Measure against a named baseline, in the same run.", no_args_is_help=True)
console = Console(stderr=True, highlight=False)
Json = Annotated[Path | None, typer.Option("--json", help="Write figures, rows and the machine's description here")]


@bench.callback()
def _group() -> None:
    """Measure against a named baseline, in the same run."""


@bench.command()
def serve(
    requests: Annotated[int, typer.Option(help="Prompts, of 10 to 1,500 tokens", min=3)] = 24,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate for each", min=8)] = 64,
    dtype: Annotated[list[str] | None, typer.Option(help="Element types; both by default")] = None,
    json: Json = None,
) -> None:
    """The split cluster against plain vLLM on one core and on two."""
    from joinwise.actors.bench import report
    from joinwise.actors.bench.serve import run

    with console.status("starting") as status:
        figures, rows = run(requests, max_tokens, dtype or ["float32", "bfloat16"], status.update)
    table = Table("figure", "value", title="joinwise bench serve")
    for name, value in figures.items():
        table.add_row(name, f"{value:g}")
    Console().print(table)
    if json is not None:
        cores = "split: two engines on one core each, gateway free; plain: engine on the cores named, server free"
        report.write(json, "serve", figures, rows, report.machine(sides=cores, kv_block_size=32))
