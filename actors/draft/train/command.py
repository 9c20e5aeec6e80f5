"""`joinwise train-draft`: the command line of a training. What is heavy is imported once everything was looked at."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from joinwise.actors.draft.train.prompts import HELD_OUT, Asked, read_prompts
from joinwise.actors.draft.train.saying import Say
from joinwise.cluster.errors import ConfigError


def train_draft(
    target: Annotated[str, typer.Option(help="The model to draft for: a built-in name, a folder, a hub id")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the head, and of all that it is made from")],
    prompts: Annotated[
        list[Path] | None, typer.Option(help="JSON lines with `turns` or `prompt`; may be repeated", show_default=False)
    ] = None,
    own_prompts: Annotated[int, typer.Option(help="Prompts that the target makes itself, as well", min=0)] = 0,
    opening: Annotated[
        list[str] | None, typer.Option(help="What these begin with; repeated: in turn", show_default="nothing")
    ] = None,
    measured: Annotated[
        list[Path] | None,
        typer.Option("--measure", help="As --prompts, to measure with alone; may be repeated", show_default=False),
    ] = None,
    blocks: Annotated[int, typer.Option(help="Decoder blocks", min=1, max=6)] = 1,
    steps: Annotated[int, typer.Option(help="Of training", min=1)] = 600,
    batch: Annotated[int, typer.Option(help="Answers a step", min=1)] = 4,
    rate: Annotated[float, typer.Option(help="Of learning, at its highest", min=0.0)] = 1e-3,
    answer_tokens: Annotated[int, typer.Option(help="Of an answer of the target, at most", min=2)] = 128,
    held_out: Annotated[float, typer.Option(help="Share of prompts to measure with", min=0.01, max=0.9)] = 0.2,
    limit: Annotated[int | None, typer.Option(help="Take so many prompts", min=1, show_default=False)] = None,
    k: Annotated[int, typer.Option(help="Drafts of a round in the report", min=1, max=64)] = 4,
    seed: Annotated[int, typer.Option(help="Of all that is drawn", min=0)] = 0,
    threads: Annotated[int | None, typer.Option(help="Of the CPU; all cores by default", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what was interrupted in --out")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON")] = False,
) -> None:
    """Distil a draft head from a model's own answers, and measure it on prompts that it never saw."""
    asked = Asked(tuple(read_prompts(prompts or [])), held_out, limit, _by_name(measured or []))
    if not own_prompts:
        asked.with_own([])  # says now if there are too few
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from joinwise.actors.draft.train.run import REPORT, Plan, prepare, train
    from joinwise.actors.models import resolve_model

    console = Console(stderr=True, highlight=False)
    plan = Plan(
        blocks=blocks,
        steps=steps,
        batch=batch,
        rate=rate,
        seed=seed,
        own_prompts=own_prompts,
        openings=tuple(opening or [""]),
        answer_tokens=answer_tokens,
        k=k,
        threads=threads or len(os.sched_getaffinity(0)),
    )
    with console.status("looking for the target") as status:
        model = resolve_model(target, progress=status.update)
    prepare(out, model, asked, plan, resume=resume)
    with _progress(console) as say:
        figures = train(out, model, asked, plan, say)
    if json:
        typer.echo((out / REPORT).read_text(encoding="utf-8"))
        return
    for name in (HELD_OUT, *asked.measured):
        Console().print(_table(figures, k, name))
    console.print(f"{out} holds the head; {figures['held_out_prompts']:.0f} prompts were kept from it")


def _by_name(files: Sequence[Path]) -> dict[str, tuple[str, ...]]:
    """Prompts by the name of their file.

    Raises:
        ConfigError: as `read_prompts`; or two would go by one name, or a file is empty.
    """
    found: dict[str, tuple[str, ...]] = {}
    for file in files:
        if file.stem in (*found, HELD_OUT):
            raise ConfigError(f"the report would name two kinds of prompts {file.stem!r}: rename {file}")
        found[file.stem] = tuple(dict.fromkeys(read_prompts([file])))
        if not found[file.stem]:
            raise ConfigError(f"there are no prompts in {file}")
    return found


@contextmanager
def _progress(console: Console) -> Iterator[Say]:
    """A bar for each part of the work."""
    columns = (TextColumn("{task.description}"), BarColumn(12), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[remark]}"), console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def say(what: str, done: int, total: int, remark: str) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, remark=remark)
            progress.update(tasks[what], completed=done, total=total, remark=remark)

        yield say


def _table(figures: Mapping[str, float], k: int, prompts: str) -> Table:
    names = ("drafter", "right drafts a round", "tokens a round", "of its drafts right")
    table = Table(*names, title=f"{prompts} prompts, {k} drafts a round")
    of = "" if prompts == HELD_OUT else f"_{prompts}"
    for name in ("head", "lookup", "both"):
        length, tokens, share = (
            figures[f"{what}_{name}{of}"] for what in ("accepted_length", "tokens_per_round", "accepted_share")
        )
        table.add_row(name, f"{length:.2f}", f"{tokens:.2f}", f"{share:.0%}")
    return table
