"""Redis behind Sentinel: a fail-over in the middle of routing, on real servers."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis
from helpers.router_rig import Bench, Make, demand

from joinwise.cluster.errors import ConfigError, JoinwiseError, NoWorkerError, StoreUnavailableError
from joinwise.cluster.router.router import Running
from joinwise.cluster.store.client import connect
from joinwise.cluster.store.embedded import find_server
from joinwise.cluster.store.sentinel import SentinelAddress, parse_sentinel


def test_addresses() -> None:
    parsed = parse_sentinel("redis+sentinel://u:p%40@a:1,b,c:3/main/2")
    assert parsed == SentinelAddress((("a", 1), ("b", 26379), ("c", 3)), "main", 2, "u", "p@")
    assert parse_sentinel("redis+sentinel://a/main") == SentinelAddress((("a", 26379),), "main", 0, None, None)


@pytest.mark.parametrize("url", ["redis+sentinel://a:1", "redis+sentinel:///m", "redis+sentinel://u:secret@a:x/m"])
def test_what_is_no_address_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sentinel(url)
    assert "secret" not in str(caught.value)


class Servers:
    """A master, its replica and one sentinel."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.master, self.replica, self.sentinel = (_free_port() for _ in range(3))
        common = ["--save", "", "--bind", "127.0.0.1", "--dir", str(folder), "--daemonize", "no"]
        self.processes = {}
        for port, more in ((self.master, []), (self.replica, ["--replicaof", "127.0.0.1", str(self.master)])):
            self._start(stack, port, [str(find_server()), "--port", str(port), *common, *more])
        config = folder / "sentinel.conf"
        config.write_text(
            f"port {self.sentinel}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor main 127.0.0.1 {self.master} 1\n"
            "sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 3000\n"
        )
        wait(lambda: redis.Redis(port=self.replica).info("replication")["master_link_status"] == "up")
        self._start(stack, self.sentinel, [str(find_server()), str(config), "--sentinel"])
        watched = redis.Redis(port=self.sentinel, decode_responses=True)
        wait(lambda: watched.execute_command("SENTINEL", "MASTER", "main") is not None)
        wait(lambda: redis.sentinel.Sentinel([("127.0.0.1", self.sentinel)]).discover_slaves("main"))
        self.url = f"redis+sentinel://127.0.0.1:{self.sentinel}/main"

    def _start(self, stack: ExitStack, port: int, command: list[str]) -> None:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stack.callback(process.wait)
        stack.callback(process.kill)
        self.processes[port] = process
        wait(lambda: redis.Redis(port=port).ping())

    def kill_master(self) -> None:
        self.processes[self.master].kill()
        self.processes[self.master].wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except (redis.RedisError, KeyError):
            pass
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    with ExitStack() as stack:
        yield Servers(tmp_path, stack)


async def test_a_fail_over_in_mid_load(servers: Servers, clock: Callable[[], int], make_worker: Make) -> None:
    client = connect(servers.url)
    bench = Bench(client, "c", clock, make_worker, max_pending_tokens=10**6)
    for name, role in (("p", "prefill"), ("d", "decode")):
        await bench.join(name, role)
    leases = [await bench.router.route(demand()) for _ in range(5)]
    await client.wait(1, 2000)
    servers.kill_master()
    refused, deadline = 0, time.monotonic() + 30
    while True:
        try:
            leases.append(await bench.router.route(demand()))
            break
        except (StoreUnavailableError, NoWorkerError):
            refused += 1  # said at once, and the client may try again
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
    assert refused
    await bench.router.adopt([Running(lease, demand(), False) for lease in leases])
    assert await bench.pending() == {"p": (600, 0), "d": (0, 660)}
    for lease in leases:
        assert await bench.router.settle(lease)
    async with asyncio.timeout(10):  # a lost answer's lease is settled in the background, or expires
        while await bench.router.leftovers():
            await asyncio.sleep(0.05)
    await client.aclose()


async def test_no_sentinel_is_said_at_once() -> None:
    client = connect("redis+sentinel://127.0.0.1:1/main")
    with pytest.raises(JoinwiseError) as caught:
        await Bench(client, "c", lambda: 1, lambda *a: None).router.route(demand())  # type: ignore[arg-type, return-value]
    assert isinstance(caught.value, StoreUnavailableError)
    await client.aclose()
