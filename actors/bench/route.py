"""`joinwise bench router`: what a decision costs, and whether it stays right when many gateways race.

Speed: `decisions_per_s_*` counts decisions per second *of Redis' own CPU time*, which is what one Redis core can do,
while a gateway has 16 requests to route at any time: it asks for those that wait in one call (`decisions_per_call_*`).
`decisions_alone_per_s_*` is the same with one request at a time, `decisions_settled_per_s_*` with giving every lease
back, 16 at a time. Clients share the machine with Redis, so wall-clock rates (`wall_per_s` in the rows) say as much
about them. A latency is that of `Router.route` as a gateway calls it, beside a plain PING over the same client, in
turns.

Race: processes reserve and settle at random over workers with a limit. After each decision the chosen workers' pending
tokens are read: one above the limit is a violation. The same arrivals go through power-of-two-choices (Mitzenmacher,
1996) with each process knowing only its own load, as routers do that keep their state in memory.
"""

import asyncio
import itertools
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from joinwise.cluster.config_model import RedisConfig, RouterConfig
from joinwise.cluster.errors import OverloadedError
from joinwise.cluster.router.registry import Registry, WorkerInfo, WorkerLoad
from joinwise.cluster.router.router import Assignment, Demand, Router
from joinwise.cluster.store.client import connect
from joinwise.cluster.store.embedded import EmbeddedRedis
from joinwise.cluster.store.keys import Keys

WORKERS = (2, 16, 64, 512, 1000)
GATEWAYS = (4, 8)  # beside a single one
_MODEL = "m"
_SETTINGS = RouterConfig(max_pending_tokens=1 << 30, lease_s=600, worker_ttl_s=600)
_RACE_LIMIT = 8_000
_RACE_SETTINGS = _SETTINGS.model_copy(update={"max_pending_tokens": _RACE_LIMIT})
_CONCURRENT = 16
_ROUNDS = 15  # of one gateway, for the median
_ROW_OF = {  # figure -> field of the rows with one gateway
    "decisions_alone_per_s": "alone_per_redis_core_s",
    "decisions_settled_per_s": "settled_per_redis_core_s",
    "decisions_per_call": "decisions_per_call",
}
_PATIENT = RedisConfig(timeout_s=60, connect_timeout_s=60)  # a busy machine is slow, not broken


def worker(index: int, count: int) -> WorkerInfo:
    """A worker; half of them prefill."""
    role = "prefill" if index < count / 2 else "decode"
    return WorkerInfo(
        worker_id=f"w{index}",
        epoch=0,
        model=_MODEL,
        pool=role,
        role=role,
        fingerprint="f",
        model_digest="d",
        engine_address=f"10.0.0.1:{index}",
        kv_address=f"10.0.0.2:{index}",
        metrics_address="",
        capabilities=frozenset({"replay"}),
        kv_layout="l",
        max_model_len=32_768,
        block_size=16,
        num_blocks=100_000,
        max_num_seqs=64,
        adapters=frozenset(),
        vllm_version="",
        protocol_version=1,
        started_ms=0,
    )


async def join(client: Any, cluster: str, count: int, speeds: int = 3) -> None:
    """Register workers of so many speeds."""
    registry = Registry(client, cluster, _SETTINGS)
    for index in range(count):
        info = worker(index, count)
        epoch = await registry.register(info)
        load = WorkerLoad(
            prefill_tokens_per_s=(4000, 8000, 16000)[index % speeds], decode_step_ms=(40, 20, 10)[index % speeds]
        )
        await registry.heartbeat(info.worker_id, epoch, load)


def demand(rng: random.Random) -> Demand:
    """A request of a length as chats have it."""
    return Demand("r", _MODEL, rng.randrange(50, 2000), rng.randrange(20, 400))


# --- speed ------------------------------------------------------------------------------------------------------------


@dataclass
class Timing:
    """What one gateway has measured: microseconds of single calls, and decisions and seconds of many at once."""

    route_us: list[float] = field(default_factory=list)
    ping_us: list[float] = field(default_factory=list)
    decisions: int = 0
    seconds: float = 0.0
    redis_cpu_s: float = 0.0
    calls: int = 0
    settling_cpu_s: float = 0.0


async def _gateway(url: str, cluster: str, decisions: int, alone: bool, seed: int) -> Timing:
    client, rng, timing = connect(url, _PATIENT), random.Random(seed), Timing()  # noqa: S311 - reproducible, not secret
    router = Router(client, cluster, _SETTINGS)
    leases = [await router.route(demand(rng)) for _ in range(3)]
    if alone:
        for _ in range(decisions):
            begin = time.perf_counter()
            await client.ping()
            between = time.perf_counter()
            leases.append(await router.route(demand(rng)))
            timing.route_us.append((time.perf_counter() - between) * 1e6)
            timing.ping_us.append((between - begin) * 1e6)
        cpu = await _cpu_s(client)
        for _ in range(decisions):
            leases.append(await router.route(demand(rng)))
        timing.decisions, timing.redis_cpu_s = decisions, await _cpu_s(client) - cpu
    else:

        async def some() -> None:
            for _ in range(decisions // _CONCURRENT):
                leases.append(await router.route(demand(rng)))

        calls, cpu, begin = await _calls(client), await _cpu_s(client), time.perf_counter()
        await asyncio.gather(*(some() for _ in range(_CONCURRENT)))
        timing.seconds, timing.redis_cpu_s = time.perf_counter() - begin, await _cpu_s(client) - cpu
        timing.decisions, timing.calls = decisions // _CONCURRENT * _CONCURRENT, await _calls(client) - calls
    cpu = await _cpu_s(client)
    for at in range(0, len(leases), _CONCURRENT):
        await asyncio.gather(*map(router.settle, leases[at : at + _CONCURRENT]))
    timing.settling_cpu_s = (await _cpu_s(client) - cpu) * timing.decisions / len(leases)
    await client.aclose()
    return timing


async def _cpu_s(client: Any) -> float:
    info = await client.info("cpu")
    return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])


async def _calls(client: Any) -> int:
    """Scripts that Redis has run."""
    return int((await client.info("commandstats")).get("cmdstat_evalsha", {}).get("calls", 0))


def _in_process(call: Callable[..., Any], *arguments: Any) -> Any:
    return asyncio.run(call(*arguments))


def _cluster(workers: int, gateways: int) -> str:
    return f"bench-{workers}-{gateways}"


def _ask(url: str, call: Callable[[Any], Any]) -> Any:
    """What a call over a client of its own returns."""

    async def run() -> Any:
        client = connect(url, _PATIENT)
        try:
            return await call(client)
        finally:
            await client.aclose()

    return asyncio.run(run())


def _leftovers(url: str, cluster: str) -> int:
    return len(_ask(url, lambda client: Router(client, cluster, _SETTINGS).leftovers()))


def speed_of_one(url: str, decisions: int, pool: Any, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Time one gateway's decisions, a row for each number of workers.

    All numbers have their turn in each round: a machine whose speed changes meanwhile changes it for all of them.
    """
    alone: dict[int, list[Timing]] = {workers: [] for workers in WORKERS}
    many: dict[int, list[Timing]] = {workers: [] for workers in WORKERS}
    for workers in WORKERS:
        _ask(url, partial(join, cluster=_cluster(workers, 1), count=workers))
    for turn in range(_ROUNDS):
        say(f"one gateway: round {turn + 1} of {_ROUNDS}")
        for workers in WORKERS if turn % 2 else WORKERS[::-1]:
            asked = _gateway, url, _cluster(workers, 1)
            alone[workers].append(pool.apply(_in_process, (*asked, decisions // _ROUNDS, True, turn)))
            many[workers].append(pool.apply(_in_process, (*asked, decisions, False, turn)))
    return [_row_of_one(url, workers, alone[workers], many[workers]) for workers in WORKERS]


def _row_of_one(url: str, workers: int, alone: list[Timing], many: list[Timing]) -> dict[str, Any]:
    row: dict[str, Any] = {"workers": workers, "gateways": 1}
    for name in ("route_us", "ping_us"):
        cuts = statistics.quantiles((value for timing in alone for value in getattr(timing, name)), n=100)
        row |= {f"{name[:-3]}_p50_us": cuts[49], f"{name[:-3]}_p99_us": cuts[98]}
    settled = [timing.decisions / (timing.redis_cpu_s + timing.settling_cpu_s) for timing in many]
    return row | {
        "decisions": sum(timing.decisions for timing in many),
        "per_redis_core_s": statistics.median(timing.decisions / timing.redis_cpu_s for timing in many),
        "with_settling": False,
        "alone_per_redis_core_s": statistics.median(timing.decisions / timing.redis_cpu_s for timing in alone),
        "settled_per_redis_core_s": statistics.median(settled),
        "decisions_per_call": statistics.median(timing.decisions / timing.calls for timing in many),
        "wall_per_s": statistics.median(timing.decisions / timing.seconds for timing in many),
        "leftovers": _leftovers(url, _cluster(workers, 1)),
    }


def speed_of_many(url: str, workers: int, gateways: int, decisions: int, pool: Any) -> dict[str, Any]:
    """Time decisions by several gateways at once; returns a row.

    They settle at the end, each when it is through: Redis' time for that is in the row's rate.
    """
    cluster = _cluster(workers, gateways)
    _ask(url, partial(join, cluster=cluster, count=workers))
    before = _ask(url, _cpu_s)
    timings = pool.starmap(_in_process, [(_gateway, url, cluster, decisions, False, seed) for seed in range(gateways)])
    cpu, total = _ask(url, _cpu_s) - before, sum(timing.decisions for timing in timings)
    return {
        "workers": workers,
        "gateways": gateways,
        "decisions": total,
        "per_redis_core_s": total / cpu,
        "with_settling": True,
        "wall_per_s": total / max(max(timing.seconds for timing in timings), 1e-9),
        "leftovers": _leftovers(url, cluster),
    }


# --- the race ---------------------------------------------------------------------------------------------------------


@dataclass
class Racer:
    """What one process has seen."""

    granted: int = 0
    refused: int = 0
    violations: int = 0
    imbalance: list[float] = field(default_factory=list)


async def _race(url: str, cluster: str, decisions: int, seed: int) -> Racer:
    client, rng, seen = connect(url, _PATIENT), random.Random(seed), Racer()  # noqa: S311
    router, registry = Router(client, cluster, _RACE_SETTINGS), Registry(client, cluster, _RACE_SETTINGS)
    held: list[Assignment] = []
    for number in range(decisions):
        try:
            lease = await router.route(demand(rng))
        except OverloadedError:
            seen.refused += 1
            await router.settle(held.pop(rng.randrange(len(held)))) if held else await asyncio.sleep(0)
            continue
        seen.granted += 1
        held.append(lease)
        taken = [chosen.worker_id for chosen in (lease.prefill, lease.decode) if chosen]
        seen.violations += sum(state.pending_tokens > _RACE_LIMIT for state in await registry.states_of(taken))
        if rng.random() < 0.7:
            await router.prefill_done(lease)
        if number % 50 == 0:
            states = await registry.states()
            loads = [float(state.pending_decode) for state in states if state.info.pool == "decode"]
            seen.imbalance.append(max(loads) / max(1.0, statistics.mean(loads)))
        while len(held) > 20:
            await router.settle(held.pop(rng.randrange(len(held))))
    for lease in held:
        await router.settle(lease)
    await client.aclose()
    return seen


async def _two_choices(url: str, cluster: str, decisions: int, workers: int, seed: int) -> Racer:
    """The same arrivals on local knowledge; the true loads are counted in one hash."""
    client, rng, seen = connect(url, _PATIENT), random.Random(seed), Racer()  # noqa: S311
    mine = dict.fromkeys(range(workers // 2, workers), 0)
    held: list[tuple[int, int]] = []
    key = f"{Keys(cluster).base}two-choices"
    for number in range(decisions):
        each = demand(rng)
        tokens, pair = each.prompt_tokens + each.max_new_tokens, rng.sample(sorted(mine), 2)
        chosen = min(pair, key=mine.__getitem__)
        mine[chosen] += tokens
        held.append((chosen, tokens))
        await client.hincrby(key, str(chosen), tokens)
        seen.granted += 1
        if number % 50 == 0:
            loads = [float(load) for load in await client.hvals(key)]
            loads += [0.0] * (len(mine) - len(loads))
            seen.imbalance.append(max(loads) / max(1.0, statistics.mean(loads)))
        while len(held) > 20:
            worker_id, tokens = held.pop(rng.randrange(len(held)))
            mine[worker_id] -= tokens
            await client.hincrby(key, str(worker_id), -tokens)
    for worker_id, tokens in held:
        await client.hincrby(key, str(worker_id), -tokens)
    await client.aclose()
    return seen


def race(url: str, processes: int, decisions: int, workers: int) -> dict[str, Any]:
    """Race so many processes; returns figures. All loads are zero afterwards, or `leftovers` says how many are not."""
    cluster = "race"

    _ask(url, partial(join, cluster=cluster, count=workers, speeds=1))  # so that equal loads are what is best
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        ours = pool.starmap(_in_process, [(_race, url, cluster, decisions, seed) for seed in range(processes)])
        theirs = pool.starmap(
            _in_process, [(_two_choices, url, cluster, decisions, workers, seed) for seed in range(processes)]
        )
    calm = slice(decisions // 250, None)  # while there is little load, any share of it is large

    def spread(racers: list[Racer]) -> list[float]:
        return [ratio for racer in racers for ratio in racer.imbalance[calm]]

    return {
        "race_granted": sum(racer.granted for racer in ours),
        "race_refused": sum(racer.refused for racer in ours),
        "race_violations": sum(racer.violations for racer in ours),
        "race_leftovers": _leftovers(url, cluster),
        "race_imbalance_max": max(spread(ours), default=0.0),
        "race_imbalance_median": statistics.median(spread(ours) or [0.0]),
        "two_choices_imbalance_max": max(spread(theirs), default=0.0),
        "two_choices_imbalance_median": statistics.median(spread(theirs) or [0.0]),
    }


def run(decisions: int, racing: int, say: Callable[[str], None]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Everything, on a Redis of its own; figures and rows."""
    server = EmbeddedRedis.start()
    rows: list[dict[str, Any]] = []
    try:
        with multiprocessing.get_context("spawn").Pool(max(GATEWAYS)) as pool:
            singles = speed_of_one(server.url, decisions, pool, say)
            rows += singles
            for workers, gateways in itertools.product(WORKERS, GATEWAYS):
                say(f"{workers} workers, {gateways} gateways")
                rows.append(speed_of_many(server.url, workers, gateways, decisions, pool))
        say("the race")
        figures: dict[str, float] = race(server.url, max(GATEWAYS), racing, 64)
    finally:
        server.stop()
    single = {row["workers"]: row for row in singles}
    for workers in WORKERS:
        figures[f"decisions_per_s_{workers}w"] = single[workers]["per_redis_core_s"]
    for name in ("decisions_alone_per_s", "decisions_settled_per_s", "decisions_per_call"):
        figures[f"{name}_64w"] = single[64][_ROW_OF[name]]
    figures["decision_rtt_ratio_64w"] = single[64]["route_p50_us"] / single[64]["ping_p50_us"]
    figures["decision_p50_us_64w"] = single[64]["route_p50_us"]
    figures["decision_p99_us_64w"] = single[64]["route_p99_us"]
    figures["leftovers"] = float(sum(row["leftovers"] for row in rows))
    return figures, rows
