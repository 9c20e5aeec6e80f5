"""The launch module through `ray job submit`, on a Ray head of our own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from helpers.cluster import MODEL, RunningCluster, mixed_config
from helpers.idle import assert_idle
from helpers.processes import listener
from helpers.ray_head import RayHead, ray_node

from joinwise.actors.chaos.redis_server import RedisServer, folder_in_memory
from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.router.registry import Registry, WorkerInfo
from joinwise.cluster.store.client import connect

pytestmark = [pytest.mark.cluster, pytest.mark.model]
LAUNCH = ("python", "-m", "joinwise.actors.launch", "-f", "joinwise.yaml")


def test_a_job_is_the_cluster(ray: RayHead, small_model: object, tmp_path: Path) -> None:
    submit(ray, "good", mixed_config("job"), tmp_path)
    facts = wait_ready(ray, "job", "good")
    answer = httpx.post(
        f"{facts['addresses']['http']}/v1/chat/completions",
        json={"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"]
    logs = ray.run("ray", "job", "logs", "--address", ray.dashboard, "good").stdout
    assert f"ready: {facts['addresses']['http']} (HTTP)" in logs
    assert "(all-0-1 pid=" in logs, "what actors say is in the job's log, under their names"

    stop = ray.run("ray", "job", "stop", "--address", ray.dashboard, "good")
    assert stop.returncode == 0, stop.stderr
    assert status(ray, "good") == "STOPPED"
    assert " stopped" in ray.run("ray", "job", "logs", "--address", ray.dashboard, "good").stdout.splitlines()[-1]
    assert not ray.home.run_path("job").exists()
    assert not [line for line in ray.home.processes() if "all-0-1" in line or "gateway" in line or "valkey" in line]


def test_a_broken_configuration_fails_the_job_with_one_line(ray: RayHead, tmp_path: Path) -> None:
    config = mixed_config("broken-job")
    config["pools"][0]["roll"] = "mixed"
    submit(ray, "broken", config, tmp_path)
    deadline = time.monotonic() + 90
    while (state := status(ray, "broken")) in ("PENDING", "RUNNING"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert state == "FAILED"
    logs = ray.run("ray", "job", "logs", "--address", ray.dashboard, "broken").stdout
    (line,) = [line for line in logs.splitlines() if line.startswith("joinwise: ")]
    assert "roll" in line and "role" in line
    assert "Traceback" not in logs


async def test_neither_a_node_nor_the_launcher_that_dies_is_noticed(
    ray: RayHead, small_model: object, tmp_path: Path
) -> None:
    """Three raylets. One is killed under a stream, then the launcher: the next job goes on with its actors."""
    with ExitStack() as stack:
        redis = RedisServer(stack.enter_context(folder_in_memory()) / "data")
        redis.start()
        stack.callback(redis.kill)
        for _ in range(2):
            stack.enter_context(ray_node(ray, tmp_path, {"engine": 1}))
        config = mixed_config("lasting")
        config["pools"][0] |= {"replicas": 2, "resources": {"custom": {"engine": 1}}}
        config |= {"redis": {"url": redis.url}}
        config["router"] |= {"worker_ttl_s": 3}
        submit(ray, "first", config, tmp_path)
        facts = wait_ready(ray, "lasting", "first")
        http = facts["addresses"]["http"]
        expected = await stream(http)

        async def lose_a_node() -> None:
            kill(await raylet_at_work(redis.url))

        first = await workers(redis.url, 2)
        assert await stream(http, lose_a_node) == expected
        stack.enter_context(ray_node(ray, tmp_path, {"engine": 1}))  # another machine comes
        before = await workers(redis.url, 2, without=first)

        async def lose_the_launcher() -> None:
            kill(facts["pid"])

        assert await stream(http, lose_the_launcher) == expected
        wait_for(ray, "first", "FAILED")
        assert await stream(http) == expected, "nobody needs a launcher to be served"
        submit(ray, "second", config, tmp_path)
        again = wait_ready(ray, "lasting", "second", than=facts["pid"])
        assert again["addresses"] == facts["addresses"]
        assert await workers(redis.url, 2) == before, "they are the same ones, in the same life"
        assert await stream(http) == expected
        logs = ray.run("ray", "job", "logs", "--address", ray.dashboard, "second").stdout
        assert logs.count("serves already: it is taken over") == 3
        await assert_idle(running(config, again, redis.url))

        assert ray.run("ray", "job", "stop", "--address", ray.dashboard, "second").returncode == 0
        assert status(ray, "second") == "STOPPED"
        left = [line for line in ray.home.processes() if "all-0-" in line or "all-1-" in line or "gateway" in line]
        assert not left, "a launcher that is told to end ends what it has taken over"


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


async def raylet_at_work(redis_url: str) -> int:
    """The raylet of the engine that has a request now."""
    client = connect(redis_url)
    try:
        registry = Registry(client, "lasting", RouterConfig(worker_ttl_s=3))
        (busy,) = [state.info for state in await registry.states() if state.pending_decode]
    finally:
        await client.aclose()
    parent = psutil.Process(listener(busy.engine_address)).parent()
    assert parent is not None and parent.name() == "raylet"
    return parent.pid


async def workers(redis_url: str, count: int, without: Sequence[WorkerInfo] = ()) -> list[WorkerInfo]:
    """Live workers, once there are so many, and not the same as before."""
    client = connect(redis_url)
    try:
        registry = Registry(client, "lasting", RouterConfig(worker_ttl_s=3))
        deadline = time.monotonic() + 120
        while True:
            found = sorted(await registry.list(), key=lambda info: info.worker_id)
            if len(found) == count and found != list(without):
                return found
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.2)
    finally:
        await client.aclose()


async def stream(http: str, in_the_middle: Callable[[], Awaitable[None]] | None = None) -> list[int]:
    """The tokens of a streamed answer, which is disturbed after ten of them."""
    tokens: list[int] = []
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 192, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "return_token_ids": True}
    async with (
        httpx.AsyncClient(base_url=http, timeout=120) as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                tokens += choice["token_ids"] or ()
            if in_the_middle is not None and len(tokens) >= 10:
                await in_the_middle()
                in_the_middle = None
    assert in_the_middle is None and len(tokens) == 192
    return tokens


def running(config: dict[str, Any], facts: dict[str, Any], redis_url: str) -> RunningCluster:
    addresses = facts["addresses"]
    nowhere = Path(os.devnull)
    name = config["cluster"]
    return RunningCluster(name, config, nowhere, addresses["http"], addresses["grpc"], redis_url, nowhere, facts["pid"])


def wait_for(ray: RayHead, job: str, state: str, within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while status(ray, job) != state:
        assert time.monotonic() < deadline, status(ray, job)
        time.sleep(0.5)


def submit(ray: RayHead, name: str, config: dict, folder: Path) -> None:
    (folder / "joinwise.yaml").write_text(yaml.safe_dump(config))
    command = ["job", "submit", "--address", ray.dashboard, "--no-wait", "--submission-id", name]
    done = ray.run("ray", *command, "--working-dir", str(folder), "--", *LAUNCH)
    assert done.returncode == 0, done.stderr + done.stdout


def status(ray: RayHead, name: str) -> str:
    headers = {"Authorization": f"Bearer {ray.token}"}
    return str(httpx.get(f"{ray.dashboard}/api/jobs/{name}", headers=headers, timeout=30).json()["status"])


def wait_ready(ray: RayHead, cluster: str, job: str, than: int = 0) -> dict:
    """The run file of a cluster that is ready; of another launcher `than` the one named."""
    deadline = time.monotonic() + 300
    while not (facts := ray.home.run_file(cluster)).get("ready") or facts["pid"] == than:
        assert time.monotonic() < deadline
        time.sleep(1)
    return facts
