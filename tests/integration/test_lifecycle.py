"""`joinwise up`, `down`, `status`: what they start is there; what they stop is gone, however it is stopped."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest
from helpers.cluster import MODEL, RunningCluster, mixed_config
from helpers.idle import assert_idle
from helpers.processes import Home

from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.router.pulse import count_waiting
from joinwise.cluster.router.registry import Registry
from joinwise.cluster.store.client import connect

pytestmark = [pytest.mark.cluster, pytest.mark.model]


@pytest.fixture
def home(tmp_path: Path, small_model: object) -> Home:
    """A home of its own, by which every process that belongs to it is known."""
    return Home(tmp_path)


def test_up_detached_serves_and_leaves_no_orphan_when_its_launcher_is_killed(home: Home) -> None:
    """Then, over what it has left: a second `up` in the foreground, ended by `down`."""
    file = home.write_config(mixed_config("detached"))
    up = home.joinwise("up", "-f", file, "--detach")
    assert up.returncode == 0, up.stderr
    assert re.search(r"engine all-0-1 is ready after .* s: process .* imports .* engine ", up.stderr), up.stderr
    assert re.search(r"started in .* s: imports .* Ray .* actors ", up.stderr), "and what the seconds went to"
    assert not [line for line in home.processes() if "/dashboard.py" in line or "/monitor.py" in line]
    assert "WARNING" not in up.stderr, "what engines print is in the log"
    launcher = home.run_file("detached")["pid"]

    status = json.loads(home.joinwise("status", "--json").stdout)
    assert [worker["role"] for worker in status["workers"]] == ["mixed"]
    assert status["models"][0]["name"] == MODEL
    chat = home.joinwise("generate", "The capital of France is", "--max-tokens", "4")
    assert chat.returncode == 0 and chat.stdout.strip(), chat.stderr
    doctor = home.joinwise("doctor", "--running", "--json")
    assert json.loads(doctor.stdout)["healthy"], doctor.stdout
    assert {"gateway": "ok", "leases": "ok", "workers": "ok"}.items() <= {
        each["check"]: each["level"] for each in json.loads(doctor.stdout)["findings"]
    }.items()

    again = home.joinwise("up", "-f", file, "--detach")
    assert again.returncode == 1
    assert "runs on this machine already" in again.stderr and "Traceback" not in again.stderr

    os.kill(launcher, signal.SIGKILL)
    home.wait_until_empty(60)

    with home.start("up", "-f", file) as foreground:
        home.wait_ready("detached", foreground)
        down = home.joinwise("down", "-f", file)
        assert down.returncode == 0 and "has stopped" in down.stderr
        assert foreground.wait(10) == 0
    shown = foreground.stderr.read() if foreground.stderr else ""
    assert "ready: http://127.0.0.1:" in shown and "WARNING" not in shown and "Traceback" not in shown
    home.wait_until_empty(5)
    assert not home.run_path("detached").exists()
    assert "does not run" in home.joinwise("down", "-f", file).stderr


@pytest.mark.timeout(300)
async def test_a_cluster_that_begins_with_nothing_wakes_for_a_request_and_goes_back_to_zero(home: Home) -> None:
    """One of two models is asked for; the other never gets an engine."""
    config = mixed_config("sleeper")
    config["models"].append({**config["models"][0], "name": "other"})
    bounds = {"least": 0, "most": 1, "down_s": 6}
    (pool,) = config["pools"]
    config["pools"] = [
        {**pool, "name": name, "model": model, "replicas": 0, "autoscale": bounds}
        for name, model in (("all", MODEL), ("rest", "other"))
    ]
    file = home.write_config(config)
    up = home.joinwise("up", "-f", file, "--detach")
    assert up.returncode == 0 and "starting no engine and the gateway" in up.stderr, up.stderr
    facts = home.run_file("sleeper")
    http, grpc = facts["addresses"]["http"], facts["addresses"]["grpc"]
    log = home.path / "log" / "sleeper.log"
    cluster = RunningCluster("sleeper", config, Path(file), http, grpc, facts["redis_url"], log, facts["pid"])
    client = connect(facts["redis_url"])
    registry = Registry(client, "sleeper", RouterConfig())

    async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 60) -> None:
        async with asyncio.timeout(seconds):
            while not await condition():
                await asyncio.sleep(0.1)

    async def nobody_waits() -> bool:
        return not await count_waiting(client, "sleeper")

    async def asleep() -> bool:
        return {each.name for each in await registry.asleep()} == {"all", "rest"} and not await registry.states()

    async with client, httpx.AsyncClient(base_url=http, timeout=240) as door:
        await until(asleep)
        assert (await door.get("/health")).status_code == 200
        assert [each["id"] for each in (await door.get("/v1/models")).json()["data"]] == [MODEL, "other"]
        status = json.loads(home.joinwise("status", "--json").stdout)
        assert (status["workers"], status["troubles"]) == ([], []) and set(status["asleep"]) == {"all", "rest"}
        doctor = json.loads(home.joinwise("doctor", "--running", "--json").stdout)
        assert doctor["healthy"] and {each["level"] for each in doctor["findings"]} == {"ok"}, doctor

        body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        for stream in (False, True):  # clients that leave are out of the queue
            with pytest.raises(httpx.ReadTimeout):
                await door.post("/v1/completions", json={**body, "stream": stream}, timeout=0.5)
            await until(nobody_waits)
        whole, streamed = await asyncio.gather(
            door.post("/v1/completions", json=body), door.post("/v1/completions", json={**body, "stream": True})
        )
        assert whole.status_code == streamed.status_code == 200, whole.text + streamed.text
        text = whole.json()["choices"][0]["text"]
        chunks = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line.startswith("data: {")]
        assert text and "".join(each["text"] for chunk in chunks for each in json.loads(chunk)["choices"]) == text
        assert [worker.info.pool for worker in await registry.states()] == ["all"]
        await assert_idle(cluster)
        await until(asleep)
        await assert_idle(cluster)
    said = home.log("sleeper")
    assert f"pool all: 0 -> 1 workers, for those who ask for {MODEL}" in said
    assert "pool all: 1 -> 0 workers" in said and "pool rest" not in said and "Traceback" not in said
    assert home.joinwise("down", "-f", file).returncode == 0
    home.wait_until_empty(5)


def test_an_interrupt_stops_a_start_at_once(home: Home) -> None:
    file = home.write_config(mixed_config("interrupted"))
    with home.start("up", "-f", file) as foreground:
        assert foreground.stderr is not None
        for line in foreground.stderr:
            if "starting 1 engines" in line:
                break
        foreground.send_signal(signal.SIGINT)
        assert foreground.wait(60) == 0
    home.wait_until_empty(5)
    assert not home.run_path("interrupted").exists()


def test_a_start_that_fails_says_why_in_one_line(home: Home) -> None:
    config = mixed_config("broken")
    config["pools"][0]["engine"]["block_sise"] = 32
    up = home.joinwise("up", "-f", home.write_config(config), "--detach")
    assert up.returncode == 1
    (error,) = [line for line in up.stderr.splitlines() if line.startswith("error: ")]
    assert "block_sise" in error
    assert "Traceback" not in up.stderr
    assert "block_sise" in home.log("broken").splitlines()[-1]
    home.wait_until_empty(5)
