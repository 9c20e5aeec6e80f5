"""`joinwise`: the command line. Starts in a blink: whatever is heavy is imported by the command that needs it."""

from __future__ import annotations

from typing import Annotated

import typer

from joinwise.cluster.cli import (
    config_command,
    doctor_command,
    explain_command,
    keys_command,
    plan_command,
    simulate_command,
    status_command,
    talk,
    top_command,
    trace_command,
)
from joinwise.cluster.cli.shell import Shell

app = typer.Typer(
    name="joinwise",
    cls=Shell,
    help="A serving cluster for large language models: prefill on one pool, decode on another.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(status_command.status)
app.command()(explain_command.explain)
app.command()(top_command.top)
app.command()(talk.chat)
app.command()(talk.generate)
app.command()(simulate_command.simulate)
app.command()(plan_command.plan)
app.add_typer(trace_command.app, name="trace")
app.add_typer(config_command.app, name="config")
app.add_typer(keys_command.app, name="keys")
app.command()(doctor_command.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        from joinwise.cluster.cli.doctor import version_of

        typer.echo(f"joinwise {version_of('joinwise') or 'of unknown version'}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A serving cluster for large language models: prefill on one pool, decode on another."""


def main() -> None:
    """The entry point of the script `joinwise`."""
    app()
