"""From a failed gRPC call to joinwise's error tree, and the three failures that only a client can see."""

from __future__ import annotations

from typing import Any

import grpc

from joinwise.cluster import errors


class UnreachableError(errors.JoinwiseError):
    """No gateway answers at this address, or the connection broke."""

    code, http_status, grpc_status = "unreachable", 503, "UNAVAILABLE"


class SequenceGapError(errors.JoinwiseError):
    """Events of a stream are missing or out of order: what was received must not be taken for the answer."""

    code, http_status, grpc_status = "sequence_gap", 502, "DATA_LOSS"


class ClientClosedError(errors.JoinwiseError):
    """The client has been closed; make another one."""

    code, http_status, grpc_status = "client_closed", 400, "FAILED_PRECONDITION"


_BY_STATUS: dict[grpc.StatusCode, type[errors.JoinwiseError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequestError,
    grpc.StatusCode.UNAUTHENTICATED: errors.UnauthorizedError,
    grpc.StatusCode.NOT_FOUND: errors.ModelNotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.OverloadedError,
    grpc.StatusCode.UNIMPLEMENTED: errors.NotSupportedError,
    grpc.StatusCode.CANCELLED: errors.RequestCancelledError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
    grpc.StatusCode.UNAVAILABLE: UnreachableError,
}


def error_of(
    status: grpc.StatusCode, details: str | None, trailer: dict[str, Any], *, target: str, request_id: str | None
) -> errors.JoinwiseError:
    """The error that a failed call stands for.

    Args:
        status, details: of the call.
        trailer: its trailing metadata; `joinwise-error` names the error exactly, `retry-after` is in seconds.
        target: the gateway's address, for the sentence about one that cannot be reached.
        request_id: the request that failed, when it is known.
    """
    message = details or status.name.lower().replace("_", " ")
    retry_after_s = _seconds(trailer.get("retry-after"))
    code = str(trailer.get("joinwise-error") or "")
    if code:
        return errors.error_from_code(code, message, request_id=request_id, retry_after_s=retry_after_s)
    kind = _BY_STATUS.get(status, errors.InternalError)
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:
        kind = errors.RequestTooLargeError
    if kind is UnreachableError:
        message = f"no answer from the gateway at {target}: {message}"
    return kind(message, request_id=request_id, retry_after_s=retry_after_s)


def as_dict(metadata: Any) -> dict[str, Any]:
    """Metadata of grpc or grpc.aio as a plain dict."""
    return {str(k): v for k, v in metadata or ()}


def _seconds(text: object) -> float | None:
    try:
        return float(str(text)) if text is not None else None
    except ValueError:
        return None
