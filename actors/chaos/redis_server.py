"""A Redis server that may be killed and started again: same port, same password, with its data or without."""

import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from joinwise.actors.bench.server import free_port
from joinwise.cluster.errors import StoreStartError
from joinwise.cluster.store.embedded import find_server

_MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of our own in it
_READY_S = 10.0
_POLL_S = 0.02


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """A folder for a server's data while the context is open, in memory where there is such a file system.

    Redis waits for its disk: one that stalls is a fault that nobody has asked for.
    """
    with tempfile.TemporaryDirectory(prefix="jw-redis-", dir=_MEMORY if _MEMORY.is_dir() else None) as name:
        yield Path(name)


class RedisServer:
    """A server that writes what it is told to a file each second, as the embedded one with `redis.data_dir` does.

    Args:
        folder: for its data; made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._port, self._password = folder, free_port(), secrets.token_urlsafe(24)
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int:
        """Its process; 0 while there is none."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            StoreStartError: it does not, within 10 s.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        # Its settings go through a pipe: arguments are seen by everyone on the machine.
        lines = ["bind 127.0.0.1", f"port {self._port}", f"requirepass {self._password}", 'save ""', "appendonly yes"]
        lines += ["appendfsync everysec", f'dir "{self._folder}"']
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen([str(find_server()), "-"], stdin=subprocess.PIPE, stdout=quiet, stderr=quiet)
        assert self._process.stdin is not None
        self._process.stdin.write("\n".join(lines).encode() + b"\n")
        self._process.stdin.close()
        deadline = time.monotonic() + _READY_S
        while not self.answers():
            if time.monotonic() > deadline:
                self.kill()
                raise StoreStartError(f"the Redis server did not answer within {_READY_S:g} s")
            time.sleep(_POLL_S)

    def answers(self) -> bool:
        """Whether it serves now."""
        return self.keys() is not None

    def keys(self) -> int | None:
        """How many keys it holds; None while it does not answer."""
        client = redis.Redis.from_url(self.url, socket_timeout=1, socket_connect_timeout=1)
        try:
            return int(str(client.dbsize()))
        except redis.RedisError:
            return None
        finally:
            client.close()

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def forget(self) -> None:
        """Remove what it has written; to be called while it is down."""
        shutil.rmtree(self._folder)
