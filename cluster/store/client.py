"""The client side of Redis: connections with deadlines, typed failures, scripts by digest, one clock for everyone."""

from __future__ import annotations

import hashlib
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from typing import Any, cast

from redis import exceptions as failures
from redis.asyncio import BlockingConnectionPool, Redis, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff

from joinwise.cluster.config_model import RedisConfig
from joinwise.cluster.errors import InternalError, StoreUnavailableError
from joinwise.cluster.store.redis_cluster import SCHEMES, ClusterClient, parse_cluster
from joinwise.cluster.store.sentinel import SCHEME, connect_sentinel

_CLOCK_REFRESH_S = 60.0
_RETRY_AFTER_S = 2.0
#: What redis-py raises when there is no Redis to work with.
GONE = (
    failures.ConnectionError,
    failures.TimeoutError,
    failures.ReadOnlyError,
    failures.OutOfMemoryError,
    failures.ClusterDownError,
    failures.MasterDownError,
    failures.RedisClusterException,
    failures.NoPermissionError,
    OSError,
)


def connect(url: str, settings: RedisConfig | None = None) -> Redis:
    """A client for `url` that gives up in time. Connects at the first command; close it with `aclose()`.

    Args:
        url: redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://; an embedded server's `url` too, but
            not the word.
        settings: deadlines, retries and the bound on connections.
    """
    settings = settings or RedisConfig()
    if url == "embedded":
        raise InternalError("connect() needs the embedded server's url: start it with EmbeddedRedis.start()")
    tls: dict[str, Any] = {}
    if url.startswith(("rediss://", "rediss+cluster://")) and settings.tls is not None:
        tls = {
            "ssl_ca_certs": settings.tls.ca,
            "ssl_certfile": settings.tls.cert,
            "ssl_keyfile": settings.tls.key,
            "ssl_check_hostname": True,
            "ssl_min_version": ssl.TLSVersion.TLSv1_2,
        }
    common: dict[str, Any] = {
        "decode_responses": True,
        "max_connections": settings.max_connections,
        "socket_connect_timeout": settings.connect_timeout_s,
        "socket_timeout": settings.timeout_s,
        "health_check_interval": 0,
        "retry": Retry(ExponentialBackoff(cap=0.2, base=0.02), settings.retries),
        "retry_on_error": [failures.ConnectionError, failures.TimeoutError],
    }
    if url.startswith(SCHEME):
        return connect_sentinel(url, **common)
    if url.startswith(SCHEMES):
        del common["retry_on_error"]
        return cast(Redis, ClusterClient(parse_cluster(url), **common, **tls))  # the same commands, another class
    pool = BlockingConnectionPool.from_url(url, timeout=settings.timeout_s, **common, **tls)
    if tls:
        pool.connection_class = _FreshSSLConnection  # as an argument, the URL's own would win
    return Redis.from_pool(pool)


class _FreshSSLConnection(SSLConnection):
    """Reads its certificates whenever it connects, so that renewed ones are used without a restart."""

    def _connection_arguments(self) -> Mapping[str, Any]:
        self.ssl_context.context = None
        return super()._connection_arguments()


@contextmanager
def store_errors(doing: str, request_id: str | None = None) -> Iterator[None]:
    """Turns what redis-py raises into joinwise's errors.

    Raises:
        StoreUnavailableError: no connection, no answer in time, or a server that refuses to work.
        InternalError: a server that works and dislikes what we sent.
    """
    try:
        yield
    except GONE as error:
        raise StoreUnavailableError(
            f"Redis does not answer ({_brief(error)}) while {doing}; is it running and reachable?",
            request_id=request_id,
            retry_after_s=_RETRY_AFTER_S,
        ) from error
    except failures.RedisError as error:
        raise InternalError(f"Redis refused a command while {doing}: {_brief(error)}", request_id=request_id) from error


def _brief(error: BaseException) -> str:
    """One line without a password: redis-py never prints one, a URL in an OSError might."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    return re.sub(r"//[^/@\s]*@", "//", text)


class Scripts:
    """The Lua scripts of one folder, run by digest; a server that has forgotten them is taught again.

    Args:
        client: where they run.
        base: KEYS[1] of every script, the prefix of all keys of the cluster.
    """

    def __init__(self, client: Redis, base: str) -> None:
        self._client: Any = client  # redis-py gives `execute_command` no types
        self._base = base

    async def run(self, name: str, *args: str | int | bytes, preludes: tuple[str, ...] = ("common",)) -> Any:
        """Run `scripts/<name>.lua` after its preludes. Raises what redis-py raises: wrap it in `store_errors`."""
        # A plain command: redis-py's object for a script costs a tenth more, and the simulator's client can have none.
        command = ("EVALSHA", _digest(name, preludes), 1, self._base, *args)
        try:
            return await self._client.execute_command(*command)
        except failures.NoScriptError:
            await self._client.script_load(script_text(name, preludes))
            return await self._client.execute_command(*command)


@cache
def script_text(name: str, preludes: tuple[str, ...]) -> str:
    """A script with the functions that it shares with others put before it."""
    folder = files("joinwise.cluster.router") / "scripts"
    return "\n".join((folder / f"{part}.lua").read_text(encoding="utf-8") for part in (*preludes, name))


@cache
def _digest(name: str, preludes: tuple[str, ...]) -> str:
    """What a server knows a script by."""
    return hashlib.sha1(script_text(name, preludes).encode(), usedforsecurity=False).hexdigest()


class StoreClock:
    """Milliseconds since 1970 on Redis' clock, which all machines of a cluster share.

    Measured once a minute and carried on by the local monotonic clock, so a wall clock that is wrong, or jumps, on one
    machine makes no worker look dead to another.

    Args:
        client: the Redis that is asked.
        fixed: a clock to use instead; tests and the simulator bring their own.
    """

    def __init__(self, client: Redis, fixed: Callable[[], int] | None = None) -> None:
        self._client = client
        self._fixed = fixed
        self._offset_s = 0.0
        self._measured: float | None = None

    async def now_ms(self) -> int:
        """The time now. Raises StoreUnavailableError when it was never measured and cannot be."""
        if self._fixed is not None:
            return self._fixed()
        now = time.monotonic()
        if self._measured is None or now - self._measured > _CLOCK_REFRESH_S:
            try:
                await self._measure()
            except StoreUnavailableError:
                if self._measured is None:
                    raise
        return int((time.monotonic() + self._offset_s) * 1000)

    async def _measure(self) -> None:
        before = time.monotonic()
        with store_errors("reading its clock"):
            seconds, micros = await self._client.time()
        after = time.monotonic()
        self._offset_s = seconds + micros / 1e6 - (before + after) / 2
        self._measured = after
