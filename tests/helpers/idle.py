"""`assert_idle`: nothing is left of any request, anywhere."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import httpx
from helpers.cluster import RunningCluster

from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.router.registry import Registry
from joinwise.cluster.router.router import Router
from joinwise.cluster.store.client import connect
from joinwise.proto import engine_pb2, engine_pb2_grpc

_SHM = Path("/dev/shm")


async def leftovers(cluster: RunningCluster) -> list[str]:
    """A line for everything that an idle cluster must not hold."""
    found = []
    client = connect(cluster.redis_url)
    try:
        settings = RouterConfig()
        found += await Router(client, cluster.name, settings).leftovers()
        workers = await Registry(client, cluster.name, settings).list()
    finally:
        await client.aclose()
    for worker in workers:
        async with grpc.aio.insecure_channel(worker.engine_address) as channel:
            idle = await engine_pb2_grpc.EngineServiceStub(channel).Idle(engine_pb2.IdleRequest(), timeout=30)
        counts = {
            "requests in the scheduler": idle.scheduler_requests,
            "KV blocks in use": idle.blocks_used,
            "connector entries": idle.connector_entries,
            "KV streams": idle.kv_streams,
            "landing bytes": idle.landing_bytes,
        }
        found += [f"{worker.worker_id}: {count} {what} {list(idle.held)}" for what, count in counts.items() if count]
    async with httpx.AsyncClient(base_url=cluster.http, timeout=30) as http:
        metrics = (await http.get("/metrics")).text
    for line in metrics.splitlines():
        if line.startswith("joinwise:requests_running") and float(line.split()[-1]):
            found.append(f"gateway: {line}")
    found += [f"shared memory: {path.name}" for path in _SHM.glob("joinwise*")]
    return found


async def assert_idle(cluster: RunningCluster, within_s: float = 15.0) -> None:
    """Wait until nothing is left; fail with what is.

    Settling is asynchronous (the last token reaches the client before the lease is given back), hence
    the deadline; it does not grow with what was done before.
    """
    import asyncio

    deadline = time.monotonic() + within_s
    while found := await leftovers(cluster):
        assert time.monotonic() < deadline, "not idle:\n" + "\n".join(found)
        await asyncio.sleep(0.1)
