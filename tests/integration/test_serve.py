"""joinwise as a Serve application, deployed as on Kubernetes: `serve deploy` with a configuration."""

from __future__ import annotations

import json
import time

import httpx
import pytest
import yaml
from helpers.cluster import MODEL, cluster_config
from helpers.ray_head import RayHead, free_ports

from joinwise.cluster.client import Client

pytestmark = [pytest.mark.cluster, pytest.mark.model]


def test_serve_deploys_gateways_and_engines(ray: RayHead, small_model: object) -> None:
    http, grpc = free_ports(2)
    config = cluster_config("serve")
    config["gateway"] |= {"http_port": http, "grpc_port": grpc}
    application = {
        "name": "joinwise",
        "import_path": "joinwise.actors.serve:app",
        "route_prefix": None,
        "args": {"config": ray.home.write_config(config)},
        # As the chart sets them.
        "deployments": [{"name": "gateway", "num_replicas": 1, "ray_actor_options": {"num_cpus": 0}}],
    }
    file = ray.home.path / "application.yaml"
    file.write_text(yaml.safe_dump({"proxy_location": "Disabled", "applications": [application]}))
    deploy = ray.run("serve", "deploy", str(file), "--address", ray.dashboard)
    assert deploy.returncode == 0, deploy.stderr

    wait_running(ray)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 6}
    answer = httpx.post(
        f"http://127.0.0.1:{http}/v1/chat/completions", json=body, headers={"x-joinwise-ledger": "1"}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    ledger = json.loads(answer.headers["x-joinwise-ledger"])
    assert ledger["prefill_worker"] == "prefill-0-1"
    assert ledger["decode_worker"] == "decode-0-1"
    with Client(f"127.0.0.1:{grpc}") as client:
        assert len(client.status().workers) == 2

    shutdown = ray.run("serve", "shutdown", "--yes", "--address", ray.dashboard)
    assert shutdown.returncode == 0, shutdown.stderr
    deadline = time.monotonic() + 60
    while left := [line for line in ray.home.processes() if "-0-1" in line or "valkey" in line or "Replica" in line]:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def wait_running(ray: RayHead) -> None:
    """Wait until Serve says that the application runs."""
    headers, deadline = {"Authorization": f"Bearer {ray.token}"}, time.monotonic() + 300
    while True:
        answer = httpx.get(f"{ray.dashboard}/api/serve/applications/", headers=headers, timeout=30).json()
        state = answer["applications"].get("joinwise", {})
        if state.get("status") == "RUNNING":
            return
        assert state.get("status") not in ("DEPLOY_FAILED", "UNHEALTHY"), state
        assert time.monotonic() < deadline, state
        time.sleep(0.5)
