"""`joinwise simulate`: a trace through a cluster that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from joinwise.cluster.simulate.profile import Profile
    from joinwise.cluster.simulate.run import Result

TraceOption = Annotated[
    str,
    typer.Option(
        help="A trace (Azure or SplitwiseSim CSV, Mooncake JSONL, .gz), or poisson:rate=2,seconds=60 (+ joins several)."
    ),
]
ProfileOption = Annotated[
    Path | None,
    typer.Option(
        help="Measured times, YAML or perf_model.csv; without one those of the Splitwise paper.", show_default=False
    ),
]
LlmOption = Annotated[str, typer.Option(help="The language model, as the profile names it.")]
RateOption = Annotated[float, typer.Option(help="Let requests come so many times as often.")]
PoissonOption = Annotated[
    float | None,
    typer.Option(
        help="Let requests of the trace's lengths come independently, so many a second.", min=1e-6, show_default=False
    ),
]
LimitOption = Annotated[
    int | None, typer.Option(help="Take the first so many requests only.", min=1, show_default=False)
]


def simulate(
    trace: TraceOption,
    pools: Annotated[str, typer.Option(help="Such as prompt=25xh100,token=15xh100, or mixed=40xh100.")],
    model: Annotated[
        str, typer.Option(help="How engines and links behave: vllm, or splitwise for SplitwiseSim's assumptions.")
    ] = "vllm",
    policy: Annotated[
        str | None,
        typer.Option(
            help="auto or always (the router that serves, by router.split); splitwise, round_robin, p2c, token_jsq.",
            show_default="auto; splitwise with --model splitwise",
        ),
    ] = None,
    profile: ProfileOption = None,
    llm: LlmOption = "bloom-176b",
    rate: RateOption = 1.0,
    poisson: PoissonOption = None,
    prompt_scale: Annotated[float, typer.Option(help="Make prompts so many times as long.")] = 1.0,
    output_scale: Annotated[float, typer.Option(help="Make answers so many times as long.")] = 1.0,
    limit: LimitOption = None,
    fail: Annotated[
        list[str] | None,
        typer.Option(
            help="Machines that die: at=30,pool=decode,machines=2,down=120, or mtbf=3600,down=120 for each of them; "
            "start= is what its engine takes to start, notice= until the cluster knows. May be repeated.",
            show_default=False,
        ),
    ] = None,
    autoscale: Annotated[
        list[str] | None,
        typer.Option(
            help="A pool that scales: pool=decode,least=1,target=5,up=10,down=60,start=60, all but the pool with these "
            "defaults; --pools says the most. The file then has the pools over time. May be repeated.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of made traces, and of policies and failures that draw lots.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write figures to this file.", show_default=False)] = None,
) -> None:
    """Run a trace through a cluster on a virtual clock: latencies, slowdowns, and whether the objectives are met."""
    from rich.console import Console

    from joinwise.cluster.simulate.outages import parse_failures
    from joinwise.cluster.simulate.pools import parse_pools
    from joinwise.cluster.simulate.run import simulate as run
    from joinwise.cluster.simulate.run import write
    from joinwise.cluster.simulate.scaling import parse_bounds
    from joinwise.cluster.simulate.trace import parse

    requests = parse(trace, seed).scaled(rate, prompt_scale, output_scale, limit)
    if poisson is not None:
        requests = requests.redrawn(poisson, seed)
    cluster, measured = parse_pools(pools), load_profile(profile, llm)
    failures = [parse_failures(text) for text in fail or ()]
    bounds = [parse_bounds(text) for text in autoscale or ()]
    with Console(stderr=True).status("simulating"):
        result = run(
            requests, cluster, measured, model=model, policy=policy, seed=seed, failures=failures, bounds=bounds
        )
    Console().print(render(result))
    if json is not None:
        about: dict[str, Any] = {
            "trace": requests.name,
            "pools": pools,
            "model": model,
            "policy": policy,
            "llm": llm,
            "seed": seed,
        }
        about |= {"fail": fail, "autoscale": autoscale, "extrapolated": result.outcome.beyond}
        bench, rows = ("scaling", result.timeline) if result.timeline else ("simulate", result.rows)
        write(json, result.figures, rows, bench=bench, **about)


def load_profile(path: Path | None, llm: str) -> Profile:
    """The profile that the options name."""
    from joinwise.cluster.simulate.profile import load, shipped

    return shipped(llm) if path is None else load(path, llm)


def render(result: Result) -> RenderableType:
    """Percentiles beside their limits, then what else there is to say."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from joinwise.cluster.simulate.report import PERCENTILES, SLOS, missed

    found = result.figures
    table = Table("", *(f"p{percent}" for percent in PERCENTILES), box=None, header_style="bold", pad_edge=False)
    for name, unit in (("ttft", "s"), ("tbt", "ms"), ("e2e", "s"), ("handoff", "s")):
        if f"{name}_p50_{unit}" in found:  # where nothing is split there is no hand-off
            table.add_row(f"{name} ({unit})", *(f"{found[f'{name}_p{percent}_{unit}']:.3f}" for percent in PERCENTILES))
    for name, limits in SLOS.items():
        values = (found[f"{name}_slowdown_p{percent}"] for percent in PERCENTILES)
        cells = (f"{value:.2f} (<= {limit:g})" for value, limit in zip(values, limits, strict=True))
        table.add_row(f"{name} slowdown", *cells)
    lines: list[RenderableType] = [table]
    over = missed(found)
    if not over and not found["refused"]:
        lines.append(Text("all nine objectives are met", style="bold green"))
    for name, factor in over.items():
        lines.append(Text(f"{name} is {factor:.2f} times its limit", style="red"))
    if found["refused"]:
        lines.append(Text(f"{found['refused']:.0f} requests were refused, or ended with an error", style="red"))
    if found["moved"]:
        again = f"{found['again_tokens']:.0f} tokens were computed again"
        lines.append(Text(f"{found['moved']:.0f} times a request lost its machine and went on elsewhere; {again}"))
    for what, times in result.outcome.beyond.items():
        lines.append(Text(f"extrapolated: {what}, {times} times beyond the profile's measurements", style="yellow"))
    busy = ", ".join(f"{row['pool']} {row['utilization']:.0%}" for row in result.rows)
    lines.append(Text(f"{found['tokens_per_s']:.0f} tokens/s; busy: {busy}"))
    return Group(*lines)
