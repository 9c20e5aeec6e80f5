"""`joinwise up`, `down` and `demo`: the commands that start and stop a cluster on this machine."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from joinwise.actors import runfile
from joinwise.cluster import env
from joinwise.cluster.config import JoinwiseConfig, load_config
from joinwise.cluster.errors import ConfigError, JoinwiseError

console = Console(stderr=True, highlight=False)
File = Annotated[Path | None, typer.Option("--file", "-f", help="joinwise.yaml; the demo's configuration without it")]

_DEMO_PROMPT = "In two sentences: why is the sky blue?"


def up(
    file: File = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once the cluster is ready")] = False,
) -> None:
    """Start a cluster: on this machine, or in the Ray cluster that the configuration names."""
    config = load_config(file)
    if detach:
        facts = _start_detached(config, file)
        console.print(f"[green]ready[/] {facts['addresses']['http']} (HTTP), {facts['addresses']['grpc']} (gRPC)")
        console.print("stop it with [bold]joinwise down[/]")
        return
    from joinwise.actors.launch import run

    begin = time.monotonic()
    asyncio.run(run(config, lambda line: console.print(f"[dim][{time.monotonic() - begin:6.1f} s][/] {line}")))


def down(
    file: File = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for running requests")] = 60.0,
) -> None:
    """Stop the cluster that runs on this machine: running requests may end first."""
    config = load_config(file)
    if not _stop(config.cluster, timeout):
        console.print(f"cluster {config.cluster!r} does not run on this machine")


def demo(
    prompt: Annotated[str, typer.Argument(help="What to ask the bundled model")] = _DEMO_PROMPT,
) -> None:
    """Start a small cluster here, ask it something, show where the time went, stop it."""
    from joinwise.actors.models import resolve_model
    from joinwise.cluster.cli.ledger import render_ledger
    from joinwise.cluster.client import Client
    from joinwise.cluster.client.types import Delta

    begin = time.monotonic()
    config = load_config(None)
    for model in config.models:
        resolve_model(model.model, revision=model.revision, progress=lambda line: console.print(f"[dim]{line}[/]"))
    facts = _start_detached(config, None)
    try:
        out = Console(highlight=False)
        console.print(f"\n[bold]{prompt}[/]")
        with Client(facts["addresses"]["grpc"]) as client:
            first: float | None = None
            with client.generate(
                messages=[{"role": "user", "content": prompt}], max_tokens=96, temperature=0.0, stream=True
            ) as stream:
                for event in stream:
                    if isinstance(event, Delta) and event.text:
                        first = first or time.monotonic()
                        out.print(event.text, end="")
                out.print("\n")
            if stream.ledger is not None:
                out.print(render_ledger(stream.ledger))
        if first is not None:
            console.print(f"[dim]first token {first - begin:.1f} s after the command was given[/]")
    finally:
        _stop(config.cluster, 60.0)
        console.print("[dim]stopped[/]")


def _start_detached(config: JoinwiseConfig, file: Path | None) -> dict[str, Any]:
    """Start the launcher in a session of its own, show its progress, and wait until it is ready."""
    if runfile.running(config.cluster):
        raise ConfigError(f"cluster {config.cluster!r} runs on this machine already: `joinwise down` stops it")
    log = env.home(os.environ) / "log" / f"{config.cluster}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "joinwise.actors.launch", *(["-f", str(file.resolve())] if file else [])]
    with log.open("w") as output:
        launcher = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
    shown = 0
    with console.status("starting"), log.open() as lines:
        while True:
            for line in lines:
                if line.startswith("["):
                    console.print(f"[dim]{line.rstrip()}[/]", markup=True)
                shown += 1
            facts = runfile.running(config.cluster)
            if facts.get("ready"):
                return facts
            if launcher.poll() is not None:
                tail = "".join(log.read_text().splitlines(keepends=True)[-15:])
                raise ConfigError(f"the cluster did not start; the end of {log}:\n{tail}")
            time.sleep(0.1)


def _stop(cluster: str, timeout: float) -> bool:
    """Stop a launcher; returns False when there is none."""
    facts = runfile.running(cluster)
    if not facts:
        return False
    pid = int(facts["pid"])
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout
    while runfile.running(cluster):
        if time.monotonic() > deadline:
            os.killpg(os.getpgid(pid), signal.SIGKILL)
            raise JoinwiseError(f"cluster {cluster!r} did not stop within {timeout:.0f} s and was killed")
        time.sleep(0.1)
    _reap(pid)
    return True


def _reap(pid: int) -> None:
    """A launcher that this process started leaves a zombie otherwise."""
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass
