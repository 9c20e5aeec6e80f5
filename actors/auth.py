"""Bearer tokens on gRPC ports: API keys at the gateway's door, the cluster's own token between its processes.

Health checks are open to all. Comparisons take the same time whatever is sent.
"""

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from joinwise.cluster.errors import UnauthorizedError

_HEADER = "authorization"
#: Prefix of the methods that need no token.
OPEN_TO_ALL = f"/{health_pb2.DESCRIPTOR.services_by_name['Health'].full_name}/"
_REFUSAL = "no token, or one that is not known: send `authorization: Bearer <token>`"
_TRAILER = (("joinwise-error", UnauthorizedError.code),)


def is_loopback(host: str) -> bool:
    """Whether an address to listen on never leaves the machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Metadata of a call that shows a token; none for an empty one."""
    return ((_HEADER, f"Bearer {token}"),) if token else ()


class TokenCheck:
    """Says whether a call may pass.

    Args:
        tokens: those that are known; with none, everybody may pass.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self._known = [f"Bearer {token}".encode() for token in tokens]

    def passes(self, details: grpc.HandlerCallDetails) -> bool:
        """Whether a call shows a known token, or needs none."""
        if not self._known or details.method.startswith(OPEN_TO_ALL):
            return True
        metadata: Iterable[tuple[str, Any]] = details.invocation_metadata or ()
        given = str(dict(metadata).get(_HEADER, "")).encode()
        matches = [hmac.compare_digest(given, known) for known in self._known]  # all of them: no early end
        return any(matches)


class AsyncBearer(grpc.aio.ServerInterceptor):
    """Refuses calls without a known token, for grpc.aio servers."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._check = TokenCheck(tokens)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)

        async def refuse(request: object, context: grpc.aio.ServicerContext) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, _REFUSAL, _TRAILER)

        return handler if self._check.passes(handler_call_details) else in_shape_of(handler, refuse)


class Bearer(grpc.ServerInterceptor):
    """The same for servers with threads."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._check = TokenCheck(tokens)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """See grpc.ServerInterceptor."""
        handler = continuation(handler_call_details)

        def refuse(request: object, context: grpc.ServicerContext) -> None:
            context.set_trailing_metadata(_TRAILER)
            context.abort(grpc.StatusCode.UNAUTHENTICATED, _REFUSAL)

        return handler if self._check.passes(handler_call_details) else in_shape_of(handler, refuse)


def in_shape_of(handler: grpc.RpcMethodHandler | None, refuse: Callable[..., Any]) -> grpc.RpcMethodHandler | None:
    """A handler that refuses, with the streaming shape of the one in whose place it stands."""
    if handler is None:
        return None
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[(bool(handler.request_streaming), bool(handler.response_streaming))]
    return make(refuse)
