"""Tickets: all leases of a request or none, and none that is not given back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from joinwise.actors.gateway.failures import NotedErrors
from joinwise.actors.gateway.tickets import Ticket, TicketOffice, on_terms
from joinwise.cluster.errors import (
    InvalidRequestError,
    JoinwiseError,
    NoWorkerError,
    OverloadedError,
    StoreUnavailableError,
)
from joinwise.cluster.router.router import Assignment, Demand, Terms, WorkerRef


class FakeRouter:
    """Hands out leases and remembers which samples hold them."""

    def __init__(self) -> None:
        self.held: list[tuple[str, int]] = []
        self.demands: list[Demand] = []
        self.before: Callable[[], Awaitable[None]] | None = None
        self.settle_error: JoinwiseError | None = None

    async def route(self, demand: Demand) -> Assignment:
        self.demands.append(demand)
        if self.before is not None:
            await self.before()
        self.held += [(demand.request_id, sample) for sample in range(demand.samples)]
        return Assignment(demand.request_id, 1, None, WorkerRef("w", 1, "a:1", "a:2"), "whole", 0)

    async def settle(self, assignment: Assignment, generated: int | None = None) -> bool:
        if self.settle_error is not None:
            raise self.settle_error
        assert generated == 0
        self.held.remove((assignment.lease_id, assignment.sample))
        return True


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()


def ticket(router: FakeRouter, samples: int = 3, adapter: str | None = None, **changes: int) -> Ticket:
    office = TicketOffice(router, "m")  # type: ignore[arg-type]
    return office.ticket(
        request_id="r", prompt_tokens=10, max_new_tokens=5, samples=samples, whole=False, adapter=adapter, **changes
    )


async def test_one_demand_for_all_samples(router: FakeRouter) -> None:
    assert ticket(router, 3).demand.samples == 3
    only = ticket(router, 1, adapter="tone").demand
    assert (only.request_id, only.model, only.prompt_tokens, only.max_new_tokens) == ("r", "m", 10, 5)
    assert only.needs == {"lora:tone"}


async def test_a_ticket_has_the_terms_of_its_call(router: FakeRouter) -> None:
    assert ticket(router).demand.terms == Terms()
    async with on_terms("r", None, {"x-tenant-id": "t", "x-priority": "3", "x-slo-ttft-ms": "20"}):
        assert ticket(router).demand.terms == Terms("t", "", 3, 20.0, 0.0)
        assert ticket(router, priority=-7).demand.terms.priority == -7  # the request's own word goes first
        assert ticket(router, priority=10**9).demand.terms.priority == 1000
    assert ticket(router).demand.terms == Terms()
    with pytest.raises(InvalidRequestError, match="x-priority"):
        async with on_terms("r", None, {"x-priority": "soon"}):
            pass


async def test_leases_are_taken_in_order_and_the_rest_given_back(router: FakeRouter) -> None:
    mine = ticket(router)
    assert mine.take() is None
    await mine.admit()
    await mine.admit()  # a second time changes nothing
    assert router.held == [("r", 0), ("r", 1), ("r", 2)]
    assert mine.routed_s > 0
    taken = mine.take()
    assert taken is not None
    assert (taken.lease_id, taken.sample) == ("r", 0)
    await mine.settle()
    await mine.settle()
    assert router.held == [("r", 0)]  # whoever took it settles it
    assert mine.take() is None


@pytest.mark.parametrize("error", [OverloadedError("full", retry_after_s=2), NoWorkerError("none"), OSError("else")])
async def test_a_refusal_is_noted_and_remembered(router: FakeRouter, error: Exception) -> None:
    async def fails() -> None:
        raise error

    router.before = fails
    mine = ticket(router)
    with NotedErrors() as noted, pytest.raises(type(error)):
        await mine.admit()
    assert noted.last is (error if isinstance(error, JoinwiseError) else None)
    if isinstance(error, JoinwiseError):
        with pytest.raises(type(error)):  # the front door asks, then vLLM's generator
            await mine.admit()
    assert len(router.demands) == 1


async def test_a_client_that_leaves_while_it_is_routed(router: FakeRouter) -> None:
    stuck = asyncio.Event()

    async def hangs() -> None:
        stuck.set()
        await asyncio.Event().wait()

    router.before = hangs
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
