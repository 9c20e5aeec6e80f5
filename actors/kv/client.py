"""The receiver's side of the KV port: agrees with senders, then fetches, a stream per rank."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from joinwise.actors.auth import bearer
from joinwise.actors.kv import layout
from joinwise.actors.kv.blocks import KvBlocks
from joinwise.actors.kv.lanes import Lane, LaneClosedError, LanePool
from joinwise.actors.kv.layout import PeerPlan
from joinwise.actors.kv.links import Link, Preference, preference, settle
from joinwise.actors.kv.receiving import Fetch, FetchReport, FetchSpec, Importer, LandingBudget
from joinwise.actors.kv.server import CHANNEL_OPTIONS, FETCH, LAYOUT, LONGEST_FETCH_S, STALE_INSTANCE
from joinwise.actors.kv.stalls import Stalls
from joinwise.proto import kv_pb2

_FETCH_DEADLINE_S = LONGEST_FETCH_S / 24
"""A last resort: stalls are noticed long before."""
_LAYOUT_TIMEOUT_S = 10.0
_LAST_WORD_S = 1.0
"""How long the reason for a broken lane may take to arrive on the control stream."""


class _StaleError(Exception):
    """What was agreed with a sender holds no more; nothing of the transfer has begun."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


@dataclass(frozen=True)
class _Agreement:
    """What has been agreed with all ranks of one sender."""

    plans: tuple[PeerPlan, ...]
    instances: tuple[int, ...]
    lanes: tuple[tuple[str, int], ...]
    """Where each rank accepts lanes, and the largest payload that it will send."""


@dataclass
class _Stream:
    """One rank's part of a fetch."""

    link: Link
    importer: Importer
    request: kv_pb2.FetchRequest
    lanes: tuple[str, int]
    report: FetchReport = field(init=False)

    def __post_init__(self) -> None:
        self.report = FetchReport(self.importer.spec.request_id)


class KvClient:
    """Fetches KV from peers; keeps channels, lanes and what was agreed.

    Args:
        blocks: the cache to write to.
        budget: bounds the bytes in landing buffers.
        token: shown to senders.
        credentials: TLS; None connects in plain text.
        transport: "auto", "grpc" or a kind of lane.
        lanes: opens lanes; None for gRPC only.
    """

    def __init__(
        self,
        blocks: KvBlocks,
        budget: LandingBudget,
        *,
        token: str = "",
        credentials: grpc.ChannelCredentials | None = None,
        transport: str = "grpc",
        lanes: LanePool | None = None,
    ) -> None:
        self._metadata = bearer(token)
        self._blocks = blocks
        self._budget = budget
        self._credentials = credentials
        self._preference: Preference = preference(transport if lanes is not None else "grpc")
        self._lanes = lanes
        self._ranks: tuple[int, Sequence[kv_pb2.KvLayout]] = (0, [blocks.layout])
        self._channels: dict[str, grpc.Channel] = {}
        self._agreed: dict[tuple[str, ...], _Agreement] = {}
        self._ending: set[grpc.Call] = set()
        self._stalls = Stalls()
        self._lock = threading.Lock()
        self.links: dict[str, Link] = {}

    def set_ranks(self, rank: int, layouts: Sequence[kv_pb2.KvLayout]) -> None:
        """Tell a rank of several of its place, and of the others' layouts."""
        self._ranks = (rank, layouts)

    def fetch(self, fetch: Fetch) -> FetchReport:
        """Run one transfer to its end.

        Raises:
            grpc.RpcError: a stream failed or was cancelled.
            TimeoutError: one made no progress.
            FrameRefusedError: a frame must not be used.
            LayoutMismatchError: the sender's KV cannot be used here.
            ConnectionError: no transport works.
        """
        try:
            return self._attempt(fetch)
        except _StaleError:
            pass  # it has restarted since we agreed, and knows nothing of before
        try:
            return self._attempt(fetch)
        except _StaleError as error:
            raise error.reason from error

    def close(self) -> None:
        """Close all channels and lanes."""
        with self._lock:
            channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.close()
        if self._lanes is not None:
            self._lanes.close()
        self._stalls.stop()

    # Agreeing.

    def _attempt(self, fetch: Fetch) -> FetchReport:
        streams = self._open(fetch.spec, fetch)
        if len(streams) == 1:
            self._run(streams[0], fetch)
        else:
            with ThreadPoolExecutor(len(streams), thread_name_prefix="kv-rank") as pool:
                running = [pool.submit(self._run, stream, fetch) for stream in streams]
                try:
                    for each in running:
                        each.result()
                except BaseException:
                    fetch.stop()
                    raise
        report = streams[0].report
        for stream in streams[1:]:
            report.merge(stream.report)
        return report

    def _open(self, spec: FetchSpec, fetch: Fetch) -> list[_Stream]:
        agreement = self._agree(spec.peers, min(spec.timeout_s, spec.start_s))
        importers = [Importer(spec, self._blocks, plan, self._budget) for plan in agreement.plans]
        fetch.begin(importers)
        return [self._stream(spec, importer, agreement) for importer in importers]

    def _stream(self, spec: FetchSpec, importer: Importer, agreement: _Agreement) -> _Stream:
        plan = importer.plan
        request = kv_pb2.FetchRequest(
            transfer_id=spec.transfer_id,
            epoch=spec.epoch,
            num_tokens=spec.num_tokens,
            first_token=spec.first_token,
            instance=agreement.instances[plan.peer],
            encoding=plan.encoding,  # type: ignore[arg-type]
            wire_dtype=str(plan.wire_dtype),
            first_head=plan.first_head,
            num_heads=plan.num_heads,
            layers=[theirs for theirs, _ in plan.layers],
            streams=plan.streams,
        )
        peer = spec.peers[plan.peer]
        return _Stream(self.links[peer], importer, request, agreement.lanes[plan.peer])

    def _agree(self, peers: tuple[str, ...], timeout: float) -> _Agreement:
        if (agreement := self._agreed.get(peers)) is not None:
            return agreement
        rank, ours = self._ranks
        answers = [self._ask_layout(peer, timeout) for peer in peers]
        plans = layout.plan(ours, rank, [answer.layout for answer in answers])
        for peer, answer in zip(peers, answers, strict=True):
            self.links[peer] = self._link(peer, answer)
        agreement = _Agreement(
            tuple(plans),
            tuple(answer.instance for answer in answers),
            tuple((answer.lane_address, answer.largest_payload) for answer in answers),
        )
        self._agreed[peers] = agreement
        return agreement

    def _ask_layout(self, peer: str, timeout: float) -> kv_pb2.LayoutResponse:
        channel = self._channel(peer)
        ask = channel.unary_unary(LAYOUT, kv_pb2.LayoutRequest.SerializeToString, kv_pb2.LayoutResponse.FromString)
        request = kv_pb2.LayoutRequest(layout=self._blocks.layout)
        answer: kv_pb2.LayoutResponse = ask(
            request, timeout=min(timeout, _LAYOUT_TIMEOUT_S), metadata=self._metadata
        )
        return answer

    def _link(self, peer: str, answer: kv_pb2.LayoutResponse) -> Link:
        def attempt(kind: str) -> None:
            if kind != "grpc" and self._lanes is not None:
                self._lanes.give_back(self._lanes.lease(answer.lane_address, kind, answer.largest_payload), clean=True)

        link = self.links.get(peer) or Link(peer)
        link.transport, link.why = settle(self._preference, tuple(answer.lane_kinds), attempt)
        return link

    def _forget(self, peer: str) -> None:
        for peers in [peers for peers in self._agreed if peer in peers]:
            self._agreed.pop(peers, None)

    # One stream.

    def _run(self, stream: _Stream, fetch: Fetch) -> None:
        begin = time.monotonic()
        try:
            with self._lane(stream) as lane:
                self._fetch(stream, fetch, lane)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION):
                self._forget(stream.link.peer)  # a restarted peer must show its layout again
            if error.details() == STALE_INSTANCE:
                raise _StaleError(error) from error
            raise
        finally:
            report = stream.report
            report.transport = stream.link.transport
            report.import_seconds = stream.importer.copying_s
            stream.link.add(
                bytes=report.bytes,
                streams=1,
                failed=not stream.importer.complete,
                seconds=time.monotonic() - begin,
                wire_seconds=report.wire_seconds,
                exposed_seconds=stream.importer.exposed_us / 1e6,
            )

    @contextmanager
    def _lane(self, stream: _Stream) -> Iterator[Lane | None]:
        kind = stream.link.transport
        if kind == "grpc" or self._lanes is None:
            yield None
            return
        try:
            lane = self._lanes.lease(stream.lanes[0], kind, stream.lanes[1])
        except OSError as error:
            self._forget(stream.link.peer)
            raise _StaleError(error) from error
        try:
            stream.request.lane_id = lane.lane_id
            with stream.importer.interrupted_by(lane.interrupt):
                yield lane
        finally:
            self._lanes.give_back(lane, clean=stream.importer.complete)

    def _fetch(self, stream: _Stream, fetch: Fetch, lane: Lane | None) -> None:
        spec = stream.importer.spec
        method: Any = self._channel(stream.link.peer).unary_stream(FETCH, kv_pb2.FetchRequest.SerializeToString, None)
        call = method(stream.request, metadata=self._metadata, timeout=_FETCH_DEADLINE_S)
        fetch.attach(call.cancel)
        with self._stalls.watch(call, spec.start_s) as watched:
            try:
                if lane is None:
                    self._receive(stream, call, lambda: watched.allow(spec.timeout_s))
                else:
                    self._receive_on_lane(stream, call, lane, lambda: watched.allow(spec.timeout_s))
            except grpc.RpcError as error:
                if watched.stalled:
                    raise TimeoutError(f"{stream.link.peer} sent no frame for {watched.allowed:g} s") from error
                raise

    def _receive(self, stream: _Stream, call: Any, progress: Callable[[], None]) -> None:
        first = 0.0
        try:
            for frame in call:
                progress()
                first = first or time.monotonic()
                stream.report.bytes += stream.importer.accept(frame)
                stream.report.wire_seconds = time.monotonic() - first
                if stream.importer.complete:
                    break
        finally:
            call.cancel()

    def _receive_on_lane(self, stream: _Stream, call: Any, lane: Lane, progress: Callable[[], None]) -> None:
        importer, link, first = stream.importer, stream.link, 0.0

        ended = threading.Event()

        def over() -> None:
            # The sender's last word, or its death: whoever waits for bytes on the lane must hear of it.
            ended.set()
            if not importer.complete:
                lane.interrupt()

        def read(views: Sequence[memoryview]) -> None:
            begin = time.monotonic()
            lane.receive(views)
            link.measure(sum(view.nbytes for view in views), time.monotonic() - begin)

        if not call.add_callback(over):
            over()
        try:
            while not importer.complete:
                raw = lane.receive_header()
                progress()
                first = first or time.monotonic()
                stream.report.bytes += importer.receive(raw, read, direct=lane.direct)
                stream.report.wire_seconds = time.monotonic() - first
        except LaneClosedError:
            if ended.wait(_LAST_WORD_S):
                for _ in call:  # raises what the sender said
                    pass
            call.cancel()
            raise
        except BaseException:
            call.cancel()
            raise
        self._let_end(call)

    def _let_end(self, call: Any) -> None:
        """Hold on to a call until the sender has ended it: one that is forgotten is cancelled."""
        with self._lock:
            self._ending.add(call)
        if not call.add_callback(lambda: self._ending.discard(call)):
            self._ending.discard(call)

    def _channel(self, peer: str) -> grpc.Channel:
        with self._lock:
            channel = self._channels.get(peer)
            if channel is None:
                if self._credentials is None:
                    channel = grpc.insecure_channel(peer, CHANNEL_OPTIONS)
                else:
                    channel = grpc.secure_channel(peer, self._credentials, CHANNEL_OPTIONS)
                self._channels[peer] = channel
            return channel
