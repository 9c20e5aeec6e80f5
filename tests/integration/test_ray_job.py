"""The launch module through `ray job submit`, on a Ray head of our own."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest
import yaml
from helpers.cluster import MODEL, mixed_config
from helpers.ray_head import RayHead

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


def submit(ray: RayHead, name: str, config: dict, folder: Path) -> None:
    (folder / "joinwise.yaml").write_text(yaml.safe_dump(config))
    command = ["job", "submit", "--address", ray.dashboard, "--no-wait", "--submission-id", name]
    done = ray.run("ray", *command, "--working-dir", str(folder), "--", *LAUNCH)
    assert done.returncode == 0, done.stderr + done.stdout


def status(ray: RayHead, name: str) -> str:
    headers = {"Authorization": f"Bearer {ray.token}"}
    return str(httpx.get(f"{ray.dashboard}/api/jobs/{name}", headers=headers, timeout=30).json()["status"])


def wait_ready(ray: RayHead, cluster: str, job: str) -> dict:
    deadline = time.monotonic() + 300
    while not (facts := ray.home.run_file(cluster)).get("ready"):
        assert time.monotonic() < deadline
        time.sleep(1)
    return facts
