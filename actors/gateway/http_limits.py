"""The HTTP listener's own limits, below ASGI: a request's head is bounded in bytes and in time.

uvicorn's fast parser takes heads of any length, and waits for ever for a first request. What happens after the head is
`Front`'s: bodies, numbers, whole calls.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from joinwise.cluster.config_model import LimitsConfig

_REFUSAL = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b'content-length: 75\r\n\r\n{"error": {"message": "the headers are too large", "code": "invalid_request"}}'
)


def limited_protocol(limits: LimitsConfig) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with these limits, for `uvicorn.Config(http=...)`."""
    return type("LimitedProtocol", (_Limited,), {"head_bytes": limits.header_bytes, "head_s": limits.body_s})


class _Limited(HttpToolsProtocol):
    head_bytes: int
    head_s: float

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head_read = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._head_timer is not None:
            self._head_read += len(data)
        super().data_received(data)
        if self._head_timer is not None and self._head_read > self.head_bytes and not self.transport.is_closing():
            self.transport.write(_REFUSAL)
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:  # a later request of the connection
            self._begin_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def _begin_head(self) -> None:
        self._head_read = 0
        self._head_timer = asyncio.get_running_loop().call_later(self.head_s, self.transport.close)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
