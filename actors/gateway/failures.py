"""Brings every way in which a call can fail into joinwise's error tree, and from there onto the wire of gRPC.

vLLM's serving objects fail in three ways: an exception, an `ErrorResponse`, an error chunk inside the stream. The last
two have lost the exception itself and kept a status and a sentence; so whoever raises a JoinwiseError below vLLM first
calls `note_error`, and the call ends with that error as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar, Token
from typing import Any, Self

import grpc
import pydantic
from prometheus_client import Counter
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from joinwise.cluster import errors

_KIND_OF_HTTP: Mapping[int, type[errors.JoinwiseError]] = {
    400: errors.InvalidRequestError,
    401: errors.UnauthorizedError,
    404: errors.ModelNotFoundError,
    413: errors.RequestTooLargeError,
    422: errors.InvalidRequestError,
    429: errors.OverloadedError,
    499: errors.RequestCancelledError,
    501: errors.NotSupportedError,
    502: errors.WorkerLostError,
    503: errors.NoWorkerError,
    504: errors.DeadlineExceededError,
}
_REFUSALS = Counter("joinwise:refusals", "Calls refused or ended by an error, by its code", ["reason"])
_MAX_REPORTED = 5  # validation errors named in one message
_MAX_MESSAGE = 2000  # characters; a status travels in HTTP/2 headers, which are bounded
_MAX_PART = 300  # characters of one validation error


class VllmRefusalError(Exception):
    """vLLM answered with an error object: `message`, `code` (an HTTP status), `type`, `param`."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        super().__init__(str(error.get("message") or "vLLM gave no reason"))
        self.http_status = int(error.get("code") or 500)


class NotedErrors:
    """While open, keeps the last error given to `note_error` by this call or a task that it started."""

    _current: ContextVar[NotedErrors | None] = ContextVar("joinwise_noted_errors", default=None)

    def __init__(self) -> None:
        self.last: errors.JoinwiseError | None = None
        self._token: Token[NotedErrors | None] | None = None

    def __enter__(self) -> Self:
        self._token = self._current.set(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._token is not None:
            self._current.reset(self._token)


def note_error(error: errors.JoinwiseError) -> errors.JoinwiseError:
    """Keep `error` for the call that runs now, and return it: `raise note_error(OverloadedError(...))`.

    Must be called in the call's own task or one that it started (`generate` of an engine client is). Outside of a
    gRPC call it does nothing.
    """
    noted = NotedErrors._current.get()
    if noted is not None:
        noted.last = error
    return error


def count_refusal(error: errors.JoinwiseError) -> None:
    """Count a call that ends with this error, in `joinwise:refusals_total` by its code."""
    _REFUSALS.labels(error.code).inc()


def as_joinwise_error(exc: Exception, noted: errors.JoinwiseError | None = None) -> errors.JoinwiseError:
    """The error of the tree that `exc` stands for.

    Args:
        exc: what ended the call.
        noted: what was last given to `note_error`; it is the cause of a `VllmRefusalError`.
    """
    if isinstance(exc, errors.JoinwiseError):
        return exc
    if isinstance(exc, VllmRefusalError):
        if noted is not None:
            return noted
        return _KIND_OF_HTTP.get(exc.http_status, errors.InternalError)(str(exc))
    if isinstance(exc, pydantic.ValidationError):
        return errors.InvalidRequestError(_sentence(exc))
    return as_joinwise_error(VllmRefusalError(create_error_response(exc).error.model_dump()), noted)


def status_of(error: errors.JoinwiseError) -> grpc.StatusCode:
    """The gRPC status of an error."""
    return grpc.StatusCode[error.grpc_status]


def details_of(error: errors.JoinwiseError) -> str:
    """The sentence that goes into the status, bounded in length."""
    return error.message if len(error.message) <= _MAX_MESSAGE else error.message[:_MAX_MESSAGE] + " ..."


def trailer_of(error: errors.JoinwiseError) -> tuple[tuple[str, str], ...]:
    """Trailing metadata: `joinwise-error` with the code, and `retry-after` in seconds where waiting helps."""
    trailer = [("joinwise-error", error.code)]
    if error.retry_after_s is not None:
        trailer.append(("retry-after", f"{error.retry_after_s:.3f}"))
    return tuple(trailer)


def _sentence(exc: pydantic.ValidationError) -> str:
    """The first few problems of a request, each with its field and without the (perhaps huge) input."""
    problems = exc.errors(include_url=False, include_input=False, include_context=False)
    parts = []
    for problem in problems[:_MAX_REPORTED]:
        # Steps such as "function-wrap[...]" and "list[...]" are pydantic's, not the request's.
        path = ".".join(str(step) for step in problem["loc"] if isinstance(step, int) or step.isidentifier())
        parts.append(f"{path}: {problem['msg']}"[:_MAX_PART] if path else problem["msg"][:_MAX_PART])
    if len(problems) > _MAX_REPORTED:
        parts.append(f"and {len(problems) - _MAX_REPORTED} more")
    return "; ".join(parts)
