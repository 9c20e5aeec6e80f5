"""`joinwise plan --from-live`: what would help the cluster that runs, by its own last hour."""

from __future__ import annotations

import asyncio
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from joinwise.cluster.cli.options import http_of, redis_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from joinwise.cluster.plan.advice import Advice, Option
    from joinwise.cluster.plan.live import Cluster
    from joinwise.cluster.router.registry import WorkerState
    from joinwise.cluster.simulate.pools import PoolSpec
    from joinwise.cluster.simulate.profile import Profile

PATH = "/ledgers"
_TIMEOUT_S = 10.0
_LARGEST = 64 << 20


def advise_live(
    redis: str | None,
    cluster: str,
    gateways: Sequence[str],
    token: str | None,
    ca: Path | None,
    files: Sequence[Path],
    served: str | None,
    profile: Profile | None,
    json: Path | None,
) -> None:
    """Read the cluster, simulate it and every single change of it, and print what helps.

    Args:
        redis, cluster: where its registry is, and its name; None is the cluster that runs on this machine.
        gateways: their URLs, whose ledgers are read; none: this machine's, unless there are files.
        files: more ledgers, JSON lines.
        served: the model's served name, where the cluster serves several.
    """
    from rich.console import Console

    from joinwise.cluster.plan.advice import advise
    from joinwise.cluster.plan.live import read, seen
    from joinwise.cluster.simulate.run import simulate, write
    from joinwise.cluster.store.embedded import EmbeddedRedis

    url, name = redis_of(redis, cluster)
    lines = [line for file in files for line in _of_file(file)]
    for gateway in gateways or ([] if files else [http_of()]):
        lines += _of_gateway(gateway, token, ca)
    workers = [each for each in asyncio.run(_workers(url, name)) if served in (None, each.info.model)]
    found = seen(workers, read(lines, served), profile)
    console = Console(stderr=True)
    with console.status("simulating") as status, ExitStack() as stack:
        server = EmbeddedRedis.start()
        stack.callback(server.stop)

        def measure(pools: Sequence[PoolSpec], rate: float) -> Mapping[str, float]:
            status.update(f"{', '.join(map(str, pools))} at {rate:.2f} times the rate")
            return simulate(found.trace.scaled(rate), pools, found.profile, policy="auto", server=server).figures

        advice = advise(found.pools, measure)
    Console().print(render(found, advice))
    if json is not None:
        rows = [row_of(each, advice) for each in (advice.now, *advice.options)]
        write(json, _figures(advice), rows, command="plan --from-live", requests=len(found.trace.arrivals))


async def _workers(url: str, cluster: str) -> tuple[WorkerState, ...]:
    from joinwise.cluster.config_model import RouterConfig
    from joinwise.cluster.router.registry import Registry
    from joinwise.cluster.store.client import connect

    client = connect(url)
    try:
        return await Registry(client, cluster, RouterConfig()).states()
    finally:
        await client.aclose()


def _of_file(path: Path) -> list[bytes]:
    from joinwise.cluster.errors import ConfigError

    try:
        return path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the ledgers {path}: {error.strerror}") from error


def _of_gateway(url: str, token: str | None, ca: Path | None) -> list[bytes]:
    """A gateway's ledgers. Raises ConfigError where it does not give them; the message says why."""
    from joinwise.cluster.errors import ConfigError

    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is no gateway; write http://host:port or https://host:port")
    headers = {"authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url.rstrip("/") + PATH, headers=headers)  # noqa: S310 - the scheme is checked
    context = ssl.create_default_context(cafile=ca) if url.startswith("https") else None
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=context) as answer:  # noqa: S310
            text: bytes = answer.read(_LARGEST + 1)
    except urllib.error.HTTPError as error:
        raise ConfigError(f"{url} does not give its ledgers: {error.code} {error.reason}") from error
    except OSError as error:
        raise ConfigError(f"{url} does not answer: {error}") from error
    if len(text) > _LARGEST:
        raise ConfigError(f"{url} has sent more than {_LARGEST >> 20} MiB")
    return text.splitlines()


def row_of(option: Option, advice: Advice) -> dict[str, object]:
    """An option as a result file has it."""
    figures = option.figures
    return {
        "change": option.what,
        "pools": ",".join(map(str, option.pools)),
        "worst": option.worst,
        "ttft_p90_s": figures["ttft_p90_s"],
        "tbt_p90_ms": figures["tbt_p90_ms"],
        "e2e_p90_s": figures["e2e_p90_s"],
        "bears": advice.bears.get(option.what),
    }


def _figures(advice: Advice) -> dict[str, float]:
    figures = {"worst": advice.now.worst, "bears": advice.bears[advice.now.what]}
    for change in ("role", "machine"):
        if (best := advice.best(change)) is not None:
            figures |= {f"worst_{change}": best.worst, f"bears_{change}": advice.bears[best.what]}
    return figures


def render(found: Cluster, advice: Advice) -> RenderableType:
    """The cluster as it is, every change by how much it helps, and what to do."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("change")
    for name in ("ttft p90 s", "tbt p90 ms", "e2e p90 s", "worst of nine", "bears"):
        table.add_column(name, justify="right")
    for each in (advice.now, *advice.options):
        values = [each.figures[key] for key in ("ttft_p90_s", "tbt_p90_ms", "e2e_p90_s")]
        bears = advice.bears.get(each.what)
        cells = [*(f"{value:.3g}" for value in values), f"{each.worst:.2f}", "" if bears is None else f"{bears:.2f}x"]
        table.add_row(each.what, *cells, style="bold" if bears is not None else None)
    trace = found.trace
    lines: list[RenderableType] = [
        Text(f"{len(trace.arrivals)} requests in {trace.seconds:.0f} s on {', '.join(map(str, found.pools))}"),
        table,
    ]
    for change, nothing in (("role", "no worker in another role would help"), ("machine", "no machine more would")):
        best = advice.best(change)
        if best is None:
            lines.append(Text(nothing))
        else:
            gain = f"{advice.now.worst:.2f} to {best.worst:.2f} of its limit"
            lines.append(Text(f"{best.what}: what is worst goes from {gain}", style="bold green"))
    lines += [Text(f"guessed: {each}", style="yellow") for each in found.guessed]
    return Group(*lines)
