"""Certificates of this process, read again when their files change.

Owns the way from PEM files to `ssl.SSLContext` and gRPC credentials. A listener made here shows the new certificate,
and trusts the new authority, from the first handshake after the files have changed; connections that stand are left
alone. Files that cannot be used (half written, key and certificate of different pairs) are reported once and the old
ones stay in use, so that a renewal that goes wrong breaks nothing before the old certificate ends.

Every process of a cluster carries the same name in its certificate (`tls.server_name`), because workers are reached by
addresses that no certificate can know in advance.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from joinwise.cluster.config_model import PeerTlsConfig, TlsConfig
from joinwise.cluster.errors import ConfigError

logger = logging.getLogger(__name__)

_CHECK_EVERY_S = 1.0


@dataclass(frozen=True)
class _Pem:
    """One reading of the files.

    Attributes:
        marks: of each file: device, inode, size and time of change, by which another reading is known.
    """

    marks: tuple[tuple[int, int, int, int], ...]
    cert: bytes
    key: bytes
    ca: bytes | None


@dataclass(frozen=True)
class _Contexts:
    """Made of one reading: listeners that ask for no client certificate, or do, and connections to peers."""

    server: ssl.SSLContext
    asking: ssl.SSLContext
    client: ssl.SSLContext


class Certificates:
    """A certificate, its key, and the authority that peers' certificates must come from.

    Args:
        cert: PEM file of the certificate chain, the leaf first.
        key: PEM file of the private key, without a passphrase.
        ca: PEM file of the authorities for peers; None trusts nobody's certificate and asks for none.
        server_name: name that a server's certificate must carry; empty checks the address that was dialled.
        check_every_s: seconds between two looks at the files; the looks are made by handshakes.

    Raises:
        ConfigError: a file cannot be read, or they do not fit together.
    """

    def __init__(
        self,
        cert: str | Path,
        key: str | Path,
        ca: str | Path | None = None,
        *,
        server_name: str = "",
        check_every_s: float = _CHECK_EVERY_S,
    ) -> None:
        self.server_name = server_name
        self._cert, self._key, self._ca = Path(cert), Path(key), Path(ca) if ca is not None else None
        self._check_every_s = check_every_s
        self._lock = threading.Lock()
        self._generation = 0
        self._looked = time.monotonic()
        self._refused: object = None
        try:
            self._pem = self._read()
            self._contexts = self._build(self._pem)
        except (OSError, ssl.SSLError, ValueError) as error:
            raise ConfigError(
                f"the TLS files {cert}, {key}{f', {ca}' if ca else ''} cannot be used: {error}"
            ) from error

    @classmethod
    def of_gateway(cls, settings: TlsConfig) -> Certificates:
        """What a gateway shows its clients."""
        return cls(settings.cert, settings.key, settings.ca)

    @classmethod
    def of_peers(cls, settings: PeerTlsConfig) -> Certificates:
        """What the processes of a cluster show each other."""
        return cls(settings.cert, settings.key, settings.ca, server_name=settings.server_name)

    @property
    def generation(self) -> int:
        """How often the files have been read anew; whoever keeps credentials renews them when it has grown."""
        self._refresh()
        return self._generation

    def server_context(self, *, clients: bool | None = None) -> ssl.SSLContext:
        """For a listener; follows the files by itself.

        Args:
            clients: ask clients for a certificate; None does so where there is an authority to check it with.
        """
        ask = self._asks(clients)
        built = self._build(self._pem)
        outer = built.asking if ask else built.server  # its own: the hook below must not be on what it hands over

        def newest(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
            self._refresh()
            connection.context = self._contexts.asking if ask else self._contexts.server

        outer.sni_callback = newest  # runs at every handshake, with or without a name
        return outer

    def client_context(self) -> ssl.SSLContext:
        """For one connection to a peer, with the files as they are now. Dial with `server_hostname=server_name`."""
        self._refresh()
        return self._contexts.client

    def grpc_server(self, *, clients: bool | None = None) -> grpc.ServerCredentials:
        """For a gRPC listener, `grpc` and `grpc.aio` alike; follows the files by itself. `clients` as above."""
        ask = self._asks(clients)
        shown = [self.generation]

        def newest() -> grpc.ServerCertificateConfiguration | None:
            if (generation := self.generation) == shown[0]:
                return None
            shown[0] = generation
            return self._grpc_configuration()

        return grpc.dynamic_ssl_server_credentials(self._grpc_configuration(), newest, ask)  # type: ignore[arg-type]

    def grpc_channel(self) -> grpc.ChannelCredentials:
        """For one channel to a peer, with the files as they are now: a channel reconnects with what it was made with,
        so make another when `generation` has grown. Give the channel `channel_options` too."""
        self._refresh()
        pem = self._pem
        return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert)

    @property
    def channel_options(self) -> list[tuple[str, Any]]:
        """Options of a channel to a peer: the name to look for in its certificate."""
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []

    # Inside.

    def _asks(self, clients: bool | None) -> bool:
        if clients and self._ca is None:
            raise ConfigError("asking clients for certificates needs an authority to check them with: set tls.ca")
        return self._ca is not None if clients is None else clients

    def _grpc_configuration(self) -> grpc.ServerCertificateConfiguration:
        pem = self._pem
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], pem.ca)

    def _marks(self) -> tuple[tuple[int, int, int, int], ...]:
        files = [self._cert, self._key, *([self._ca] if self._ca else [])]
        stats = [file.stat() for file in files]  # through links: Kubernetes swaps a link to renew all files at once
        return tuple((each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns) for each in stats)

    def _read(self) -> _Pem:
        """The files as they were at one moment."""
        while True:
            marks = self._marks()
            ca = self._ca.read_bytes() if self._ca else None
            pem = _Pem(marks, self._cert.read_bytes(), self._key.read_bytes(), ca)
            if marks == self._marks():
                return pem

    def _build(self, pem: _Pem) -> _Contexts:
        """What connections are made with; also the proof that the files fit together."""
        ca = pem.ca.decode() if pem.ca is not None else None
        server, client = self._context(ssl.PROTOCOL_TLS_SERVER, pem), self._context(ssl.PROTOCOL_TLS_CLIENT, pem)
        if ca is None:
            client.load_default_certs()
            return _Contexts(server, server, client)
        client.load_verify_locations(cadata=ca)
        asking = self._context(ssl.PROTOCOL_TLS_SERVER, pem)
        asking.load_verify_locations(cadata=ca)
        asking.verify_mode = ssl.CERT_REQUIRED
        # A resumed session is not verified again: its client might have lost our trust meanwhile.
        asking.num_tickets = 0
        asking.options |= ssl.OP_NO_TICKET
        return _Contexts(server, asking, client)

    def _context(self, protocol: int, pem: _Pem) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # From memory, so that what was read together is used together; OpenSSL wants a path.
        with open(os.memfd_create("pem", os.MFD_CLOEXEC), "wb", buffering=0) as file:
            file.write(pem.key + b"\n" + pem.cert)
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
        return context

    def _refresh(self) -> None:
        """Read the files again if they have changed; what cannot be used is said once and changes nothing."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked < self._check_every_s:
                return
            self._looked = now
            marks = None
            try:
                marks = self._marks()
                if marks in (self._pem.marks, self._refused):
                    return
                pem = self._read()
                contexts = self._build(pem)
            except (OSError, ssl.SSLError, ValueError) as error:
                self._refused = marks
                logger.error("the TLS files beside %s cannot be used, the old ones stay: %s", self._cert, error)
                return
            self._pem, self._contexts = pem, contexts  # others build from them meanwhile: only what fits is ever seen
            self._generation += 1
            logger.info("the TLS files beside %s have changed and are in use", self._cert)


def peers(settings: PeerTlsConfig | None) -> Certificates | None:
    """The cluster's own certificates, where there are any."""
    return Certificates.of_peers(settings) if settings is not None else None
