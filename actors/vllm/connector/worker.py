"""The worker half of the connector: sends final KV blocks, imports fetched ones, reports both.

All methods run on the engine's stepping thread; the transport has its own threads. What those
finish is picked up by `transfer_results`, once per step, and `wake` is called so that an idle
engine loop takes that step at once.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import grpc
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from joinwise.actors.kv.blocks import KvBlocks
from joinwise.actors.kv.client import KvClient
from joinwise.actors.kv.fetching import Fetch, FetchReport
from joinwise.actors.kv.frames import FrameRefusedError
from joinwise.actors.kv.lanes.lane import LaneOptions
from joinwise.actors.kv.lanes.pool import LanePool
from joinwise.actors.kv.lanes.server import LaneServer
from joinwise.actors.kv.layout import LayerGeometry, LayoutMismatchError
from joinwise.actors.kv.links import LinkStatus
from joinwise.actors.kv.receiving import FetchSpec, LandingBudget
from joinwise.actors.kv.sending import SendTable, SendTransfer
from joinwise.actors.kv.server import KvServer
from joinwise.actors.tls import peers
from joinwise.actors.vllm.connector.metadata import StepMetadata, StepReports
from joinwise.cluster.config_model import PeerTlsConfig
from joinwise.proto import kv_pb2

logger = logging.getLogger(__name__)

_FETCH_THREADS = 1024
"""A fetch that waits for its prefill holds a thread, and one queued behind it holds its sender's blocks."""

_STOPPED = {"abort": "the request was aborted", "fail": "the sender has failed"}


@dataclass(frozen=True)
class KvSettings:
    """How a worker ships KV. Sizes in bytes, times in seconds."""

    host: str = "127.0.0.1"
    """Address to listen on; ports are chosen by the system."""
    transport: str = "auto"
    codec: str = "none"
    lossy: str = "none"
    frame_bytes: int = 2 << 20
    landing_bytes: int = 64 << 20
    lease_s: float = 60.0
    max_streams: int = 1024
    """Streams open at once, those that wait for their prefill included; see `KvServer`."""
    model_digest: str = ""
    token: str = field(default="", repr=False)
    tls: PeerTlsConfig | None = None
    """The cluster's certificates: each rank reads them where it runs."""


@dataclass(frozen=True)
class KvPort:
    """Where one rank serves its KV, and how that lies in memory (a serialized `kv_pb2.KvLayout`)."""

    address: str
    layout: bytes


@dataclass
class KvStatus:
    """What one rank holds and has done."""

    entries: list[str]
    streams: int
    landing_bytes: int
    landing_limit: int
    landing_waits: int
    counters: Counter[str]
    links: list[LinkStatus]


@dataclass
class _Receive:
    fetch: Fetch
    report: FetchReport
    over: bool = False
    """Its thread has ended."""
    told: bool = False
    """Its report has been taken."""
    stopped: str = ""
    """ "abort" or "fail": what the scheduler half said. Set only after the fence."""


class WorkerConnector:
    """Work of the worker half, on one rank.

    Args:
        block_size: tokens per KV block.
        num_blocks: KV blocks of each layer.
        wake: called from any thread when the engine should step.
    """

    def __init__(self, block_size: int, num_blocks: int | None = None, *, wake: Callable[[], None]) -> None:
        self._settings = KvSettings()
        self._block_size = block_size
        self._num_blocks = num_blocks
        self._wake = wake
        self._table = SendTable(wake)
        self._budget = LandingBudget(self._settings.landing_bytes)
        self._receives: dict[str, _Receive] = {}
        self._released: set[str] = set()
        self._reports: list[FetchReport] = []
        self._fetching = 0
        self._pool = ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="kv-fetch")
        self._lock = threading.Lock()
        self._layer_index: dict[str, int] = {}
        self.caches: dict[str, torch.Tensor] = {}
        self._step: list[tuple[SendTransfer, int]] = []
        self.counters: Counter[str] = Counter()
        self.blocks: KvBlocks | None = None
        self.server: KvServer | None = None
        self._client: KvClient | None = None

    # Start and stop.

    def register(self, caches: dict[str, torch.Tensor]) -> None:
        """Take vLLM's cache tensors."""
        self.caches = caches
        self._layer_index = {name: index for index, name in enumerate(caches)}

    def open(self, settings: KvSettings, geometry: Mapping[str, LayerGeometry], interior: str) -> KvPort:
        """Open the KV port, before the first request.

        Args:
            settings: sizes, times, addresses.
            geometry: what the elements of each layer's blocks are, where that is known.
            interior: who laid out the inside of a block.

        Raises:
            UnsupportedKvCacheError: a layer whose cache cannot be shipped.
        """
        self._settings = settings
        self._budget = LandingBudget(settings.landing_bytes)
        self.blocks = KvBlocks(
            self.caches,
            block_size=self._block_size,
            interior=interior,
            model_digest=settings.model_digest,
            num_blocks=self._num_blocks,
            geometry=geometry,
        )
        kinds = {"auto": ("shm", "tcp"), "grpc": ()}.get(settings.transport, (settings.transport,))
        device = str(next(iter(self.caches.values())).device)
        slot_bytes = max(settings.frame_bytes, *self.blocks.block_bytes)
        options = LaneOptions(slot_bytes=slot_bytes, device=device)
        certificates = peers(settings.tls)
        lanes = pool = None
        if kinds:
            tls = certificates.server_context() if certificates is not None else None
            lanes = LaneServer(f"{settings.host}:0", token=settings.token, tls=tls, kinds=kinds, options=options)
            pool = LanePool(
                token=settings.token,
                tls=certificates.client_context if certificates is not None else None,
                server_name=certificates.server_name if certificates is not None else "",
                options=options,
            )
        self._client = KvClient(
            self.blocks,
            self._budget,
            token=settings.token,
            certificates=certificates,
            transport=settings.transport,
            codec=settings.codec,
            lossy=settings.lossy,
            lanes=pool,
            slot_bytes=slot_bytes,
        )
        self.server = KvServer(
            self._table,
            self.blocks,
            bind=f"{settings.host}:0",
            frame_bytes=settings.frame_bytes,
            claim_timeout_s=settings.lease_s,
            max_streams=settings.max_streams,
            token=settings.token,
            credentials=certificates.grpc_server() if certificates is not None else None,
            lanes=lanes,
            lane_kinds=kinds,
        )
        return KvPort(self.server.address, self.blocks.layout.SerializeToString())

    def set_ranks(self, rank: int, layouts: Sequence[bytes]) -> None:
        """All ranks of this worker are open: this is one of them."""
        if self._client is not None:
            self._client.set_ranks(rank, [kv_pb2.KvLayout.FromString(each) for each in layouts])

    def shutdown(self) -> None:
        """End every transfer and close the port."""
        for receive in list(self._receives.values()):
            self._stop(receive, "abort")
        if self.server is not None:
            self.server.stop()
        if self._client is not None:
            self._client.close()
        self._pool.shutdown(wait=True)

    def status(self) -> KvStatus:
        """What is held and has been done; from any thread."""
        return KvStatus(
            entries=[*self._table.held(), *(f"fetch of {name}" for name in list(self._receives))],
            streams=(self.server.open_streams if self.server else 0) + self._fetching,
            landing_bytes=self._budget.used,
            landing_limit=self._settings.landing_bytes,
            landing_waits=self._budget.waits,
            counters=Counter(self.counters),
            links=self._client.link_status() if self._client is not None else [],
        )

    def needed(self) -> set[str]:
        """Ids of the transfers whose KV a peer may still take."""
        return self._table.needed(time.monotonic())

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
                    block_size=self._block_size,
                )
            )
        if metadata.stopping:
            self._table.stop_opening("this worker is stopping")
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
                if not receive.over and not receive.stopped:
                    continue
                self._tell(receive)
                if receive.stopped != "abort" and request_id not in self._released:
                    continue
                del self._receives[request_id]
                self._released.discard(request_id)
                results.finished_recving.add(request_id)
                if receive.stopped != "abort" and not receive.fetch.complete:
                    results.failed_recving.add(request_id)
        return results

    def _tell(self, receive: _Receive) -> None:
        """Report what an import has cost, once, as soon as it is over."""
        if receive.told:
            return
        receive.told = True
        if not receive.fetch.complete and receive.stopped:  # what its stream then said tells nothing
            receive.report = replace(receive.report, failure=_STOPPED[receive.stopped])
        self._reports.append(receive.report)

    def take_reports(self) -> StepReports | None:
        """What the imports that have ended since the last call have cost."""
        reports, self._reports = self._reports, []
        return StepReports(reports) if reports else None

    # Receiving.

    def _start(self, spec: FetchSpec) -> None:
        receive = _Receive(Fetch(spec), FetchReport(spec.request_id, local_hit_tokens=spec.first_token))
        with self._lock:
            self._receives[spec.request_id] = receive
            self._fetching += 1
        self._pool.submit(self._fetch, receive)

    def _fetch(self, receive: _Receive) -> None:
        assert self._client is not None
        fetch = receive.fetch
        report = FetchReport(fetch.spec.request_id)
        kind = "ended_early"
        try:
            report = self._client.fetch(fetch)
        except FrameRefusedError as error:
            kind, report.failure = error.reason, str(error)
        except LayoutMismatchError as error:
            kind, report.failure = "layout", str(error)
        except TimeoutError as error:
            kind, report.failure = "stalled", str(error)
        except grpc.RpcError as error:
            kind = f"stream_{error.code().name.lower()}"
            report.failure = f"{error.code().name}: {error.details()}"
        except OSError as error:
            kind, report.failure = "lane_broken", str(error)
        except Exception as error:
            logger.exception("fetch of %s", fetch.spec.transfer_id)
            kind, report.failure = "internal", f"{type(error).__name__}: {error}"
        fetch.stop()
        report.local_hit_tokens = fetch.spec.first_token
        with self._lock:
            if fetch.complete:
                report.failure = ""
                report.exposed_seconds = fetch.exposed_seconds
                self.counters["completed"] += 1
            else:
                self.counters["failed"] += 1
                report.failure = report.failure or "the stream ended early"
                if not receive.stopped:
                    self.counters[kind] += 1
            receive.report = report
            receive.over = True
            self._fetching -= 1
        self._wake()

    def _stop(self, receive: _Receive, why: str) -> None:
        """Fence first: vLLM may reuse the blocks as soon as we have reported."""
        receive.fetch.stop()
        with self._lock:
            receive.stopped = why if receive.stopped != "abort" else "abort"

    def _final_blocks(self, transfer: SendTransfer, tokens: int) -> int:
        """Blocks that are final once `tokens` tokens are computed: the last may be partial."""
        return transfer.num_blocks if tokens >= transfer.num_tokens else tokens // self._block_size
