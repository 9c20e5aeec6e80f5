"""Tickets: a request is routed after it is rendered and before its answer begins.

vLLM's `generate` is lazy: it runs after a streaming response has sent its 200. A ticket is made when
`generate` is *called*, with the rendered prompt, and `admit` is awaited before anything is sent (by
the HTTP middleware, or by the gRPC servicer), so that 429 and 503 are real statuses. A ticket that
is not used settles its leases.
"""

import contextlib
import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from joinwise.actors.gateway.failures import note_error
from joinwise.cluster.errors import JoinwiseError
from joinwise.cluster.router.router import Assignment, Demand, Router

#: The tickets made while one client call is served; set by the front doors.
call_tickets: ContextVar["list[Ticket] | None"] = ContextVar("joinwise_call_tickets", default=None)
#: The ticket whose requests are being added in this task.
active_ticket: ContextVar["Ticket | None"] = ContextVar("joinwise_active_ticket", default=None)


@dataclass
class Ticket:
    """Leases for the `n` samples of one request.

    Attributes:
        request_id: the client call's id, as vLLM's front end made it.
        demands: one per sample.
        created: monotonic time at which the request was rendered.
        assignments: leases taken and not yet used.
        started: vLLM's ids of the samples that were started; their ledgers are kept under these.
        routed_s: seconds that routing took.
    """

    request_id: str
    router: Router
    demands: list[Demand]
    created: float = field(default_factory=time.monotonic)
    assignments: list[Assignment] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    routed_s: float = 0.0
    admitted: bool = False
    failure: JoinwiseError | None = None

    async def admit(self) -> None:
        """Reserve workers for every sample; all or none.

        Raises:
            JoinwiseError: no worker, no room, or no Redis.
        """
        if self.failure is not None:
            raise self.failure
        if self.admitted:
            return
        self.admitted = True
        begin = time.monotonic()
        try:
            for demand in self.demands:
                self.assignments.append(await self.router.route(demand))
        except BaseException as error:
            if isinstance(error, JoinwiseError):
                self.failure = note_error(error)
            await self.settle()
            raise
        self.routed_s = time.monotonic() - begin

    def take(self) -> Assignment | None:
        """The lease of the next sample; its taker settles it."""
        return self.assignments.pop(0) if self.assignments else None

    async def settle(self) -> None:
        """Give back the leases that nobody took; those that Redis does not take back expire by themselves."""
        while self.assignments:
            with contextlib.suppress(JoinwiseError):
                await self.router.settle(self.assignments.pop(0))


@dataclass(frozen=True)
class TicketOffice:
    """Makes tickets for one model."""

    router: Router
    model: str

    def ticket(
        self,
        *,
        request_id: str,
        prompt_tokens: int,
        max_new_tokens: int,
        samples: int,
        whole: bool,
        adapter: str | None,
    ) -> Ticket:
        """A ticket for `samples` equal requests. Token counts are per sample."""
        needs = frozenset({f"lora:{adapter}"} if adapter else ())
        demands = [
            Demand(
                request_id=f"{request_id}:{index}" if samples > 1 else request_id,
                model=self.model,
                prompt_tokens=prompt_tokens,
                max_new_tokens=max_new_tokens,
                whole=whole,
                needs=needs,
            )
            for index in range(samples)
        ]
        return Ticket(request_id, self.router, demands)
