"""The states of a request, and which may follow which. Pure: no clock, no I/O.

    QUEUED -> ROUTED -> PREFILLING -> TRANSFERRING -> DECODING -> FINISHED
                 ^  \\_______________________________^
                 |     (one worker does it all)
                 +---- from any running state: the request moves to other workers

From every state that is not an end a request may fail or be cancelled; nothing follows an end.
"""

from __future__ import annotations

from enum import StrEnum

from joinwise.cluster.errors import InternalError


class RequestState(StrEnum):
    """Where a request is."""

    QUEUED = "queued"
    """Rendered; waits for workers."""
    ROUTED = "routed"
    """Has a lease."""
    PREFILLING = "prefilling"
    """A worker computes its prompt; its KV may already be crossing."""
    TRANSFERRING = "transferring"
    """The first token is out, the decode worker does not yet have all it needs."""
    DECODING = "decoding"
    """Tokens come."""
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing follows."""
        return self in _ENDS


_S = RequestState
_ENDS = frozenset({_S.FINISHED, _S.FAILED, _S.CANCELLED})
_RUNNING = frozenset({_S.PREFILLING, _S.TRANSFERRING, _S.DECODING})
_NEXT: dict[RequestState, frozenset[RequestState]] = {
    _S.QUEUED: frozenset({_S.ROUTED}),
    _S.ROUTED: frozenset({_S.PREFILLING, _S.DECODING}),
    _S.PREFILLING: frozenset({_S.TRANSFERRING, _S.DECODING, _S.FINISHED}),
    _S.TRANSFERRING: frozenset({_S.DECODING}),
    _S.DECODING: frozenset({_S.FINISHED}),
}


def may_follow(state: RequestState, following: RequestState) -> bool:
    """Whether `following` may come directly after `state`."""
    if state.ended:
        return False
    if following in (_S.FAILED, _S.CANCELLED) or (following is _S.ROUTED and state in _RUNNING):
        return True
    return following in _NEXT[state]


class Lifecycle:
    """One request's state, starting QUEUED."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.state = RequestState.QUEUED

    def advance(self, following: RequestState) -> None:
        """Enter a state; entering the present one again changes nothing.

        Raises:
            InternalError: it may not follow; the state stays what it was.
        """
        if following is self.state:
            return
        if not may_follow(self.state, following):
            raise InternalError(f"a {self.state} request cannot become {following}", request_id=self.request_id)
        self.state = following

    def end(self, how: RequestState) -> bool:
        """End the request; False if it had ended before, so that an end is counted once.

        Raises:
            InternalError: `how` is no end, or the request cannot finish yet.
        """
        if self.state.ended:
            return False
        if not how.ended:
            raise InternalError(f"{how} is no end", request_id=self.request_id)
        self.advance(how)
        return True
