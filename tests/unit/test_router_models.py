"""Several models on one router: a request meets workers of its own model that can serve it, whatever hints say."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
from helpers.router_rig import Bench, Make, chosen, demand
from redis.asyncio import Redis

from joinwise.cluster.errors import NoWorkerError
from joinwise.cluster.router.decision import Assignment, Held
from joinwise.cluster.router.registry import capabilities_of
from joinwise.cluster.router.router import samples_of
from joinwise.cluster.router.terms import Terms
from joinwise.cluster.store.keys import Keys

_MODELS = ("m", "m:n", "n")  # a name may be the end or the beginning of another's
_CAPABILITIES = (frozenset({"replay", "all_sampling"}), frozenset[str]())
_ADAPTERS = (frozenset({"tone"}), frozenset[str]())
_NEEDS = (frozenset[str](), frozenset({"all_sampling"}), frozenset({"lora:tone"}), frozenset({"replay", "lora:tone"}))


@pytest.fixture
def bench(redis_client: Redis, cluster_name: str, clock: Callable[[], int], make_worker: Make) -> Bench:
    return Bench(
        redis_client, cluster_name, clock, make_worker, split="auto", spill_ms=0, max_pending_tokens=10_000_000
    )


async def fleet(bench: Bench) -> list[str]:
    """Of each model a worker for every role, with and without capabilities and an adapter."""
    names = []
    for model in _MODELS:
        for role in ("prefill", "decode", "mixed"):
            for index, capabilities in enumerate(_CAPABILITIES):
                names.append(f"{model}.{role}.{index}")
                await bench.join(
                    names[-1],
                    role,
                    model=model,
                    model_digest=model,
                    capabilities=capabilities,
                    adapters=_ADAPTERS[index],
                )
    return names


async def test_every_decision_keeps_to_the_model_and_to_what_is_needed(bench: Bench) -> None:
    numbers, names = random.Random(4), await fleet(bench)
    able = {
        state.info.worker_id: (state.info.model, capabilities_of(state.info)) for state in await bench.registry.states()
    }
    taken: set[str] = set()

    async def ask(seed: int) -> list[Assignment]:
        dice = random.Random(seed)
        model, needs, samples = dice.choice(_MODELS), dice.choice(_NEEDS), dice.choice((1, 3))
        asked = demand(
            dice.choice((64, 4096)),
            32,
            model=model,
            needs=needs,
            samples=samples,
            whole=dice.random() < 0.2,
            held={name: Held(bench.epochs[name], dice.choice((32, 4000))) for name in dice.sample(names, 4)},
            terms=Terms(session=f"s{dice.randrange(4)}"),  # shared by models
        )
        lease = await bench.router.route(asked)
        for worker in filter(None, (lease.prefill, lease.decode)):
            own, can = able[worker.worker_id]
            assert own == model and needs <= can, (model, needs, worker.worker_id)
            taken.add(worker.worker_id)
        return samples_of(lease, samples)

    leases = await asyncio.gather(*(ask(numbers.randrange(1 << 30)) for _ in range(400)))
    assert taken == set(names), "all have served somebody, those without capabilities too"
    assert any(lease.prefill is not None for lease, *_ in leases)
    for sample in (sample for lease in leases for sample in lease):
        await bench.router.settle(sample)
    await bench.assert_zero()


async def test_a_model_without_able_workers_borrows_none(bench: Bench) -> None:
    await fleet(bench)
    for name in [name for name in bench.epochs if name.startswith("n.") and name.endswith(".0")]:
        await bench.registry.deregister(name, bench.epochs[name])
    for needs in _NEEDS[1:]:
        with pytest.raises(NoWorkerError, match="'n'"):
            await bench.router.route(demand(model="n", needs=needs))
    assert (await bench.router.route(demand(model="n"))).decode.worker_id.startswith("n.")
    with pytest.raises(NoWorkerError):
        await bench.router.route(demand(model="unheard-of"))


async def test_a_worker_that_comes_back_with_another_model_serves_that_one_only(bench: Bench) -> None:
    await bench.join("w", "mixed", model="m")
    old = await bench.router.route(demand(model="m", terms=Terms(session="s")))
    epoch = await bench.join("w", "mixed", model="n", model_digest="2")
    with pytest.raises(NoWorkerError):
        await bench.router.route(demand(model="m", terms=Terms(session="s"), held={"w": Held(epoch, 64)}))
    assert chosen(await bench.router.route(demand(model="n")))[1] == "w"
    await bench.router.settle(old)  # of the earlier life: nothing is taken from the new one
    assert (await bench.pending())["w"] == (100, 110)


async def test_a_worker_in_the_sets_of_a_model_that_is_not_its_own(bench: Bench) -> None:
    """Whoever put it there: its own record decides."""
    await bench.join("mine", "mixed", model="m")
    await bench.join("liar", "mixed", model="n", model_digest="2")
    base = Keys(bench.cluster).base
    for kind in ("queue", "room"):
        (key,) = [key async for key in bench.client.scan_iter(match=f"{base}{kind}:mixed:*:m".replace("[", "\\["))]
        await bench.client.zadd(key, {"liar": -1})
    for _ in range(5):
        assert chosen(await bench.router.route(demand(model="m")))[1] == "mine"
    await bench.registry.deregister("mine", bench.epochs["mine"])
    with pytest.raises(NoWorkerError):
        await bench.router.route(demand(model="m"))
