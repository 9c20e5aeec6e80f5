"""The seam to Ray, without a Ray: what a Ray of our own goes without, and who is known to live."""

from __future__ import annotations

import subprocess
import time
from types import SimpleNamespace

import psutil
import pytest
from ray._private.node import Node

from joinwise.actors import ray_api


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


def test_an_owner_lives_as_long_as_ray_says(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [{"JobID": "01000000", "IsDead": True}, {"JobID": "02000000", "IsDead": False}]
    actors = {"a1": {"State": "ALIVE"}, "a2": {"State": "DEAD"}, "a3": {}}
    monkeypatch.setattr(ray_api.state, "jobs", lambda: jobs)
    monkeypatch.setattr(ray_api.state, "actors", lambda identity: actors[identity])
    said = {owner: ray_api.lives(owner) for owner in ("job 01000000", "job 02000000", "job 03000000")}
    assert said == {"job 01000000": False, "job 02000000": True, "job 03000000": False}
    assert [ray_api.lives(f"actor {identity}") for identity in actors] == [True, False, False]
