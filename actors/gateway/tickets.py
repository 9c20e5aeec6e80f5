"""Tickets: a request is routed after it is rendered and before its answer begins.

vLLM's `generate` is lazy: it runs after a streaming response has sent its 200. A ticket is made when
`generate` is *called*, with the rendered prompt, and `admit` is awaited before anything is sent (by
the HTTP middleware, or by the gRPC servicer), so that 429 and 503 are real statuses. A ticket that
is not used settles its leases.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from joinwise.actors.gateway.failures import note_error
from joinwise.actors.gateway.identity import bound
from joinwise.actors.gateway.tracing import headers_of, trace_headers
from joinwise.cluster.errors import JoinwiseError
from joinwise.cluster.router.registry import ADAPTER_CAPABILITY
from joinwise.cluster.router.router import Assignment, Demand, Held, Router, Terms, samples_of
from joinwise.cluster.router.terms import MAX_PRIORITY, PLAIN

#: The tickets made while one client call is served; set by the front doors.
call_tickets: ContextVar["list[Ticket] | None"] = ContextVar("joinwise_call_tickets", default=None)
#: What the caller has said of itself in headers or metadata; set by the front doors.
call_terms: ContextVar[Terms] = ContextVar("joinwise_call_terms", default=PLAIN)
#: The tokens of a stream that broke at another gateway and goes on here; set by the gRPC door.
call_resumes: ContextVar[tuple[int, ...] | None] = ContextVar("joinwise_call_resumes", default=None)
#: The ticket whose requests are being added in this task.
active_ticket: ContextVar["Ticket | None"] = ContextVar("joinwise_active_ticket", default=None)


@contextlib.asynccontextmanager
async def on_terms(request_id: str, request: object, metadata: Mapping[str, str]) -> AsyncIterator[None]:
    """The admission of a gRPC call: its metadata says what headers say over HTTP.

    Raises:
        InvalidRequestError: one that does not parse.
    """
    token, trace = call_terms.set(bound(Terms.parse(metadata))), trace_headers.set(headers_of(metadata))
    try:
        yield
    finally:
        call_terms.reset(token)
        trace_headers.reset(trace)


@dataclass
class Ticket:
    """The lease for the `n` samples of one request.

    Attributes:
        request_id: the client call's id, as vLLM's front end made it.
        demand: for all samples.
        created: monotonic time at which the request was rendered.
        assignments: parts of the lease that no sample has taken yet.
        started: vLLM's ids of the samples that were started; their ledgers are kept under these.
        routed_s: seconds that routing took.
        prompt_ready: set when the decode worker holds the prompt's KV; until then all samples but the first wait, so
            that the prompt is computed, and sent, once.
    """

    request_id: str
    router: Router
    demand: Demand
    created: float = field(default_factory=time.monotonic)
    assignments: list[Assignment] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    routed_s: float = 0.0
    admitted: bool = False
    failure: JoinwiseError | None = None
    prompt_ready: asyncio.Event = field(default_factory=asyncio.Event)

    async def admit(self) -> None:
        """Reserve workers for all samples at once.

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
            self.assignments = samples_of(await self.router.route(self.demand), self.demand.samples)
        except BaseException as error:
            if isinstance(error, JoinwiseError):
                self.failure = note_error(error)
            await self.settle()
            raise
        self.routed_s = time.monotonic() - begin

    def take(self) -> Assignment | None:
        """The next sample's part of the lease; its taker settles it."""
        return self.assignments.pop(0) if self.assignments else None

    async def settle(self) -> None:
        """Give back the parts that nobody took; those that Redis does not take back expire by themselves."""
        while self.assignments:
            with contextlib.suppress(JoinwiseError):
                await self.router.settle(self.assignments.pop(0), generated=0)


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
        needs: frozenset[str] = frozenset(),
        priority: int = 0,
        held: Mapping[str, Held] | None = None,
        exclude: frozenset[str] = frozenset(),
    ) -> Ticket:
        """A ticket for `samples` equal requests of the call that runs now. Token counts are per sample.

        Args:
            needs: capabilities that the workers must have, beside the adapter.
            priority: as the request says; the caller's header holds where it says nothing.
            held: the prefix that workers hold, by worker.
            exclude: ids of workers that may not be taken.
        """
        terms = call_terms.get()
        demand = Demand(
            request_id=request_id,
            model=self.model,
            prompt_tokens=prompt_tokens,
            max_new_tokens=max_new_tokens,
            whole=whole,
            needs=needs | ({f"{ADAPTER_CAPABILITY}{adapter}"} if adapter else set()),
            samples=samples,
            held=held or {},
            exclude=exclude,
            terms=replace(terms, priority=max(-MAX_PRIORITY, min(MAX_PRIORITY, priority or terms.priority))),
        )
        return Ticket(request_id, self.router, demand)
