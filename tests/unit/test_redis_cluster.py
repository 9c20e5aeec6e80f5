"""A real Redis Cluster: three primaries, a replica of the one that holds our slot, a user who sees our keys only."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
from helpers.router_rig import Make, demand
from redis.crc import key_slot

from joinwise.cluster.config_model import RedisConfig, RouterConfig
from joinwise.cluster.errors import ConfigError, StoreUnavailableError
from joinwise.cluster.router.pulse import take_pulse
from joinwise.cluster.router.registry import Registry, WorkerLoad
from joinwise.cluster.router.router import Router
from joinwise.cluster.router.why import decisions_on
from joinwise.cluster.store.client import connect
from joinwise.cluster.store.embedded import find_server
from joinwise.cluster.store.redis_cluster import ClusterAddress, parse_cluster

_SETTINGS = RouterConfig(split="always")
_NAME = "c"
_SLOT = key_slot(f"{{jw:{_NAME}}}".encode())


def test_addresses() -> None:
    parsed = parse_cluster("redis+cluster://u:p%40@a:1,b,c:3")
    assert parsed == ClusterAddress((("a", 1), ("b", 6379), ("c", 3)), "u", "p@", tls=False)
    assert parse_cluster("rediss+cluster://a/") == ClusterAddress((("a", 6379),), None, None, tls=True)
    assert RedisConfig(url="rediss+cluster://a:1").url


@pytest.mark.parametrize("url", ["redis+cluster://", "redis+cluster://u:secret@a:x", "redis+cluster://u:secret@a/0"])
def test_what_is_no_address_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_cluster(url)
    assert "secret" not in str(caught.value)


def wait(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except redis.RedisError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Nodes:
    """Three primaries with a third of the slots each; `replica` follows the owner of ours."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.ports, self.processes = [_free_port() for _ in range(4)], {}
        self._clients = {port: redis.Redis(port=port, decode_responses=True) for port in self.ports}
        for port in self.ports:
            (folder / str(port)).mkdir()
            options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder / str(port))]
            options += [
                "--cluster-enabled",
                "yes",
                "--cluster-port",
                str(_free_port()),
                "--cluster-node-timeout",
                "1000",
            ]
            options += ["--repl-diskless-sync-delay", "0", "--cluster-replica-validity-factor", "0"]
            process = subprocess.Popen([str(find_server()), *options], stdout=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
            self.processes[port] = process
            wait(self._clients[port].ping)
        bounds = [0, 5461, 10923, 16384]
        for index, port in enumerate(self.ports[:3]):
            self.run(port, "CLUSTER", "ADDSLOTSRANGE", bounds[index], bounds[index + 1] - 1)
            if bounds[index] <= _SLOT < bounds[index + 1]:
                self.owner = port
        for port in self.ports[1:]:
            bus = self.run(port, "CONFIG", "GET", "cluster-port")["cluster-port"]
            self.run(self.ports[0], "CLUSTER", "MEET", "127.0.0.1", port, bus)
        wait(lambda: all("cluster_known_nodes:4" in str(self._raw(port, "INFO")) for port in self.ports))
        self.replica = self.ports[3]
        owner_id = self.run(self.owner, "CLUSTER", "MYID")
        wait(lambda: self.run(self.replica, "CLUSTER", "REPLICATE", owner_id))
        self.wait_for_replica()
        wait(lambda: all("cluster_state:ok" in str(self._raw(port, "INFO")) for port in self.ports))
        for port in self.ports:
            self.run(port, "ACL", "SETUSER", "jw", "on", ">pw", f"~{{jw:{_NAME}}}*", "+@all")

    def wait_for_replica(self) -> None:
        wait(lambda: self._clients[self.replica].info("replication")["master_link_status"] == "up")

    def run(self, port: int, *command: Any) -> Any:
        return self._clients[port].execute_command(*command)

    def _raw(self, port: int, what: str) -> Any:
        return self.run(port, "CLUSTER", what)

    def url(self, *ports: int) -> str:
        return "redis+cluster://jw:pw@" + ",".join(f"127.0.0.1:{port}" for port in ports)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with ExitStack() as stack:
        yield Nodes(tmp_path, stack)


async def test_routing_over_a_cluster_and_a_lost_primary(nodes: Nodes, make_worker: Make) -> None:
    other = next(port for port in nodes.ports[:3] if port != nodes.owner)
    client = connect(nodes.url(other), RedisConfig(timeout_s=1, max_connections=4))
    registry, router = Registry(client, _NAME, _SETTINGS), Router(client, _NAME, _SETTINGS)
    epochs = {
        name: await registry.register(make_worker(name, role)) for name, role in (("p", "prefill"), ("d", "decode"))
    }
    leases = await asyncio.gather(*(router.route(demand(1, 1)) for _ in range(40)))  # more than connections
    assert (await take_pulse(client, _NAME)).leases == 40
    assert len(await decisions_on(client, _NAME, "r")) == 40
    assert len(await router.leftovers()) >= 40
    await client.script_flush()
    assert all(await asyncio.gather(*(router.settle(lease) for lease in leases[1:])))
    kept = leases[0]
    assert int(nodes.run(nodes.owner, "WAIT", 1, 2000)) == 1

    nodes.run(nodes.replica, "CLUSTER", "FAILOVER")  # by hand: the client is told that the slot has moved
    wait(lambda: "master" in str(nodes.run(nodes.replica, "ROLE")))
    moved = await router.route(demand(1, 1))
    nodes.run(nodes.owner, "CLUSTER", "FAILOVER")
    wait(lambda: "master" in str(nodes.run(nodes.owner, "ROLE")))
    assert await router.settle(moved)

    nodes.wait_for_replica()
    nodes.processes[nodes.owner].kill()
    async with asyncio.timeout(20):
        while True:
            try:
                for name, epoch in epochs.items():
                    assert await registry.heartbeat(name, epoch, WorkerLoad())
                lease = await router.route(demand(1, 1))
                break
            except StoreUnavailableError:
                continue
    assert await router.settle(lease)
    assert await router.settle(kept)
    assert await router.leftovers() == []
    await client.aclose()


async def test_a_user_reaches_the_keys_of_its_cluster_only(nodes: Nodes) -> None:
    client = connect(nodes.url(nodes.ports[0]))
    with pytest.raises(StoreUnavailableError, match=r"(?i)perm"):
        await Registry(client, "another", _SETTINGS).states()
    await client.aclose()
    wrong = connect(nodes.url(nodes.ports[0]).replace("pw", "secret"))
    with pytest.raises(StoreUnavailableError) as caught:
        await Registry(wrong, _NAME, _SETTINGS).states()
    assert "secret" not in str(caught.value)
    await wrong.aclose()
