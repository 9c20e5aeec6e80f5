"""`joinwise up`, `down` and `demo`: the commands that start and stop a cluster on this machine.

The terminal shows one line a step; what Ray, vLLM and the actors print goes into a log.
"""

import asyncio
import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.text import Text

from joinwise.actors import runfile
from joinwise.actors.launcher import Launcher
from joinwise.actors.phases import process_began
from joinwise.cluster import env
from joinwise.cluster.cli.options import ConfigFile, config_path
from joinwise.cluster.config import JoinwiseConfig, load_config
from joinwise.cluster.errors import ConfigError, JoinwiseError

console = Console(stderr=True, highlight=False)

_DEMO_PROMPT = "In two sentences: why is the sky blue?"
_POLL_S = 0.1


def up(
    file: ConfigFile = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once the cluster is ready")] = False,
) -> None:
    """Start a cluster: on this machine, or in the Ray cluster that the configuration names."""
    file = config_path(file)
    config = load_config(file)
    _refuse_second(config)
    if detach:
        facts = _start_detached(config, file)
        seconds = time.monotonic() - process_began()
        addresses = f"{facts['addresses']['http']} (HTTP), {facts['addresses']['grpc']} (gRPC)"
        console.print(f"[green]ready[/] after {seconds:.1f} s: {addresses}")
        console.print("stop it with [bold]joinwise down[/]")
        return
    with _output_in_log(config) as terminal, terminal.status("running; Ctrl-C stops the cluster"):
        from joinwise.actors.launch import run

        asyncio.run(run(config, _sayer(terminal)))


def down(
    file: ConfigFile = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for running requests")] = 60.0,
) -> None:
    """Stop the cluster that runs on this machine: running requests may end first."""
    config = load_config(config_path(file))
    if _stop(config.cluster, timeout):
        console.print(f"cluster {config.cluster!r} has stopped")
    else:
        console.print(f"cluster {config.cluster!r} does not run on this machine")


def apply(
    file: Annotated[Path, typer.Option("--file", "-f", help="The new configuration")],
) -> None:
    """Change the cluster that runs on this machine to another configuration: only what it touches restarts, drained."""
    config = load_config(file)
    log = _log_file(config)
    with contextlib.ExitStack() as stack:
        lines: IO[str] = stack.enter_context(log.open(errors="replace")) if log.exists() else io.StringIO()
        lines.seek(0, os.SEEK_END)
        wanted = runfile.wish(config.cluster, file)
        stack.enter_context(console.status("changing"))
        while not runfile.granted(config.cluster, wanted):
            for line in lines:
                if line.startswith("["):
                    console.print(Text(line.rstrip(), style="dim"))
            time.sleep(_POLL_S)
    console.print(f"cluster {config.cluster!r} has changed")


def demo(
    prompt: Annotated[str, typer.Argument(help="What to ask the bundled model")] = _DEMO_PROMPT,
) -> None:
    """Start a small cluster here, ask it something, show where the time went, stop it."""
    begin = process_began()
    config = load_config(None)
    _refuse_second(config)
    environment = {
        "JOINWISE_GATEWAY__HTTP_PORT": "0",
        "JOINWISE_GATEWAY__GRPC_PORT": "0",
        "JOINWISE_ROUTER__SPLIT": "always",  # by its cost so short a prompt runs whole
    }
    facts = _start_detached(config, None, **environment)
    try:
        first = _ask(facts["addresses"]["grpc"], prompt)
        if first is not None:
            console.print(f"[dim]first token {first - begin:.1f} s after the command was given[/]")
    finally:
        with console.status("stopping"):
            _stop(config.cluster, 60.0)
        console.print("[dim]stopped; nothing is left running[/]")


def _ask(target: str, prompt: str) -> float | None:
    """Stream one answer to the terminal, then its ledger; returns when the first token came."""
    from joinwise.cluster.cli.ledger import render_ledger
    from joinwise.cluster.client import Client
    from joinwise.cluster.client.types import Delta

    out = Console(highlight=False)
    out.print(Text(f"\n{prompt}", style="bold"))
    first: float | None = None
    messages = [{"role": "user", "content": prompt}]
    with Client(target) as client:
        with client.generate(messages=messages, max_tokens=96, temperature=0.0, stream=True) as stream:
            for event in stream:
                if isinstance(event, Delta) and event.text:
                    first = first or time.monotonic()
                    out.print(Text(event.text), end="")
            out.print("\n")
        if stream.ledger is not None:
            out.print(render_ledger(stream.ledger))
    return first


def _refuse_second(config: JoinwiseConfig) -> None:
    if facts := runfile.running(config.cluster):
        at = facts["addresses"]["http"] if facts.get("ready") else "not ready yet"
        raise ConfigError(f"cluster {config.cluster!r} runs on this machine already ({at}): `joinwise down` stops it")


def _log_file(config: JoinwiseConfig) -> Path:
    log = env.home(os.environ) / "log" / f"{config.cluster}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    return log


def _sayer(terminal: Console) -> Callable[[str], None]:
    """Prints a line of progress, with the seconds since this process began, on the terminal and into the log."""
    begin = process_began()

    def say(line: str) -> None:
        line = f"[{time.monotonic() - begin:6.1f} s] {line}"
        print(line, flush=True)
        terminal.print(Text(line, style="dim"))

    return say


@contextlib.contextmanager
def _output_in_log(config: JoinwiseConfig) -> Iterator[Console]:
    """Send what this process and its actors print into the log; yields a console on the terminal."""
    log = _log_file(config)
    with os.fdopen(os.dup(2), "w") as terminal, log.open("w") as output:
        kept = [os.dup(number) for number in (1, 2)]
        for number in (1, 2):
            os.dup2(output.fileno(), number)
        shown = Console(file=terminal, highlight=False)
        shown.print(Text(f"log: {log}", style="dim"))
        try:
            yield shown
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)


def _start_detached(config: JoinwiseConfig, file: Path | None, **environment: str) -> dict[str, Any]:
    """Start the launcher, show its progress, and wait until it is ready.

    Raises:
        JoinwiseError: the launcher has failed; its last line says why. Interrupted, it is stopped first.
    """
    launcher = Launcher(config.cluster, file, _log_file(config), environment)
    console.print(Text(f"log: {launcher.log}", style="dim"))
    try:
        with console.status("starting"):
            return launcher.wait_ready(say=lambda line: console.print(Text(line, style="dim")))
    except BaseException:
        launcher.stop()
        raise


def _stop(cluster: str, timeout: float) -> bool:
    """Stop a launcher and wait until its process has gone; returns False when there is none."""
    facts = runfile.running(cluster)
    if not facts:
        runfile.forget(cluster)
        return False
    pid = int(facts["pid"])
    deadline = time.monotonic() + timeout
    os.kill(pid, signal.SIGTERM)
    while _lives(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)  # Ray's processes, the actors and Redis end with it
            raise JoinwiseError(f"cluster {cluster!r} did not stop within {timeout:.0f} s and was killed")
        time.sleep(_POLL_S)
    return True


def _lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and that its parent has not asked about does not."""
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
