"""Tickets: all leases of a request or none, and none that is not given back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from joinwise.actors.gateway.failures import NotedErrors
from joinwise.actors.gateway.tickets import Ticket, TicketOffice
from joinwise.cluster.errors import JoinwiseError, NoWorkerError, OverloadedError, StoreUnavailableError
from joinwise.cluster.router.router import Assignment, Demand, WorkerRef


class FakeRouter:
    """Hands out leases and remembers them."""

    def __init__(self) -> None:
        self.held: list[str] = []
        self.demands: list[Demand] = []
        self.before: Callable[[int], Awaitable[None]] | None = None
        self.settle_error: JoinwiseError | None = None

    async def route(self, demand: Demand) -> Assignment:
        self.demands.append(demand)
        if self.before is not None:
            await self.before(len(self.demands))
        self.held.append(demand.request_id)
        return Assignment(demand.request_id, 1, None, WorkerRef("w", 1, "a:1", "a:2"), "whole", 0)

    async def settle(self, assignment: Assignment) -> bool:
        if self.settle_error is not None:
            raise self.settle_error
        self.held.remove(assignment.lease_id)
        return True


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()


def ticket(router: FakeRouter, samples: int = 3, adapter: str | None = None) -> Ticket:
    office = TicketOffice(router, "m")  # type: ignore[arg-type]
    return office.ticket(
        request_id="r", prompt_tokens=10, max_new_tokens=5, samples=samples, whole=False, adapter=adapter
    )


async def test_one_demand_a_sample(router: FakeRouter) -> None:
    assert [demand.request_id for demand in ticket(router, 3).demands] == ["r:0", "r:1", "r:2"]
    (only,) = ticket(router, 1, adapter="tone").demands
    assert (only.request_id, only.model, only.prompt_tokens, only.max_new_tokens) == ("r", "m", 10, 5)
    assert only.needs == {"lora:tone"}


async def test_leases_are_taken_in_order_and_the_rest_given_back(router: FakeRouter) -> None:
    mine = ticket(router)
    assert mine.take() is None
    await mine.admit()
    await mine.admit()  # a second time changes nothing
    assert router.held == ["r:0", "r:1", "r:2"]
    assert mine.routed_s > 0
    taken = mine.take()
    assert taken is not None
    assert taken.lease_id == "r:0"
    await mine.settle()
    await mine.settle()
    assert router.held == ["r:0"]  # whoever took it settles it
    assert mine.take() is None


@pytest.mark.parametrize("error", [OverloadedError("full", retry_after_s=2), NoWorkerError("none"), OSError("else")])
async def test_all_samples_or_none(router: FakeRouter, error: Exception) -> None:
    async def third_fails(number: int) -> None:
        if number == 3:
            raise error

    router.before = third_fails
    mine = ticket(router)
    with NotedErrors() as noted, pytest.raises(type(error)):
        await mine.admit()
    assert router.held == []
    assert noted.last is (error if isinstance(error, JoinwiseError) else None)


async def test_a_refusal_is_remembered(router: FakeRouter) -> None:
    async def fails(number: int) -> None:
        raise OverloadedError("full")

    router.before = fails
    mine = ticket(router)
    for _ in range(2):  # the front door asks, then vLLM's generator
        with pytest.raises(OverloadedError):
            await mine.admit()
    assert len(router.demands) == 1


async def test_a_client_that_leaves_while_it_is_routed(router: FakeRouter) -> None:
    stuck = asyncio.Event()

    async def second_hangs(number: int) -> None:
        if number == 2:
            stuck.set()
            await asyncio.Event().wait()

    router.before = second_hangs
    mine = ticket(router)
    admission = asyncio.create_task(mine.admit())
    await stuck.wait()
    admission.cancel()
    with pytest.raises(asyncio.CancelledError):
        await admission
    assert router.held == []
    assert mine.take() is None


async def test_a_redis_that_is_gone_does_not_stop_the_settling(router: FakeRouter) -> None:
    mine = ticket(router)
    await mine.admit()
    router.settle_error = StoreUnavailableError("gone")
    await mine.settle()
    assert mine.assignments == []
