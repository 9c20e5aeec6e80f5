"""`joinwise doctor`: prints what `doctor.py` found."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from joinwise.cluster.cli.options import ConfigFile, Json, config_path

if TYPE_CHECKING:
    from joinwise.cluster.cli.doctor import Finding

_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "missing": ("✗", "red")}


def doctor(file: ConfigFile = None, as_json: Json = False) -> None:
    """Look for what a cluster needs on this machine, and name the command that mends what is missing."""
    from joinwise.cluster.cli.doctor import examine, healthy
    from joinwise.cluster.config import load_config

    gateway = load_config(config_path(file)).gateway
    findings = examine(tuple(port for port in (gateway.http_port, gateway.grpc_port) if port))
    if as_json:
        typer.echo(json.dumps({"healthy": healthy(findings), "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        _print(findings)
    if not healthy(findings):
        raise typer.Exit(1)


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        mark, style = _MARKS[finding.level]
        detail = Text(finding.detail)
        if finding.fix:
            detail.append(f"\n  → {finding.fix}", style="bold")
        table.add_row(Text(mark, style=style), finding.check, detail)
    Console(highlight=False).print(table)
