"""The shell around all commands: commands that load late, and errors that are one clear line.

Commands come from two places. Those of this package are registered in `main.py`. Those that need engines come from the
entry-point group `joinwise.commands`; they are listed without being imported, and imported when they are called. Where
an extra is missing they print the command that installs it.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from joinwise.cluster.errors import JoinwiseError

GROUP = "joinwise.commands"
EXIT_NOT_INSTALLED = 3

#: Commands that need engines, with their line in `--help`; they are listed whether or not they can run.
ENGINE_COMMANDS = {
    "up": "Start a cluster on this machine or in a Ray cluster.",
    "down": "Stop a cluster and everything that it started.",
    "apply": "Change a running cluster to another configuration; only what that touches restarts.",
    "demo": "Start a small cluster, ask it one question, show where the time went, stop it.",
    "bench": "Measure a cluster against plain vLLM.",
    "chaos": "Break a cluster of its own under load, and count what its clients notice.",
    "profile": "Measure an engine here, for `joinwise simulate` and `joinwise plan`.",
    "train-draft": "Distil a draft head from a model's own answers, and measure it.",
}
_EXTRA = ("ray", "vllm", "torch")  # what both extras bring
_ENGINE_PACKAGES = frozenset({"ray", "vllm", "torch", "transformers", "numpy", "fastapi", "uvicorn", "psutil"})
_HINTS = {
    "unreachable": "Start a cluster with `joinwise up`, or name another gateway with --target.",
    "unauthorized": "Give the API key with --token or JOINWISE_API_KEY.",
    "model_not_found": "`joinwise status` lists what is served.",
    "no_worker": "`joinwise status` shows the workers.",
    "store_start": "`joinwise doctor` says what is missing.",
    "store_unavailable": "Is Redis running? `joinwise doctor` looks for it.",
    "internal": "This is a defect. JOINWISE_DEBUG=1 shows where.",
    "deadline_exceeded": "Allow more time with --timeout.",
}


class Shell(TyperGroup):
    """The top-level group: adds late commands, and turns errors into exit codes."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Commands of this package in their order, then late ones."""
        own = super().list_commands(ctx)
        return [*own, *(name for name in _late_names() if name not in own)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command by name; a late one is a stand-in until it is called."""
        own = super().get_command(ctx, cmd_name)
        if own is not None or cmd_name not in _late_names():
            return own
        return LateCommand(cmd_name)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run; errors of joinwise exit with 1, a missing extra with 3."""
        if os.environ.get("JOINWISE_DEBUG"):
            return super().main(*args, **kwargs)
        try:
            return super().main(*args, **kwargs)
        except JoinwiseError as e:
            print_error(e)
            sys.exit(1)
        except ModuleNotFoundError as e:
            if (e.name or "").split(".")[0] not in _ENGINE_PACKAGES:
                raise
            print_not_installed(f"Python package {e.name}")
            sys.exit(EXIT_NOT_INSTALLED)


class LateCommand(TyperCommand):
    """Stands for a command that is imported when it is called."""

    def __init__(self, name: str) -> None:
        text = ENGINE_COMMANDS.get(name, "")
        super().__init__(name=name, help=text, rich_help_panel="Commands that run engines")

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Called before arguments are parsed: hands over to the real command."""
        return self._load().make_context(info_name, args, parent=parent, **extra)

    def _load(self) -> Any:
        # Asked before loading: such a command may import engines late, in another process, or half way through.
        if self.name not in ENGINE_COMMANDS or all(find_spec(package) for package in _EXTRA):
            for entry in _entries():
                if entry.name == self.name:
                    return _as_command(entry.name, entry.load())
        print_not_installed(f"`joinwise {self.name}`")
        raise typer.Exit(EXIT_NOT_INSTALLED)


@cache
def _entries() -> tuple[metadata.EntryPoint, ...]:
    """Late commands of every installed package; read once, as it looks into each of them."""
    return tuple(metadata.entry_points(group=GROUP))


def _late_names() -> list[str]:
    registered = sorted(entry.name for entry in _entries())
    return [*ENGINE_COMMANDS, *(name for name in registered if name not in ENGINE_COMMANDS)]


def _as_command(name: str, target: Any) -> Any:
    """The command that an entry point gave: a Typer, a function with Typer parameters, or a command itself."""
    if isinstance(target, typer.Typer):
        return typer.main.get_command(target)
    if hasattr(target, "make_context"):
        return target
    single = typer.Typer(add_completion=False)
    single.command(name)(target)
    return typer.main.get_command(single)


def print_error(error: JoinwiseError) -> None:
    """One red line on stderr, and a hint where there is one."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), (str(error), "red")))
    hint = _HINTS.get(error.code, "")
    if error.retry_after_s is not None:
        hint = f"Try again in {error.retry_after_s:g} s."
    if hint:
        console.print(Text(f"hint: {hint}", style="dim"))


def print_not_installed(what: str) -> None:
    """Say which extra is missing and how to install it."""
    from rich.console import Console
    from rich.text import Text

    from joinwise.cluster.cli.doctor import install_command

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), (f"{what} needs engines, which are not installed", "red")))
    console.print(Text(f"hint: {install_command()}", style="dim"))
