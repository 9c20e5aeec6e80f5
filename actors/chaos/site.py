"""The cluster that is broken: its configuration, its workers as Redis knows them, and the processes behind them."""

import asyncio
import contextlib
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import yaml

from joinwise.actors import runfile
from joinwise.actors.auth import bearer
from joinwise.actors.bench.server import free_port
from joinwise.actors.chaos.kept import Kept
from joinwise.actors.chaos.nodes import Nodes
from joinwise.actors.chaos.redis_server import RedisServer
from joinwise.cluster.config import JoinwiseConfig
from joinwise.cluster.drafts import DraftInfo, Drafts
from joinwise.cluster.errors import ConfigError, InternalError, StoreUnavailableError
from joinwise.cluster.router.registry import Registry, WorkerInfo
from joinwise.cluster.store.client import connect, store_errors
from joinwise.cluster.store.keys import Keys
from joinwise.proto import engine_pb2, engine_pb2_grpc

MODEL = "smollm2-135m-instruct"
_ENGINE: dict[str, Any] = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 200_000_000,
    "block_size": 32,
    "max_num_seqs": 8,
}
_MAX_MODEL_LEN = 2048
_VERIFY, _DRAFT = "verify", "draft"
#: Engine arguments of the undisturbed engine, whose answers are the right ones.
PLAIN_ENGINE = {**_ENGINE, "dtype": "float32", "max_model_len": _MAX_MODEL_LEN}

_LANDING_BYTES = 4 << 10  # a frame, and nothing beside it
_WAITS = re.compile(r"^joinwise:kv_landing_waits_total (\S+)", re.MULTILINE)
_POLL_S = 0.2
_LOOK_S = 0.005
_ANSWER_S = 5.0


def cluster_config(
    name: str, redis_url: str, ray_address: str, *, prefill: int, decode: int, draft: bool = False
) -> JoinwiseConfig:
    """A small cluster in float32 that notices quickly, where every request is split.

    Its ports stay the same when it is started again.

    Args:
        name: of the cluster.
        redis_url: of its Redis.
        ray_address: host:port of the Ray that it joins, each of whose nodes stands for a machine: KV goes over TCP.
        prefill, decode: engines.
        draft: one more engine decodes, and verifies what a draft actor proposes.
    """
    # Prompts in chunks, and never from a cache: prefill takes long enough to be hit. Of blocks that differ KV lands in
    # a buffer first.
    slow = {"max_num_batched_tokens": 128, "enable_prefix_caching": False, "block_size": 2 * _ENGINE["block_size"]}
    pools = [
        {"name": "prefill", "model": MODEL, "role": "prefill", "replicas": prefill, "engine": {**_ENGINE, **slow}},
        {"name": "decode", "model": MODEL, "role": "decode", "replicas": decode, "engine": dict(_ENGINE)},
    ]
    if draft:
        asks = {"speculation": {"draft": _DRAFT}, "engine": dict(_ENGINE)}
        pools += [{"name": _VERIFY, "model": MODEL, "role": "decode", **asks}]
        pools += [{"name": _DRAFT, "model": MODEL, "role": "draft"}]
    return JoinwiseConfig.model_validate(
        {
            "cluster": name,
            "models": [{"name": MODEL, "model": MODEL, "dtype": "float32", "max_model_len": _MAX_MODEL_LEN}],
            "pools": pools,
            "redis": {"url": redis_url},
            "ray": {"address": ray_address},
            "kv": {"transport": "tcp", "transfer_timeout_s": 5, "landing_bytes": _LANDING_BYTES},
            "router": {"split": "always", "moves": False, "worker_ttl_s": 3, "lease_s": 10},
            "gateway": {"http_port": free_port(), "grpc_port": free_port(), "drain_s": 20},
        }
    )


@dataclass
class Site:
    """A running cluster of this command's own.

    Attributes:
        config: what it runs, now.
        file: where that is written.
        kept: its launcher.
        redis: its Redis.
        nodes: its Ray; all processes of the cluster are descendants of ours.
    """

    config: JoinwiseConfig
    file: Path
    kept: Kept
    redis: RedisServer
    nodes: Nodes

    @property
    def http(self) -> str:
        """Base URL of the gateway."""
        return str(self.kept.facts["addresses"]["http"])

    @property
    def grpc(self) -> str:
        """host:port of the gateway."""
        return str(self.kept.facts["addresses"]["grpc"])

    def write(self, config: JoinwiseConfig) -> None:
        """Let the file say another configuration; whoever starts, or applies it, reads it."""
        self.config = config
        self.file.touch(mode=0o600)
        self.file.write_text(yaml.safe_dump(config.model_dump(mode="json")))

    def apply(self, config: JoinwiseConfig, timeout_s: float) -> None:
        """Change the running cluster, as `joinwise apply` does.

        Raises:
            ConfigError: it cannot, or does not in time.
        """
        self.write(config)
        wanted, deadline = runfile.wish(config.cluster, self.file), time.monotonic() + timeout_s
        while not runfile.granted(config.cluster, wanted):
            if time.monotonic() > deadline:
                raise ConfigError(f"the change was not there after {timeout_s:.0f} s")
            time.sleep(_POLL_S)

    async def workers(self, role: str = "") -> tuple[WorkerInfo, ...]:
        """Live workers that take requests, of a role if one is named; none while Redis does not answer."""
        client = connect(self.redis.url, self.config.redis)
        try:
            found = await Registry(client, self.config.cluster, self.config.router).list()
        except StoreUnavailableError:
            return ()
        finally:
            await client.aclose()
        return tuple(info for info in found if not role or info.role == role)

    async def draft(self) -> DraftInfo | None:
        """The draft actor that an engine would be given now; None while there is none."""
        client = connect(self.redis.url, self.config.redis)
        try:
            return await Drafts(client, self.config.cluster, self.config.router).bind(_DRAFT, self.config.cluster)
        except StoreUnavailableError:
            return None
        finally:
            await client.aclose()

    async def busy(self, role: str) -> Sequence[WorkerInfo]:
        """The workers of a role that have requests in their engines; waits for one."""
        while True:
            found = []
            for worker in await self.workers(role):
                with contextlib.suppress(grpc.aio.AioRpcError):
                    if (await self.idle(worker)).scheduler_requests:
                        found.append(worker)
            if found:
                return found
            await asyncio.sleep(_LOOK_S)

    async def wait_whole(self, gone: str, timeout_s: float) -> float | None:
        """Wait until all workers that there should be are there, one that is named not among them, and the gateway
        answers; returns the seconds that this took, None if it did not come to pass in time."""
        begin = time.monotonic()
        wanted = {pool.name: pool.replicas for pool in self.config.pools if pool.role != "draft"}
        drafts = len(wanted) < len(self.config.pools)
        async with httpx.AsyncClient(base_url=self.http, timeout=_ANSWER_S) as client:
            while time.monotonic() - begin < timeout_s:
                live = await self.workers()
                counts = {name: sum(info.pool == name for info in live) for name in wanted}
                ids = {info.worker_id for info in live}
                draft = await self.draft() if drafts else None
                ids |= {draft.draft_id} if draft is not None else set()
                whole = counts == wanted and (draft is not None) == drafts and gone not in ids
                if whole and await _healthy(client):
                    return time.monotonic() - begin
                await asyncio.sleep(_POLL_S)
        return None

    async def idle(self, worker: WorkerInfo) -> engine_pb2.IdleResponse:
        """What a worker holds now. Raises grpc.aio.AioRpcError when it does not answer."""
        async with grpc.aio.insecure_channel(worker.engine_address) as channel:
            stub = engine_pb2_grpc.EngineServiceStub(channel)
            return await stub.Idle(engine_pb2.IdleRequest(), timeout=_ANSWER_S, metadata=bearer(await self._token()))

    async def _token(self) -> str:
        """That the cluster's processes ask each other for, off the loopback; "" while Redis does not answer."""
        client = connect(self.redis.url, self.config.redis)
        try:
            with store_errors("a worker is asked"):
                return str(await client.get(Keys(self.config.cluster).token) or "")
        except StoreUnavailableError:
            return ""
        finally:
            await client.aclose()

    async def landing_waits(self, workers: Sequence[WorkerInfo]) -> int:
        """How often KV has found the landing buffers of workers full. Raises httpx.HTTPError when one does not
        answer."""
        async with httpx.AsyncClient(timeout=_ANSWER_S) as client:
            texts = [(await client.get(f"http://{each.metrics_address}/metrics")).text for each in workers]
        return sum(round(float(found[1])) for text in texts if (found := _WAITS.search(text)))

    async def wait_landing_full(self, workers: Sequence[WorkerInfo], before: int, timeout_s: float) -> int:
        """Wait until KV has found them full more often than before; returns how much more, 0 if it has not in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            more = await self.landing_waits(workers) - before
            if more or time.monotonic() > deadline:
                return more
            await asyncio.sleep(_POLL_S)

    def process_at(self, address: str) -> psutil.Process:
        """The process that listens at an address.

        Raises:
            InternalError: nobody does, or a process that is not of this cluster.
        """
        host, _, port = address.rpartition(":")
        listening = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN and each.pid]
        hosts = {host, f"::ffff:{host}", "0.0.0.0", "::"}  # noqa: S104 - looked for, not listened on
        owners = {each.pid for each in listening if each.laddr.port == int(port) and each.laddr.ip in hosts}
        if len(owners) != 1:
            raise InternalError(f"{len(owners)} processes listen at {address}")
        found = psutil.Process(owners.pop())
        if os.getpid() not in {parent.pid for parent in found.parents()}:
            raise InternalError(f"process {found.pid} at {address} is not of this cluster")
        return found


async def _healthy(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health")).status_code == 200
    except httpx.HTTPError:
        return False
