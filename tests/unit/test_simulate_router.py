"""The simulator drives the router that serves: gathered decisions are those of one call after another."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.errors import NoWorkerError
from joinwise.cluster.router.router import Router
from joinwise.cluster.simulate import profile as profiles
from joinwise.cluster.simulate.live_router import LiveRouter
from joinwise.cluster.simulate.pools import parse_pools
from joinwise.cluster.simulate.run import simulate
from joinwise.cluster.simulate.simulator import MODELS, Simulation
from joinwise.cluster.simulate.trace import Trace, poisson
from joinwise.cluster.store.embedded import EmbeddedRedis

TRACE = poisson(rate=30, seconds=8, seed=3, prompt=600, output=40)
OPEN = RouterConfig(max_pending_tokens=1 << 30)


def drive(
    server: EmbeddedRedis, trace: Trace, pools: str, model: str, settings: RouterConfig = OPEN, *, ahead: bool
) -> tuple[list[tuple[float, float]], LiveRouter, Simulation]:
    made: list[LiveRouter] = []

    def policy(simulation: Simulation) -> LiveRouter:
        made.append(LiveRouter(simulation, settings, server, ahead=ahead))
        return made[0]

    simulation = Simulation(trace, parse_pools(pools), profiles.shipped(), MODELS[model], policy)
    jobs = simulation.run().jobs
    return [(job.first, job.end) for job in jobs], made[0], simulation


async def assert_idle(client: Redis, router: LiveRouter) -> None:
    """No lease and no pending token is left: asked of Redis by a router of one's own."""
    router.flush()
    router.close()
    assert await Router(client, router.cluster, OPEN).leftovers() == []


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("pools", ["prompt=3xh100,token=2xh100", "prompt=2xh100,token=2xa100", "mixed=4xh100"])
async def test_gathered_decisions_change_nothing(
    redis_server: EmbeddedRedis, redis_client: Redis, pools: str, model: str
) -> None:
    together, router, simulation = drive(redis_server, TRACE, pools, model, ahead=True)
    alone, patient, _ = drive(redis_server, TRACE, pools, model, ahead=False)
    assert together == alone
    assert router.rounds < patient.rounds  # else nothing was gathered
    assert all(job.end > 0 for job in simulation.jobs)
    for each in (router, patient):
        await assert_idle(redis_client, each)
        assert each.calls == 3 * len(TRACE.arrivals)


async def test_a_refused_request_is_counted(redis_server: EmbeddedRedis, redis_client: Redis) -> None:
    tight = RouterConfig(max_pending_tokens=2000)
    _, router, simulation = drive(redis_server, TRACE, "mixed=2xh100", "vllm", tight, ahead=True)
    assert 0 < simulation.refused < len(TRACE.arrivals)
    assert sum(job.end < 0 for job in simulation.jobs) == simulation.refused
    await assert_idle(redis_client, router)


def test_without_a_worker_it_says_so(redis_server: EmbeddedRedis) -> None:
    def policy(simulation: Simulation) -> LiveRouter:
        simulation.engines = simulation.engines[:0]
        return LiveRouter(simulation, OPEN, redis_server)

    with pytest.raises((NoWorkerError, ValueError)):
        Simulation(TRACE, parse_pools("mixed=1xh100"), profiles.shipped(), MODELS["vllm"], policy)


def test_the_same_trace_gives_the_same_figures() -> None:
    first, again = (
        simulate(TRACE, parse_pools("prompt=2xh100,token=2xh100"), profiles.shipped()).figures for _ in range(2)
    )
    assert first == again
    assert first["refused"] == 0
