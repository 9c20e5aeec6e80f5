"""`joinwise bench ...`: every claim about speed comes from one of these."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from joinwise.actors.bench.console import Json, console, progress, show_figures
from joinwise.actors.bench.speculate_commands import speculate, verify

bench = typer.Typer(help="Measure against a named baseline, in the same run.", no_args_is_help=True)
_HANDOFF_SHOWN = (
    "link",
    "transport",
    "codec",
    "prompt_tokens",
    "decode_step_ms",
    "exposed_ms",
    "gap_ms",
    "same_tokens",
)


@bench.callback()
def _group() -> None:
    """Measure against a named baseline, in the same run."""


@bench.command()
def serve(
    requests: Annotated[int, typer.Option(help="Prompts, of 10 to 1,500 tokens", min=3)] = 24,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate for each", min=8)] = 64,
    dtype: Annotated[list[str] | None, typer.Option(help="Element types; both by default")] = None,
    json: Json = None,
) -> None:
    """The split cluster against plain vLLM on one core and on two."""
    from joinwise.actors.bench import report
    from joinwise.actors.bench.serve import run

    with progress() as say:
        figures, rows = run(requests, max_tokens, dtype or ["float32", "bfloat16"], say)
    show_figures("serve", figures)
    if json is not None:
        cores = "split: two engines on one core each, gateway free; plain: engine on the cores named, server free"
        report.write(json, "serve", figures, rows, report.machine(sides=cores, kv_block_size=32))


@bench.command()
def handoff(
    transport: Annotated[list[str] | None, typer.Option(help="kv.transport; shm, tcp and grpc by default")] = None,
    codec: Annotated[list[str] | None, typer.Option(help="kv.codec of each transport; none by default")] = None,
    link: Annotated[
        list[str] | None, typer.Option(help="Over a link of this rate, such as 1gbit; tcp with each codec by default")
    ] = None,
    longest: Annotated[int, typer.Option(help="Tokens of the longest prompts: 4000 or 1500", min=1500)] = 4000,
    dtype: Annotated[str, typer.Option(help="Element type of model and cache")] = "float32",
    repeats: Annotated[int, typer.Option(help="Prompts of each length", min=1)] = 5,
    json: Json = None,
) -> None:
    """What a request waits for between prefill and decode: by prompt length, transport, codec and link."""
    from joinwise.actors.bench import kv_nixl, report
    from joinwise.actors.bench.handoff import LENGTHS, Side, run

    transports = transport or (["tcp"] if link else ["shm", "tcp", "grpc"])
    codecs = codec or (["none", "lossless", "int8", "fp8"] if link else ["none"])
    sides = [Side(each, how, rate) for rate in link or [""] for each in transports for how in codecs]
    if said := kv_nixl.missing():
        console.print(f"not measured: {said}")
    with progress() as say:
        lengths = [length for length in LENGTHS if length <= longest]
        figures, rows = run(sides, lengths, dtype, repeats, not said, say)
    table = Table(*_HANDOFF_SHOWN, title="joinwise bench handoff")
    for row in ({name: row[name] for name in _HANDOFF_SHOWN} for row in rows):
        table.add_row(
            *(
                "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
                for value in row.values()
            )
        )
    Console().print(table)
    show_figures("handoff", figures)
    if json is not None:
        how = "two engines on one core each, gateway free; one cluster per side, one after the other"
        report.write(json, "handoff", figures, rows, report.machine(sides=how, kv_block_size=32))


@bench.command()
def gateway(
    requests: Annotated[int, typer.Option(help="Streams through each system, each round", min=8)] = 100,
    at_once: Annotated[int, typer.Option(help="Of them", min=1)] = 4,
    rounds: Annotated[int, typer.Option(help="Rounds for the medians", min=1)] = 5,
    tls: Annotated[
        Path | None, typer.Option(help="Folder with tls.crt, tls.key and ca.crt for 127.0.0.1: measure TLS too")
    ] = None,
    json: Json = None,
) -> None:
    """CPU and delay between a client and an engine that costs nothing: joinwise, vLLM's server, other routers."""
    from joinwise.actors.bench import ray_pd, report
    from joinwise.actors.bench.gateway import run

    absent = ray_pd.missing()
    how = "stub engines, 5 ms a step, processes free to run on every core; split: real engines, one core each"
    machine = report.machine(sides=how, at_once=at_once, requests=requests)
    with progress() as say:
        figures, rows, missing = run(requests, at_once, rounds, say, tls)
        if json is not None:
            report.write(json, "gateway", figures, rows, machine)
        if not absent:
            split, split_rows = ray_pd.run(requests // 4, rounds, say)
            figures, rows = figures | split, rows + split_rows
            if json is not None:
                report.write(json, "gateway", figures, rows, machine)
    for line in missing + absent:
        console.print(f"not measured: {line}")
    for row in rows:
        Console().print(row)
    show_figures("gateway", figures)


@bench.command()
def goodput(
    trace: Annotated[
        list[str], typer.Option(help="FILE:PROMPT:ANSWER, a trace and the factors of its lengths; may be repeated")
    ],
    requests: Annotated[int, typer.Option(help="At each rate", min=10)] = 40,
    seeds: Annotated[int, typer.Option(help="Of requests and their arrivals", min=1)] = 3,
    json: Json = None,
) -> None:
    """Traffic served within limits on two cores: `auto` and `always` against two plain engines behind vllm-router.

    Rows of other traces in the JSON file are kept.
    """
    from joinwise.actors.bench import report
    from joinwise.actors.bench.goodput import figures_of, parse, run

    kept = report.rows_of(json, "goodput") if json is not None and json.exists() else []
    how = "two engines on one core each on every side, idle while another is measured; the client on the same cores"
    with progress() as say:
        for rows in run([parse(each) for each in trace], requests, seeds, say):
            kept = [row for row in kept if row["trace"] != rows[0]["trace"]] + rows
            figures = figures_of(kept)
            if json is not None:
                described = report.machine(sides=how, requests=requests, seeds=seeds)
                report.write(json, "goodput", figures, kept, described)
    show_figures("goodput", figures)


@bench.command()
def router(
    decisions: Annotated[int, typer.Option(help="Decisions by each gateway", min=64)] = 2000,
    race: Annotated[int, typer.Option(help="Decisions by each of 8 processes in the race", min=100)] = 5000,
    json: Json = None,
) -> None:
    """Decisions of the router: how many, how fast, and right under a race. Needs no engine."""
    from joinwise.actors.bench import report
    from joinwise.actors.bench.route import run

    with progress() as say:
        figures, rows = run(decisions, race, say)
    show_figures("router", figures)
    if json is not None:
        sides = "one embedded Redis; gateways are processes of their own; all share the cores"
        report.write(json, "router", figures, rows, report.machine(sides=sides))


@bench.command()
def kv(
    size: Annotated[list[int] | None, typer.Option(help="Megabytes moved at once; 1 to 256 by default", min=1)] = None,
    repeats: Annotated[int, typer.Option(help="Pairs of measurements for each median", min=1)] = 7,
    gpu: Annotated[bool, typer.Option("--gpu", help="Memory of a GPU at either end, and its kernels, instead")] = False,
    tls: Annotated[
        Path | None,
        typer.Option(help="Instead: with TLS against without; a folder with tls.crt, tls.key and ca.crt, for joinwise"),
    ] = None,
    json: Json = None,
) -> None:
    """The KV transports against blocking TCP and NIXL; packing and codecs against memcpy."""
    from joinwise.actors.bench import kv as bench_kv
    from joinwise.actors.bench import kv_device, kv_tls, report

    with progress() as say:
        if tls is not None:
            found, rows = kv_tls.run(tls, size or kv_tls.SIZES_MB, repeats, say)
            figures: dict[str, float | None] = {**found}
        else:
            measure = kv_device.run if gpu else bench_kv.run
            figures, rows = measure(size or bench_kv.SIZES_MB, repeats, say)
    table = Table("figure", "value", "at least", title="joinwise bench kv")
    for name, value in figures.items():
        target = bench_kv.TARGETS.get(name)
        table.add_row(name, "not measured" if value is None else f"{value:g}", "" if target is None else f"{target:g}")
    details = bench_kv.tables(rows)
    Console().print(*details, table)
    if json is not None:
        ends = "two processes, one core each; medians of alternated pairs; figures of sizes from 16 MB on"
        report.write(json, "kv" if tls is None else "kv-tls", figures, rows, report.machine(ends=ends, repeats=repeats))


@bench.command()
def simulate(
    requests: Annotated[int, typer.Option(help="Requests of the run over 1,000 machines", min=1000)] = 1_000_000,
    json: Json = None,
) -> None:
    """The simulator with the real router: requests a second, memory, and whether the same seed gives the same bytes."""
    from joinwise.actors.bench import report
    from joinwise.actors.bench.simulate import run

    with progress() as say:
        figures, rows = run(requests, say)
    show_figures("simulate", figures)
    if json is not None:
        sides = "one process and one embedded Redis a run; both share the cores"
        report.write(json, "simulate", figures, rows, report.machine(sides=sides))


@bench.command()
def fidelity(
    mixed: Annotated[bool, typer.Option("--mixed", help="Two engines for both phases, not one for each")] = False,
    rate: Annotated[float, typer.Option(help="Requests a second", min=0.01)] = 0.8,
    seconds: Annotated[float, typer.Option(help="Of each of the two traces", min=10)] = 90.0,
    profile_seconds: Annotated[float, typer.Option(help="Of the profile of both engines", min=0)] = 40.0,
    json: Json = None,
) -> None:
    """A trace through a cluster on this machine and through the simulator of it: percentiles side by side."""
    from joinwise.actors.bench import report
    from joinwise.actors.bench.fidelity import METRICS, run

    shape: Literal["split", "mixed"] = "mixed" if mixed else "split"
    with progress() as say:
        figures, rows = run(shape, rate, seconds, profile_seconds, say)
    table = Table("", "cluster", "simulated", "error", "alone", title="joinwise bench fidelity")
    for name in (f"{metric}_p{percent}" for metric in METRICS for percent in (50, 90, 99)):
        real, ours = (f"{figures[f'{name}_{side}']:.3f}" for side in ("real", "simulated"))
        table.add_row(name, real, ours, *(f"{figures[f'{name}_{side}']:+.1%}" for side in ("error", "error_alone")))
    Console().print(table)
    show_figures("fidelity", {name: value for name, value in figures.items() if "_p" not in name})
    if json is not None:
        how = "two engines on one core each; gateway, client, Redis and Ray free to run on both"
        report.write(json, "fidelity", figures, rows, report.machine(sides=how, shape=shape, rate=rate))


bench.command()(speculate)
bench.command()(verify)
