"""How the SDK's channels are made: target, TLS, credentials and limits. Shared by both clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

DEFAULT_TARGET = "localhost:8001"
DEFAULT_RESUME_S = 60.0
DEFAULT_TIMEOUT_S = 600.0
CLIENT_DEFAULT = -1.0
"""As the timeout of a call: the client's own."""

_MAX_MESSAGE = 64 << 20  # bytes; answers with many logprobs are large


@dataclass(frozen=True)
class TLS:
    """How to speak TLS. All paths are PEM files; none means the system's authorities and no client certificate."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str | None = None
    """The name that the server's certificate carries, where it is not the target's host."""


def options(tls: TLS | bool) -> list[tuple[str, Any]]:
    """Channel arguments."""
    arguments: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", _MAX_MESSAGE),
        ("grpc.max_send_message_length", _MAX_MESSAGE),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # A request is never sent twice behind the caller's back: it may have produced tokens already.
        ("grpc.enable_retries", 0),
        # A gateway that comes back is found as soon as a stream looks for it (`retry`); gRPC waits up to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]
    if isinstance(tls, TLS) and tls.server_name:
        arguments.append(("grpc.ssl_target_name_override", tls.server_name))
    return arguments


def credentials(tls: TLS | bool) -> grpc.ChannelCredentials | None:
    """Channel credentials; None for plain text."""
    if tls is False:
        return None
    files = tls if isinstance(tls, TLS) else TLS()
    return grpc.ssl_channel_credentials(
        root_certificates=files.ca.read_bytes() if files.ca else None,
        private_key=files.key.read_bytes() if files.key else None,
        certificate_chain=files.certificate.read_bytes() if files.certificate else None,
    )


class Targets(tuple[str, ...]):
    """Gateways of one cluster, one of which is asked next."""

    _at = 0

    def __new__(cls, target: str | Sequence[str]) -> Targets:
        """Of one target or several. Raises ValueError for none."""
        found = (target,) if isinstance(target, str) else tuple(target)
        if not found:
            raise ValueError("no target: give at least one host:port")
        return super().__new__(cls, found)

    @property
    def now(self) -> str:
        """The one that is asked next."""
        return self[self._at]

    def turn(self, than: str) -> None:
        """Turn to the next one, unless somebody has done so since `than` was asked."""
        if self.now == than:
            self._at = (self._at + 1) % len(self)


def call_metadata(token: str | None) -> Sequence[tuple[str, str]]:
    """Metadata of every call."""
    return (("authorization", f"Bearer {token}"),) if token else ()
