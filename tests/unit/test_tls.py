"""Certificates on real listeners: HTTP's (asyncio), gRPC's (threads and asyncio) and connections, before and after a
renewal, with wrong authorities, ended certificates, and files that are broken while they are renewed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from helpers.certificates import Authority, Files

from joinwise.actors.tls import Certificates, peers
from joinwise.cluster.config import PeerTlsConfig
from joinwise.cluster.errors import ConfigError


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def stranger() -> Authority:
    return Authority("somebody else")


def load(files: Files, *, mutual: bool = True) -> Certificates:
    ca = files.ca if mutual else None
    return Certificates(files.cert, files.key, ca, server_name="joinwise", check_every_s=0)


@contextlib.asynccontextmanager
async def listening(context: ssl.SSLContext) -> AsyncIterator[int]:
    """An asyncio listener that greets whoever gets through the handshake."""

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


def shake(port: int, context: ssl.SSLContext) -> tuple[bytes, int]:
    """What the listener says, and the serial number of its certificate. Raises OSError where it refuses."""
    with (
        socket.create_connection(("127.0.0.1", port), 5) as plain,
        context.wrap_socket(plain, server_hostname="joinwise") as secured,
    ):
        serial = int((secured.getpeercert() or {})["serialNumber"], 16)
        if said := secured.recv(5):  # with TLS 1.3 a client learns only now that it is refused
            return said, serial
        raise ConnectionResetError("closed without a word")


async def test_a_listener_shows_a_renewed_certificate(authority: Authority, tmp_path: Path) -> None:
    certificates = load(authority.issue(tmp_path))
    async with listening(certificates.server_context()) as port:
        first = await asyncio.to_thread(shake, port, certificates.client_context())
        assert (await asyncio.to_thread(shake, port, certificates.client_context())) == first
        authority.issue(tmp_path)
        second = await asyncio.to_thread(shake, port, certificates.client_context())
    assert (first[0], second[0]) == (b"hello", b"hello")
    assert first[1] != second[1]
    assert certificates.generation == 1


async def test_a_listener_stops_trusting_an_authority(
    authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    mine = load(authority.issue(tmp_path / "mine"))
    old_client = mine.client_context()
    old_client.load_verify_locations(cadata=stranger.pem.decode())
    async with listening(mine.server_context()) as port:
        assert (await asyncio.to_thread(shake, port, old_client))[0] == b"hello"
        stranger.issue(tmp_path / "mine")
        with pytest.raises(OSError, match=r"(?i)unknown.ca|without a word|reset|eof"):
            await asyncio.to_thread(shake, port, old_client)
        assert (await asyncio.to_thread(shake, port, mine.client_context()))[0] == b"hello"


@pytest.mark.parametrize("case", ["no certificate", "another authority's", "ended", "plain text", "old protocol"])
async def test_who_is_refused(case: str, authority: Authority, stranger: Authority, tmp_path: Path) -> None:
    mine = load(authority.issue(tmp_path / "mine"))
    client = ssl.create_default_context(cafile=str(tmp_path / "mine" / "ca.crt"))
    if case == "another authority's":
        files = stranger.issue(tmp_path / "theirs")
        client.load_cert_chain(files.cert, files.key)
    elif case == "ended":
        files = authority.issue(tmp_path / "ended", days=-1)
        client.load_cert_chain(files.cert, files.key)
    elif case == "old protocol":
        client = mine.client_context()
        client.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        client.maximum_version = ssl.TLSVersion.TLSv1_1
    async with listening(mine.server_context()) as port:
        if case == "plain text":
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            assert b"hello" not in await reader.read()
            writer.close()
        else:
            with pytest.raises(OSError):
                await asyncio.to_thread(shake, port, client)


async def test_a_server_that_is_not_ours_is_refused(authority: Authority, stranger: Authority, tmp_path: Path) -> None:
    mine, theirs = load(authority.issue(tmp_path / "mine")), load(stranger.issue(tmp_path / "theirs"), mutual=False)
    async with listening(theirs.server_context()) as port:
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.to_thread(shake, port, mine.client_context())
    named = load(authority.issue(tmp_path / "named", "another-name"), mutual=False)
    async with listening(named.server_context()) as port:
        with pytest.raises(ssl.SSLCertVerificationError, match="joinwise"):
            await asyncio.to_thread(shake, port, mine.client_context())


@pytest.mark.parametrize("breakage", ["half a file", "another key", "gone"])
async def test_a_broken_renewal_leaves_the_old_files_in_use(
    breakage: str, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = authority.issue(tmp_path)
    certificates = load(files)
    client = certificates.client_context()
    async with listening(certificates.server_context()) as port:
        before = await asyncio.to_thread(shake, port, client)
        if breakage == "half a file":
            files.cert.write_bytes(files.cert.read_bytes()[:100])
        elif breakage == "another key":
            other = authority.issue(tmp_path / "other")
            files.key.write_bytes(other.key.read_bytes())
        else:
            files.key.unlink()
        for _ in range(2):
            assert await asyncio.to_thread(shake, port, client) == before
        assert (certificates.generation, "the old ones stay" in caplog.text) == (0, True)
        if breakage != "gone":  # a missing file has nothing by which to know that it was reported
            assert caplog.text.count("the old ones stay") == 1
        authority.issue(tmp_path)
        assert (await asyncio.to_thread(shake, port, client))[1] != before[1]


def test_secrets_stay_out_of_the_log(authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = authority.issue(tmp_path)
    certificates = load(files)
    files.cert.write_text("nonsense")
    assert certificates.generation == 0
    assert "PRIVATE" not in caplog.text and files.key.read_text().splitlines()[1] not in caplog.text


@pytest.mark.parametrize("missing", ["cert", "key", "ca"])
def test_files_that_cannot_be_used_at_the_start(missing: str, authority: Authority, tmp_path: Path) -> None:
    files = authority.issue(tmp_path)
    getattr(files, missing).write_text("nonsense")
    with pytest.raises(ConfigError, match=r"tls\.crt.*cannot be used"):
        load(files)
    getattr(files, missing).unlink()
    with pytest.raises(ConfigError, match="cannot be used"):
        peers(PeerTlsConfig(cert=str(files.cert), key=str(files.key), ca=str(files.ca)))


def test_asking_for_certificates_needs_an_authority(authority: Authority, tmp_path: Path) -> None:
    certificates = load(authority.issue(tmp_path), mutual=False)
    with pytest.raises(ConfigError, match="authority"):
        certificates.server_context(clients=True)
    with pytest.raises(ConfigError, match="authority"):
        certificates.grpc_server(clients=True)


def test_no_settings_mean_no_certificates() -> None:
    assert peers(None) is None


# gRPC.


@contextlib.contextmanager
def grpc_server(certificates: Certificates) -> Iterator[int]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    checks = health.HealthServicer()
    checks.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = server.add_secure_port("127.0.0.1:0", certificates.grpc_server())
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait()


def check(port: int, certificates: Certificates) -> int:
    """Ask for the health over a channel of its own."""
    address = f"127.0.0.1:{port}"
    options = [*certificates.channel_options, ("grpc.use_local_subchannel_pool", 1)]
    with grpc.secure_channel(address, certificates.grpc_channel(), options) as channel:
        request = health_pb2.HealthCheckRequest()
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=10).status


def test_grpc_follows_a_renewal_to_another_authority(authority: Authority, stranger: Authority, tmp_path: Path) -> None:
    certificates = load(authority.issue(tmp_path / "mine"))
    left_behind = load(authority.issue(tmp_path / "left-behind"))
    with grpc_server(certificates) as port:
        assert check(port, certificates) == check(port, left_behind) == health_pb2.HealthCheckResponse.SERVING
        stranger.issue(tmp_path / "mine")
        assert check(port, certificates) == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as refusal:
            check(port, left_behind)
        assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
    assert certificates.generation == 1


async def test_grpc_aio_follows_a_renewal(authority: Authority, stranger: Authority, tmp_path: Path) -> None:
    certificates = load(authority.issue(tmp_path))
    server = grpc.aio.server()
    checks = health.aio.HealthServicer()
    await checks.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = server.add_secure_port("127.0.0.1:0", certificates.grpc_server())
    await server.start()
    try:
        assert await asyncio.to_thread(check, port, certificates) == health_pb2.HealthCheckResponse.SERVING
        stranger.issue(tmp_path)
        assert await asyncio.to_thread(check, port, certificates) == health_pb2.HealthCheckResponse.SERVING
    finally:
        await server.stop(0)


def test_grpc_refuses_clients_without_a_certificate(authority: Authority, tmp_path: Path) -> None:
    certificates = load(authority.issue(tmp_path))
    with grpc_server(certificates) as port:
        credentials = grpc.ssl_channel_credentials(authority.pem)
        with (
            grpc.secure_channel(f"127.0.0.1:{port}", credentials, certificates.channel_options) as channel,
            pytest.raises(grpc.RpcError),
        ):
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)


def test_many_handshakes_during_renewals(authority: Authority, tmp_path: Path) -> None:
    """Every handshake finds a certificate and a key that belong together, whatever the renewals are doing."""
    certificates = load(authority.issue(tmp_path))
    ended = threading.Event()
    failures: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            while not ended.is_set():
                work()
        except BaseException as error:
            failures.append(error)

    def build() -> None:
        certificates.server_context()
        certificates.client_context()
        certificates.grpc_channel()

    threads = [threading.Thread(target=guarded, args=(build,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        authority.issue(tmp_path)
    ended.set()
    for thread in threads:
        thread.join()
    assert failures == []
