"""Fixtures on a real Redis: one server for all tests, a cluster of its own (a key prefix) for each."""

import itertools
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from helpers.workers import worker
from redis.asyncio import Redis

from joinwise.cluster.router.registry import WorkerInfo
from joinwise.cluster.store.client import connect
from joinwise.cluster.store.embedded import EmbeddedRedis

_numbers = itertools.count()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    """A server that lives as long as the test run."""
    server = EmbeddedRedis.start()
    yield server
    server.stop()


@pytest.fixture
async def redis_client(redis_server: EmbeddedRedis) -> AsyncIterator[Redis]:
    """A client of it."""
    client = connect(redis_server.url)
    yield client
    await client.aclose()


@pytest.fixture
def cluster_name() -> str:
    """A cluster that no other test has."""
    return f"test-{next(_numbers)}"


class Clock:
    """Milliseconds that pass when a test says so."""

    def __init__(self, now_ms: int = 1_800_000_000_000) -> None:
        self.now_ms = now_ms

    def __call__(self) -> int:
        return self.now_ms

    def pass_(self, seconds: float) -> None:
        self.now_ms += int(seconds * 1000)


@pytest.fixture
def clock() -> Clock:
    """A virtual clock."""
    return Clock()


@pytest.fixture
def make_worker() -> Callable[..., WorkerInfo]:
    """`helpers.workers.worker`, as an argument."""
    return worker
