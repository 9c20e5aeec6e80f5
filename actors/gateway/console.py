"""`/console`: a live page of the cluster, for people.

Owns the paths below it, in front of the application: the page's few files, which say nothing of the cluster and are
open to all (a browser cannot show a credential before it has a page to ask for one), and what the page then asks for
with the credential in a header, never in an address: `events`, a stream of server-sent events, and `request`, all that
is known of one. `Guard` has checked the credential; these two need the role `metrics`.

Files are read once, at start, and found by their exact path: nothing else of the disk can be asked for.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from urllib.parse import parse_qs

from joinwise.actors.gateway.console_feed import Feed, Page
from joinwise.actors.gateway.front import App, Message, Receive, Scope, Send
from joinwise.cluster.errors import ForbiddenError, InvalidRequestError
from joinwise.cluster.router.why import Decision

ROOT = "/console"
EVENTS = f"{ROOT}/events"
REQUEST = f"{ROOT}/request"

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_LONGEST_ID = 256
_PATIENCE_S = 10.0  # for a client that does not read
_LONGEST_S = 300.0  # then the page asks anew, and its credential is checked anew
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True)
class Asset:
    """A file of the page."""

    content: bytes
    media_type: str
    etag: str


def _assets() -> Mapping[str, Asset]:
    """The page's files by path; the page itself is the folder's."""
    found = {}
    for file in (files("joinwise.actors.gateway") / "page").iterdir():
        suffix = f".{file.name.rpartition('.')[2]}"
        if suffix in _TYPES:
            content = file.read_bytes()
            asset = Asset(content, f"{_TYPES[suffix]}; charset=utf-8", f'"{hashlib.sha256(content).hexdigest()[:16]}"')
            found[f"{ROOT}/{'' if file.name == 'index.html' else file.name}"] = asset
    return found


class Console:
    """Serves the page, and passes on what is not for it.

    Args:
        app: what stands behind it.
        feed: what open pages are told.
        decisions_on: the kept decisions on a request.
    """

    def __init__(self, app: App, feed: Feed, decisions_on: Callable[[str], Awaitable[Sequence[Decision]]]) -> None:
        self._app = app
        self._feed = feed
        self._decisions_on = decisions_on
        self._files = _assets()

    @property
    def open_paths(self) -> frozenset[str]:
        """What is open to all: the page's files."""
        return frozenset({ROOT, *self._files})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection. Raises what `Guard` makes an answer of."""
        path = str(scope.get("path", ""))
        if scope["type"] != "http" or not f"{path}/".startswith(f"{ROOT}/"):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["method"] not in ("GET", "HEAD"):
            await _answer(scope, send, 405, {"allow": "GET, HEAD"})
        elif path == ROOT:  # the page's own addresses are relative: below whatever prefix a proxy adds
            await _answer(scope, send, 308, {"location": "console/"})
        elif (asset := self._files.get(path)) is not None:
            await self._show(asset, headers, scope, send)
        elif path == EVENTS and scope["method"] == "GET":
            _same_site(headers)
            await self._stream(receive, send)
        elif path == REQUEST:
            _same_site(headers)
            await self._tell(scope, send)
        else:
            await _answer(scope, send, 404, {})

    async def _show(self, asset: Asset, headers: Mapping[str, str], scope: Scope, send: Send) -> None:
        caching = {"cache-control": "no-cache", "etag": asset.etag}
        if asset.etag in headers.get("if-none-match", ""):
            await _answer(scope, send, 304, caching)
        else:
            await _answer(scope, send, 200, {**caching, "content-type": asset.media_type}, asset.content)

    async def _tell(self, scope: Scope, send: Send) -> None:
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        (request_id,) = query.get("id", [""])[:1]
        if not 0 < len(request_id) <= _LONGEST_ID:
            raise InvalidRequestError(f"say which request: ?id=, of at most {_LONGEST_ID} characters")
        ledgers = self._feed.sources.ledgers
        kept = [one] if (one := ledgers.get(request_id)) is not None else ledgers.of_call(request_id)
        known = {
            "ledgers": [json.loads(each.to_json()) for each in kept],
            "decisions": [each.to_dict() for each in await self._decisions_on(request_id)],
        }
        kind = {"content-type": "application/json", "cache-control": "no-store"}
        await _answer(scope, send, 200, kind, json.dumps(known).encode())

    async def _stream(self, receive: Receive, send: Send) -> None:
        """Events until the client goes, falls behind or has to show its credential again."""
        with self._feed.page() as page:
            # A proxy that held events back would make the page stand still.
            await _begin(
                send, 200, {"content-type": "text/event-stream", "cache-control": "no-store", "x-accel-buffering": "no"}
            )
            leaving = asyncio.create_task(_left(receive, page))
            try:
                await _pump(page, send)
            finally:
                leaving.cancel()


async def _pump(page: Page, send: Send) -> None:
    """Send frames. Raises TimeoutError for a client that does not read."""
    end = time.monotonic() + _LONGEST_S
    while time.monotonic() < end and (frames := await page.next()) is not None:
        async with asyncio.timeout(_PATIENCE_S):
            await send({"type": "http.response.body", "body": frames, "more_body": True})
    async with asyncio.timeout(_PATIENCE_S):
        await send({"type": "http.response.body", "body": b""})


async def _left(receive: Receive, page: Page) -> None:
    """Let the page go once its client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    page.let_go()


def _same_site(headers: Mapping[str, str]) -> None:
    """Where nobody is asked for a credential, another site's page could still open streams until none is left."""
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        raise ForbiddenError("the console's data is for its own page")


async def _begin(send: Send, status: int, headers: Mapping[str, str]) -> None:
    raw = [(name.encode(), value.encode()) for name, value in (_HEADERS | dict(headers)).items()]
    message: Message = {"type": "http.response.start", "status": status, "headers": raw}
    await send(message)


async def _answer(scope: Scope, send: Send, status: int, headers: Mapping[str, str], content: bytes = b"") -> None:
    await _begin(send, status, {**headers, "content-length": str(len(content))})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else content})
