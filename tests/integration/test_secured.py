"""A split cluster with everything on: TLS on every port, hashed keys, traces, the operator's ports."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.certificates import Authority, Files
from helpers.cluster import MODEL, RunningCluster, cluster_config, running_cluster
from helpers.collector import Collector, collector
from prometheus_client.parser import text_string_to_metric_families

from joinwise.cluster import apikeys
from joinwise.cluster.client import TLS, AsyncClient
from joinwise.cluster.config import load_config
from joinwise.cluster.errors import JoinwiseError, UnauthorizedError
from joinwise.cluster.router.registry import Registry
from joinwise.cluster.store.client import connect

pytestmark = [pytest.mark.cluster, pytest.mark.model]


@dataclass
class Secured:
    """The cluster, and what a caller needs."""

    cluster: RunningCluster
    collector: Collector
    authority: Authority
    front: Files
    keys: dict[str, str]
    folder: Path

    def http(self, role: str | None = "user") -> httpx.AsyncClient:
        context = ssl.create_default_context(cafile=str(self.front.ca))
        context.load_cert_chain(self.front.cert, self.front.key)
        headers = {"authorization": f"Bearer {self.keys[role]}"} if role else {}
        return httpx.AsyncClient(base_url=self.cluster.http, verify=context, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def secured(small_model: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    authority = Authority()
    front, peers = authority.issue(folder / "front"), authority.issue(folder / "peers")
    keys, entries = {}, []
    for role in apikeys.ROLES:
        keys[role], entry = apikeys.make(f"tenant-{role}", (role,))
        entries.append(entry)
    apikeys.KeyRing(tuple(entries)).save(folder / "keys.yaml")
    with collector() as traces:
        config: dict[str, Any] = cluster_config("secured")
        config["tls"] = {"cert": str(peers.cert), "key": str(peers.key), "ca": str(peers.ca)}
        config["tracing"] = {"endpoint": traces.endpoint}
        for pool in config["pools"]:
            pool["engine"] = {**pool.get("engine", {}), "otlp_traces_endpoint": traces.endpoint}
        config["log"] = {"format": "json"}
        config["gateway"] |= {
            "tls": {"cert": str(front.cert), "key": str(front.key), "ca": str(front.ca)},
            "keys_file": str(folder / "keys.yaml"),
            "audit_file": str(folder / "audit.jsonl"),
            "admin": True,
            "ops_port": 0,
        }
        with running_cluster(config, folder) as cluster:
            yield Secured(cluster, traces, authority, front, keys, folder)


def completion(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "One, two, three,", "max_tokens": 8, "temperature": 0, **more}


async def test_a_split_request_over_tls_is_one_trace(secured: Secured) -> None:
    trace = secrets.token_bytes(16)
    headers = {"traceparent": f"00-{trace.hex()}-{secrets.token_hex(8)}-01", "x-joinwise-ledger": "1"}
    async with secured.http() as http:
        answer = await http.post("/v1/completions", json=completion(), headers=headers)
    assert answer.status_code == 200, answer.text
    ledger = json.loads(answer.headers["x-joinwise-ledger"])
    assert ledger["wire_bytes"] > 0 and not ledger["recomputed"]
    ours = {"request", "route", "queue", "prefill", "transfer", "decode"}
    spans = secured.collector.wait_for(trace, ours | {"llm_request"})
    assert {spans[name].parent_span_id for name in ours - {"request"} | {"llm_request"}} == {spans["request"].span_id}
    assert spans["prefill"].end_time_unix_nano <= spans["decode"].end_time_unix_nano


async def test_grpc_over_tls(secured: Secured) -> None:
    tls = TLS(ca=secured.front.ca, certificate=secured.front.cert, key=secured.front.key)
    async with AsyncClient(secured.cluster.grpc, token=secured.keys["user"], tls=tls, timeout=60) as client:
        assert (await client.generate("One, two,", max_tokens=4)).text
    async with AsyncClient(secured.cluster.grpc, token="nonsense", tls=tls, timeout=60) as client:
        with pytest.raises(UnauthorizedError):
            await client.models()
    async with AsyncClient(secured.cluster.grpc, token=secured.keys["user"], timeout=5) as plain:
        with pytest.raises(JoinwiseError):
            await plain.models()


async def test_roles_and_the_audit_log(secured: Secured) -> None:
    async with secured.http(None) as nobody, secured.http() as user, secured.http("admin") as admin:
        for path in ("/v1/models", "/metrics", "/federate", "/ledgers", "/docs", "/tokenize"):
            assert (await nobody.get(path)).status_code == 401, path
        assert (await nobody.get("/health")).status_code == 200
        assert (await user.get("/metrics")).status_code == 403
        assert (await user.post("/v1/reset_prefix_cache")).status_code == 403
        assert (await admin.post("/v1/reset_prefix_cache")).status_code == 200
    lines = [json.loads(line) for line in (secured.folder / "audit.jsonl").read_text().splitlines()]
    assert [(line["status"], line["tenant"]) for line in lines][-2:] == [(403, None), (200, "tenant-admin")]


async def test_merged_metrics_answer_the_dashboards_queries(secured: Secured) -> None:
    async with secured.http() as http:
        await http.post("/v1/completions", json=completion())
        await http.post("/v1/completions", json=completion(model="another"))
    async with secured.http("metrics") as http:
        text = (await http.get("/federate")).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {sample.value for sample in families["joinwise:federated"].samples} == {1.0}
    assert {sample.labels["pool"] for sample in families["joinwise:federated"].samples} == {"prefill", "decode"}
    series = {sample.name for family in families.values() for sample in family.samples}
    series |= {f"{name}_total" for name, family in families.items() if family.type == "counter"}  # of what never was
    files = Path(__file__).parents[2] / "helm" / "joinwise" / "files" / "dashboards"
    for path in files.glob("*.json"):
        expressions = " ".join(
            target["expr"]
            for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]
            for target in panel.get("targets", ())
        )
        named = set(re.findall(r"\b(?:joinwise|vllm):[a-zA-Z_:]+", expressions))
        assert not named - series, f"{path.name} asks for what nobody exposes: {named - series}"


async def test_no_listener_speaks_plain_text(secured: Secured) -> None:
    addresses = [secured.cluster.http.removeprefix("https://"), secured.cluster.grpc]
    client = connect(secured.cluster.redis_url)
    try:
        config = load_config(secured.cluster.file, {})
        for worker in await Registry(client, config.cluster, config.router).list():
            addresses += [worker.engine_address, worker.kv_address, worker.metrics_address]
    finally:
        await client.aclose()
    assert len(addresses) == 8
    for address in addresses:
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), 5) as plain:
            plain.settimeout(5)
            plain.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            said = b""
            with contextlib.suppress(OSError):
                while data := plain.recv(4096):
                    said += data
        assert b"200 OK" not in said and b"python_info" not in said, address


async def test_certificates_are_renewed_without_a_restart(secured: Secured) -> None:
    host, _, port = secured.cluster.http.removeprefix("https://").rpartition(":")

    def serial() -> str:
        context = ssl.create_default_context(cafile=str(secured.front.ca))
        context.load_cert_chain(secured.front.cert, secured.front.key)
        with (
            socket.create_connection((host, int(port)), 10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as connection,
        ):
            return str((connection.getpeercert() or {})["serialNumber"])

    before = serial()
    secured.authority.issue(secured.folder / "front")
    secured.authority.issue(secured.folder / "peers")
    for _ in range(50):  # files are looked at once a second, by handshakes
        if serial() != before:
            break
        await asyncio.sleep(0.1)
    assert serial() != before
    async with secured.http() as http:
        assert (await http.post("/v1/completions", json=completion())).status_code == 200


async def test_nothing_secret_was_written(secured: Secured) -> None:
    async with secured.http() as http:
        await http.post("/v1/completions", json=completion(), headers={"x-tenant-id": "rich"})
    written = secured.cluster.log.read_text() + (secured.folder / "audit.jsonl").read_text()
    password = secured.cluster.redis_url.partition("://")[2].partition("@")[0].rpartition(":")[2]
    for secret in (*secured.keys.values(), password):
        assert len(secret) < 8 or secret not in written
