"""The outermost layer of the HTTP door, over ASGI and over real sockets: credentials, roles, limits, the audit log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from helpers.certificates import Authority
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from joinwise.actors.gateway.audit import Audit
from joinwise.actors.gateway.front import Front
from joinwise.actors.gateway.guard import ADMINISTRATION, METRICS, Guard
from joinwise.actors.gateway.http_limits import limited_protocol
from joinwise.actors.gateway.identity import Authenticator, caller
from joinwise.actors.gateway.ledgers import Ledgers
from joinwise.actors.tls import Certificates
from joinwise.cluster import apikeys
from joinwise.cluster.config import GatewayConfig, LimitsConfig
from joinwise.cluster.errors import ConfigError


class World:
    """A guard before an application that tells who called, what came in, or waits."""

    def __init__(self, tmp_path: Path, **limits: Any) -> None:
        self.keys: dict[str, str] = {}
        entries = []
        for role in apikeys.ROLES:
            self.keys[role], entry = apikeys.make(f"tenant-{role}", (role,))
            entries.append(entry)
        keys = tmp_path / "keys.yaml"
        apikeys.KeyRing(tuple(entries)).save(keys)
        self.settings = GatewayConfig(keys_file=str(keys), limits=LimitsConfig(**limits))
        self.audit_file = tmp_path / "audit.jsonl"
        self.audit = Audit(str(self.audit_file))
        self.waiting = asyncio.Event()
        self.go_on = asyncio.Event()
        self.cancelled = asyncio.Event()
        front = Front(self.application, Ledgers(None), max_body_bytes=1000)
        self.guard = Guard(front, Authenticator(self.settings), self.settings.limits, self.audit)
        self.client = self.client_of(self.guard)

    @staticmethod
    def client_of(app: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://gateway")

    def auth(self, role: str = "user") -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[role]}"}

    async def application(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.accept"})
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if scope["path"] == "/wait":
            self.waiting.set()
            try:
                await self.go_on.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        who = caller.get()
        told = json.dumps({"tenant": who.tenant, "body": len(body)}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": told})

    def audited(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.audit_file.read_text().splitlines()]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# Who may call.


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/chat/completions", "/tokenize", "/metrics", "/docs", "/openapi.json"]
)
async def test_everything_needs_a_credential(world: World, path: str) -> None:
    for headers in (
        {},
        {"authorization": "Bearer nonsense"},
        {"x-api-key": "nonsense"},
        {"authorization": "Basic eA=="},
    ):
        answer = await world.client.get(path, headers=headers)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert answer.json()["error"]["code"] == "unauthorized"
        assert "nonsense" not in answer.text


@pytest.mark.parametrize("path", ["/health", "/ping"])
async def test_health_needs_none(world: World, path: str) -> None:
    assert (await world.client.get(path)).status_code == 200


@pytest.mark.parametrize("path", ["/health/", "//health", "/health/../metrics", "/%68ealth/x"])
async def test_nothing_else_passes_for_health(world: World, path: str) -> None:
    assert (await world.client.get(path)).status_code == 401


async def test_the_tenant_is_known_below(world: World) -> None:
    answer = await world.client.post("/v1/completions", headers=world.auth(), content=b"{}")
    assert answer.json() == {"tenant": "tenant-user", "body": 2}
    by_anthropic = await world.client.get("/v1/models", headers={"x-api-key": world.keys["user"]})
    assert by_anthropic.json()["tenant"] == "tenant-user"
    assert caller.get().tenant == ""  # nothing is left of the calls


async def test_two_credentials_are_none(world: World) -> None:
    headers = [*world.auth().items(), ("authorization", f"Bearer {world.keys['admin']}")]
    assert (await world.client.get("/v1/models", headers=headers)).status_code == 401
    mixed = world.auth() | {"x-api-key": world.keys["admin"]}
    assert (await world.client.get("/v1/models", headers=mixed)).status_code == 401


async def test_where_nobody_is_asked_credentials_do_not_matter(world: World) -> None:
    """Clients send what they have: Anthropic's sends both headers when it was given both."""
    guard = Guard(world.application, Authenticator(GatewayConfig()), LimitsConfig(), world.audit)
    headers = {"authorization": "Bearer a", "x-api-key": "b"}
    for path in ("/v1/models", "/metrics", *ADMINISTRATION):
        assert (await world.client_of(guard).post(path, headers=headers)).status_code == 200


async def test_a_preflight_needs_no_credential(world: World) -> None:
    assert (await world.client.options("/v1/models")).status_code == 200


@pytest.mark.parametrize("role", apikeys.ROLES)
async def test_roles(world: World, role: str) -> None:
    paths = {"/v1/models", *METRICS, *ADMINISTRATION}
    allowed = {"user": {"/v1/models"}, "metrics": METRICS}.get(role, paths)
    for path in paths:
        answer = await world.client.post(path, headers=world.auth(role))
        assert answer.status_code == (200 if path in allowed else 403), path


async def test_a_revoked_key(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("joinwise.actors.gateway.identity._LOOK_EVERY_S", 0.0)
    assert (await world.client.get("/v1/models", headers=world.auth())).status_code == 200
    path = Path(str(world.settings.keys_file))
    ring = apikeys.load(path)
    ring.without(world.keys["user"].split("_")[1]).save(path)
    assert (await world.client.get("/v1/models", headers=world.auth())).status_code == 401
    assert (await world.client.get("/v1/models", headers=world.auth("admin"))).status_code == 200


async def test_websockets_pass_the_same_door(world: World) -> None:
    async def shake(*headers: tuple[bytes, bytes]) -> str:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        await world.guard({"type": "websocket", "path": "/v1/realtime", "headers": list(headers)}, receive, send)
        return str(sent[0]["type"])

    assert await shake() == "websocket.close"
    assert await shake((b"authorization", world.auth()["authorization"].encode())) == "websocket.accept"


# The audit log.


async def test_administration_is_recorded(world: World) -> None:
    await world.client.post("/v1/load_lora_adapter", headers=world.auth("admin"), json={"lora_path": "s3://secret"})
    await world.client.post("/v1/load_lora_adapter", headers=world.auth("user"))
    await world.client.post("/v1/reset_prefix_cache", headers={"authorization": "Bearer stolen"})
    await world.client.post("/v1/completions", headers=world.auth("user"))
    lines = world.audited()
    assert [(line["action"], line["status"], line["tenant"]) for line in lines] == [
        ("POST /v1/load_lora_adapter", 200, "tenant-admin"),
        ("POST /v1/load_lora_adapter", 403, None),
        ("POST /v1/reset_prefix_cache", 401, None),
    ]
    assert lines[0]["key"] == world.keys["admin"].split("_")[1] and lines[0]["client"] == "127.0.0.1"
    text = world.audit_file.read_text()
    assert not any(word in text for word in ("secret", "stolen", world.keys["admin"]))
    assert stat.S_IMODE(world.audit_file.stat().st_mode) == 0o600


async def test_a_call_is_recorded_before_its_caller_hears_of_it(world: World) -> None:
    recorded: list[int] = []

    async def send(message: Any) -> None:
        recorded.append(len(world.audited()))

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    for headers in (world.auth("admin"), {}):
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": "/v1/reset_prefix_cache", "headers": raw, "client": None}
        await world.guard(scope, receive, send)
    assert recorded[0] == 1 and recorded[-1] == 2


async def test_audit_lines_stay_whole_under_load(world: World) -> None:
    calls = [world.client.post("/v1/reset_prefix_cache", headers=world.auth("admin")) for _ in range(100)]
    await asyncio.gather(*calls)
    assert len(world.audited()) == 100


def test_the_audit_log_without_a_file(caplog: pytest.LogCaptureFixture) -> None:
    Audit(None).record("POST /x", 200, identity=None, client="")
    assert '"action": "POST /x"' in caplog.text


def test_an_audit_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="audit_file"):
        Audit(str(tmp_path / "no" / "such" / "folder"))


# Limits.


async def test_too_many_headers(tmp_path: Path) -> None:
    world = World(tmp_path, headers=20, header_bytes=2000)
    many = {f"x-{i}": "1" for i in range(30)}
    for headers in (many, {"x-long": "a" * 3000}):
        answer = await world.client.get("/health", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (431, "headers_too_large")


async def test_too_many_calls(tmp_path: Path) -> None:
    world = World(tmp_path, concurrent=1)
    first = asyncio.create_task(world.client.get("/wait", headers=world.auth()))
    await world.waiting.wait()
    refused = await world.client.get("/v1/models", headers=world.auth())
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert (await world.client.get("/health")).status_code == 200
    world.go_on.set()
    assert (await first).status_code == 200
    assert (await world.client.get("/v1/models", headers=world.auth())).status_code == 200


async def test_a_call_that_runs_too_long(tmp_path: Path) -> None:
    world = World(tmp_path, request_s=0.05)
    answer = await world.client.get("/wait", headers=world.auth())
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert world.cancelled.is_set()


async def test_a_body_that_is_late(tmp_path: Path) -> None:
    world = World(tmp_path, body_s=0.05)
    never = asyncio.Event()

    async def drip() -> AsyncIterator[bytes]:
        yield b"{"
        await never.wait()

    answer = await world.client.post("/v1/completions", headers=world.auth(), content=drip())
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "request_timeout")


# Over real sockets.


@contextlib.asynccontextmanager
async def served(world: World, certificates: Certificates | None = None) -> AsyncIterator[int]:
    factory = None if certificates is None else (lambda *_: certificates.server_context())
    config = uvicorn.Config(
        world.guard,
        port=0,
        http=limited_protocol(world.settings.limits),
        lifespan="off",
        log_level="error",
        ssl_context_factory=factory,
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def send(port: int, *pieces: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
    try:
        async with asyncio.timeout(10):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize(
    "bomb",
    [
        b"GET /health HTTP/1.1\r\nx: " + b"a" * 100_000,
        b"GET /" + b"a" * 100_000,
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000,
    ],
    ids=["value", "path", "number"],
)
async def test_head_bombs_are_refused_unread(tmp_path: Path, bomb: bytes) -> None:
    async with served(World(tmp_path, header_bytes=8192)) as port:
        answer = await send(port, bomb)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
        assert b" 200 " in await send(port, b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")


@pytest.mark.parametrize("said", [b"", b"GET /health HTT", b"GET /health HTTP/1.1\r\nhost: x\r\n"])
async def test_a_head_that_is_late_ends_the_connection(tmp_path: Path, said: bytes) -> None:
    async with served(World(tmp_path, body_s=0.1)) as port:
        assert await send(port, said) == b""


async def test_later_requests_of_a_connection_are_bounded_too(tmp_path: Path) -> None:
    get = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    async with served(World(tmp_path, header_bytes=2048)) as port:
        answer = await send(port, get, get, b"GET /health HTTP/1.1\r\nx: " + b"a" * 50_000)
        assert answer.count(b" 200 ") == 2
        big = b"POST /ping HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\nconnection: close\r\n\r\n" + b"b" * 900
        assert b" 200 " in await send(port, big)  # a body is no head


async def test_no_plain_text_and_no_stranger_where_tls_is_on(world: World, tmp_path: Path) -> None:
    authority = Authority()
    files = authority.issue(tmp_path / "tls")
    certificates = Certificates(files.cert, files.key, files.ca, check_every_s=0)
    async with served(world, certificates) as port:
        assert b"200" not in await send(port, b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        url = f"https://localhost:{port}/v1/models"
        async with httpx.AsyncClient(verify=certificates.client_context()) as client:
            assert (await client.get(url)).status_code == 401  # a certificate is no API key
            assert (await client.get(url, headers=world.auth())).status_code == 200
        async with httpx.AsyncClient(verify=_trusting(authority, tmp_path)) as stranger:
            with pytest.raises(httpx.TransportError):
                await stranger.get(url, headers=world.auth())


def _trusting(authority: Authority, folder: Path) -> Any:
    import ssl

    (folder / "only-ca.crt").write_bytes(authority.pem)
    return ssl.create_default_context(cafile=str(folder / "only-ca.crt"))


# Whatever comes.


@given(
    path=st.text(min_size=1, max_size=60).map(lambda text: f"/{text}"),
    headers=st.lists(st.tuples(st.binary(max_size=30), st.binary(max_size=80)), max_size=12),
    token=st.binary(max_size=200).map(lambda secret: b"jw-s3cr3t-" + secret),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_bytes_get_past_the_door(
    world: World, path: str, headers: list[tuple[bytes, bytes]], token: bytes
) -> None:
    """Any path and any headers end with a refusal that is well-formed, and says nothing of what was sent."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    shown = [(name.lower(), value) for name, value in headers] + [(b"authorization", b"Bearer " + token)]
    scope = {"type": "http", "method": "POST", "path": path, "headers": shown, "client": None}
    await world.guard(scope, receive, send)
    start, body = sent
    assert start["status"] in (401, 431) or path in ("/health", "/ping")
    text = json.dumps(json.loads(body["body"]))
    assert "s3cr3t" not in text
