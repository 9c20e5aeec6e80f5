"""What every benchmark's command has: where its result goes, what it shows meanwhile and in the end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

console = Console(stderr=True, highlight=False)
Json = Annotated[Path | None, typer.Option("--json", help="Write figures, rows and the machine's description here")]


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Shows what is being done: in one line of a terminal, line by line elsewhere."""
    if not console.is_terminal:
        yield lambda line: console.print(line, markup=False)
        return
    with console.status("starting") as status:
        yield status.update


def show_figures(name: str, figures: dict[str, float]) -> None:
    """Print a table of them."""
    table = Table("figure", "value", title=f"joinwise bench {name}")
    for figure, value in figures.items():
        table.add_row(figure, f"{value:g}")
    Console().print(table)
