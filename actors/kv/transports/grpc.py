"""KV over gRPC: one server stream per transfer, raw frames through an identity serializer.

The server half sends what a `SendTable` holds; the client half feeds an `Importer`. Both use
threads, not an event loop: they copy megabytes and must not share a loop with token frames.
"""

import functools
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent import futures
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from joinwise.actors.auth import Bearer, bearer
from joinwise.actors.kv.blocks import KvBlocks
from joinwise.actors.kv.frames import FLAG_END, MAX_EXPOSED_US, FrameHeader, encode, transfer_tag
from joinwise.actors.kv.receiving import Importer, LandingBudget
from joinwise.actors.kv.sending import NoSuchTransferError, SendTable, SendTransfer, WrongEpochError
from joinwise.actors.kv.stalls import Stalls
from joinwise.proto import kv_pb2

_SERVICE = kv_pb2.DESCRIPTOR.services_by_name["KvService"].full_name
FETCH = f"/{_SERVICE}/Fetch"
LAYOUT = f"/{_SERVICE}/Layout"
_LONGEST_FETCH_S = 86_400.0
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.optimization_target", "throughput"),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A stream that waits for its prefill carries no data; without these its pings would end it.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A port that is taken is an error, never shared with another worker.
    ("grpc.so_reuseport", 0),
]


class KvServer:
    """Serves this worker's KV.

    Args:
        table: the transfers to serve.
        blocks: the cache to read from.
        bind: address to listen on, `host:0` for a free port.
        frame_bytes: payload bytes a frame aims at.
        claim_timeout_s: how long a stream waits for its transfer to be opened.
        max_streams: streams open at once, those included that wait for their prefill: each holds a
            (mostly sleeping) thread. More are refused with RESOURCE_EXHAUSTED: if they queued behind
            waiting ones, the blocks that they would free could be what those wait for.
    """

    def __init__(
        self,
        table: SendTable,
        blocks: KvBlocks,
        *,
        bind: str,
        frame_bytes: int,
        claim_timeout_s: float,
        max_streams: int,
        token: str = "",
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self._table = table
        self._blocks = blocks
        self._frame_bytes = frame_bytes
        self._claim_timeout_s = claim_timeout_s
        self._open_streams = 0
        self._count_lock = threading.Lock()
        self._instance = time.time_ns()
        self._server = grpc.server(
            futures.ThreadPoolExecutor(max_streams, thread_name_prefix="kv-send"),
            options=CHANNEL_OPTIONS,
            maximum_concurrent_rpcs=max_streams,
            interceptors=[Bearer([token])] if token else [],
        )
        checks = health.HealthServicer()
        checks.set(_SERVICE, health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(checks, self._server)
        reflection.enable_server_reflection((_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self._server.add_generic_rpc_handlers((_Handlers(self._fetch, self._layout),))
        if credentials is None:
            port = self._server.add_insecure_port(bind)
        else:
            port = self._server.add_secure_port(bind, credentials)
        self.address = f"{bind.rsplit(':', 1)[0]}:{port}"
        self._server.start()

    @property
    def open_streams(self) -> int:
        """Streams being served now."""
        return self._open_streams

    def stop(self) -> None:
        """End all streams and the listener."""
        self._server.stop(grace=0.2).wait()

    def _layout(self, request: kv_pb2.LayoutRequest, context: grpc.ServicerContext) -> kv_pb2.LayoutResponse:
        mine = self._blocks.layout
        for name in ("protocol_version", "model_digest", "dtype", "block_size", "interior"):
            if getattr(mine, name) != getattr(request.layout, name):
                context.abort(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"KV layouts differ in {name}: {getattr(request.layout, name)!r} here {getattr(mine, name)!r}",
                )
        for theirs, ours in zip(request.layout.layers, mine.layers, strict=False):
            if theirs != ours:
                context.abort(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"KV layouts differ in layer {ours.name}: {theirs.name} with {theirs.block_bytes} bytes a block, "
                    f"here {ours.block_bytes}",
                )
        if len(request.layout.layers) != len(mine.layers):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "KV layouts differ in the number of layers")
        return kv_pb2.LayoutResponse(layout=mine, instance=self._instance)

    def _fetch(self, request: kv_pb2.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        if request.layout_digest != self._blocks.digest:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the caller's KV layout differs from this worker's")
        if context.time_remaining() > _LONGEST_FETCH_S:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a fetch needs a deadline: it holds this worker's blocks")
        with self._count_lock:
            self._open_streams += 1
        transfer: SendTransfer | None = None
        outcome = "the receiver went away"
        try:
            deadline = time.monotonic() + self._claim_timeout_s
            context.add_callback(self._table.wake_claims)
            try:
                transfer = self._table.claim(request.transfer_id, request.epoch, deadline, context.is_active)
            except NoSuchTransferError as error:
                context.abort(grpc.StatusCode.NOT_FOUND, str(error))
            except WrongEpochError as error:
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            if request.num_blocks < 1 or request.first_block + request.num_blocks != transfer.num_blocks:
                outcome = "the receiver asked for other blocks"
                context.abort(grpc.StatusCode.OUT_OF_RANGE, f"the prompt has {transfer.num_blocks} blocks")
            if request.num_tokens != transfer.num_tokens:
                outcome = "the receiver has another prompt"
                context.abort(grpc.StatusCode.OUT_OF_RANGE, f"the prompt has {transfer.num_tokens} tokens")
            context.add_callback(functools.partial(_wake, transfer))
            sequence = yield from self._frames(transfer, request.first_block, context)
            outcome = "sent"  # said before the last frame: its receiver may close the stream as soon as it has it
            exposed_us = min(int((time.monotonic() - transfer.computed_at) * 1e6), MAX_EXPOSED_US)
            tag = transfer_tag(transfer.transfer_id)
            yield encode(FrameHeader(tag, transfer.epoch, sequence, 0, 0, 0, FLAG_END, exposed_us))
        finally:
            if transfer is not None:
                self._table.release(transfer, outcome)
            with self._count_lock:
                self._open_streams -= 1

    def _frames(self, transfer: SendTransfer, first: int, context: grpc.ServicerContext) -> Generator[bytes, None, int]:
        """All frames but the last; returns their number."""
        tag = transfer_tag(transfer.transfer_id)
        sent = [first] * transfer.num_layers
        sequence = 0
        while min(sent) < transfer.num_blocks:
            for layer, end in self._next_ready(transfer, sent, context):
                step = max(1, self._frame_bytes // self._blocks.block_bytes[layer])
                for start in range(sent[layer], end, step):
                    count = min(step, end - start)
                    payload = self._blocks.read(layer, transfer.block_ids[start : start + count])
                    frame = encode(FrameHeader(tag, transfer.epoch, sequence, layer, start, count), payload)
                    if transfer.closed:
                        context.abort(grpc.StatusCode.ABORTED, f"transfer ended: {transfer.closed}")
                    yield frame
                    sequence += 1
                sent[layer] = end
        return sequence

    def _next_ready(
        self, transfer: SendTransfer, sent: list[int], context: grpc.ServicerContext
    ) -> list[tuple[int, int]]:
        """Wait for blocks that are final and not yet sent: (layer, end) in layer order."""
        while True:
            with transfer.changed:
                ready = [(layer, end) for layer, end in enumerate(transfer.ready) if end > sent[layer]]
                if not ready and not transfer.closed and context.is_active():
                    transfer.changed.wait(1.0)
                    continue
            if transfer.closed or not context.is_active():
                context.abort(grpc.StatusCode.ABORTED, f"transfer ended: {transfer.closed or 'the receiver went away'}")
            return ready


class KvClient:
    """Fetches KV from peers; keeps one channel per peer."""

    def __init__(
        self,
        blocks: KvBlocks,
        budget: LandingBudget,
        *,
        token: str = "",
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._metadata = bearer(token)
        self._blocks = blocks
        self._budget = budget
        self._credentials = credentials
        self._channels: dict[str, grpc.Channel] = {}
        self._agreed: set[str] = set()
        self._stalls = Stalls()
        self._lock = threading.Lock()

    def fetch(self, importer: Importer, on_call: Callable[[grpc.Call], None]) -> tuple[int, float, float]:
        """Run one transfer to its end.

        Args:
            importer: takes the frames.
            on_call: gets the call, so that another thread can cancel it.

        Returns:
            Payload bytes, seconds from first to last frame, seconds of copying.

        Raises:
            grpc.RpcError: the stream failed or was cancelled.
            TimeoutError: it made no progress.
            FrameRefusedError: a frame must not be used.
        """
        spec = importer.spec
        channel = self._channel(spec.peer)
        try:
            self._agree(channel, spec.peer, min(spec.timeout_s, spec.start_s))
            fetch: Any = channel.unary_stream(FETCH, kv_pb2.FetchRequest.SerializeToString, None)
            call = fetch(
                kv_pb2.FetchRequest(
                    transfer_id=spec.transfer_id,
                    epoch=spec.epoch,
                    first_block=spec.first_block,
                    num_blocks=len(spec.block_ids),
                    layout_digest=self._blocks.digest,
                    num_tokens=spec.num_tokens,
                ),
                metadata=self._metadata,
                timeout=_LONGEST_FETCH_S / 24,  # a last resort: stalls are noticed long before
            )
            on_call(call)
            with self._stalls.watch(call, spec.start_s) as watched:
                try:
                    return self._receive(call, importer, lambda: watched.allow(spec.timeout_s))
                except grpc.RpcError as error:
                    if watched.stalled:
                        raise TimeoutError(f"{spec.peer} sent no frame for {watched.allowed:g} s") from error
                    raise
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION):
                self._agreed.discard(spec.peer)  # a restarted peer must show its layout again
            raise

    def close(self) -> None:
        """Close all channels."""
        with self._lock:
            channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.close()
        self._stalls.stop()

    def _receive(self, call: Any, importer: Importer, progress: Callable[[], None]) -> tuple[int, float, float]:
        total, first, copying = 0, 0.0, 0.0
        last = first
        try:
            for frame in call:
                progress()
                self._budget.acquire(len(frame))
                try:
                    begin = time.monotonic()
                    total += importer.accept(frame)
                    last = time.monotonic()
                    copying += last - begin
                    first = first or begin
                finally:
                    self._budget.release(len(frame))
                if importer.complete:
                    break
        finally:
            call.cancel()
        return total, last - first, copying

    def _agree(self, channel: grpc.Channel, peer: str, timeout: float) -> None:
        if peer in self._agreed:
            return
        layout = channel.unary_unary(LAYOUT, kv_pb2.LayoutRequest.SerializeToString, kv_pb2.LayoutResponse.FromString)
        layout(kv_pb2.LayoutRequest(layout=self._blocks.layout), timeout=min(timeout, 10.0), metadata=self._metadata)
        self._agreed.add(peer)

    def _channel(self, peer: str) -> grpc.Channel:
        with self._lock:
            channel = self._channels.get(peer)
            if channel is None:
                options = CHANNEL_OPTIONS
                if self._credentials is None:
                    channel = grpc.insecure_channel(peer, options)
                else:
                    channel = grpc.secure_channel(peer, self._credentials, options)
                self._channels[peer] = channel
            return channel


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, fetch: Callable, layout: Callable) -> None:
        self._fetch: grpc.RpcMethodHandler = grpc.unary_stream_rpc_method_handler(
            fetch, kv_pb2.FetchRequest.FromString, None
        )
        self._layout: grpc.RpcMethodHandler = grpc.unary_unary_rpc_method_handler(
            layout, kv_pb2.LayoutRequest.FromString, kv_pb2.LayoutResponse.SerializeToString
        )

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return {FETCH: self._fetch, LAYOUT: self._layout}.get(details.method)


def _wake(transfer: SendTransfer) -> None:
    with transfer.changed:
        transfer.changed.notify_all()
