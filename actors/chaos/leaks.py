"""What an idle cluster must not hold: leases, pending tokens, KV blocks, streams, landing buffers, shared memory."""

import asyncio
from pathlib import Path

import grpc
import httpx

from joinwise.actors.auth import bearer
from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.router.registry import Registry
from joinwise.cluster.router.router import Router
from joinwise.cluster.store.client import connect
from joinwise.cluster.store.keys import Keys
from joinwise.proto import engine_pb2, engine_pb2_grpc

_SHM = Path("/dev/shm")  # noqa: S108 - looked at only
_ANSWER_S = 30.0


async def leftovers(cluster: str, redis_url: str, http: str) -> list[str]:
    """A line for everything that is left of requests, anywhere.

    Args:
        cluster: its name.
        redis_url: of its Redis, with the password.
        http: base URL of a gateway, without /v1.

    Raises:
        StoreUnavailableError: Redis does not answer.
        grpc.aio.AioRpcError, httpx.HTTPError: a worker, or the gateway, does not.
    """
    found = []
    client = connect(redis_url)
    try:
        settings = RouterConfig()
        found += await Router(client, cluster, settings).leftovers()
        workers = await Registry(client, cluster, settings).list()
        token = str(await client.get(Keys(cluster).token) or "")
    finally:
        await client.aclose()
    for worker in workers:
        async with grpc.aio.insecure_channel(worker.engine_address) as channel:
            stub = engine_pb2_grpc.EngineServiceStub(channel)
            idle = await stub.Idle(engine_pb2.IdleRequest(), timeout=_ANSWER_S, metadata=bearer(token))
        counts = {
            "requests in the scheduler": idle.scheduler_requests,
            "KV blocks in use": idle.blocks_used,
            "connector entries": idle.connector_entries,
            "KV streams": idle.kv_streams,
            "landing bytes": idle.landing_bytes,
        }
        found += [f"{worker.worker_id}: {count} {what} {list(idle.held)}" for what, count in counts.items() if count]
    async with httpx.AsyncClient(base_url=http, timeout=_ANSWER_S) as asked:
        metrics = (await asked.get("/metrics")).text
    for line in metrics.splitlines():
        if line.startswith("joinwise:requests_running") and float(line.split()[-1]):
            found.append(f"gateway: {line}")
    shared = await asyncio.to_thread(lambda: sorted(_SHM.glob("joinwise*")))
    return found + [f"shared memory: {path.name}" for path in shared]
