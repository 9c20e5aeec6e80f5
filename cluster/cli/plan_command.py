"""`joinwise plan`: which machines for this traffic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from joinwise.cluster.cli.options import Ca, ClusterName, RedisUrl, Token
from joinwise.cluster.cli.simulate_command import (
    LimitOption,
    LlmOption,
    PoissonOption,
    ProfileOption,
    RateOption,
    TraceOption,
    load_profile,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from joinwise.cluster.plan.search import Candidate, Plan
    from joinwise.cluster.simulate.pools import PoolSpec


def plan(
    trace: TraceOption = "",
    kinds: Annotated[str, typer.Option(help="Kinds of machines to choose from.")] = "a100,h100,h100cap",
    iso: Annotated[
        str, typer.Option(help="What is given: throughput (the trace), or a budget of cost (an hour) or power (kW).")
    ] = "throughput",
    budget: Annotated[float | None, typer.Option(help="With --iso cost or power.", show_default=False)] = None,
    most: Annotated[int, typer.Option(help="Machines at most, with --iso throughput.", min=2)] = 64,
    most_rate: Annotated[
        float, typer.Option(help="With a budget: the highest rate to look at, over the trace's.")
    ] = 4.0,
    model: Annotated[str, typer.Option(help="How engines behave: vllm or splitwise.")] = "vllm",
    profile: ProfileOption = None,
    llm: LlmOption = "bloom-176b",
    rate: RateOption = 1.0,
    poisson: PoissonOption = None,
    limit: LimitOption = 2000,
    check: Annotated[bool, typer.Option(help="Run what is recommended once more, with the router that serves.")] = True,
    yaml: Annotated[Path | None, typer.Option(help="Write the recommended joinwise.yaml.", show_default=False)] = None,
    helm: Annotated[Path | None, typer.Option(help="Write Helm values of it.", show_default=False)] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots.", show_default=False)] = None,
    json: Annotated[Path | None, typer.Option(help="Write figures to this file.", show_default=False)] = None,
    from_live: Annotated[
        bool, typer.Option("--from-live", help="Say what would help the cluster that runs, by its own last hour.")
    ] = False,
    redis: RedisUrl = None,
    cluster: ClusterName = "joinwise",
    gateway: Annotated[
        list[str] | None,
        typer.Option(help="With --from-live: a gateway's URL; may be repeated.", show_default=False),
    ] = None,
    ledgers: Annotated[
        list[Path] | None,
        typer.Option(help="With --from-live: ledgers that were kept, JSON lines.", show_default=False),
    ] = None,
    served: Annotated[
        str | None, typer.Option(help="With --from-live: the model, where several are served.", show_default=False)
    ] = None,
    token: Token = None,
    ca: Ca = None,
) -> None:
    """Find the cluster that keeps the nine objectives at the least cost, or the most traffic for a budget."""
    from rich.console import Console

    from joinwise.cluster.errors import ConfigError

    if from_live == bool(trace):
        raise ConfigError("a plan is for a --trace, or --from-live for the cluster that runs; say one of them")
    if from_live:
        from joinwise.cluster.cli.plan_live import advise_live

        measured = load_profile(profile, llm) if profile is not None else None
        advise_live(redis, cluster, gateway or (), token, ca, ledgers or (), served, measured, json)
        return
    from joinwise.cluster.plan.page import Story, page
    from joinwise.cluster.plan.recommend import configuration, headroom, helm_values
    from joinwise.cluster.plan.search import Search
    from joinwise.cluster.simulate.outages import Failures
    from joinwise.cluster.simulate.run import simulate, write
    from joinwise.cluster.simulate.trace import parse

    if iso not in ("throughput", "cost", "power") or (budget is None) != (iso == "throughput"):
        raise ConfigError("--iso is throughput, or cost or power with a --budget")
    requests = parse(trace, 0).scaled(rate, limit=limit)
    if poisson is not None:
        requests = requests.redrawn(poisson, 0)
    measured = load_profile(profile, llm)
    names = [measured.kind(name).name for name in dict.fromkeys(kinds.split(","))]
    console = Console(stderr=True)

    def measure(pools: Sequence[PoolSpec], times: float, home: str | None = None, lost: int = 0) -> Mapping[str, float]:
        """Figures of a cluster, of which machines may die in the middle of the trace for good."""
        failing = f", {lost} of {home} fail" if lost else ""
        status.update(f"{', '.join(map(str, pools))} at {times:g} times the rate{failing}")
        policy = "token_jsq" if pools[0].home == "mixed" else "splitwise"
        arrivals = requests.scaled(times)
        failures = [Failures(at=arrivals.seconds / 3, pool=home, machines=lost)] if lost else []
        return simulate(arrivals, pools, measured, model=model, policy=policy, failures=failures).figures

    search = Search(requests, measured, measure)
    with console.status("planning") as status:
        if iso == "throughput":
            found = search.iso_throughput(names, most)
            best = found.cheapest()
        else:
            unit = {name: getattr(measured.kind(name), "price" if iso == "cost" else "power") for name in names}
            found = search.iso_budget(names, budget or 0.0, unit.__getitem__, most_rate)
            best = found.fastest()
        spare = headroom(search, best, measure)
        status.update("checking with the router")
        live = simulate(requests.scaled(best.rate), best.pools, measured, model=model, policy="auto") if check else None
    Console().print(render(found, best, spare, requests.rate))
    if live is not None:
        verdict = "keeps" if live.figures["slo_all_nine"] else "misses"
        Console().print(f"the router that serves {verdict} the nine objectives on it")
    if yaml is not None:
        yaml.write_text(configuration(best, llm), encoding="utf-8")
    if helm is not None:
        helm.write_text(helm_values(best, llm), encoding="utf-8")
    if html is not None:
        kept = bool(live.figures["slo_all_nine"]) if live else None
        command = f"joinwise plan --trace {trace} --kinds {kinds} --iso {iso} --model {model} --llm {llm}"
        tried = list(search.tried.values())
        story = Story(requests.name, requests.rate, iso, best, spare, tried, kept, command)
        html.write_text(page(found, story), encoding="utf-8")
    if json is not None:
        write(
            json,
            {**_figures(found, best, spare, live.figures if live else {}), "simulated": float(len(search.tried))},
            [_row(each) for each in found.candidates],
            command="plan",
            trace=requests.name,
            iso=iso,
            budget=budget,
            model=model,
            llm=llm,
        )


def _figures(found: Plan, best: Candidate, spare: int, live: Mapping[str, float]) -> dict[str, float]:
    whole = [each for each in found.feasible if each.shape.mixed]
    figures = {
        "machines": float(best.machines),
        "price_per_hour": best.price,
        "power_kw": best.power,
        "rate": best.rate,
        "split": float(not best.shape.mixed),
        "headroom_machines": float(spare),
        "front": float(len(found.front)),
    }
    if whole:
        figures |= {
            "price_over_whole": best.price / min(each.price for each in whole),
            "rate_over_whole": best.rate / max(each.rate for each in whole),
        }
    if live:
        figures["router_slo_all_nine"] = live["slo_all_nine"]
    return figures


def _row(each: Candidate) -> dict[str, object]:
    return {
        "shape": str(each.shape),
        "pools": str(each),
        "meets": each.meets,
        "rate": each.rate,
        "machines": each.machines,
        "price_per_hour": each.price,
        "power_kw": each.power,
        "over": dict(each.over),
    }


def render(found: Plan, best: Candidate, spare: int, rate: float) -> RenderableType:
    """A row a shape, the front marked, then the recommendation and why."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table("", box=None, header_style="bold", pad_edge=False)
    table.add_column("pools", no_wrap=True)
    for name in ("requests/s", "machines", "price/h", "kW", "objectives"):
        table.add_column(name, justify="right")
    for each in sorted(found.candidates, key=lambda each: (not each.meets, each.price, each.power)):
        numbers = (f"{each.rate * rate:.1f}", str(each.machines), f"{each.price:.0f}", f"{each.power:.0f}")
        verdict = "met" if each.meets else f"{each.worst:.2f}x over"
        table.add_row("*" if each in found.front else "", str(each), *numbers, verdict)
    split = "do not split" if best.shape.mixed else "split"
    lines = [
        Text(f"recommended: {best} ({split}); {best.price:.0f} an hour, {best.power:.0f} kW", style="bold green"),
        Text(f"any one pool may lose {spare} machines and the objectives are still met" + (", or more" * (spare == 3))),
        Text("* the front: no other cluster is better in rate, price or power and no worse in the others", style="dim"),
    ]
    return Group(table, *lines)
