"""TLS to Redis: a real server behind a listener that speaks it, and certificates that are renewed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from helpers.certificates import Authority, Files
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff

from joinwise.actors.tls import Certificates
from joinwise.cluster.config import RedisConfig, RedisTlsConfig
from joinwise.cluster.errors import StoreUnavailableError
from joinwise.cluster.store.client import connect, store_errors
from joinwise.cluster.store.embedded import EmbeddedRedis, find_server


@pytest.fixture(scope="module")
def plain() -> Iterator[str]:
    server = EmbeddedRedis.start(RedisConfig())
    yield server.url
    server.stop()


@contextlib.asynccontextmanager
async def terminated(plain_url: str, context: ssl.SSLContext) -> AsyncIterator[str]:
    """A listener that ends TLS in front of the server; its address, with the server's password."""
    parts = urlsplit(plain_url)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if parts.scheme == "unix":
            inner = await asyncio.open_unix_connection(parts.path)
        else:
            inner = await asyncio.open_connection(parts.hostname, parts.port)
        await asyncio.gather(pump(reader, inner[1]), pump(inner[0], writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    credentials = f"{parts.username or ''}:{parts.password}@" if parts.password else ""
    try:
        yield f"rediss://{credentials}localhost:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def settings(files: Files, *, client: bool = True) -> RedisConfig:
    own = {"cert": str(files.cert), "key": str(files.key)} if client else {}
    return RedisConfig(url="rediss://elsewhere", retries=0, tls=RedisTlsConfig(ca=str(files.ca), **own))


async def test_a_renewed_client_certificate_is_shown(plain: str, tmp_path: Path) -> None:
    """The server moves to another authority; a client made before must follow with the files that it was given."""
    old, new = Authority("old"), Authority("new")
    server = Certificates(*_paths(old.issue(tmp_path / "server")), check_every_s=0)
    files = old.issue(tmp_path / "client")
    async with terminated(plain, server.server_context()) as url:
        client = connect(url, settings(files))
        try:
            assert await client.ping()
            new.issue(tmp_path / "server")
            new.issue(tmp_path / "client")
            await client.connection_pool.disconnect()
            assert await client.ping()
        finally:
            await client.aclose()


async def test_strangers_are_refused_on_both_sides(plain: str, tmp_path: Path) -> None:
    ours, theirs = Authority("ours"), Authority("theirs")
    server = Certificates(*_paths(ours.issue(tmp_path / "server")), check_every_s=0)
    cases = [
        settings(ours.issue(tmp_path / "none"), client=False),
        settings(theirs.issue(tmp_path / "wrong")),
        settings(theirs.issue(tmp_path / "half", ca=ours.pem)),
    ]
    async with terminated(plain, server.server_context()) as url:
        for case in cases:
            client = connect(url, case)
            try:
                with pytest.raises(StoreUnavailableError) as caught, store_errors("the test runs"):
                    await client.ping()
            finally:
                await client.aclose()
            assert (urlsplit(url).password or "no password") not in str(caught.value)


async def test_a_redis_cluster_speaks_tls_too(tmp_path: Path) -> None:
    authority = Authority("ours")
    server = Certificates(*_paths(authority.issue(tmp_path / "server")), check_every_s=0)
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        port, bus = one.getsockname()[1], two.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    options += ["--cluster-enabled", "yes", "--cluster-port", str(bus), "--cluster-preferred-endpoint-type", "hostname"]
    options += ["--cluster-announce-hostname", "localhost"]
    process = await asyncio.create_subprocess_exec(str(find_server()), *options, stdout=asyncio.subprocess.DEVNULL)
    try:
        direct = Redis(port=port, retry=Retry(ConstantBackoff(0.05), 100))
        await direct.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        while b"cluster_state:ok" not in (await direct.execute_command("CLUSTER", "INFO")):
            await asyncio.sleep(0.02)
        async with terminated(f"redis://127.0.0.1:{port}", server.server_context()) as url:
            await direct.config_set("cluster-announce-port", url.rpartition(":")[2])
            client = connect(
                url.replace("rediss://", "rediss+cluster://"), settings(authority.issue(tmp_path / "client"))
            )
            assert await client.set("{jw:c}:x", "1")
            assert await client.get("{jw:c}:x") == "1"
            await client.aclose()
            stranger = connect(
                url.replace("rediss://", "rediss+cluster://"), settings(Authority("theirs").issue(tmp_path / "wrong"))
            )
            with pytest.raises(StoreUnavailableError), store_errors("the test runs"):
                await stranger.get("{jw:c}:x")
            await stranger.aclose()
        await direct.aclose()
    finally:
        process.kill()
        await process.wait()


def _paths(files: Files) -> tuple[Path, Path, Path]:
    return files.cert, files.key, files.ca
