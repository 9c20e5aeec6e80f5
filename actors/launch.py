"""The launcher's process: starts a cluster as configured, supervises it, and stops it.

    python -m joinwise.actors.launch -f joinwise.yaml

is what `joinwise up` runs, and what `ray job submit` runs inside a Ray cluster. The process stays
while the cluster runs; SIGINT or SIGTERM ends both.
"""

import argparse
import asyncio
import contextlib
import signal
import sys
import time
from pathlib import Path

from joinwise.actors import logs, runfile
from joinwise.actors.deployment import Cluster, Say
from joinwise.actors.phases import Phases, process_began
from joinwise.actors.runfile import RunFile
from joinwise.cluster.config import JoinwiseConfig, load_config
from joinwise.cluster.errors import JoinwiseError

#: What the last line begins with when the launcher fails.
FAILED = "joinwise: "


class _Changes:
    """Answers `joinwise apply`, one at a time; a signal says that a wish lies beside the run file."""

    def __init__(self, cluster: Cluster, run_file: RunFile, say: Say) -> None:
        self._cluster, self._run_file, self._say = cluster, run_file, say
        self._task: asyncio.Task[None] | None = None

    def asked(self) -> None:
        """The signal's handler; the one who asks has seen that no change is under way."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._answer())

    async def end(self) -> None:
        """Give up what is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _answer(self) -> None:
        wish = self._run_file.take_wish()
        if wish is None:
            return
        self._run_file.answer(wish, done=False)
        try:
            self._say(f"changing to {wish.file}")
            await self._cluster.apply(load_config(wish.file))
        except Exception as error:
            self._say(f"the change has failed: {error}; the cluster goes on as it was")
            self._run_file.answer(wish, error=str(error) or repr(error))
            return
        self._say("changed")
        self._run_file.answer(wish)


async def run(config: JoinwiseConfig, say: Say) -> None:
    """Start a cluster and keep it until a signal says otherwise."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    with RunFile.claim(config.cluster) as run_file:
        phases = Phases(process_began())
        phases.done("imports")
        cluster = Cluster(config, say, phases=phases)
        changes = _Changes(cluster, run_file, say)
        loop.add_signal_handler(runfile.CHANGE, changes.asked)
        start = asyncio.create_task(cluster.start())
        stop = asyncio.create_task(stopped.wait())
        await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            say("stopping before the start was over")
            start.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await start
            return
        stop.cancel()
        addresses = await start
        run_file.ready(addresses, cluster.redis_url)
        try:
            await cluster.supervise(stopped)
        finally:
            await changes.end()
            say("stopping")
            await cluster.stop()
            say("stopped")


def main() -> None:
    """Run from the command line, or as a Ray job; exit 1 with one clear line on failure."""
    parser = argparse.ArgumentParser(prog="python -m joinwise.actors.launch", description=__doc__)
    parser.add_argument("-f", "--file", type=Path, help="joinwise.yaml; the demo's configuration without it")
    arguments = parser.parse_args()
    begin = process_began()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - begin:6.1f} s] {line}", flush=True)

    try:
        config = load_config(arguments.file)
        logs.setup(config, "info")
        asyncio.run(run(config, say))
    except JoinwiseError as error:
        sys.exit(f"{FAILED}{error}")


if __name__ == "__main__":
    main()
