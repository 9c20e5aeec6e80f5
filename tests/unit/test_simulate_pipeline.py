"""Coroutines share a connection without an event loop: each gets its own replies, in order, whatever Redis forgot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis

from joinwise.cluster.errors import OverloadedError, StoreUnavailableError
from joinwise.cluster.simulate.pipeline import Pipeline, Recorder, VirtualClock
from joinwise.cluster.store.client import Scripts
from joinwise.cluster.store.embedded import EmbeddedRedis


@pytest.fixture
def pipeline(redis_server: EmbeddedRedis) -> Iterator[Pipeline]:
    made = Pipeline(redis_server.url)
    yield made
    made.close()


def test_replies_go_to_whom_they_belong_when_scripts_are_forgotten(
    pipeline: Pipeline, redis_server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    echo = "-- echo\nreturn { KEYS[1], ARGV[1], ARGV[2] }"
    monkeypatch.setattr("joinwise.cluster.store.client.script_text", lambda *_: echo)

    async def ask(number: int) -> Any:
        return await Scripts(Recorder(), f"k{number}").run("echo", number, b"\x00\r\n")

    with redis.Redis.from_url(redis_server.url) as other:
        other.script_flush()
    pipeline.begin(((0.0, number, ask(number)) for number in range(50)), VirtualClock())
    # The first one teaches Redis the script while 49 refusals are on their way; each of those teaches it again.
    assert [pipeline.finish() for _ in range(50)] == [(n, [f"k{n}", str(n), "\x00\r\n"]) for n in range(50)]
    assert len(pipeline) == 0
    assert pipeline.one(ask(7)) == ["k7", "7", "\x00\r\n"]


def test_each_call_begins_at_its_own_time(pipeline: Pipeline) -> None:
    clock, client = VirtualClock(), Recorder()

    async def ask() -> Any:
        return await client.execute_command("ECHO", clock())

    pipeline.begin(((at, None, ask()) for at in (1.0, 2.5)), clock)
    first, second = (int(pipeline.finish()[1]) for _ in range(2))
    assert second - first == 1500


def test_a_refusal_is_a_result_and_a_mistake_is_raised(pipeline: Pipeline) -> None:
    client = Recorder()

    async def refused() -> None:
        await client.execute_command("PING")
        raise OverloadedError("no room")

    async def wrong() -> None:
        await client.execute_command("NO-SUCH-COMMAND")

    pipeline.begin([(0.0, "a", refused()), (0.0, "b", wrong())], VirtualClock())
    name, result = pipeline.finish()
    assert name == "a" and isinstance(result, OverloadedError)
    with pytest.raises(redis.ResponseError, match="unknown command"):
        pipeline.finish()


def test_a_redis_that_is_gone_is_named() -> None:
    server = EmbeddedRedis.start()
    try:
        pipeline = Pipeline(server.url)
    finally:
        server.stop()

    async def ask() -> Any:
        return await Recorder().execute_command("PING")

    with pytest.raises(StoreUnavailableError, match="Redis is gone"):
        pipeline.one(ask())
    pipeline.close()
