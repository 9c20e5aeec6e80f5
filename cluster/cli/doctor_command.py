"""`joinwise doctor`: prints what `doctor.py` found on this machine, or `doctor_cluster.py` in a cluster that runs."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from joinwise.cluster.cli.options import (
    Ca,
    ClusterName,
    ConfigFile,
    Json,
    RedisUrl,
    Target,
    Timeout,
    Tls,
    Token,
    config_path,
    connect,
    redis_of,
)

if TYPE_CHECKING:
    from joinwise.cluster.cli.doctor import Finding
    from joinwise.cluster.client import ClusterStatus

_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "missing": ("✗", "red")}


def doctor(
    file: ConfigFile = None,
    running: Annotated[bool, typer.Option("--running", help="Examine a cluster that runs instead.")] = False,
    redis: RedisUrl = None,
    cluster: ClusterName = "joinwise",
    target: Target = None,
    token: Token = None,
    tls: Tls = False,
    ca: Ca = None,
    timeout: Timeout = 5.0,
    as_json: Json = False,
) -> None:
    """Look for what a cluster needs on this machine, or is wrong with one that runs, and name what mends it."""
    from joinwise.cluster.cli.doctor import healthy

    findings = _of_cluster(redis, cluster, target, token, tls, ca, timeout) if running else _of_machine(file)
    if as_json:
        typer.echo(json.dumps({"healthy": healthy(findings), "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        _print(findings)
    if not healthy(findings):
        raise typer.Exit(1)


def _of_machine(file: Path | None) -> list[Finding]:
    from joinwise.cluster.cli.doctor import examine
    from joinwise.cluster.config import load_config

    gateway = load_config(config_path(file)).gateway
    return examine(tuple(port for port in (gateway.http_port, gateway.grpc_port) if port))


def _of_cluster(
    redis: str | None, cluster: str, target: str | None, token: str | None, tls: bool, ca: Path | None, timeout: float
) -> list[Finding]:
    from joinwise.cluster.cli.doctor_cluster import examine, look

    url, name = redis_of(redis, cluster)

    def ask() -> ClusterStatus:
        with connect(target, token, tls, ca, timeout) as client:
            return client.status()

    return examine(asyncio.run(look(url, name, ask)))


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
