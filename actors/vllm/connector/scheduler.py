"""The scheduler half of the connector: which requests send, which receive, and in what state.

All methods run on the engine's stepping thread. A receiving request is asked for once per
allocation attempt; only `update_state_after_alloc` fixes what is fetched. After a failure or a
preemption it is an ordinary request that computes its own prompt.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput

from joinwise.actors.kv.fetching import FetchReport
from joinwise.actors.kv.receiving import FetchSpec
from joinwise.actors.vllm.connector.metadata import OpenSend, SendStep, StepMetadata, StepReports
from joinwise.actors.vllm.handoff import Handoff
from joinwise.actors.vllm.speeds import prompt_tokens

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.request import Request


class ReceiveState(enum.Enum):
    """Where a receiving request stands."""

    WAITING = "waiting"  # not allocated yet
    LOADING = "loading"  # vLLM waits for our report
    OVER = "over"  # reported, or never to be loaded


@dataclass
class _Receive:
    handoff: Handoff
    state: ReceiveState = ReceiveState.WAITING
    released: bool = False
    fail: bool = False
    whole: bool = False  # imported by all ranks, as they have reported


@dataclass
class _Send:
    handoff: Handoff
    num_tokens: int
    block_ids: list[int]


class SchedulerConnector:
    """Bookkeeping of the scheduler half.

    Args:
        block_size: tokens per KV block.
        on_report: gets the report of every ended import, on the stepping thread.
        ranks: each of them reports its part.

    Attributes:
        prompt_tokens: that the step computes which was scheduled last.
    """

    def __init__(
        self, block_size: int, on_report: Callable[[FetchReport], None] = lambda _: None, ranks: int = 1
    ) -> None:
        self._block_size = block_size
        self._on_report = on_report
        self._ranks = ranks
        self.prompt_tokens = 0
        self._reports: dict[str, list[FetchReport]] = {}
        self._receives: dict[str, _Receive] = {}
        self._sends: dict[str, _Send] = {}
        self._held: set[str] = set()
        self._ready: set[str] = set()  # imported, and released since the last step
        self._told: set[str] = set()  # vLLM knows of them before the worker half says so
        self._next = StepMetadata()
        self._stopping = False

    # Called by the engine loop, between two steps.

    def stop_sending(self) -> None:
        """The worker drains: requests that come from now on are computed, and send nothing."""
        self._stopping = True

    def release(self, request_id: str, *, recompute: bool) -> bool:
        """Let a receiving request go on once its KV is there; with `recompute`, without it.

        Returns:
            False when no such request waits here (it was aborted, or is over).
        """
        receive = self._receives.get(request_id)
        if receive is None:
            return False
        receive.released = True
        receive.fail = receive.fail or recompute
        if receive.state is ReceiveState.LOADING and receive.whole and not recompute:
            self._ready.add(request_id)
        elif receive.state is ReceiveState.LOADING:
            self._next.released.add(request_id)
            if recompute:
                self._next.fail_receives.add(request_id)
        return True

    def take_ready(self) -> set[str]:
        """Requests that the next step may go on with, right before it: released, and their KV is known to be there.

        Else the worker half would learn of the release in the next step, and vLLM of the import in the one after that.
        """
        ready, self._ready = self._ready, set()
        for request_id in ready:
            self._receives[request_id].state = ReceiveState.OVER
        self._next.released |= ready
        self._told |= ready
        return ready

    def cancel_send(self, request_id: str) -> None:
        """Nobody will fetch this request's KV."""
        if request_id in self._sends or request_id in self._held:
            self._next.close_sends[request_id] = "cancelled by the gateway"

    def entries(self) -> list[str]:
        """Names of everything held, for `assert_idle`."""
        return [
            *(f"receive {name} ({r.state.value})" for name, r in self._receives.items()),
            *(f"send {name}" for name in self._sends),
            *(f"held {name}" for name in self._held),
            *(f"report of {name}" for name in self._reports),
            *(f"import of {name}" for name in self._told),
        ]

    # Called by vLLM's scheduler.

    def on_new_request(self, request: "Request") -> None:
        """Register a request that takes part in a transfer."""
        handoff = Handoff.from_params(request.kv_transfer_params)
        if handoff is None:
            return
        if handoff.half == "recv":
            self._receives[request.request_id] = _Receive(handoff)
        elif not self._stopping:
            self._sends[request.request_id] = _Send(handoff, request.num_prompt_tokens, [])
            self._next.open_sends.append(
                OpenSend(request.request_id, handoff.transfer_id, handoff.epoch, request.num_prompt_tokens)
            )

    def matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int, bool]:
        """Offer the rest of what the sender has, at least one token (vLLM asserts on none).

        Nothing is offered where the sender is known to have failed: the prompt is computed at once.
        """
        receive = self._receives.get(request.request_id)
        if receive is None or receive.state is not ReceiveState.WAITING or receive.fail:
            return 0, False
        rest = _sent(receive.handoff, request) - num_computed_tokens
        return (rest, True) if rest > 0 else (0, False)

    def after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        """Blocks are allocated: fix what to fetch. The second call, after the load, changes nothing."""
        receive = self._receives.get(request.request_id)
        if receive is None or receive.state is not ReceiveState.WAITING:
            return
        if num_external_tokens == 0:
            receive.state = ReceiveState.OVER
            return
        receive.state = ReceiveState.LOADING
        handoff = receive.handoff
        sent = _sent(handoff, request)
        first = (sent - num_external_tokens) // self._block_size
        last = -(-sent // self._block_size)
        self._next.receives.append(
            FetchSpec(
                request_id=request.request_id,
                transfer_id=handoff.transfer_id,
                epoch=handoff.epoch,
                peers=tuple(handoff.peer.split(",")),
                first_token=first * self._block_size,
                block_ids=tuple(blocks.get_block_ids()[0][first:last]),
                num_tokens=sent,
                timeout_s=handoff.timeout_s,
            )
        )
        if receive.released:
            self._next.released.add(request.request_id)

    def build_metadata(self, output: SchedulerOutput) -> StepMetadata:
        """Take what has gathered since the last step, and add this step's progress of senders."""
        metadata, self._next = self._next, StepMetadata()
        self.prompt_tokens = prompt_tokens(output)
        metadata.stopping = self._stopping
        metadata.preempted = set(output.preempted_req_ids or ())
        for request_id in metadata.preempted:
            if self._sends.pop(request_id, None) is not None:
                metadata.close_sends[request_id] = "preempted"
                self._held.add(request_id)
        for new in output.scheduled_new_reqs:
            send = self._sends.get(new.req_id)
            if send is not None:
                send.block_ids = list(new.block_ids[0])
                self._progress(metadata, output, new.req_id, send, new.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            send = self._sends.get(request_id)
            if send is not None:
                new_blocks = cached.new_block_ids[index]
                send.block_ids.extend(new_blocks[0] if new_blocks else ())
                self._progress(metadata, output, request_id, send, cached.num_computed_tokens[index])
        return metadata

    def on_worker_output(self, output: KVConnectorOutput) -> None:
        """The worker halves have reported requests."""
        if isinstance(output.kv_connector_worker_meta, StepReports):
            for report in output.kv_connector_worker_meta.reports:
                self._gather(report)
        if output.finished_recving:
            told = output.finished_recving & self._told
            output.finished_recving -= told
            self._told -= told
        for request_id in output.finished_recving or ():
            receive = self._receives.get(request_id)
            if receive is not None:
                receive.state = ReceiveState.OVER
        self._held.difference_update(output.finished_sending or ())

    def _gather(self, report: FetchReport) -> None:
        parts = self._reports.setdefault(report.request_id, [])
        parts.append(report)
        if len(parts) < self._ranks:
            return
        whole, *others = self._reports.pop(report.request_id)
        for other in others:
            whole.merge(other)
        if not whole.failure and (receive := self._receives.get(whole.request_id)) is not None:
            receive.whole = True
        self._on_report(whole)

    def request_finished(self, request: "Request") -> bool:
        """A request has ended, in whatever way.

        Returns:
            True when vLLM must keep its blocks until the worker half reports `finished_sending`.
        """
        request_id = request.request_id
        receive = self._receives.pop(request_id, None)
        self._ready.discard(request_id)
        if receive is not None and receive.state is ReceiveState.LOADING:
            self._next.stop_receives.add(request_id)
        send = self._sends.pop(request_id, None)
        if send is not None or request_id in self._held:
            self._held.add(request_id)
            return True
        return False

    def _progress(
        self, metadata: StepMetadata, output: SchedulerOutput, request_id: str, send: _Send, computed: int
    ) -> None:
        after = min(computed + output.num_scheduled_tokens[request_id], send.num_tokens)
        metadata.sends.append(SendStep(request_id, tuple(send.block_ids), after))


def _sent(handoff: Handoff, request: "Request") -> int:
    """Tokens of a receiving request whose KV the sender has."""
    return handoff.num_tokens or int(request.num_prompt_tokens)
