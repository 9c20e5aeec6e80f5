"""The error tree: every failure that joinwise reports to anyone is one of these.

An error says what happened, to which request, and what the caller can do about it. Its class fixes one stable `code`,
one HTTP status and one gRPC status, so that both front ends answer alike and the SDK can raise the same class again
(`error_from_code`). Nothing here imports grpc: a gRPC status is held by its name.
"""

from __future__ import annotations

from typing import ClassVar


class JoinwiseError(Exception):
    """Base of the tree.

    Args:
        message: what happened and what the caller can do.
        request_id: the request it happened to, when there is one.
        retry_after_s: seconds after which trying again may succeed; None where waiting does not help.
    """

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, request_id: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.message} (request {self.request_id})" if self.request_id else self.message

    def __reduce__(self) -> tuple[object, ...]:
        """Keyword-only arguments survive pickling, which is how errors cross Ray calls."""
        return (type(self), (self.message,), self.__dict__.copy())


class InternalError(JoinwiseError):
    """A defect in joinwise. Report it."""


# --- the caller's part -----------------------------------------------------------------------------------------------


class InvalidRequestError(JoinwiseError):
    """The request can never succeed as it is."""

    code, http_status, grpc_status = "invalid_request", 400, "INVALID_ARGUMENT"


class UnauthorizedError(JoinwiseError):
    """No API key, or one that is not known."""

    code, http_status, grpc_status = "unauthorized", 401, "UNAUTHENTICATED"


class ForbiddenError(JoinwiseError):
    """The API key is known, and does not allow this."""

    code, http_status, grpc_status = "forbidden", 403, "PERMISSION_DENIED"


class ModelNotFoundError(JoinwiseError):
    """No such model or adapter is served here."""

    code, http_status, grpc_status = "model_not_found", 404, "NOT_FOUND"


class RequestTooLargeError(JoinwiseError):
    """The body is larger than the gateway accepts."""

    code, http_status, grpc_status = "request_too_large", 413, "RESOURCE_EXHAUSTED"


class HeadersTooLargeError(JoinwiseError):
    """More headers than the gateway accepts."""

    code, http_status, grpc_status = "headers_too_large", 431, "RESOURCE_EXHAUSTED"


class RequestTimeoutError(JoinwiseError):
    """The body did not arrive in time."""

    code, http_status, grpc_status = "request_timeout", 408, "DEADLINE_EXCEEDED"


class PoisonError(JoinwiseError):
    """Two workers have died with this request in their engines, one after the other."""

    code, http_status, grpc_status = "poison", 422, "FAILED_PRECONDITION"


class CannotResumeError(JoinwiseError):
    """A stream that broke cannot be continued exactly, or not yet."""

    code, http_status, grpc_status = "cannot_resume", 409, "ABORTED"


class NotSupportedError(JoinwiseError):
    """A valid wish that this cluster cannot fulfil."""

    code, http_status, grpc_status = "not_supported", 501, "UNIMPLEMENTED"


class RequestCancelledError(JoinwiseError):
    """The client went away or cancelled. 499 is nginx's number: nobody is there to read it, the log is."""

    code, http_status, grpc_status = "cancelled", 499, "CANCELLED"


class DeadlineExceededError(JoinwiseError):
    """The request's own deadline passed."""

    code, http_status, grpc_status = "deadline_exceeded", 504, "DEADLINE_EXCEEDED"


# --- capacity: try again later ---------------------------------------------------------------------------------------


class RateLimitedError(JoinwiseError):
    """This caller is over its own limit, whatever the cluster's load."""

    code, http_status, grpc_status = "rate_limited", 429, "RESOURCE_EXHAUSTED"


class OverloadedError(JoinwiseError):
    """Every worker that could serve the request has as many pending tokens as it may."""

    code, http_status, grpc_status = "overloaded", 429, "RESOURCE_EXHAUSTED"


class ObjectiveError(JoinwiseError):
    """The request asks for times (`x-slo-ttft-ms`, `x-slo-tpot-ms`) that no worker can keep now."""

    code, http_status, grpc_status = "objective_missed", 429, "RESOURCE_EXHAUSTED"


class NoWorkerError(JoinwiseError):
    """No live worker serves the model with what the request needs."""

    code, http_status, grpc_status = "no_worker", 503, "UNAVAILABLE"


class StoreUnavailableError(JoinwiseError):
    """Redis does not answer, so nothing can be decided."""

    code, http_status, grpc_status = "store_unavailable", 503, "UNAVAILABLE"


class WorkerLostError(JoinwiseError):
    """A worker died under the request and no other could take it over.

    502, not 503: the gateway is well and accepts work, its upstream failed in the middle of this answer. Clients that
    retry on 502 do the right thing; over gRPC it is UNAVAILABLE, which says the same.
    """

    code, http_status, grpc_status = "worker_lost", 502, "UNAVAILABLE"


# --- the cluster's own parts -----------------------------------------------------------------------------------------


class ConfigError(JoinwiseError):
    """The configuration is wrong. `problems` holds every one of them, a sentence each."""

    code, http_status, grpc_status = "config", 500, "FAILED_PRECONDITION"

    def __init__(
        self,
        message: str,
        *,
        problems: tuple[str, ...] = (),
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, request_id=request_id, retry_after_s=retry_after_s)
        self.problems = problems or (message,)


class StoreStartError(JoinwiseError):
    """The embedded Redis could not be started: no binary, a port in use, or no answer in time."""

    code, http_status, grpc_status = "store_start", 500, "FAILED_PRECONDITION"


class RegistrationRefusedError(JoinwiseError):
    """A worker may not join: another model or layout than its peers, or an adapter it has not loaded."""

    code, http_status, grpc_status = "registration_refused", 409, "FAILED_PRECONDITION"


class TransferError(JoinwiseError):
    """A KV transfer failed, came late or did not pass its check. The engine recomputes; clients rarely see it."""

    code, http_status, grpc_status = "transfer", 500, "INTERNAL"


def _tree(kind: type[JoinwiseError]) -> list[type[JoinwiseError]]:
    return [kind, *(leaf for child in kind.__subclasses__() for leaf in _tree(child))]


#: code -> class, for every class above.
ERRORS: dict[str, type[JoinwiseError]] = {kind.code: kind for kind in _tree(JoinwiseError) if kind is not JoinwiseError}


def error_from_code(
    code: str, message: str, *, request_id: str | None = None, retry_after_s: float | None = None
) -> JoinwiseError:
    """The error that `code` names, as a client meets it on the wire; an unknown code gives a plain `InternalError`."""
    return ERRORS.get(code, InternalError)(message, request_id=request_id, retry_after_s=retry_after_s)
