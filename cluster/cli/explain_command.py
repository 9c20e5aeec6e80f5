"""`joinwise explain`: why a request went where it did."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Annotated

import typer

from joinwise.cluster.cli.options import ClusterName, Json, RedisUrl, redis_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from joinwise.cluster.router.why import Decision


def explain(
    request_id: Annotated[str, typer.Argument(help="The request's id, as the client or the log has it.")],
    redis: RedisUrl = None,
    cluster: ClusterName = "joinwise",
    as_json: Json = False,
) -> None:
    """Show the router's decisions on a request: candidates, estimates, choice and reason."""
    from rich.console import Console

    from joinwise.cluster.errors import InvalidRequestError

    url, cluster = redis_of(redis, cluster)
    found = asyncio.run(_read(url, cluster, request_id))
    if not found:
        raise InvalidRequestError(
            f"no decision on {request_id!r} is kept; the last `router.decisions_kept` are, of the cluster {cluster!r}"
        )
    if as_json:
        typer.echo(json.dumps([each.to_dict() for each in found], indent=2))
        return
    console = Console()
    for decision in found:
        console.print(render_decision(decision))


async def _read(url: str, cluster: str, request_id: str) -> list[Decision]:
    from joinwise.cluster.router.why import decisions_on
    from joinwise.cluster.store.client import connect

    client = connect(url)
    try:
        return await decisions_on(client, cluster, request_id)
    finally:
        await client.aclose()


def render_decision(decision: Decision) -> RenderableType:
    """A decision as it is printed; the chosen are marked."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head = Text.assemble(
        (decision.verdict, "bold"), f"   {' -> '.join(decision.chosen)}   {decision.cost_ms:.1f} ms", style="default"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "worker", "role"):
        table.add_column(name)
    for name in ("wait", "prefill", "harm", "queue", "stall", "hand-off", "uncached", "pending"):
        table.add_column(name, justify="right")
    for each in decision.candidates:
        times = (each.wait_ms, each.prefill_ms, each.harm_ms, each.queue_ms, each.stall_ms, each.move_ms)
        counts = (str(each.uncached_tokens), str(each.pending_tokens))
        mark = "*" if each.worker_id in decision.chosen else ""
        table.add_row(mark, each.worker_id, each.role, *(f"{time:.1f}" for time in times), *counts)
    return Group(head, table)
