"""The receiver's side of the KV port: agrees with senders, then fetches, a stream per rank."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from joinwise.actors.auth import bearer
from joinwise.actors.kv import layout
from joinwise.actors.kv.blocks import KvBlocks
from joinwise.actors.kv.codecs import CodecChoice
from joinwise.actors.kv.fetching import Fetch, FetchReport
from joinwise.actors.kv.frames import FrameRefusedError
from joinwise.actors.kv.lanes.lane import LaneClosedError, LaneRefusedError, ReceiveLane
from joinwise.actors.kv.lanes.pool import LanePool
from joinwise.actors.kv.layout import PeerPlan
from joinwise.actors.kv.links import Link, LinkStatus, LinkTable, Preference, preference, settle
from joinwise.actors.kv.memory import keep_freed
from joinwise.actors.kv.receiving import FetchSpec, Importer, LandingBudget
from joinwise.actors.kv.server import CHANNEL_OPTIONS, FETCH, LAYOUT, LONGEST_FETCH_S, STALE_INSTANCE
from joinwise.actors.kv.stalls import Stalls
from joinwise.actors.kv.streams import Stream, receive, receive_on_lane
from joinwise.actors.tls import Certificates
from joinwise.proto import kv_pb2

_FETCH_DEADLINE_S = LONGEST_FETCH_S / 24
"""A last resort: stalls are noticed long before."""
_LAYOUT_TIMEOUT_S = 10.0


class _StaleError(Exception):
    """What was agreed with a sender holds no more; nothing of the transfer has begun."""

    def __init__(self, reason: Exception, link: Link) -> None:
        super().__init__(str(reason))
        self.reason = reason
        self.link = link


@dataclass(frozen=True)
class _Agreement:
    """What has been agreed with all ranks of one sender."""

    plans: tuple[PeerPlan, ...]
    unneeded: tuple[int, ...]
    instances: tuple[int, ...]
    lane_addresses: tuple[str, ...]
    coding: tuple[dict[int, float], ...]
    """Numbers that each encodes in a second, by encoding."""


class KvClient:
    """Fetches KV from peers; keeps channels, lanes and what was agreed.

    Args:
        blocks: the cache to write to.
        budget: bounds the bytes in landing buffers.
        token: shown to senders.
        certificates: of the cluster, read again when they are renewed; None connects in plain text.
        transport: "auto", "grpc" or a kind of lane.
        codec: how payloads are coded, "auto" to choose for each transfer; see `CodecChoice`.
        lossy: the codec with loss that "auto" may choose.
        lanes: opens lanes; None for gRPC only.
        slot_bytes: largest payload of its `shm` lanes.
    """

    def __init__(
        self,
        blocks: KvBlocks,
        budget: LandingBudget,
        *,
        token: str = "",
        certificates: Certificates | None = None,
        transport: str = "grpc",
        codec: str = "none",
        lossy: str = "none",
        lanes: LanePool | None = None,
        slot_bytes: int = 0,
    ) -> None:
        keep_freed()
        self._metadata = bearer(token)
        self._blocks = blocks
        self._budget = budget
        self._certificates = certificates
        self._preference: Preference = preference(transport if lanes is not None else "grpc")
        self._lanes = lanes
        self._slot_bytes = slot_bytes
        self._codecs = CodecChoice(blocks, codec, lossy)
        self._ranks: tuple[int, Sequence[kv_pb2.KvLayout]] = (0, [blocks.layout])
        self._channels: dict[tuple[str, int], grpc.Channel] = {}  # by peer, and by generation of our certificates
        self._agreed: dict[tuple[str, ...], _Agreement] = {}
        self._ending: set[grpc.Call] = set()
        self._stalls = Stalls()
        self._lock = threading.Lock()
        self.links = LinkTable()

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
        with self.links.using(fetch.spec.peers):
            try:
                return self._attempt(fetch)
            except _StaleError as error:
                error.link.retries += 1  # it has restarted since we agreed, and knows nothing of before
            try:
                return self._attempt(fetch)
            except _StaleError as error:
                raise error.reason from error

    def link_status(self) -> list[LinkStatus]:
        """All links, once those that are gone have been forgotten, with all that was kept for their peers."""
        gone = self.links.take_gone(time.monotonic())
        for peer in gone:
            self._forget(peer)
        with self._lock:
            channels = [self._channels.pop(key) for key in list(self._channels) if key[0] in gone]
        for channel in channels:
            channel.close()
        return [link.status() for link in self.links.values()]

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
                    fetch.end_streams()  # their threads are waited for; another attempt may follow
                    raise
        report = streams[0].report
        for stream in streams[1:]:
            report.merge(stream.report)
        return report

    def _open(self, spec: FetchSpec, fetch: Fetch) -> list[Stream]:
        agreement = self._agree(spec.peers, min(spec.timeout_s, spec.start_s))
        plans = [
            self._codecs.apply(plan, self.links.of(spec.peers[plan.peer]), agreement.coding[plan.peer])
            for plan in agreement.plans
        ]
        importers = [Importer(spec, self._blocks, plan, self._budget) for plan in plans]
        fetch.begin(importers)
        for peer in agreement.unneeded:
            self._decline(spec, spec.peers[peer], agreement.instances[peer])
        return [self._stream(spec, importer, agreement) for importer in importers]

    def _decline(self, spec: FetchSpec, peer: str, instance: int) -> None:
        """Tell a rank that nobody needs its part; one that does not hear it waits for its lease to end."""
        request = kv_pb2.FetchRequest(
            transfer_id=spec.transfer_id, epoch=spec.epoch, num_tokens=spec.num_tokens, instance=instance
        )
        self._let_end(self._call(peer, request))

    def _call(self, peer: str, request: kv_pb2.FetchRequest) -> Any:
        fetch: Any = self._channel(peer).unary_stream(FETCH, kv_pb2.FetchRequest.SerializeToString, None)
        return fetch(request, metadata=self._metadata, timeout=_FETCH_DEADLINE_S)

    def _stream(self, spec: FetchSpec, importer: Importer, agreement: _Agreement) -> Stream:
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
        return Stream(self.links.of(spec.peers[plan.peer]), importer, request, agreement.lane_addresses[plan.peer])

    def _agree(self, peers: tuple[str, ...], timeout: float) -> _Agreement:
        if (agreement := self._agreed.get(peers)) is not None:
            return agreement
        rank, ours = self._ranks
        answers = [self._ask_layout(peer, timeout) for peer in peers]
        plan = layout.plan(ours, rank, [answer.layout for answer in answers])
        for peer, answer in zip(peers, answers, strict=True):
            self._settle(self.links.of(peer), answer)
        agreement = _Agreement(
            plan.parts,
            plan.unneeded,
            tuple(answer.instance for answer in answers),
            tuple(answer.lane_address for answer in answers),
            tuple({s.encoding: s.numbers_per_s for s in answer.coding if s.numbers_per_s > 0} for answer in answers),
        )
        self._agreed[peers] = agreement
        return agreement

    def _ask_layout(self, peer: str, timeout: float) -> kv_pb2.LayoutResponse:
        channel = self._channel(peer)
        ask = channel.unary_unary(LAYOUT, kv_pb2.LayoutRequest.SerializeToString, kv_pb2.LayoutResponse.FromString)
        request = kv_pb2.LayoutRequest(layout=self._blocks.layout, coding=self._codecs.auto)
        link = self.links.of(peer)
        link.reachable = False
        answer: kv_pb2.LayoutResponse = ask(request, timeout=min(timeout, _LAYOUT_TIMEOUT_S), metadata=self._metadata)
        link.reachable = True
        return answer

    def _settle(self, link: Link, answer: kv_pb2.LayoutResponse) -> None:
        def attempt(kind: str) -> None:
            if kind == "grpc" or self._lanes is None:
                return
            if kind == "shm" and answer.largest_payload > self._slot_bytes:
                raise LaneRefusedError("size", f"the sender's payloads have up to {answer.largest_payload} bytes")
            self._lanes.give_back(self._lanes.lease(answer.lane_address, kind), clean=True)

        link.transport, link.why = settle(self._preference, tuple(answer.lane_kinds), attempt)

    def _forget(self, peer: str) -> None:
        for peers in [peers for peers in list(self._agreed) if peer in peers]:
            self._agreed.pop(peers, None)

    # One stream.

    def _run(self, stream: Stream, fetch: Fetch) -> None:
        begin, transport, refused = time.monotonic(), stream.link.transport, ""
        try:
            with self._lane(stream, transport) as lane:
                self._fetch(stream, fetch, lane)
        except FrameRefusedError as error:
            refused = error.reason
            raise
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION):
                self._forget(stream.link.peer)  # a restarted peer must show its layout again
            if error.details() == STALE_INSTANCE:
                raise _StaleError(error, stream.link) from error
            stream.link.reachable = error.code() is not grpc.StatusCode.UNAVAILABLE
            raise
        finally:
            stream.account(transport, time.monotonic() - begin, refused)

    @contextmanager
    def _lane(self, stream: Stream, kind: str) -> Iterator[ReceiveLane | None]:
        if kind == "grpc" or self._lanes is None:
            yield None
            return
        try:
            lane = self._lanes.lease(stream.lane_address, kind)
        except OSError as error:
            self._forget(stream.link.peer)
            raise _StaleError(error, stream.link) from error
        try:
            stream.request.lane_id = lane.lane_id
            with stream.importer.interrupted_by(lane.interrupt):
                yield lane
        finally:
            self._lanes.give_back(lane, clean=stream.importer.complete)

    def _fetch(self, stream: Stream, fetch: Fetch, lane: ReceiveLane | None) -> None:
        spec = stream.importer.spec
        call = self._call(stream.link.peer, stream.request)
        fetch.attach(call.cancel)

        def stall() -> None:
            call.cancel()
            if lane is not None:
                lane.interrupt()  # the call may have ended well, with frames that never came

        with self._stalls.watch(stall, spec.start_s) as watched:
            try:
                if lane is None:
                    receive(stream, call, lambda: watched.allow(spec.timeout_s))
                else:
                    receive_on_lane(stream, call, lane, lambda: watched.allow(spec.timeout_s))
                    self._let_end(call)
            except (grpc.RpcError, LaneClosedError) as error:
                if watched.stalled:
                    raise TimeoutError(f"{stream.link.peer} sent no frame for {watched.allowed:g} s") from error
                raise

    def _let_end(self, call: Any) -> None:
        """Hold on to a call until the sender has ended it: one that is forgotten is cancelled."""
        with self._lock:
            self._ending.add(call)
        if not call.add_callback(lambda: self._ending.discard(call)):
            self._ending.discard(call)

    def _channel(self, peer: str) -> grpc.Channel:
        with self._lock:
            certificates = self._certificates
            key = (peer, certificates.generation if certificates is not None else 0)
            channel = self._channels.get(key)
            if channel is None:
                if certificates is None:
                    channel = grpc.insecure_channel(peer, CHANNEL_OPTIONS)
                else:  # one of an older generation stays open for the transfers that it carries
                    options = [*CHANNEL_OPTIONS, *certificates.channel_options]
                    channel = grpc.secure_channel(peer, certificates.grpc_channel(), options)
                self._channels[key] = channel
            return channel
