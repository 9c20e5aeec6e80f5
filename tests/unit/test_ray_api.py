"""The seam to Ray, without a Ray: what happens inside an actor's process, and what a Ray of our own goes without."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray._private.node import Node

from joinwise.actors import ray_api
from joinwise.cluster.errors import ConfigError


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
    yield lambda *arguments: ray_api._Host("name", "hosted_by_a_test:make", arguments, {}, "info")
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


def test_a_ray_of_our_own_has_no_dashboard_and_no_autoscaler() -> None:
    ours = Node.start_api_server, Node.start_monitor
    node = SimpleNamespace()
    with pytest.raises(RuntimeError, match="as Ray may"), ray_api._nothing_beside():
        Node.start_api_server(node, include_dashboard=False, raise_on_failure=False)
        Node.start_monitor(node)
        assert node._webui_url == ""
        raise RuntimeError("as Ray may")
    assert (Node.start_api_server, Node.start_monitor) == ours


def test_a_connection_knows_whether_its_own_node_runs() -> None:
    process = subprocess.Popen(["sleep", "60"])
    connection = ray_api.Connection(local=True, ours=True, node=psutil.Process(process.pid))
    assert connection.alive
    process.kill()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:  # nobody has buried it yet
        time.sleep(0.001)
    assert not connection.alive
    process.wait()
    assert not connection.alive
    assert ray_api.Connection(local=False, ours=True).alive  # of somebody else's nodes we know nothing
