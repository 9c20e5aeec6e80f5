"""The worker half of the connector: sends final KV blocks, imports fetched ones, reports both.

All methods run on the engine's stepping thread; the transport has its own threads. What those
finish is picked up by `transfer_results`, once per step, and `wake` is called so that an idle
engine loop takes that step at once.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from joinwise.actors.kv.blocks import KvBlocks
from joinwise.actors.kv.frames import FrameRefusedError
from joinwise.actors.kv.receiving import FetchReport, FetchSpec, Importer, LandingBudget
from joinwise.actors.kv.sending import SendTable, SendTransfer
from joinwise.actors.kv.transports.grpc import KvClient, KvServer
from joinwise.actors.vllm.connector.metadata import OpenReceive, StepMetadata

logger = logging.getLogger(__name__)

_FETCH_THREADS = 1024
"""A fetch that waits for its prefill holds a thread, and one queued behind it holds its sender's blocks."""

_STOPPED = {"abort": "the request was aborted", "fail": "the sender has failed"}


@dataclass(frozen=True)
class KvSettings:
    """How a worker ships KV. Sizes in bytes, times in seconds."""

    bind: str = "127.0.0.1:0"
    frame_bytes: int = 1 << 20
    landing_bytes: int = 64 << 20
    lease_s: float = 60.0
    max_streams: int = 1024
    """Streams open at once, those that wait for their prefill included; see `KvServer`."""
    model_digest: str = ""
    interior: str = ""
    token: str = field(default="", repr=False)


@dataclass
class _Receive:
    importer: Importer
    call: grpc.Call | None = None
    outcome: FetchReport | None = None
    stopped: str = ""
    """ "abort" or "fail": what the scheduler half said. Set only after the fence."""


class WorkerConnector:
    """Work of the worker half.

    Args:
        settings: sizes and times.
        block_size: tokens per KV block.
        num_blocks: KV blocks of each layer.
        wake: called from any thread when the engine should step.
        on_report: gets the report of every ended fetch, from any thread.
    """

    def __init__(
        self,
        settings: KvSettings,
        block_size: int,
        num_blocks: int | None = None,
        *,
        wake: Callable[[], None],
        on_report: Callable[[FetchReport], None],
    ) -> None:
        self._settings = settings
        self._block_size = block_size
        self._num_blocks = num_blocks
        self._wake = wake
        self._on_report = on_report
        self._table = SendTable(wake)
        self._budget = LandingBudget(settings.landing_bytes)
        self._receives: dict[str, _Receive] = {}
        self._released: set[str] = set()
        self._fetching = 0
        self._pool = ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="kv-fetch")
        self._lock = threading.Lock()
        self._layer_index: dict[str, int] = {}
        self._step: list[tuple[SendTransfer, int]] = []
        self.counters: Counter[str] = Counter()
        self.blocks: KvBlocks | None = None
        self.server: KvServer | None = None
        self._client: KvClient | None = None

    # Start and stop.

    def register(self, caches: dict[str, torch.Tensor]) -> None:
        """Take vLLM's cache tensors and open the KV port.

        Raises:
            UnsupportedKvCacheError: a layer whose cache cannot be shipped.
        """
        settings = self._settings
        self.blocks = KvBlocks(
            caches,
            block_size=self._block_size,
            interior=settings.interior,
            model_digest=settings.model_digest,
            num_blocks=self._num_blocks,
        )
        self._layer_index = {name: index for index, name in enumerate(self.blocks.layer_names)}
        self._client = KvClient(self.blocks, self._budget, token=settings.token)
        self.server = KvServer(
            self._table,
            self.blocks,
            bind=settings.bind,
            frame_bytes=settings.frame_bytes,
            claim_timeout_s=settings.lease_s,
            max_streams=settings.max_streams,
            token=settings.token,
        )

    def shutdown(self) -> None:
        """End every transfer and close the port."""
        for receive in list(self._receives.values()):
            self._stop(receive, "abort")
        if self.server is not None:
            self.server.stop()
        if self._client is not None:
            self._client.close()
        self._pool.shutdown(wait=True)

    def entries(self) -> list[str]:
        """Names of everything held, for `assert_idle`."""
        return [*self._table.held(), *(f"fetch of {name}" for name in list(self._receives))]

    @property
    def streams(self) -> int:
        """Open KV streams, both directions."""
        return (self.server.open_streams if self.server else 0) + self._fetching

    @property
    def landing_bytes(self) -> int:
        """Bytes received and not yet in their blocks."""
        return self._budget.used

    # One engine step, in vLLM's order.

    def preempt(self, metadata: StepMetadata) -> None:
        """Before any block is overwritten: stop senders whose blocks vLLM has taken back."""
        for request_id in metadata.preempted:
            self._table.close(request_id, "preempted")

    def begin(self, metadata: StepMetadata) -> None:
        """Open senders, and note how far this step brings each.

        Nothing is final here, not even a prefix-cache hit: vLLM shares blocks as soon as they are
        scheduled, so the request that computes them may be in this very step.
        """
        for send in metadata.open_sends:
            self._table.open(
                SendTransfer(
                    transfer_id=send.transfer_id,
                    request_id=send.request_id,
                    epoch=send.epoch,
                    num_blocks=-(-send.num_tokens // self._block_size),
                    num_layers=len(self._layer_index),
                    lease_s=self._settings.lease_s,
                    num_tokens=send.num_tokens,
                )
            )
        for request_id, reason in metadata.close_sends.items():
            self._table.close(request_id, reason)
        self._step = []
        for step in metadata.sends:
            transfer = self._table.of_request(step.request_id)
            if transfer is None or transfer.closed:
                continue
            transfer.block_ids = list(step.block_ids)
            self._step.append((transfer, self._final_blocks(transfer, step.ready_after)))

    def layer_done(self, layer_name: str) -> None:
        """The forward pass has written this layer's KV, of all its requests."""
        layer = self._layer_index.get(layer_name)
        if layer is not None and self.blocks is not None:
            self.blocks.mark(layer)
            for transfer, ready in self._step:
                self._table.advance(transfer, layer, ready)

    def start_receives(self, metadata: StepMetadata) -> None:
        """Start fetches, and stop those that the scheduler half has given up."""
        for request in metadata.receives:
            self._start(request)
        for request_id in metadata.fail_receives:
            if (receive := self._receives.get(request_id)) is not None:
                self._stop(receive, "fail")
        for request_id in metadata.stop_receives:
            if (receive := self._receives.get(request_id)) is not None:
                self._stop(receive, "abort")
        self._released |= metadata.released

    def end_step(self) -> None:
        """The forward pass is over."""
        self._step = []

    def transfer_results(self, finished_request_ids: set[str]) -> KVConnectorTransferResults:
        """Report what has ended; each request exactly once."""
        for request_id in finished_request_ids:
            self._table.end(request_id)
        results = KVConnectorTransferResults(finished_sending=self._table.take_releasable(time.monotonic()))
        with self._lock:
            for request_id, receive in list(self._receives.items()):
                # Stopped means fenced: it can be reported though its thread may not have noticed.
                if receive.outcome is None and not receive.stopped:
                    continue
                if receive.stopped != "abort" and request_id not in self._released:
                    continue
                del self._receives[request_id]
                self._released.discard(request_id)
                results.finished_recving.add(request_id)
                if receive.stopped != "abort" and not receive.importer.complete:
                    results.failed_recving.add(request_id)
        return results

    # Receiving.

    def _start(self, request: OpenReceive) -> None:
        assert self.blocks is not None
        spec = FetchSpec(
            request_id=request.request_id,
            transfer_id=request.transfer_id,
            epoch=request.epoch,
            peer=request.peer,
            first_block=request.first_block,
            block_ids=request.block_ids,
            num_tokens=request.num_tokens,
            timeout_s=request.timeout_s,
        )
        receive = _Receive(Importer(spec, self.blocks))
        with self._lock:
            self._receives[request.request_id] = receive
            self._fetching += 1
        self._pool.submit(self._fetch, receive)

    def _fetch(self, receive: _Receive) -> None:
        assert self._client is not None
        importer = receive.importer
        report = FetchReport(importer.spec.request_id, local_hit_blocks=importer.spec.first_block)
        kind = "ended_early"
        try:
            if not receive.stopped:
                report.bytes, report.wire_seconds, report.import_seconds = self._client.fetch(
                    importer, lambda call: self._attach(receive, call)
                )
        except FrameRefusedError as error:
            kind, report.failure = error.reason, str(error)
        except TimeoutError as error:
            kind, report.failure = "stalled", str(error)
        except grpc.RpcError as error:
            kind = f"stream_{error.code().name.lower()}"
            report.failure = f"{error.code().name}: {error.details()}"
        except Exception as error:
            logger.exception("fetch of %s", importer.spec.transfer_id)
            kind, report.failure = "internal", f"{type(error).__name__}: {error}"
        importer.fence()
        with self._lock:
            if importer.complete:
                report.failure = ""
                report.exposed_seconds = importer.exposed_us / 1e6
                self.counters["completed"] += 1
            else:
                self.counters["failed"] += 1
                if receive.stopped:  # what its stream then said tells nothing
                    report.failure = _STOPPED[receive.stopped]
                else:
                    report.failure = report.failure or "the stream ended early"
                    self.counters[kind] += 1
            receive.outcome = report
            self._fetching -= 1
        try:
            self._on_report(report)
        finally:
            self._wake()

    def _attach(self, receive: _Receive, call: grpc.Call) -> None:
        with self._lock:
            receive.call = call
            stopped = receive.stopped
        if stopped:
            call.cancel()

    def _stop(self, receive: _Receive, why: str) -> None:
        """Fence first: vLLM may reuse the blocks as soon as we have reported."""
        receive.importer.fence()
        with self._lock:
            receive.stopped = why if receive.stopped != "abort" else "abort"
            call = receive.call
        if call is not None:
            call.cancel()

    def _final_blocks(self, transfer: SendTransfer, tokens: int) -> int:
        """Blocks that are final once `tokens` tokens are computed: the last may be partial."""
        return transfer.num_blocks if tokens >= transfer.num_tokens else tokens // self._block_size
