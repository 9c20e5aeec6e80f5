"""`joinwise status`: which workers serve, how loaded they are, and how KV crosses between them."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from joinwise.cluster.cli.options import Ca, Json, Target, Timeout, Tls, Token, connect

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from joinwise.cluster.client import Client, ClusterStatus, KvLinkStatus, Model, WorkerStatus


def status(
    target: Target = None,
    token: Token = None,
    tls: Tls = False,
    ca: Ca = None,
    timeout: Timeout = 5.0,
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until interrupted.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks with --watch.")] = 1.0,
) -> None:
    """Show workers, models and load."""
    from rich.console import Console

    with connect(target, token, tls, ca, timeout) as client:
        if as_json:
            while True:
                typer.echo(json.dumps(_data(client), indent=None if watch else 2))
                if not watch:
                    return
                time.sleep(interval)
        console = Console()
        if not watch:
            console.print(_view(client))
            return
        _watch(client, console, interval)


def _watch(client: Client, console: Console, interval: float) -> None:
    """Redraw until interrupted; a gateway that does not answer is shown, and asked again."""
    from rich.live import Live
    from rich.text import Text

    from joinwise.cluster.errors import JoinwiseError

    view: RenderableType = _view(client)
    with Live(view, console=console, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            try:
                live.update(_view(client), refresh=True)
            except JoinwiseError as e:
                live.update(Text(str(e), style="red"), refresh=True)


def _data(client: Client) -> dict[str, object]:
    return asdict(client.status()) | {"models": [asdict(m) for m in client.models()]}


def _view(client: Client) -> RenderableType:
    return render_status(client.status(), client.models())


def render_status(snapshot: ClusterStatus, models: tuple[Model, ...]) -> RenderableType:
    """The snapshot as it is printed."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("worker")
    table.add_column("pool")
    table.add_column("role")
    table.add_column("model")
    for name in ("running", "waiting", "pending tokens", "KV used", "step ms"):
        table.add_column(name, justify="right")
    table.add_column("address", style="dim")
    for worker in sorted(snapshot.workers, key=lambda w: (w.pool, w.worker_id)):
        table.add_row(*_row(worker))
    names = ", ".join(f"{m.name} ({m.max_model_len} tokens)" if not m.parent else m.name for m in models)
    head = Text.assemble(("cluster ", "dim"), (snapshot.cluster, "bold"), (f"   leases {snapshot.leases}", "dim"))
    body: list[RenderableType] = [table] if snapshot.workers else []
    if snapshot.asleep:
        body += [Text(f"at zero until a request comes: {', '.join(snapshot.asleep)}", style="dim")]
    elif not snapshot.workers:
        body += [Text("no live worker", style="red")]
    body += [Text(trouble, style="red") for trouble in snapshot.troubles]
    if snapshot.kv_links:
        body += [Text(), _links(snapshot.kv_links)]
    return Group(head, Text(f"models  {names or 'none'}", style="dim"), Text(), *body)


def _links(links: tuple[KvLinkStatus, ...]) -> RenderableType:
    """How KV gets from one worker to another, and why so."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("KV link", "transport", "codec"):
        table.add_column(name, overflow="fold")
    for name in ("MB/s", "MB", "transfers", "failed", "retries", "refused"):
        table.add_column(name, justify="right")
    table.add_column("why", style="dim", overflow="fold")
    for link in links:
        refused = ", ".join(f"{count} {reason}" for reason, count in sorted(link.refused.items()))
        speed = f"{link.bytes_per_s / 1e6:.0f}" if link.bytes_per_s else "-"
        counts = (str(link.streams), str(link.failed), str(link.retries), refused or "0")
        why = "; ".join(text for text in (link.why, link.codec_why) if text)
        pair = f"{link.sender} → {link.receiver}"
        table.add_row(pair, link.transport, link.codec, speed, f"{link.bytes / 1e6:.1f}", *counts, why)
    return table


def _row(w: WorkerStatus) -> tuple[str, ...]:
    used = w.kv_blocks_total - w.kv_blocks_free
    kv = f"{used / w.kv_blocks_total:.0%} of {w.kv_blocks_total}" if w.kv_blocks_total else "-"
    step = f"{w.decode_step_ms:.1f}" if w.decode_step_ms else "-"
    counts = (str(w.running), str(w.waiting), str(w.pending_tokens))
    return (w.worker_id, w.pool, w.role, w.model, *counts, kv, step, w.address)
