"""`joinwise bench speculate` and `joinwise bench verify`: drafts, and the layers that verify them."""

import shutil
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console

from joinwise.actors.bench.console import Json, progress, show_figures


def speculate(
    dataset: Annotated[list[str] | None, typer.Option(help="Of the prompts; humaneval and gsm8k by default")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Answers at once; 1 and 4 by default", min=1)] = None,
    side: Annotated[
        list[str] | None, typer.Option(help="Beside the engine without speculation: silent, lookup, fixed, ...")
    ] = None,
    first: Annotated[int, typer.Option(help="The first prompt of each dataset", min=0)] = 0,
    count: Annotated[int, typer.Option("--prompts", help="Prompts of each dataset", min=1)] = 4,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most", min=2, max=512)] = 64,
    target: Annotated[str, typer.Option(help="The model that answers")] = "qwen2.5-coder-1.5b-instruct",
    draft: Annotated[str, typer.Option(help="The model that drafts")] = "qwen2.5-coder-0.5b-instruct",
    dtype: Annotated[str, typer.Option(help="Of the target's weights")] = "bfloat16",
    draft_dtype: Annotated[str, typer.Option(help="Of the draft's weights")] = "bfloat16",
    k: Annotated[int, typer.Option(help="Drafts a step, where their number is fixed", min=1, max=32)] = 4,
    most: Annotated[int, typer.Option(help="Of the adaptive side and of those that replay", min=1, max=32)] = 8,
    apart: Annotated[
        bool, typer.Option("--apart", help="One engine in memory at a time: tokens are compared, times are not")
    ] = False,
    engine: Annotated[
        list[str] | None, typer.Option(help="An argument of vLLM for both engines, such as quantization=joinwise")
    ] = None,
    draft_core: Annotated[
        int | None, typer.Option(help="A core for the draft actors alone; the engines have the others", min=0)
    ] = None,
    draft_gpu: Annotated[
        bool, typer.Option("--draft-gpu", help="The draft model on a GPU, the target on CPUs; says why where it cannot")
    ] = False,
    draft_python: Annotated[
        str | None, typer.Option(help="The draft actors' interpreter: one with joinwise and a torch for GPUs")
    ] = None,
    data: Annotated[Path, typer.Option(help="Folder of <dataset>.jsonl")] = Path("../shared/data/prompts"),
    json: Json = None,
) -> None:
    """Answers with drafts against answers without. A result file that is there gets these samples beside its own."""
    from joinwise.actors.bench import gpu, report, speculate_rows
    from joinwise.actors.bench import speculate as it
    from joinwise.actors.bench.speculate_plan import Plan

    sides = speculate_rows.SIDES
    if unknown := set(side or ()) - set(sides):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: there are {', '.join(sides)}", param_hint="--side")
    arguments = {name: yaml.safe_load(value) for name, _, value in (each.partition("=") for each in engine or ())}
    if draft_gpu and (why := gpu.missing(draft_python)):
        Console().print(f"drafts on a GPU are not measured: {why}", soft_wrap=True)
        return
    if draft_python is not None and shutil.which(draft_python) is None:
        raise typer.BadParameter(f"{draft_python} is no program", param_hint="--draft-python")
    plan = Plan(
        target,
        draft,
        dtype,
        draft_dtype,
        k,
        most,
        max_tokens,
        together=not apart,
        engine=arguments,
        draft_core=draft_core,
        draft_gpu=draft_gpu,
        draft_python=draft_python,
    )
    asked = {name: it.texts(data, name, first, count) for name in dataset or ["humaneval", "gsm8k"]}
    how = "two engines take turns on all cores, draft actors beside them on the same; own_device...: a projection"
    rows = report.rows_of(json, "speculate") if json is not None and json.exists() else []
    with progress() as say:
        for fresh in it.run(plan, asked, batch or [1, 4], side or sides, say):
            rows = speculate_rows.merged(rows, fresh)
            if json is not None:
                report.write(json, "speculate", speculate_rows.figures(rows), rows, report.machine(sides=how))
    Console(width=max(Console().width, 132)).print(speculate_rows.table(rows))
    show_figures(
        "speculate", {name: value for name, value in speculate_rows.figures(rows).items() if value is not None}
    )


def verify(
    repeats: Annotated[int, typer.Option(help="Turns of all sides for each median", min=1)] = 7,
    json: Json = None,
) -> None:
    """Linear layers of 1 to 32 rows on all cores: share of memory bandwidth of torch, vLLM's own and ours."""
    from joinwise.actors.bench import report
    from joinwise.actors.bench.verify import run

    with progress() as say:
        figures, rows = run(repeats, say)
    show_figures("verify", figures)
    if json is not None:
        how = "layers of Qwen2.5-Coder-1.5B, activations in bfloat16, in turns with a plain read of as much memory"
        report.write(json, "verify", figures, rows, report.machine(sides=how, repeats=repeats))
