"""TLS to Redis: a real server behind a listener that speaks it, and certificates that are renewed."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from helpers.certificates import Authority, Files

from joinwise.actors.tls import Certificates
from joinwise.cluster.config import RedisConfig, RedisTlsConfig
from joinwise.cluster.errors import StoreUnavailableError
from joinwise.cluster.store.client import connect, store_errors
from joinwise.cluster.store.embedded import EmbeddedRedis


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


def _paths(files: Files) -> tuple[Path, Path, Path]:
    return files.cert, files.key, files.ca
