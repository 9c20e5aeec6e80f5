"""`ClusterCore` over fake links and router: whatever goes away and whenever, nothing is left, nothing repeats."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from joinwise.actors.gateway.failures import NotedErrors
from joinwise.actors.gateway.ledgers import LedgerBuilder
from joinwise.actors.gateway.tickets import Ticket, active_ticket
from joinwise.actors.gateway.tracing import Traces, trace_headers
from joinwise.actors.vllm import nixl
from joinwise.actors.vllm.core_client import ClusterCore
from joinwise.actors.vllm.handoff import Handoff, replay_of
from joinwise.cluster.config import TracingConfig
from joinwise.cluster.errors import JoinwiseError, NoWorkerError, PoisonError, StoreUnavailableError, WorkerLostError
from joinwise.cluster.router.router import Assignment, Demand, WorkerRef, samples_of
from joinwise.proto import engine_pb2

P, D, E = (WorkerRef(name, 1, f"{name}:1", f"{name}:2") for name in ("p", "d", "e"))


class FakeRouter:
    """Gives the assignments it is told to, and counts what is given back."""

    def __init__(self) -> None:
        self.next: list[Assignment | JoinwiseError] = []
        self.demands: list[Demand] = []
        self.settled: list[str] = []
        self.released: list[str] = []
        self.settle_error: JoinwiseError | None = None
        self.left: set[str] = set()

    async def route(self, demand: Demand) -> Assignment:
        self.demands.append(demand)
        answer = self.next.pop(0)
        if isinstance(answer, JoinwiseError):
            raise answer
        return answer

    async def settle(self, assignment: Assignment, generated: int | None = None) -> bool:
        if self.settle_error is not None:
            raise self.settle_error
        self.settled.append(assignment.lease_id)
        return True

    async def registered(self, worker: WorkerRef) -> bool:
        if self.settle_error is not None:
            raise self.settle_error
        return worker.worker_id not in self.left

    async def prefill_done(self, assignment: Assignment) -> bool:
        self.released.append(assignment.lease_id)
        return True


class FakeLink:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.broken = False
        self.sent: list[tuple[str, Any]] = []

    def send(self, message: engine_pb2.AttachRequest) -> None:
        kind = message.WhichOneof("message")
        assert kind is not None
        if kind == "add":
            request = MsgpackDecoder(EngineCoreRequest).decode(list(message.add.request))
            self.sent.append(("add", request))
        elif kind == "abort":
            self.sent.append(("abort", list(message.abort.request_ids)))
        else:
            self.sent.append(("continue", getattr(message, kind)))

    @property
    def summary(self) -> list[tuple[str, Any]]:
        """What was sent, with ids only."""
        ids = {"add": lambda m: m.request_id, "abort": lambda m: m[0], "continue": lambda m: m.request_id}
        return [(kind, ids[kind](message)) for kind, message in self.sent]


class FakeLinks:
    """Links that open when a test lets them."""

    def __init__(self) -> None:
        self.links = {worker: FakeLink() for worker in (P, D, E)}
        self.errors: dict[WorkerRef, JoinwiseError] = {}
        self.gates: dict[WorkerRef, asyncio.Event] = {}

    async def get(self, worker: WorkerRef) -> FakeLink:
        if worker in self.gates:
            await self.gates[worker].wait()
        if worker in self.errors:
            raise self.errors[worker]
        return self.links[worker]

    def find(self, worker: WorkerRef) -> FakeLink | None:
        return None if worker in self.errors else self.links[worker]


class World:
    """A core, and what a test says in the workers' names."""

    def __init__(self, **options: Any) -> None:
        self.router, self.links = FakeRouter(), FakeLinks()
        self.ended: list[str] = []
        self.ledgers: list[LedgerBuilder] = []
        self.core = ClusterCore(
            self.router,  # type: ignore[arg-type]
            self.links,  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            on_ledger=self._ended,
            transfer_timeout_s=5.0,
            **options,
        )

    def _ended(self, request_id: str, ledger: LedgerBuilder) -> None:
        self.ended.append(request_id)
        self.ledgers.append(ledger)

    async def add(
        self, assignment: Assignment, request_id: str = "r", ticket: Ticket | None = None, **params: Any
    ) -> None:
        request = EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=[1, 2, 3],
            mm_features=None,
            sampling_params=SamplingParams(**{"max_tokens": 8, **params}),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        demand = Demand(request_id, "m", 3, 8, False)
        ticket = ticket or Ticket(request_id, self.router, demand)  # type: ignore[arg-type]
        ticket.assignments.append(assignment)
        token = active_ticket.set(ticket)
        try:
            await self.core.add_request_async(request)
        finally:
            active_ticket.reset(token)
        await self.settle_down()

    def says(
        self,
        worker: WorkerRef,
        part: str,
        *tokens: int,
        finish: FinishReason | None = None,
        handed: dict[str, Any] | None = None,
        drafts: RequestSpecDecodeMetrics | None = None,
    ) -> None:
        """A worker's frame with one output."""
        output = EngineCoreOutput(
            part, list(tokens), finish_reason=finish, kv_transfer_params=handed, spec_decode_metrics=drafts
        )
        outputs = EngineCoreOutputs(outputs=[output])
        buffers = [bytes(buffer) for buffer in MsgpackEncoder().encode(outputs)]
        self.core.on_message(worker, engine_pb2.AttachResponse(frame=engine_pb2.Frame(outputs=buffers)))

    def reports(self, worker: WorkerRef, part: str, failure: str = "") -> None:
        """A worker's report of a transfer."""
        report = engine_pb2.TransferReport(request_id=part, failure=failure, recomputed=bool(failure))
        self.core.on_message(worker, engine_pb2.AttachResponse(transfer=report))

    def begins(self, worker: WorkerRef, part: str) -> None:
        """A worker's word that it has begun with a request that had lost another."""
        self.core.on_message(worker, engine_pb2.AttachResponse(begun=engine_pb2.Begun(request_id=part)))

    def outputs(self) -> list[tuple[list[int], FinishReason | None]]:
        """What vLLM's front end got so far."""
        got = []
        while not self.core._outputs.empty():
            got += [(each.new_token_ids, each.finish_reason) for each in self.core._outputs.get_nowait().outputs]
        return got

    async def settle_down(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0)


def lease(name: str, prefill: WorkerRef | None, decode: WorkerRef) -> Assignment:
    return Assignment(name, 7, prefill, decode, "split" if prefill else "whole", 0)


@pytest.fixture
def world() -> World:
    return World()


async def test_a_client_that_leaves_while_links_open_leaves_nothing(world: World) -> None:
    """vLLM aborts only what it has seen added: adding must be over before anybody can cancel it."""
    world.links.gates[D] = asyncio.Event()
    await asyncio.wait_for(world.add(lease("l", P, D)), 1)
    assert world.core.running == ["r"]
    await world.core.abort_requests_async(["r"])
    world.links.gates[D].set()
    await world.until(lambda: world.router.settled == ["l"])
    await world.settle_down()
    assert world.core.running == []
    sent = world.links.links[P].summary + world.links.links[D].summary
    assert not [kind for kind, _ in sent if kind == "add"]


async def test_a_split_request_from_end_to_end(world: World) -> None:
    await world.add(lease("l", P, D))
    (_, prefill), (_, decode) = world.links.links[P].sent[0], world.links.links[D].sent[0]
    send, receive = (
        Handoff.from_params(part.sampling_params.extra_args["kv_transfer_params"]) for part in (prefill, decode)
    )
    assert send is not None
    assert receive is not None
    assert (send.half, receive.half, receive.peer) == ("send", "recv", "p:2")
    assert (send.transfer_id, send.epoch) == (receive.transfer_id, receive.epoch)
    world.says(P, "r.0.p", 11, finish=FinishReason.LENGTH)
    kind, message = world.links.links[D].sent[1]
    assert (kind, message.request_id, list(message.replay_token_ids)) == ("continue", "r.0.d", [11])
    assert not message.recompute
    world.reports(D, "r.0.d")
    world.says(D, "r.0.d", 11)
    world.says(D, "r.0.d", 12)
    world.says(D, "r.0.d", 13, finish=FinishReason.STOP)
    await world.settle_down()
    assert world.outputs() == [([11], None), ([12], None), ([13], FinishReason.STOP)]
    assert (world.router.released, world.router.settled, world.ended) == (["l"], ["l"], ["r"])
    assert world.links.links[P].summary == [("add", "r.0.p")]
    assert world.core.running == []


async def test_a_worker_that_does_it_all_gets_its_room_back_at_the_first_token(world: World) -> None:
    await world.add(lease("l", None, D))
    world.says(D, "r.0.d", 11)
    await world.settle_down()
    assert (world.router.released, world.router.settled) == (["l"], [])
    world.says(D, "r.0.d", 12)
    world.says(D, "r.0.d", 13, finish=FinishReason.STOP)
    await world.settle_down()
    assert (world.router.released, world.router.settled) == (["l"], ["l"])


async def test_an_answer_of_one_token_gives_all_back_at_once(world: World) -> None:
    await world.add(lease("l", None, D))
    world.says(D, "r.0.d", 11, finish=FinishReason.LENGTH)
    await world.settle_down()
    assert (world.router.released, world.router.settled) == ([], ["l"])


async def test_each_worker_that_does_the_rest_gets_its_room_back(world: World) -> None:
    await world.add(lease("l", None, D))
    world.says(D, "r.0.d", 11)
    world.router.next = [lease("m", None, E)]
    await world.core.on_lost(D, "gone")
    await world.until(lambda: world.links.links[E].sent)
    world.says(E, "r.1.d", 11)
    world.says(E, "r.1.d", 12)
    await world.settle_down()
    assert world.router.released == ["l", "m"]


@pytest.mark.parametrize("sampled", [True, False])
async def test_both_engines_are_told_the_trace_and_vllm_s_own_span_joins_it(sampled: bool) -> None:
    """From the caller's `traceparent` to the spans, over what is sent to the workers and given to vLLM's front end."""
    spans = InMemorySpanExporter()
    settings = TracingConfig(endpoint="http://collector:4317", sample_ratio=1.0)
    traces = Traces(settings, "demo", "gateway-1", SimpleSpanProcessor(spans))
    world = World(traces=traces)
    caller = f"00-{'ab' * 16}-{'cd' * 8}-0{int(sampled)}"
    token = trace_headers.set({"traceparent": caller})
    await world.add(lease("l", P, D))
    trace_headers.reset(token)
    told = [world.links.links[worker].sent[0][1].trace_headers for worker in (P, D)]
    world.says(P, "r.0.p", 11, finish=FinishReason.LENGTH)
    world.says(D, "r.0.d", 11)
    drafts = RequestSpecDecodeMetrics.new(2)
    drafts.observe(2, 1)
    world.says(D, "r.0.d", 12, 13, finish=FinishReason.STOP, drafts=drafts)
    await world.settle_down()
    *_, last = [each for _ in range(world.core._outputs.qsize()) for each in world.core._outputs.get_nowait().outputs]
    (builder,) = world.ledgers
    assert builder.trace is not None and last.trace_headers == builder.trace.headers
    assert last.spec_decode_metrics is None  # in the ledger instead
    traces.end(builder.trace, builder.build())
    if not sampled:
        assert told == [None, None] and builder.trace.headers["traceparent"].endswith("-00")
        assert not spans.get_finished_spans()
        return
    found = {span.name: span for span in spans.get_finished_spans()}
    assert found.keys() == {"request", "route", "queue", "prefill", "decode", "draft"}
    context = found["request"].context
    assert context is not None
    expected = {"traceparent": f"00-{'ab' * 16}-{context.span_id:016x}-01"}
    assert told == [expected, expected] and builder.trace.headers == expected
    assert (found["draft"].attributes or {})["joinwise.draft.accepted"] == 1


HANDED = {"do_remote_prefill": True, "remote_block_ids": [[4, 5]], "remote_engine_id": "p"}


@pytest.mark.parametrize("handed", [HANDED, None])
async def test_in_turn_decode_is_asked_with_what_prefill_hands_over(handed: dict[str, Any] | None) -> None:
    world = World(in_turn=True)
    await world.add(lease("l", P, D))
    ((_, prefill),) = world.links.links[P].sent
    assert prefill.sampling_params.extra_args["kv_transfer_params"] == nixl.ASK
    assert world.links.links[D].sent == []
    world.says(P, "r.0.p", 11, finish=FinishReason.LENGTH, handed=handed)
    ((kind, decode),) = world.links.links[D].sent
    assert (kind, decode.request_id, replay_of(decode.sampling_params)) == ("add", "r.0.d", [11])
    assert decode.sampling_params.extra_args.get("kv_transfer_params") == handed
    world.says(D, "r.0.d", 11)
    world.says(D, "r.0.d", 12, finish=FinishReason.STOP)
    await world.settle_down()
    assert world.outputs() == [([11], None), ([12], FinishReason.STOP)]
    assert (world.router.released, world.router.settled, world.ended) == (["l"], ["l"], ["r"])


async def test_in_turn_a_lost_prefill_worker_lets_decode_compute() -> None:
    world = World(in_turn=True)
    await world.add(lease("l", P, D))
    await world.core.on_lost(P, "gone")
    ((kind, decode),) = world.links.links[D].sent
    assert (kind, decode.request_id, replay_of(decode.sampling_params)) == ("add", "r.0.d", [])
    assert "kv_transfer_params" not in decode.sampling_params.extra_args
    world.says(P, "r.0.p", 99, finish=FinishReason.LENGTH, handed=HANDED)  # too late
    world.says(D, "r.0.d", 11, finish=FinishReason.LENGTH)
    assert world.outputs() == [([11], FinishReason.LENGTH)]
    assert len(world.links.links[D].sent) == 1


async def test_in_turn_a_lost_decode_worker_is_replaced_and_asked_once() -> None:
    world = World(in_turn=True)
    await world.add(lease("l", P, D))
    world.router.next = [lease("m", None, E)]
    await world.core.on_lost(D, "gone")
    await world.until(lambda: world.links.links[E].sent)
    world.says(P, "r.0.p", 11, finish=FinishReason.LENGTH, handed=HANDED)  # of the attempt before
    assert world.links.links[E].summary == [("add", "r.1.d")]
    assert world.links.links[D].sent == []


async def test_a_stop_at_the_first_token_ends_both_parts(world: World) -> None:
    await world.add(lease("l", P, D))
    world.says(P, "r.0.p", 11, finish=FinishReason.STOP)
    await world.settle_down()
    assert world.outputs() == [([11], FinishReason.STOP)]
    assert world.links.links[D].summary == [("add", "r.0.d"), ("abort", "r.0.d")]
    assert world.links.links[P].summary == [("add", "r.0.p"), ("abort", "r.0.p")]  # its KV is fetched by nobody
    assert world.router.settled == ["l"]


@pytest.mark.parametrize("report_first", [True, False])
async def test_what_a_failed_transfer_leaves_on_the_sender_is_freed(world: World, report_first: bool) -> None:
    await world.add(lease("l", P, D))
    steps = [
        lambda: world.reports(D, "r.0.d", "UNAVAILABLE"),
        lambda: world.says(P, "r.0.p", 11, finish=FinishReason.LENGTH),
    ]
    for step in steps if report_first else reversed(steps):
        step()
    assert world.links.links[P].summary == [("add", "r.0.p"), ("abort", "r.0.p")]
    assert world.links.links[D].summary == [("add", "r.0.d"), ("continue", "r.0.d")]


@pytest.mark.parametrize("prefill", [None, P])
async def test_an_abort_while_links_open_starts_nothing(world: World, prefill: WorkerRef | None) -> None:
    world.links.gates[D] = asyncio.Event()
    adding = asyncio.create_task(world.add(lease("l", prefill, D)))
    await world.until(lambda: world.core.running)
    await world.core.abort_requests_async(["r"])
    world.links.gates[D].set()
    await adding
    assert [kind for worker in (P, D) for kind, _ in world.links.links[worker].sent if kind == "add"] == []
    await world.settle_down()
    assert world.router.settled == ["l"]


async def test_a_lost_decode_worker_is_replaced_with_replay(world: World) -> None:
    await world.add(lease("l", P, D))
    world.says(P, "r.0.p", 11, finish=FinishReason.LENGTH)
    world.says(D, "r.0.d", 11)
    world.says(D, "r.0.d", 12)
    world.router.next = [lease("m", None, E)]
    await world.core.on_lost(D, "gone")
    await world.until(lambda: world.links.links[E].sent)
    world.says(D, "r.0.d", 13)  # of a worker that has been given up: the new one makes it again
    (demand,) = world.router.demands
    assert (demand.whole, demand.exclude, demand.max_new_tokens) == (True, {"d"}, 6)
    _, part = world.links.links[E].sent[0]
    assert (part.request_id, replay_of(part.sampling_params)) == ("r.1.d", [11, 12])
    for token in (11, 12, 13):
        world.says(E, "r.1.d", token)
    world.says(E, "r.1.d", 14, finish=FinishReason.LENGTH)
    await world.settle_down()
    assert world.outputs() == [([11], None), ([12], None), ([13], None), ([14], FinishReason.LENGTH)]
    assert world.router.settled == ["l", "m"]


async def test_a_worker_that_is_lost_while_its_partner_is_dialled_moves_once(world: World) -> None:
    world.links.gates[P] = asyncio.Event()
    adding = asyncio.create_task(world.add(lease("l", P, D)))
    await world.until(lambda: world.core.running)
    world.router.next = [lease("m", None, E)]
    await world.core.on_lost(D, "gone")
    await world.until(lambda: world.links.links[E].sent)
    world.links.gates[P].set()
    await adding
    assert world.links.links[P].sent == []
    assert world.links.links[E].summary == [("add", "r.1.d")]
    assert len(world.router.demands) == 1


async def test_a_prefill_worker_that_cannot_be_reached_is_done_without(world: World) -> None:
    world.links.errors[P] = WorkerLostError("refused")
    await world.add(lease("l", P, D))
    kind, message = world.links.links[D].sent[1]
    assert (kind, message.recompute, list(message.replay_token_ids)) == ("continue", True, [])
    world.says(D, "r.0.d", 11, finish=FinishReason.LENGTH)
    assert world.outputs() == [([11], FinishReason.LENGTH)]


async def test_a_prefill_worker_that_is_lost_or_fails_is_done_without(world: World) -> None:
    for request_id, end in (
        ("lost", lambda: world.core.on_lost(P, "gone")),
        ("error", lambda: asyncio.sleep(0, world.says(P, "error.0.p", finish=FinishReason.ERROR))),
    ):
        await world.add(lease(request_id, P, D), request_id)
        await end()
        kind, message = world.links.links[D].sent[-1]
        assert (kind, message.request_id, message.recompute) == ("continue", f"{request_id}.0.d", True)
        world.says(P, f"{request_id}.0.p", 99)  # too late
        world.says(D, f"{request_id}.0.d", 11, finish=FinishReason.LENGTH)
        assert world.outputs() == [([11], FinishReason.LENGTH)]
    await world.settle_down()
    assert sorted(world.router.settled) == ["error", "lost"]


@pytest.mark.parametrize("in_front", [True, False])
async def test_a_request_that_cannot_go_on_says_why(world: World, in_front: bool) -> None:
    error = NoWorkerError("no live worker")
    with NotedErrors() as noted:
        if in_front:  # while it is added
            world.links.errors[D] = WorkerLostError("refused")
            world.router.next = [error]
            await world.add(lease("l", None, D))
        else:  # later, in another context
            await world.add(lease("l", None, D))
            world.router.next = [error]
    if not in_front:
        await asyncio.create_task(world.core.on_lost(D, "gone"))
    await world.settle_down()
    assert noted.last is error
    assert world.outputs() == [([], FinishReason.ERROR)]
    assert (world.router.settled, world.ended, world.core.running) == (["l"], ["r"], [])


async def test_a_request_is_given_up_after_three_workers(world: World) -> None:
    world.links.errors = {worker: WorkerLostError("refused") for worker in (P, D, E)}
    world.router.next = [lease("m", None, E), lease("n", None, P)]
    with NotedErrors() as noted:
        await world.add(lease("l", None, D))
    assert isinstance(noted.last, WorkerLostError)
    assert world.router.demands[-1].exclude == {"d", "e"}
    assert world.outputs() == [([], FinishReason.ERROR)]
    assert world.router.settled == ["l", "m", "n"]


async def test_a_request_with_which_two_workers_die_is_refused(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.router.next = [lease("m", None, E)]
    with NotedErrors() as noted:
        await world.add(lease("l", None, D))
    world.says(D, "r.0.d", 11)
    await world.core.on_lost(D, "gone")
    await world.until(lambda: world.links.links[E].sent)
    world.begins(E, "r.1.d")
    world.says(E, "r.1.d", 11)  # repeats what there was, and dies of what comes next
    await world.core.on_lost(E, "gone")
    await world.until(lambda: not world.core.running)
    assert isinstance(noted.last, PoisonError)
    assert world.outputs() == [([11], None), ([], FinishReason.ERROR)]
    assert world.router.settled == ["l", "m"]
    assert "request r is refused" in caplog.text


async def test_a_request_with_which_its_prefill_worker_and_then_its_decode_worker_dies_is_refused(
    world: World,
) -> None:
    with NotedErrors() as noted:
        await world.add(lease("l", P, D))
    await world.core.on_lost(P, "gone")
    world.begins(D, "r.0.d")
    await world.core.on_lost(D, "gone")
    await world.until(lambda: not world.core.running)
    assert isinstance(noted.last, PoisonError)
    assert world.router.demands == [], "no third one is asked"


@pytest.mark.parametrize("split", [True, False])
async def test_workers_that_die_at_the_same_time_put_no_blame_on_a_request(world: World, split: bool) -> None:
    """Before they could begin with it: they died of something else."""
    world.router.next = [lease("m", None, E), lease("n", None, P)]
    await world.add(lease("l", P if split else None, D))
    dead = [P, D] if split else [D, E]
    for worker in dead:
        await world.core.on_lost(worker, "gone")
        await world.settle_down()
    serves, part = (E, "r.1.d") if split else (P, "r.2.d")
    world.says(serves, part, 11, finish=FinishReason.LENGTH)
    assert world.outputs() == [([11], FinishReason.LENGTH)]


async def test_a_word_of_an_attempt_that_is_over_is_not_heard(world: World) -> None:
    world.router.next = [lease("m", None, E), lease("n", None, P)]
    await world.add(lease("l", None, D))
    await world.core.on_lost(D, "gone")
    await world.until(lambda: world.links.links[E].sent)
    world.begins(D, "r.0.d")
    world.begins(D, "another.0.d")
    await world.core.on_lost(E, "gone")
    await world.until(lambda: world.links.links[P].sent)
    world.says(P, "r.2.d", 11, finish=FinishReason.LENGTH)
    assert world.outputs() == [([11], FinishReason.LENGTH)]


@pytest.mark.parametrize("left", ["d", "e"])
async def test_workers_that_leave_in_good_order_put_no_blame_on_a_request(world: World, left: str) -> None:
    world.router.next = [lease("m", None, E), lease("n", None, P)]
    world.router.left = {left}
    await world.add(lease("l", None, D))
    for worker, part in ((D, "r.0.d"), (E, "r.1.d")):
        world.begins(worker, part)
        await world.core.on_lost(worker, "gone")
        await world.settle_down()
    world.says(P, "r.2.d", 11, finish=FinishReason.LENGTH)
    assert world.outputs() == [([11], FinishReason.LENGTH)]


async def test_a_client_that_leaves_while_blame_is_weighed_hears_nothing(world: World) -> None:
    weighing = asyncio.Event()

    async def registered(worker: WorkerRef) -> bool:
        await weighing.wait()
        return True

    world.router.registered = registered  # type: ignore[method-assign]
    world.router.next = [lease("m", None, E)]
    await world.add(lease("l", None, D))
    await world.core.on_lost(D, "gone")
    await world.settle_down()
    world.begins(E, "r.1.d")
    await world.core.on_lost(E, "gone")
    await world.settle_down()
    await world.core.abort_requests_async(["r"])
    weighing.set()
    await world.settle_down()
    assert world.outputs() == [] and world.core.running == []


async def test_a_request_that_comes_on_between_two_deaths_is_innocent(world: World) -> None:
    world.router.next = [lease("m", None, E), lease("n", None, P)]
    await world.add(lease("l", None, D))
    world.says(D, "r.0.d", 11)
    await world.core.on_lost(D, "gone")
    await world.until(lambda: world.links.links[E].sent)
    world.begins(E, "r.1.d")
    for token in (11, 12):
        world.says(E, "r.1.d", token)
    await world.core.on_lost(E, "gone")
    await world.until(lambda: world.links.links[P].sent)
    for token in (11, 12):
        world.says(P, "r.2.d", token)
    world.says(P, "r.2.d", 13, finish=FinishReason.LENGTH)
    assert [tokens for tokens, _ in world.outputs()] == [[11], [12], [13]]


async def test_without_redis_a_request_that_runs_ends_and_one_that_must_move_says_so(world: World) -> None:
    gone = StoreUnavailableError("gone")
    await world.add(lease("l", None, D), "runs")
    await world.add(lease("m", None, E), "moves")
    world.router.settle_error = gone
    world.router.next = [gone]
    await world.core.on_lost(E, "gone")
    world.says(D, "runs.0.d", 11, finish=FinishReason.LENGTH)
    await world.settle_down()
    assert world.outputs() == [([11], FinishReason.LENGTH), ([], FinishReason.ERROR)]
    assert world.core.running == []


async def test_a_request_without_a_lease_ends_with_an_error(world: World) -> None:
    request = EngineCoreRequest("r", [1], None, SamplingParams(), None, 0.0, None, None, None)
    await world.core.add_request_async(request)
    assert world.outputs() == [([], FinishReason.ERROR)]
    assert world.core.running == []


# --- samples of one request -------------------------------------------------------------------------------------------


async def two_samples(world: World, prefill: WorkerRef | None) -> None:
    ticket = Ticket("r", world.router, Demand("r", "m", 3, 8, samples=2))  # type: ignore[arg-type]
    first, second = samples_of(lease("l", prefill, D), 2)
    await world.add(first, "a", ticket)
    await world.add(second, "b", ticket)


@pytest.mark.parametrize("prefill", [P, None])
async def test_the_second_sample_waits_for_the_prompt_and_computes_none(
    world: World, prefill: WorkerRef | None
) -> None:
    await two_samples(world, prefill)
    assert world.links.links[D].summary == [("add", "a.0.d")]
    if prefill is not None:
        world.says(P, "a.0.p", 5)
    world.says(D, "a.0.d", 5)
    await world.settle_down()
    assert world.links.links[D].summary[-1] == ("add", "b.0.d")
    assert [kind for kind, _ in world.links.links[P].summary] == ["add"] * (prefill is not None)
    assert world.links.links[D].sent[-1][1].sampling_params.extra_args == {}  # it fetches nothing
    world.says(D, "b.0.d", 6, finish=FinishReason.STOP)
    world.says(D, "a.0.d", 7, finish=FinishReason.STOP)
    await world.settle_down()
    assert (world.core.running, world.router.settled) == ([], ["l", "l"])


@pytest.mark.parametrize("loss", ["ends", "aborted", "worker"])
async def test_whatever_becomes_of_the_first_sample_the_second_goes_on(world: World, loss: str) -> None:
    await two_samples(world, P)
    if loss == "ends":
        world.says(P, "a.0.p", 5, finish=FinishReason.STOP)
    elif loss == "aborted":
        await world.core.abort_requests_async(["a"])
    else:
        world.router.next = [lease("l2", None, E), lease("l3", None, E)]
        await world.core.on_lost(D, "gone")
    await world.settle_down()
    target, part = (E, "b.1.d") if loss == "worker" else (D, "b.0.d")
    assert ("add", part) in world.links.links[target].summary
    world.says(target, part, 6, finish=FinishReason.STOP)
    await world.settle_down()
    assert "b" not in world.core.running


async def test_a_waiting_sample_that_is_aborted_is_never_sent(world: World) -> None:
    await two_samples(world, P)
    await world.core.abort_requests_async(["b"])
    world.says(D, "a.0.d", 5)
    await world.settle_down()
    assert world.links.links[D].summary == [("add", "a.0.d")]
    assert world.core.running == ["a"]
