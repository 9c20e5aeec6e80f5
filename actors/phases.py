"""What the seconds of a start went to: phases that follow each other, each with a name."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

_SHOWN_S = 0.05


class Phases:
    """A stop-watch: each phase ends where the next one begins.

    Args:
        begin: `time.monotonic()` at which the first phase has begun; None for now.
    """

    def __init__(self, begin: float | None = None) -> None:
        self.begin = self._last = time.monotonic() if begin is None else begin
        self.seconds: dict[str, float] = {}

    def done(self, name: str) -> None:
        """The phase that runs ends now; a name that comes again adds up."""
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds of all phases that have ended."""
        return self._last - self.begin


def told(seconds: Mapping[str, float]) -> str:
    """Phases in a line, `imports 5.2 s, engine 3.1 s`; without those too short to matter."""
    return ", ".join(f"{name} {each:.1f} s" for name, each in seconds.items() if each >= _SHOWN_S)


def process_began() -> float:
    """When this process began, as `time.monotonic()` would have had it: its interpreter and its imports count too."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    since_boot_s = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # `starttime`, the 22nd field of proc(5)
    return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot_s)
