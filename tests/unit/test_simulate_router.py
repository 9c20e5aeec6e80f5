"""The simulator drives the router that serves: gathered decisions are those of one call after another."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.errors import NoWorkerError
from joinwise.cluster.router.router import Router
from joinwise.cluster.simulate import profile as profiles
from joinwise.cluster.simulate.live_router import LiveRouter
from joinwise.cluster.simulate.models import MODELS
from joinwise.cluster.simulate.pools import parse_pools
from joinwise.cluster.simulate.run import simulate
from joinwise.cluster.simulate.simulator import Simulation
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


def talks(seed: int, turns: int) -> Trace:
    """Conversations whose prompts grow turn by turn, in blocks of 512 tokens."""
    base = poisson(rate=turns, seconds=20, seed=seed, prompt=1, output=20, spread=0.3).arrivals
    made = []
    for index, each in enumerate(base):
        talk, turn = index % 7, index // 7
        blocks = tuple(talk * 1000 + depth for depth in range(turn + 1))
        made.append(each._replace(prompt=512 * len(blocks) - 100, blocks=blocks))
    return Trace("talks", made, 512)


@pytest.mark.parametrize("pools", ["prompt=3xh100,token=2xh100", "mixed=4xh100"])
async def test_prefixes_are_found_and_gathering_changes_nothing(
    redis_server: EmbeddedRedis, redis_client: Redis, pools: str
) -> None:
    trace = talks(5, 6)
    together, router, simulation = drive(redis_server, trace, pools, "vllm", ahead=True)
    alone, patient, again = drive(redis_server, trace, pools, "vllm", ahead=False)
    assert together == alone
    assert simulation.caches is not None and again.caches is not None
    assert simulation.caches.figures() == again.caches.figures()
    assert simulation.caches.figures()["prefix_hit_of_ideal"] > 0.9
    for each in (router, patient):
        await assert_idle(redis_client, each)


def test_prefix_routing_beats_round_robin() -> None:
    pools, profile = parse_pools("mixed=4xh100"), profiles.shipped()
    found = {
        name: simulate(talks(5, 6), pools, profile, policy=name).figures for name in ("auto", "radix", "round_robin")
    }
    assert found["auto"]["prefix_hit_of_ideal"] > found["round_robin"]["prefix_hit_of_ideal"]
    assert found["radix"]["prefix_hit_of_ideal"] > found["round_robin"]["prefix_hit_of_ideal"]
    assert found["auto"]["ttft_p50_s"] < found["round_robin"]["ttft_p50_s"]


def test_the_same_trace_gives_the_same_figures() -> None:
    first, again = (
        simulate(TRACE, parse_pools("prompt=2xh100,token=2xh100"), profiles.shipped()).figures for _ in range(2)
    )
    assert first == again
    assert first["refused"] == 0
