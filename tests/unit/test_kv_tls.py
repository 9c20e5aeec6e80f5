"""KV between two workers that speak TLS, on every transport: strangers get nothing, renewals are followed."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.certificates import Authority
from helpers.kv_rig import BLOCK_SIZE, eventually, make_caches

from joinwise.actors.kv.fetching import FetchReport
from joinwise.actors.kv.receiving import FetchSpec
from joinwise.actors.tls import Certificates
from joinwise.actors.vllm.connector.metadata import OpenSend, SendStep, StepMetadata
from joinwise.actors.vllm.connector.worker import KvSettings, WorkerConnector
from joinwise.cluster.config_model import PeerTlsConfig

TRANSPORTS = ("grpc", "tcp", "shm", "auto")


class Worker:
    """One worker half with its ports open."""

    def __init__(self, seed: int, transport: str, tls: PeerTlsConfig | None) -> None:
        self.caches = make_caches(16, seed)
        self.connector = WorkerConnector(BLOCK_SIZE, wake=lambda: None)
        self.connector.register(self.caches)
        settings = KvSettings(frame_bytes=600, model_digest="m", transport=transport, token="cluster-token", tls=tls)
        self.address = self.connector.open(settings, {}, "test").address

    def step(self, metadata: StepMetadata | None = None) -> list[FetchReport]:
        metadata = metadata or StepMetadata()
        self.connector.preempt(metadata)
        self.connector.begin(metadata)
        if metadata.sends:
            for name in self.caches:
                self.connector.layer_done(name)
        self.connector.start_receives(metadata)
        self.connector.end_step()
        self.connector.transfer_results(set())
        reports = self.connector.take_reports()
        return list(reports.reports) if reports else []


def transfer(sender: Worker, receiver: Worker, name: str) -> FetchReport:
    """Send two blocks; what the receiver reports."""
    tokens = 2 * BLOCK_SIZE
    spec = FetchSpec(
        request_id=name,
        transfer_id=f"{name}-t",
        epoch=1,
        peers=(sender.address,),
        block_ids=(5, 6),
        first_token=0,
        num_tokens=tokens,
        timeout_s=5.0,
    )
    receiver.step(StepMetadata(receives=[spec], released={name}))
    sender.step(
        StepMetadata(open_sends=[OpenSend(name, f"{name}-t", 1, tokens)], sends=[SendStep(name, (3, 4), tokens)])
    )
    reports: list[FetchReport] = []

    def reported() -> bool:
        reports.extend(receiver.step())
        return bool(reports)

    eventually(reported, "the transfer ends", 60)  # handshakes are tried again, ever less often
    return reports[0]


def settings_of(authority: Authority, folder: Path) -> PeerTlsConfig:
    files = authority.issue(folder)
    return PeerTlsConfig(cert=str(files.cert), key=str(files.key), ca=str(files.ca))


@pytest.fixture
def started() -> Iterator[list[Worker]]:
    workers: list[Worker] = []
    yield workers
    for worker in workers:
        worker.connector.shutdown()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_kv_crosses_under_tls(transport: str, started: list[Worker], tmp_path: Path) -> None:
    tls = settings_of(Authority(), tmp_path)
    sender, receiver = Worker(1, transport, tls), Worker(2, transport, tls)
    started += [sender, receiver]
    report = transfer(sender, receiver, "r")
    assert (report.failure, report.transport) == ("", "shm" if transport == "auto" else transport)
    for name, cache in receiver.caches.items():
        assert (cache[5:7] == sender.caches[name][3:5]).all()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("stranger", ["in the clear", "another authority"])
def test_a_stranger_gets_nothing(stranger: str, transport: str, started: list[Worker], tmp_path: Path) -> None:
    """It shows the cluster's own token, which alone does not let it in."""
    theirs = settings_of(Authority("theirs"), tmp_path / "theirs") if stranger == "another authority" else None
    sender = Worker(1, transport, settings_of(Authority("ours"), tmp_path / "ours"))
    receiver = Worker(2, transport, theirs)
    started += [sender, receiver]
    before = {name: cache.clone() for name, cache in receiver.caches.items()}
    assert transfer(sender, receiver, "r").failure
    assert all((cache == before[name]).all() for name, cache in receiver.caches.items())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_renewal_is_followed(
    transport: str, started: list[Worker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole cluster moves to another authority; whoever connects anew does so with the new files."""
    monkeypatch.setitem(Certificates.__init__.__kwdefaults__, "check_every_s", 0.0)
    tls = settings_of(Authority("old"), tmp_path)
    sender, receiver = Worker(1, transport, tls), Worker(2, transport, tls)
    started += [sender, receiver]
    assert transfer(sender, receiver, "first").failure == ""
    Authority("new").issue(tmp_path)
    again = Worker(3, transport, tls)
    started.append(again)
    assert transfer(again, receiver, "second").failure == ""
    assert transfer(sender, again, "third").failure == ""


def test_no_port_speaks_plain_text(started: list[Worker], tmp_path: Path) -> None:
    worker = Worker(1, "tcp", settings_of(Authority(), tmp_path))
    started.append(worker)
    host, _, port = worker.address.rpartition(":")
    with socket.create_connection((host, int(port)), 5) as plain:
        plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        plain.settimeout(5)
        assert plain.recv(1000)[:1] in (b"", b"\x15")  # closed, or a TLS alert; never HTTP/2 settings
