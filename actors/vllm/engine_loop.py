"""Steps one vLLM `EngineCore` on a thread of its own, for any number of gateways.

The loop owns the engine: nobody else touches it. Work comes in through a queue and is done between
two steps; outputs go out per gateway (vLLM's `client_index`). A request that cannot be added ends
with an ERROR output and harms nobody. If a step raises, the engine is dead: `on_dead` is called
once, and nothing more comes out.
"""

import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor import Executor
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats

from joinwise.actors.kv.draining import Pending
from joinwise.actors.vllm import connector
from joinwise.actors.vllm.ageing import age_preempted
from joinwise.actors.vllm.connector import ports
from joinwise.actors.vllm.connector.worker import KvSettings, KvStatus
from joinwise.actors.vllm.cpu_seeds import spare_generators
from joinwise.actors.vllm.handoff import KV_TRANSFER_KEY, Handoff, set_replay
from joinwise.actors.vllm.kv_events import report_now
from joinwise.actors.vllm.plain import PlainTakeover
from joinwise.actors.vllm.speeds import Speeds

logger = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.005
UTILITIES = ("add_lora", "remove_lora", "pin_lora", "list_loras", "reset_prefix_cache")


class EngineLoop:
    """One engine and its thread.

    Args:
        config: vLLM's configuration, from `build.worker_config`.
        kv: how its ranks ship KV.
        on_outputs: called on the stepping thread with (gateway slot, outputs of one step).
        on_dead: called on the stepping thread with the exception that ended the engine.
    """

    def __init__(
        self,
        config: VllmConfig,
        kv: KvSettings,
        *,
        on_outputs: Callable[[int, EngineCoreOutputs], None],
        on_dead: Callable[[BaseException], None],
    ) -> None:
        self._on_outputs = on_outputs
        self._on_dead = on_dead
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._stopping = False
        self._threads = torch.get_num_threads()
        # An engine that speculates cannot replay.
        self._plain = PlainTakeover() if config.speculative_config is not None else None
        self._owners: dict[int, set[str]] = defaultdict(set)
        self._rests = True
        self.last_step_at = time.monotonic()
        self.speeds = Speeds()
        self.stats: SchedulerStats | None = None
        connector.host.wake = self._wake.set
        self.core = EngineCore(config, Executor.get_class(config), log_stats=True)
        age_preempted(self.core.scheduler)
        self.core.model_executor.collective_rpc(spare_generators)
        self.kv_ports = ports.open_ports(self.core.model_executor, kv)
        self._metrics = StatLoggerManager(config, engine_idxs=[0], custom_stat_loggers=None)
        self._metrics.log_engine_initialized()
        self._thread = threading.Thread(target=self._run, name="engine-step", daemon=True)

    def start(self) -> None:
        """Begin to step."""
        self._thread.start()

    def stop(self) -> None:
        """End all requests, the transfers and the engine."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout=30)
        self.core.shutdown()

    # Called from any thread.

    def add(self, slot: int, request: EngineCoreRequest) -> None:
        """Add a request of the gateway in `slot`."""
        self._submit(lambda: self._add(slot, request))

    def abort(self, slot: int, request_ids: Sequence[str]) -> None:
        """Abort requests, and what finished ones still hold for a receiver; unknown ones are ignored."""
        self._submit(lambda: self._abort(slot, list(request_ids)))

    def continue_(self, request_id: str, epoch: int, replay: list[int], recompute: bool) -> None:
        """Release a decode part, with the tokens it must repeat."""
        self._submit(lambda: self._continue(request_id, epoch, replay, recompute))

    def drop(self, slot: int) -> None:
        """A gateway has gone: abort everything of it."""
        self._submit(lambda: self._abort(slot, list(self._owners.pop(slot, ()))))

    def utility(self, method: str, arguments: Sequence[Any]) -> "Future[Any]":
        """Call one of `UTILITIES` between two steps."""

        def call() -> Any:
            result = getattr(self.core, method)(*arguments)
            report_now(self.core.scheduler)
            return result

        return self.between_steps(call)

    def between_steps(self, call: Callable[[], Any]) -> "Future[Any]":
        """Run a call on the stepping thread, between two steps."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

        self._submit(run)
        return future

    def kv_status(self) -> "Future[KvStatus]":
        """What the connectors of all ranks hold and have done."""
        return self.between_steps(lambda: ports.status(self.core.model_executor))

    def stop_sending(self) -> None:
        """The worker drains: transfers that there are go on, and no other is opened."""
        if (scheduler := connector.host.scheduler) is not None:
            self._submit(scheduler.stop_sending)

    def pending(self) -> "Future[Pending]":
        """What must end before this engine may stop."""

        def look() -> Pending:
            running, waiting = self.core.scheduler.get_request_counts()
            return Pending(running + waiting + len(self.held), ports.needed(self.core.model_executor))

        return self.between_steps(look)

    def stuck_for(self) -> float:
        """Seconds since the last step, while there is work, be it a step or a call between two; 0 on an idle engine."""
        return 0.0 if self._rests else time.monotonic() - self.last_step_at

    @property
    def held(self) -> frozenset[str]:
        """Requests that vLLM does not know yet: they wait for their first token."""
        return self._plain.held if self._plain is not None else frozenset()

    @property
    def alive(self) -> bool:
        """Whether the engine still steps."""
        return self._thread.is_alive()

    def _submit(self, call: Callable[[], None]) -> None:
        self._work.put(call)
        self._wake.set()

    # On the stepping thread.

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # OpenMP keeps this per thread
        self.last_step_at, self._rests = time.monotonic(), False
        try:
            while not self._stopping:
                self._wake.clear()
                self._do_work()
                if not self.core.scheduler.has_requests():
                    self._rests = True
                    self._wake.wait()
                    self.last_step_at, self._rests = time.monotonic(), False
                elif not self._step():
                    self._wake.wait(_IDLE_WAIT_S)
        except BaseException as error:
            logger.exception("the engine has died")
            self._on_dead(error)

    def _do_work(self) -> None:
        while True:
            try:
                call = self._work.get_nowait()
            except queue.Empty:
                return
            call()

    def _step(self) -> bool:
        begin = time.monotonic()
        if (kv := connector.host.scheduler) is not None:
            self.core.scheduler.finished_recving_kv_req_ids |= kv.take_ready()
        outputs, executed = self.core.step_fn()
        self.core.post_step(executed)
        self.last_step_at = time.monotonic()
        if executed and kv is not None:
            self.speeds.stepped(kv.prompt_tokens, self.last_step_at - begin)
        for slot, output in (outputs or {}).items():
            if output.scheduler_stats is not None:
                self._record(output.scheduler_stats)
                output.scheduler_stats = None
            if slot in self._owners and any(each.finish_reason is not None for each in output.outputs):
                # One that is finished but kept for a receiver stays its gateway's: vLLM knows it until then.
                self._owners[slot].intersection_update({*self.core.scheduler.requests, *self.held})
            if output.outputs:
                if self._plain is not None:
                    self._plain.complete(output)
                self._on_outputs(slot, output)
        return executed

    def _record(self, stats: SchedulerStats) -> None:
        self.stats = stats
        self._metrics.record(scheduler_stats=stats, iteration_stats=None, engine_idx=0)

    def _add(self, slot: int, request: EngineCoreRequest) -> None:
        request_id = request.request_id

        def add() -> None:
            if request_id in self.core.scheduler.requests:
                raise ValueError(f"request id {request_id} is in use")
            Handoff.from_params((request.params.extra_args or {}).get(KV_TRANSFER_KEY))  # refuse a broken one here
            given = request if self._plain is None else self._plain.admit(slot, request)
            if given is not None:
                self._give(slot, given)
            self._owners[slot].add(request_id)

        self._try(slot, request_id, add)

    def _try(self, slot: int, request_id: str, add: Callable[[], None]) -> None:
        """Add a request; one that cannot be added ends with an error."""
        try:
            add()
        except Exception:
            logger.exception("request %s could not be added", request_id)
            self._on_outputs(
                slot, EngineCoreOutputs(outputs=[EngineCoreOutput(request_id, [], finish_reason=FinishReason.ERROR)])
            )

    def _give(self, slot: int, request: EngineCoreRequest) -> None:
        request.client_index = slot
        self.core.add_request(*self.core.preprocess_add_request(request))

    def _abort(self, slot: int, request_ids: list[str]) -> None:
        if self._plain is not None:
            self._plain.forget(request_ids)
        self.core.abort_requests(request_ids)
        for request_id in request_ids:
            if connector.host.scheduler is not None:
                connector.host.scheduler.cancel_send(request_id)
            if slot in self._owners:
                self._owners[slot].discard(request_id)

    def _continue(self, request_id: str, epoch: int, replay: list[int], recompute: bool) -> None:
        if self._plain is not None:
            released = self._plain.release(request_id, epoch, replay, recompute=recompute)
            if released is not None:
                slot, held = released
                self._try(slot, request_id, lambda: self._give(slot, held))
        request = self.core.scheduler.requests.get(request_id)
        if request is None or request.is_finished() or connector.host.scheduler is None:
            return
        handoff = Handoff.from_params(request.kv_transfer_params)
        if handoff is None or handoff.epoch != epoch:
            return
        if replay and self._plain is None:
            set_replay(request.sampling_params, replay)
        connector.host.scheduler.release(request_id, recompute=recompute)
