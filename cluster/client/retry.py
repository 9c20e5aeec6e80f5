"""When a stream that broke is continued, and where; the part that both clients share."""

from __future__ import annotations

import time

from joinwise.cluster.client.failures import UnreachableError
from joinwise.cluster.errors import CannotResumeError, JoinwiseError

_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 2.0
_MAX_REFUSALS = 5


class Patience:
    """Says whether to try again after a failure, and how long to wait before.

    Args:
        within_s: seconds after a break within which a gateway must answer; 0 never tries again.
        targets: how many gateways there are: each is tried once before anybody waits.
        deadline_s: seconds that the whole call may take; None for no limit.
    """

    def __init__(self, within_s: float, targets: int, deadline_s: float | None) -> None:
        self._within_s = within_s
        self._targets = targets
        self._deadline = None if deadline_s is None else time.monotonic() + deadline_s
        self._broke: float | None = None
        self._tried = self._refused = 0

    def rest_s(self) -> float | None:
        """Seconds that are left for the call."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def moved(self) -> None:
        """The stream has come on: the next break is another one."""
        self._broke, self._tried = None, 0

    def pause_s(self, failure: JoinwiseError, *, begun: bool) -> float | None:
        """Seconds to wait before the next try; None where that is no use.

        Args:
            failure: how the call has ended.
            begun: something of the answer has come. Else another gateway is tried, but the same one is not asked again.
        """
        if not isinstance(failure, UnreachableError | CannotResumeError) or not self._within_s:
            return None
        if self.rest_s() == 0.0:
            return None
        now = time.monotonic()
        self._broke = now if self._broke is None else self._broke
        self._tried += 1
        if isinstance(failure, CannotResumeError):
            self._refused += 1
        if self._refused > _MAX_REFUSALS or now - self._broke > self._within_s:
            return None
        if self._tried < self._targets:
            return 0.0
        return min(_MAX_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** (self._tried - self._targets)) if begun else None
