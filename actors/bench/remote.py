"""An object in a process of its own: the ends of a benchmark, each with its core and its environment."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

_WAIT_S = 120.0
_END_S = 3.0


class Remote:
    """An object in a process of its own, called over a pipe.

    Args:
        make: makes it, there; importable.
        arguments: for `make`.
        core: the only core that the process uses; None for any.
        environment: variables that the process has beside ours.
        wait_s: seconds that an answer may take.
        python: another interpreter than ours, with what is installed there; joinwise must be.

    Raises:
        RuntimeError: the process has ended, says nothing, or could not make the object.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        *arguments: Any,
        core: int | None = None,
        environment: dict[str, str] | None = None,
        wait_s: float = _WAIT_S,
        python: str | None = None,
    ) -> None:
        self._wait_s = wait_s
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process: Any
        with _environment(environment or {}):
            if python is None:
                self._process = context.Process(target=_serve, args=(theirs, core, make, arguments), daemon=True)
                self._process.start()
            else:
                self._process = _Elsewhere(python, theirs)
                self._pipe.send((core, make, arguments))
        self._pid: int = self._process.pid
        theirs.close()
        self._answer()

    def __call__(self, method: str, *arguments: Any) -> Any:
        """Call a method there; what it raises is raised here.

        Raises:
            RuntimeError: the process has ended, or says nothing.
        """
        with contextlib.suppress(BrokenPipeError):  # `_answer` tells
            self._pipe.send((method, arguments))
        return self._answer()

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Let the process run while this lasts, and stop it afterwards: its threads may poll."""
        os.kill(self._pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.kill(self._pid, signal.SIGSTOP)

    def close(self) -> None:
        """End the process, which may be stopped."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGCONT)
        self._pipe.close()  # it ends by itself, and what its libraries log gets written
        self._process.join(_END_S)
        self._process.terminate()
        self._process.join()

    def _answer(self) -> Any:
        try:
            if not self._pipe.poll(self._wait_s):
                raise RuntimeError(f"no answer within {self._wait_s:g} s")
            error, result = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError("an end of the benchmark has died") from None
        if error is not None:
            raise error
        return result


class _Elsewhere(subprocess.Popen[bytes]):
    """A process of another interpreter: one that multiprocessing spawns has our `sys.path`."""

    def __init__(self, python: str, pipe: Connection) -> None:
        there = "from joinwise.actors.bench import remote; remote.attend()"
        super().__init__([python, "-c", there, str(pipe.fileno())], pass_fds=[pipe.fileno()])

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end, no longer than so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout)


def attend() -> None:
    """Serve whoever started this interpreter."""
    pipe = Connection(int(sys.argv[1]))
    _serve(pipe, *pipe.recv())


def _serve(pipe: Any, core: int | None, make: Callable[..., Any], arguments: Sequence[Any]) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    call: Callable[..., Any] = make
    end: Any = None
    while True:
        try:
            result = call(*arguments)
            if end is None:
                end, result = result, None
            pipe.send((None, result))
        except Exception as error:
            pipe.send((RuntimeError(f"{type(error).__name__}: {error}"), None))
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        call = getattr(end, method)


@contextlib.contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
