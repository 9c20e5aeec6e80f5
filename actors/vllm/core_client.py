"""`ClusterCore`: vLLM's front end believes it talks to one engine; behind it stands the cluster.

Each `EngineCoreRequest` becomes one or two parts on workers, and the parts' outputs one stream
again (`split.py`). A request that cannot go on ends with an ERROR output; `add_request_async` never
raises, since vLLM would leak the request's state. A worker that is lost costs its requests nothing
but time: a decode part moves to another worker with the tokens emitted so far, and a lost prefill
lets the decode worker compute the prompt.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.tasks import SupportedTask
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from joinwise.actors.gateway.failures import note_error
from joinwise.actors.gateway.ledgers import LedgerBuilder
from joinwise.actors.gateway.links import Links
from joinwise.actors.gateway.tickets import Ticket, active_ticket
from joinwise.actors.gateway.tracing import Traces
from joinwise.actors.gateway.utilities import Utilities
from joinwise.actors.vllm import nixl, split
from joinwise.actors.vllm.handoff import Handoff
from joinwise.cluster.errors import JoinwiseError, PoisonError, WorkerLostError
from joinwise.cluster.router.router import Assignment, Demand, Router, Running, WorkerRef
from joinwise.proto import engine_pb2

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 3


@dataclass
class _Live:
    """One request of vLLM's front end while it runs."""

    request: EngineCoreRequest
    ticket: Ticket
    assignment: Assignment
    merge: split.Merge
    ledger: LedgerBuilder
    attempt: int = 0
    prefill_id: str = ""
    decode_id: str = ""
    prefill_done: bool = False
    computed: bool = False
    """Whether the one worker that does all of it has computed its prompt."""
    fetched: bool | None = None
    """Whether decode has all of prefill's KV; None until it says."""
    lost_on: set[str] = field(default_factory=set)
    loss: "tuple[int, asyncio.Task[bool]] | None" = None
    """Tokens emitted when a worker was last lost with it, and whether that one died."""
    begun: bool = False
    """Whether a worker has begun with it since that loss."""
    context: Context = field(default_factory=copy_context)
    """Of the client's call, whose error this request's is."""


class ClusterCore(EngineCoreClient):
    """The cluster as one engine. Lives on the gateway's event loop.

    Args:
        router: takes and settles leases.
        links: streams to workers; `on_message` and `on_lost` must be ours (`bind`).
        on_ledger: gets the finished ledger of every request.
        transfer_timeout_s: seconds without a frame after which a KV transfer that has begun has failed.
        in_turn: the decode worker is asked when the prefill worker has ended, with what that hands over; see `nixl`.
        traces: begins a trace for each request, whose context the engines are told where it is sampled.
    """

    def __init__(
        self,
        router: Router,
        links: Links,
        utilities: Utilities,
        *,
        on_ledger: Callable[[str, LedgerBuilder], None],
        transfer_timeout_s: float,
        in_turn: bool = False,
        traces: Traces | None = None,
    ) -> None:
        self.engine_ranks_managed = [0]
        self.resources = SimpleNamespace(engine_dead=False)
        self._router = router
        self._links = links
        self._utilities = utilities
        self._on_ledger = on_ledger
        self._transfer_timeout_s = transfer_timeout_s
        self._in_turn = in_turn
        self._traces = traces
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self._live: dict[str, _Live] = {}
        self._background: set[asyncio.Task[Any]] = set()
        self._encoder = MsgpackEncoder()
        self._decoder = MsgpackDecoder(EngineCoreOutputs)

    @property
    def running(self) -> list[str]:
        """Ids of requests that have not ended."""
        return list(self._live)

    def assignments(self) -> list[Assignment]:
        """Leases in use, to be renewed."""
        return [live.assignment for live in self._live.values()]

    def lost_leases(self, lease_ids: Collection[str]) -> list[Running]:
        """Requests that run on leases which Redis does not know any more."""
        return [
            Running(live.assignment, live.ticket.demand, live.prefill_done or bool(live.merge.emitted))
            for live in self._live.values()
            if live.assignment.lease_id in lease_ids
        ]

    # What vLLM calls.

    async def get_output_async(self) -> EngineCoreOutputs:
        """Next outputs for the front end."""
        return await self._outputs.get()

    async def get_supported_tasks_async(self) -> tuple[SupportedTask, ...]:
        """Text generation only."""
        return ("generate",)

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Start a request; never raises."""
        ticket = active_ticket.get()
        assignment = ticket.take() if ticket is not None else None
        if ticket is None or assignment is None:
            logger.error("request %s came without a lease", request.request_id)
            self._emit_error(request.request_id)
            return
        assert request.sampling_params is not None
        trace = self._traces.begin(ticket.created) if self._traces is not None else None
        if trace is not None:
            request.trace_headers = trace.headers if trace.sampled else None
        ledger = LedgerBuilder(
            request_id=request.request_id,
            call_id=request.external_req_id or request.request_id,
            model=ticket.demand.model,
            created=ticket.created,
            routed_s=ticket.routed_s,
            prompt_tokens=len(request.prompt_token_ids or ()),
            trace=trace,
        )
        live = _Live(request, ticket, assignment, split.Merge(request.sampling_params.max_tokens), ledger)
        self._live[request.request_id] = live
        ticket.started.append(request.request_id)
        # Not awaited: a client that leaves while links open would cancel us in here, and vLLM aborts only what it
        # has seen added.
        self._spawn(self._start(live))

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Abort every part of these requests."""
        for request_id in request_ids:
            live = self._live.get(request_id)
            if live is not None:
                self._abort_part(live.assignment.prefill, live.prefill_id)
                self._abort_part(live.assignment.decode, live.decode_id)
                self._end(live, "stop" if live.merge.emitted else "abort")

    def dp_engines_running(self) -> bool:
        """The gateway looks like one engine; data parallelism is the router's."""
        return False

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing to stop: `Gateway` closes the links."""

    # Utilities: all workers or none.

    async def add_lora_async(self, lora_request: LoRARequest) -> bool:
        """Load an adapter on every worker."""
        return await self._utilities.add_lora(lora_request)

    async def remove_lora_async(self, lora_id: int) -> bool:
        """Unload an adapter everywhere."""
        return await self._utilities.remove_lora(lora_id)

    async def pin_lora_async(self, lora_id: int) -> bool:
        """Pin an adapter everywhere."""
        return await self._utilities.pin_lora(lora_id)

    async def list_loras_async(self) -> set[int]:
        """Adapters that every worker holds."""
        return await self._utilities.list_loras()

    async def reset_prefix_cache_async(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Forget cached prefixes everywhere."""
        return await self._utilities.reset_prefix_cache(reset_running_requests)

    # What the links call.

    def on_message(self, worker: WorkerRef, message: engine_pb2.AttachResponse) -> None:
        """Outputs of one engine step, or the report of a transfer."""
        kind = message.WhichOneof("message")
        if kind == "frame":
            self._on_frame(worker, self._decoder.decode(list(message.frame.outputs)))
        elif kind == "transfer":
            report = message.transfer
            live = self._live.get(split.origin_of(report.request_id)[0])
            if live is not None and live.decode_id == report.request_id:
                live.ledger.transferred(report)
                live.fetched = not report.failure
                if report.failure and live.prefill_done:
                    self._free_sender(live)
        elif kind == "begun":
            live = self._live.get(split.origin_of(message.begun.request_id)[0])
            if live is not None and live.decode_id == message.begun.request_id:
                live.begun = True

    async def on_lost(self, worker: WorkerRef, reason: str) -> None:
        """A worker is gone: go on without it."""
        died: asyncio.Task[bool] | None = None
        for live in list(self._live.values()):
            decode = live.assignment.decode
            decodes = (decode.worker_id, decode.epoch) == (worker.worker_id, worker.epoch)
            if not decodes and not (live.prefill_id and live.assignment.prefill == worker and not live.prefill_done):
                continue
            died = died or self._spawn(self._has_died(worker))
            if decodes:
                self._spawn(self._move(live, live.attempt, worker, reason, died))
            else:
                live.loss, live.begun = (len(live.merge.emitted), died), False
                self._without_prefill(live, reason)

    # Inside.

    async def _start(self, live: _Live) -> None:
        """Send the parts of a request to their workers, unless it has ended or moved while links opened."""
        request, attempt = live.request, live.attempt
        live.ledger.assigned(live.assignment, attempt)
        if live.assignment.sample and not attempt:  # the first sample brings the prompt's KV to the decode worker
            await live.ticket.prompt_ready.wait()
            if not self._is_at(live, attempt):
                return
            live.assignment = replace(live.assignment, prefill=None)
        assignment = live.assignment
        request_id = request.request_id
        prefill, decode = assignment.prefill, assignment.decode
        live.decode_id = split.part_id(request_id, attempt, "d")
        live.merge.to_skip = len(live.merge.emitted)
        try:
            if prefill is None:
                link = await self._links.get(decode)
                if self._is_at(live, attempt):
                    part = split.decode_part(request, live.decode_id, None, live.merge.emitted)
                    link.send(self._add(part, again=attempt > 0))
                return
            transfer_id = f"{request_id}.{attempt}.{secrets.token_hex(8)}"
            epoch, timeout = assignment.lease_epoch, self._transfer_timeout_s
            send = Handoff("send", transfer_id, epoch, timeout_s=timeout)
            receive = Handoff("recv", transfer_id, epoch, prefill.kv_address, timeout)
            to_prefill, to_decode = await self._both(prefill, decode)
            if not self._is_at(live, attempt):
                return
            if not self._in_turn:
                to_decode.send(self._add(split.decode_part(request, live.decode_id, receive, [])))
            if to_prefill is None or to_prefill.broken:
                self._without_prefill(live, "no link")
            else:
                live.prefill_id = split.part_id(request_id, attempt, "p")
                transfer = nixl.ASK if self._in_turn else send
                to_prefill.send(self._add(split.prefill_part(request, live.prefill_id, transfer)))
        except JoinwiseError as error:
            await self._move(live, attempt, decode, str(error))

    def _is_at(self, live: _Live, attempt: int) -> bool:
        """Whether a request still runs, and has not moved since that attempt."""
        return self._live.get(live.request.request_id) is live and live.attempt == attempt

    async def _both(self, prefill: WorkerRef, decode: WorkerRef) -> tuple[Any, Any]:
        to_prefill, to_decode = await asyncio.gather(
            self._links.get(prefill), self._links.get(decode), return_exceptions=True
        )
        if isinstance(to_decode, BaseException):
            raise to_decode
        return (None if isinstance(to_prefill, BaseException) else to_prefill), to_decode

    def _on_frame(self, worker: WorkerRef, frame: EngineCoreOutputs) -> None:
        now = time.monotonic()
        shift = now - frame.timestamp
        outputs = []
        for output in frame.outputs:
            if output.events:
                split.shift_times(output, shift)
            merged = self._merge(output, now)
            if merged is not None:
                outputs.append(merged)
        if outputs:
            self._outputs.put_nowait(
                EngineCoreOutputs(outputs=outputs, timestamp=now, weight_version=frame.weight_version)
            )

    def _merge(self, output: EngineCoreOutput, now: float) -> EngineCoreOutput | None:
        worker_request_id = output.request_id
        request_id, part = split.origin_of(worker_request_id)
        live = self._live.get(request_id)
        if live is None or worker_request_id not in (live.prefill_id, live.decode_id):
            return None
        merged: EngineCoreOutput | None
        if part == "p":
            if output.finish_reason is FinishReason.ERROR and not output.new_token_ids:
                self._without_prefill(live, "the prefill worker could not run it")
                return None
            handed = output.kv_transfer_params
            merged = live.merge.from_prefill(output)
            if output.new_token_ids or merged.finish_reason is not None:
                self._prefill_ended(live, handed)
        else:
            live.ticket.prompt_ready.set()
            skipping = live.merge.to_skip
            step_s = split.step_seconds(output, now) if skipping else 0.0
            joined = live.prefill_done or bool(live.attempt and live.merge.emitted)
            merged = live.merge.from_decode(output, joined=joined)
            live.ledger.replayed(skipping - live.merge.to_skip, step_s)
            if output.new_token_ids and live.assignment.prefill is None and not live.computed:
                live.computed = True
                if not live.merge.finished:
                    self._spawn(self._router.prefill_done(live.assignment))
        if merged is None:
            return None
        merged.request_id = request_id
        live.ledger.produced(merged, now)
        merged.spec_decode_metrics = None  # asked for by us: clients see it in the ledger
        if live.merge.finished:
            if part == "p":
                self._abort_part(live.assignment.decode, live.decode_id)
            self._end(live, str(merged.finish_reason))
            if live.ledger.trace is not None:  # for vLLM's own span of the request: of one not sampled it makes none
                merged.trace_headers = live.ledger.trace.headers
        return merged

    def _prefill_ended(self, live: _Live, handed: dict[str, Any] | None) -> None:
        """The first token is there: give it to the decode part, and the prefill worker its room back."""
        live.prefill_done = True
        if not live.merge.finished:
            live.merge.to_skip = len(live.merge.emitted)
            self._continue(live, handed, recompute=False)
        if live.fetched is False:
            self._free_sender(live)
        self._spawn(self._router.prefill_done(live.assignment))

    def _without_prefill(self, live: _Live, reason: str) -> None:
        logger.warning("request %s goes on without its prefill worker: %s", live.request.request_id, reason)
        live.prefill_id = ""
        live.ledger.recomputed = True
        self._continue(live, None, recompute=True)
        self._spawn(self._router.prefill_done(live.assignment))

    def _free_sender(self, live: _Live) -> None:
        """Nobody will fetch what the prefill worker keeps for this request."""
        self._abort_part(live.assignment.prefill, live.prefill_id)

    def _continue(self, live: _Live, handed: dict[str, Any] | None, *, recompute: bool) -> None:
        link = self._links.find(live.assignment.decode)
        if link is not None and self._in_turn:
            if handed:
                live.ledger.transferred(engine_pb2.TransferReport(request_id=live.decode_id, transport="nixl"))
            link.send(self._add(split.decode_part(live.request, live.decode_id, handed, live.merge.emitted)))
        elif link is not None:
            message = engine_pb2.ContinueRequest(
                request_id=live.decode_id,
                epoch=live.assignment.lease_epoch,
                replay_token_ids=live.merge.emitted,
                recompute=recompute,
            )
            link.send(engine_pb2.AttachRequest(continue_request=message))

    async def _move(
        self, live: _Live, attempt: int, lost: WorkerRef, reason: str, died: "asyncio.Task[bool] | None" = None
    ) -> None:
        """Go on elsewhere, with what has been emitted; nothing, if that attempt is over.

        A worker that died may have died of this request: if the next one begins with it, and dies too before there is
        another token of it, it gets no third. Workers that die at the same time, of their machine, put no blame on it.
        """
        request_id = live.request.request_id
        if not self._is_at(live, attempt):
            return
        self._abort_part(live.assignment.prefill, live.prefill_id)
        live.prefill_id = live.decode_id = ""  # what their parts still say is not heard
        live.computed = False
        live.lost_on.add(lost.worker_id)
        live.attempt += 1
        live.ticket.prompt_ready.set()
        with contextlib.suppress(JoinwiseError):  # the lease expires by itself
            await self._router.settle(live.assignment, generated=len(live.merge.emitted))
        if died is not None:
            before, live.loss = live.loss, (len(live.merge.emitted), died)
            suspect, live.begun = live.begun and before is not None and before[0] == live.loss[0], False
            if suspect and before is not None and all(await asyncio.gather(before[1], died)):
                logger.error("request %s is refused: a second worker, %s, has died with it", request_id, lost.worker_id)
                self._fail(live, PoisonError("two workers have died with this request: it is not tried again"))
                return
        if live.attempt >= _MAX_ATTEMPTS:
            logger.error("request %s lost %d workers, giving up: %s", request_id, live.attempt, reason)
            self._fail(live, WorkerLostError(f"the request has lost {live.attempt} workers, and ends: {reason}"))
            return
        params = live.request.sampling_params
        assert params is not None
        try:
            live.assignment = await self._router.route(
                Demand(
                    request_id=request_id,
                    model=live.ledger.model,
                    prompt_tokens=len(live.request.prompt_token_ids or ()) + len(live.merge.emitted),
                    max_new_tokens=max(1, (params.max_tokens or 1) - len(live.merge.emitted)),
                    whole=True,
                    needs=live.ticket.demand.needs,
                    exclude=live.ticket.demand.exclude | live.lost_on,
                    terms=live.ticket.demand.terms,
                    urgent=True,
                )
            )
        except JoinwiseError as error:
            logger.error("request %s cannot go on: %s", request_id, error)
            self._fail(live, error)
            return
        if self._live.get(request_id) is not live:
            with contextlib.suppress(JoinwiseError):
                await self._router.settle(live.assignment, generated=0)
            return
        logger.warning("request %s moves to %s: %s", request_id, live.assignment.decode.worker_id, reason)
        live.ledger.recomputed = True
        await self._start(live)

    async def _has_died(self, worker: WorkerRef) -> bool:
        """Whether a lost worker went without a word; not known without Redis, and then nobody is blamed."""
        try:
            return await self._router.registered(worker)
        except JoinwiseError:
            return False

    def _fail(self, live: _Live, error: JoinwiseError) -> None:
        if self._live.get(live.request.request_id) is not live:  # its client has left
            return
        live.context.run(note_error, error)  # an ERROR output says nothing
        self._emit_error(live.request.request_id)
        self._end(live, "error", settle=False)

    def _emit_error(self, request_id: str) -> None:
        output = EngineCoreOutput(request_id, [], finish_reason=FinishReason.ERROR)
        self._outputs.put_nowait(EngineCoreOutputs(outputs=[output], timestamp=time.monotonic()))

    def _end(self, live: _Live, reason: str, *, settle: bool = True) -> None:
        if self._live.pop(live.request.request_id, None) is None:
            return
        live.ticket.prompt_ready.set()
        if live.fetched is None:
            self._free_sender(live)
        live.ledger.finish(reason, time.monotonic())
        self._on_ledger(live.request.request_id, live.ledger)
        if settle:
            self._spawn(self._router.settle(live.assignment, generated=len(live.merge.emitted)))

    def _abort_part(self, worker: WorkerRef | None, part: str) -> None:
        link = self._links.find(worker) if worker is not None and part else None
        if link is not None:
            link.send(engine_pb2.AttachRequest(abort=engine_pb2.AbortRequests(request_ids=[part])))

    def _add(self, request: EngineCoreRequest, *, again: bool = False) -> engine_pb2.AttachRequest:
        buffers: Sequence[Any] = self._encoder.encode(request)
        added = engine_pb2.AddRequest(request=[bytes(each) for each in buffers], again=again)
        return engine_pb2.AttachRequest(add=added)

    def _spawn(self, work: Any) -> "asyncio.Task[Any]":
        """Run bookkeeping in the background; what it raises is logged, and leases expire by themselves."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("background work failed: %s", error)
