"""`joinwise top`: the cluster live, from Redis alone."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from joinwise.cluster.cli.options import ClusterName, RedisUrl, redis_of

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from joinwise.cluster.router.pulse import PoolPulse, Pulse

_FRAME_ROWS = 9  # head, headings and blank lines
_MOST_LINKS = 5


def top(
    redis: RedisUrl = None,
    cluster: ClusterName = "joinwise",
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    every: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between two frames.")] = 1.0,
) -> None:
    """Show pools, workers, queue, KV caches, hand-offs and rates, live; Ctrl-C ends it."""
    url, cluster = redis_of(redis, cluster)
    try:
        asyncio.run(_show(url, cluster, once=once, every_s=every))
    except KeyboardInterrupt:
        return


async def _show(url: str, cluster: str, *, once: bool, every_s: float) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from joinwise.cluster.errors import StoreUnavailableError
    from joinwise.cluster.router.pulse import take_pulse
    from joinwise.cluster.store.client import connect

    console, client = Console(), connect(url)
    try:
        if once:
            console.print(render_pulse(await take_pulse(client, cluster), cluster))
            return
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                frame: RenderableType
                try:
                    frame = render_pulse(await take_pulse(client, cluster), cluster, console.size.height)
                except StoreUnavailableError as error:
                    frame = Text(str(error), style="red")
                live.update(frame, refresh=True)
                await asyncio.sleep(every_s)
    finally:
        await client.aclose()


def render_pulse(pulse: Pulse, cluster: str, height: int | None = None) -> RenderableType:
    """One frame; `height`: rows of the terminal, beyond which the least loaded workers are only counted."""
    from rich.console import Group
    from rich.text import Text

    pending = f"{sum(each.pending_tokens for each in pulse.workers):,} tokens pending"
    head = Text.assemble(
        (cluster, "bold"),
        f"   {len(pulse.workers)} workers   {pulse.leases} leases   {pulse.waiting} waiting   {pending}   ",
        f"{pulse.assigned_per_s:.1f} assigned/s   ",
        (f"{pulse.refused_per_s:.1f} refused/s", "red" if pulse.refused_per_s else "default"),
    )
    counts = sorted(pulse.verdicts.items(), key=lambda item: (-item[1], item[0]))
    reasons = "   ".join(f"{verdict} {count / pulse.span_s:.1f}/s" for verdict, count in counts)
    pools, links = _pools(pulse), sorted(pulse.links.items(), key=lambda item: (-item[1], item[0]))[:_MOST_LINKS]
    most = None
    if height is not None:
        most = max(1, height - _FRAME_ROWS - pools.row_count - len(links))
    parts: list[RenderableType] = [head, Text(reasons or "no decision in the last seconds", style="dim"), Text(), pools]
    parts += [Text(), _workers(pulse, most)]
    if most is not None and len(pulse.workers) > most:
        parts.append(Text(f"and {len(pulse.workers) - most} more", style="dim"))
    if links:
        parts.append(Text())
        parts += [Text(f"{p} -> {d}   {count / pulse.span_s:.1f} hand-offs/s") for (p, d), count in links]
    return Group(*parts)


def _table(left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in left:
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _pools(pulse: Pulse) -> Table:
    table = _table(("pool", "model", "roles"), ("prompt", "KV", "to generate", "sequences", "KV used"))
    for each in pulse.pools:
        roles = ", ".join(f"{count} {role}" for role, count in each.roles.items())
        table.add_row(each.pool, each.model, roles, *_pending(each), _kv_used(each))
    for asleep in pulse.asleep:
        table.add_row(asleep.name, asleep.model, "at zero", *["-"] * 5)
    return table


def _workers(pulse: Pulse, most: int | None) -> Table:
    from joinwise.cluster.router.pulse import PoolPulse

    counts = ("prompt", "KV", "to generate", "sequences", "KV used", "step ms", "tokens/s", "last beat")
    table = _table(("worker", "role"), counts)
    for each in sorted(pulse.workers, key=lambda state: (-state.pending_tokens, state.info.worker_id))[:most]:
        own, load = PoolPulse.of(each.info.pool, each.info.model, [each]), each.load
        speeds = (f"{load.decode_step_ms:.1f}", f"{load.prefill_tokens_per_s:,.0f}")
        age = f"{max(0, pulse.now_ms - each.beat_ms) / 1000:.1f} s"
        table.add_row(each.info.worker_id, each.info.role, *_pending(own), _kv_used(own), *speeds, age)
    return table


def _pending(some: PoolPulse) -> tuple[str, ...]:
    sums = (some.pending_prefill, some.pending_decode, some.pending_new, some.sequences)
    return tuple(f"{value:,}" for value in sums)


def _kv_used(some: PoolPulse) -> str:
    """Of the blocks that workers have told of."""
    total, free = some.kv_blocks_total, some.kv_blocks_free
    return f"{100 * (total - free) / total:.0f} %" if total else "-"
