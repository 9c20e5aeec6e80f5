"""Cancels calls that make no progress: one thread watches all of a worker's fetches."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator


class Watched:
    """A call that must make progress; see `Stalls`."""

    def __init__(self, cancel: Callable[[], object], changed: threading.Condition) -> None:
        self.cancel = cancel
        self.allowed = 0.0
        self.limit = 0.0
        self.stalled = False
        self._changed = changed

    def allow(self, seconds: float) -> None:
        """It has made progress: give it these seconds to make more."""
        with self._changed:
            sooner = seconds < self.allowed
            self.allowed, self.limit = seconds, time.monotonic() + seconds
            if sooner:
                self._changed.notify()


class Stalls:
    """Cancels calls that make no progress, from one thread for all of them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._watched: set[Watched] = set()
        self._thread: threading.Thread | None = None
        self._stopped = False

    @contextlib.contextmanager
    def watch(self, cancel: Callable[[], object], seconds: float) -> Iterator[Watched]:
        """Call `cancel` after these seconds, unless it is allowed more first; it must not block."""
        watched = Watched(cancel, self._changed)
        watched.allow(seconds)
        with self._changed:
            self._watched.add(watched)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kv-stalls", daemon=True)
                self._thread.start()
            self._changed.notify()
        try:
            yield watched
        finally:
            with self._changed:
                self._watched.discard(watched)

    def stop(self) -> None:
        """End the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        with self._changed:
            while not self._stopped:
                now = time.monotonic()
                for watched in [each for each in self._watched if each.limit <= now]:
                    watched.stalled = True
                    self._watched.discard(watched)
                    watched.cancel()
                nearest = min((watched.limit for watched in self._watched), default=None)
                self._changed.wait(None if nearest is None else max(0.0, nearest - now))
