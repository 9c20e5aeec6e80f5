"""`joinwise profile`: measures how long a real engine takes, for `joinwise simulate` and `joinwise plan`.

Points are measured in rounds, each round all of them, so that a machine whose speed drifts tilts no table.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
import yaml
from rich.console import Console
from rich.table import Table

from joinwise.cluster.config import DEMO_MODEL
from joinwise.cluster.errors import ConfigError
from joinwise.cluster.simulate import fit as fitting
from joinwise.cluster.simulate.fit import Facts, Fit, Timing

_STEPS = 8  # of each batch and context, each round
_LEAST_PROMPT = 32
_SHORTEST_CONTEXT = 64


class Engine(Protocol):
    """What is measured: `vllm.stepping.SteppedEngine`, or a test's."""

    max_model_len: int
    max_tokens: int
    layers: int
    kv_bytes: int
    kv_tokens: int

    def prefill(self, tokens: int) -> float:
        """Compute one prompt; returns seconds."""

    def decode(self, batches: Sequence[int], context: int, steps: int) -> Iterator[tuple[int, float]]:
        """Decode so many steps with each number of sequences; yields (batch, seconds)."""


def profile(
    out: Annotated[Path, typer.Option("--out", "-o", help="The profile, YAML; one that is there gets a machine more")],
    model: Annotated[str, typer.Option(help="As in joinwise.yaml: a built-in name, a folder, a hub id")] = DEMO_MODEL,
    kind: Annotated[str, typer.Option(help="A name for this kind of machine")] = "here",
    longest: Annotated[int, typer.Option(help="Tokens of the longest prompt and context", min=_LEAST_PROMPT)] = 2048,
    batch: Annotated[int, typer.Option(help="Most sequences in a batch", min=1)] = 16,
    context: Annotated[int, typer.Option(help="Tokens of each sequence in a batch", min=1)] = 512,
    seconds: Annotated[float, typer.Option(help="Measure for so long; one round at least", min=0)] = 120.0,
    threads: Annotated[int | None, typer.Option(help="Of the CPU; all cores by default", show_default=False)] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="An argument of vLLM, such as dtype=float32; may be repeated")
    ] = None,
    price: Annotated[float, typer.Option(help="Of an hour", min=0)] = 1.0,
    power: Annotated[float, typer.Option(help="Kilowatts", min=0)] = 1.0,
    link: Annotated[float, typer.Option(help="Bytes a second of the network card", min=1)] = 1.25e9,
    json: Annotated[Path | None, typer.Option(help="Write every timing to this file", show_default=False)] = None,
) -> None:
    """Measure this machine with this model: prefill and decode times over prompt tokens, batch and context."""
    from joinwise.actors import cpu
    from joinwise.actors.models import resolve_model

    arguments = _arguments(engine or [])
    os.environ.update(cpu.environment(threads or len(os.sched_getaffinity(0))))
    console = Console(stderr=True, highlight=False)
    with console.status("starting an engine") as status:
        local = resolve_model(model, progress=status.update)
        from joinwise.actors.vllm.stepping import SteppedEngine

        room = {"max_num_batched_tokens": max(longest, batch), "max_num_seqs": batch}
        stepped = SteppedEngine(local.path, {**room, **_defaults(), **arguments})
        try:
            timings = measure(stepped, longest, batch, context, seconds, status.update)
            facts = Facts(
                kind=kind,
                llm=local.name,
                weight_bytes=sum(file.stat().st_size for file in local.path.glob("*.safetensors")),
                kv_bytes=stepped.kv_bytes,
                kv_tokens=stepped.kv_tokens,
                layers=stepped.layers,
                link_bytes_s=link,
                price=price,
                power=power,
            )
        finally:
            stepped.close()
    found = fitting.fit(timings, context)
    fitting.save(out, facts, found)
    Console().print(render(found, len(timings)))
    if json is not None:
        from joinwise.actors.bench import report

        described = report.machine(model=local.name, engine=arguments, threads=threads)
        figures = {"spread": found.spread, "lifted": found.lifted, "steps": float(len(timings))}
        report.write(json, "profile", figures, [each._asdict() for each in timings], described)


def measure(
    engine: Engine,
    longest: int,
    batch: int,
    context: int,
    seconds: float,
    say: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Timing]:
    """Time an engine's steps, for so long or for one round.

    Args:
        longest: tokens of the longest prompt, and of the longest context.
        batch, context: most sequences, and tokens of each in the steps that go by batch.

    Raises:
        ConfigError: the engine cannot hold what is to be measured; the message says what it can.
    """
    _check(engine, longest, batch, context)
    prompts = _doubling(_LEAST_PROMPT, longest)
    contexts = sorted({*_doubling(min(_SHORTEST_CONTEXT, longest), longest), context})
    batches = _doubling(1, batch)
    engine.prefill(prompts[0])  # the first step of a process pays for much that comes once
    found: list[Timing] = []
    until, rounds = clock() + seconds, 0
    while not rounds or clock() < until:
        rounds += 1
        for tokens in prompts:
            say(f"round {rounds}: a prompt of {tokens} tokens")
            found.append(Timing("prefill", 1, tokens, engine.prefill(tokens)))
        for tokens in contexts:
            sizes = batches if tokens == context else [1]
            say(f"round {rounds}: {max(sizes)} sequences of {tokens} tokens")
            found += [Timing("step", size, tokens, took) for size, took in engine.decode(sizes, tokens, _STEPS)]
    return found


def _check(engine: Engine, longest: int, batch: int, context: int) -> None:
    """That all of it fits, with the tokens that are decoded meanwhile."""
    grown = _STEPS * (batch.bit_length() + 1) + 1
    if max(longest, context) + grown > engine.max_model_len:
        raise ConfigError(
            f"the model takes {engine.max_model_len} tokens, and the longest context would have "
            f"{max(longest, context) + grown}; lower --longest or --context"
        )
    if longest > engine.max_tokens:
        raise ConfigError(f"a step has at most {engine.max_tokens} tokens; a prompt of {longest} takes more than one")
    needed = max(longest + grown, batch * (context + grown))
    if needed > engine.kv_tokens:
        raise ConfigError(
            f"{batch} sequences of {context} tokens need {needed} tokens of KV cache, and {engine.kv_tokens} fit; "
            "lower --batch or --context, or give the engine more with --engine kv_cache_memory_bytes=..."
        )


def _doubling(first: int, last: int) -> list[int]:
    """From the first, twice as many each time, and the last."""
    found = []
    while first < last:
        found.append(first)
        first *= 2
    return [*found, last]


def _defaults() -> dict[str, Any]:
    """Where there is no GPU: no compiling, which takes minutes, and a cache of a size that does not depend on luck."""
    import torch

    return {} if torch.cuda.is_available() else {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30}


def _arguments(given: Sequence[str]) -> dict[str, Any]:
    found = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not name or not equals:
            raise ConfigError(f"--engine {each!r} is no argument; write it as dtype=float32")
        found[name.replace("-", "_")] = yaml.safe_load(value)
    return found


def render(found: Fit, timings: int) -> Table:
    """The tables as they are printed."""
    table = Table("table", "milliseconds", box=None, header_style="bold", pad_edge=False)
    for name, points in found.tables.items():
        table.add_row(name, "  ".join(f"{count}: {ms:.1f}" for count, ms in points.items()))
    table.add_row("", f"{timings} steps timed; quartiles {found.spread:.0%} apart; moved by {found.lifted:.0%} at most")
    return table
