"""What runs inside an actor's process, without a Ray: its start, who looks after it, and its end when nobody does."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from joinwise.actors import host
from joinwise.actors.host import Host, Keep, Label
from joinwise.cluster.config import JoinwiseConfig, load_config
from joinwise.cluster.errors import ConfigError

LABEL = Label("decode-0", 2, "b1", "engine", 0.5, (0.5,), "redis://x")


class Hosted:
    """Notes whether garbage was collected while it came to be and while it started."""

    def __init__(self, error: Exception | None = None) -> None:
        self.collected = [gc.isenabled()]
        self.phases = SimpleNamespace(seconds={"engine": 2.0})
        self._error = error

    async def start(self) -> dict[str, Any]:
        self.collected.append(gc.isenabled())
        if self._error is not None:
            raise self._error
        return {"collected": self.collected}


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes an actor's inside, which hosts a `Hosted`."""
    monkeypatch.setitem(sys.modules, "hosted_by_a_test", SimpleNamespace(make=Hosted))  # type: ignore[misc]
    yield lambda *arguments: Host("name", "hosted_by_a_test:make", arguments, {}, "info")
    gc.unfreeze()


async def test_nothing_is_collected_until_an_actor_has_started(actor: Any) -> None:
    facts, seconds = await actor().start()
    assert facts["collected"] == [False, False]
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0, "what the start has made is not looked through again"
    assert list(seconds) == ["imports", "engine"] and seconds["engine"] == 2.0


@pytest.mark.parametrize("error", [ConfigError("wrong"), RuntimeError("broken")])
async def test_a_start_that_fails_leaves_the_collector_on(actor: Any, error: Exception) -> None:
    with pytest.raises(type(error)):
        await actor(error).start()
    assert gc.isenabled()


class Kept:
    """Notes how it is stopped."""

    def __init__(self, config: JoinwiseConfig | None = None) -> None:
        self.phases = SimpleNamespace(seconds={})
        self.stopped: list[tuple[float, ...]] = []
        self.sick = ""

    async def start(self) -> dict[str, str]:
        return {"grpc": "127.0.0.1:1"}

    async def stop(self, *arguments: float) -> None:
        self.stopped.append(arguments)

    def failure(self) -> str:
        return self.sick


class KeptHost(Host):
    """A host whose process does not end."""

    ended: asyncio.Event

    def _exit(self) -> None:
        self.ended.set()


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes the inside of an actor that outlives its launcher by so many seconds."""
    monkeypatch.setitem(sys.modules, "kept_by_a_test", SimpleNamespace(make=Kept))  # type: ignore[misc]
    monkeypatch.setattr(host, "_LOOK_S", 0.01)

    def make(alone_s: float, *arguments: Any) -> KeptHost:
        made = KeptHost("name", "kept_by_a_test:make", arguments, {}, "info", Keep(LABEL, "job 1", alone_s))
        made.ended = asyncio.Event()
        return made

    yield make
    gc.unfreeze()


async def test_only_its_owner_may_ask_and_stop_it(kept: Any) -> None:
    made = kept(60.0)
    assert await made.failure("job 1") == "it has not started"
    await made.start()
    hosted = made._hosted
    hosted.sick = "stuck"
    assert await made.failure("job 1") == "stuck" and await made.failure("job 2") is None
    assert not await made.stop("job 2", 1.0) and hosted.stopped == []
    assert not await made.take("job 3", "job 2"), "whoever takes it over must know whose it was"
    assert await made.take("job 1", "job 2")
    assert await made.failure("job 1") is None and await made.failure("job 2") == "stuck"
    assert not await made.take("job 1", "job 3"), "another launcher was quicker"
    assert await made.stop("job 2", 1.0) and hosted.stopped == [(1.0,)]


async def test_it_says_what_another_launcher_must_know(kept: Any) -> None:
    config = load_config(None)
    made = kept(60.0, config)
    account = await made.account()
    assert (account.label, account.owner, account.facts, account.config) == (LABEL, "job 1", None, config)
    await made.start()
    assert (await made.account()).facts == {"grpc": "127.0.0.1:1"}
    ends_with_its_own = Host("name", "kept_by_a_test:make", (), {}, "info")
    assert await ends_with_its_own.account() is None
    assert not await ends_with_its_own.take("", "job 2")


async def test_it_ends_when_no_launcher_asks(kept: Any, caplog: pytest.LogCaptureFixture) -> None:
    made = kept(0.05)
    await made.start()
    async with asyncio.timeout(5):
        await made.ended.wait()
    assert made._hosted.stopped == [(0.5,)], "what runs on it may end first"
    assert "no launcher has asked" in caplog.text


async def test_it_ends_though_its_stop_fails(kept: Any) -> None:
    made = kept(0.05)
    await made.start()

    async def fails(*arguments: float) -> None:
        raise RuntimeError("broken")

    made._hosted.stop = fails
    async with asyncio.timeout(5):
        await made.ended.wait()


async def test_it_stays_while_somebody_asks_and_waits_less_long_once_it_is_dismissed(kept: Any) -> None:
    made = kept(0.2)
    await made.start()
    for _ in range(10):
        await asyncio.sleep(0.05)
        await made.failure("job 1")
        await made.failure("somebody else")
    assert not made.ended.is_set()
    made = kept(600.0)
    made._alone_s = 600.0
    await made.dismiss("job 2")
    assert made._alone_s == 600.0
    await made.dismiss("job 1")
    assert made._alone_s == 2 * LABEL.patience_s + host.STOP_BESIDE_S
    await made.take("job 1", "job 2")
    assert made._alone_s == 600.0, "it is wanted again"
