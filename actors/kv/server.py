"""A worker's KV port: layouts, and one `Fetch` stream per transfer, its frames on it or on a lane.

Threads, not an event loop: they copy megabytes and must not share a loop with token frames.
"""

import functools
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent import futures

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from joinwise.actors.auth import Bearer
from joinwise.actors.kv.blocks import KvBlocks
from joinwise.actors.kv.codecs import CodingSpeeds
from joinwise.actors.kv.lanes.lane import LaneClosedError
from joinwise.actors.kv.lanes.server import LaneServer
from joinwise.actors.kv.layout import CODECS, WHOLE, LayoutMismatchError, dtype_of
from joinwise.actors.kv.memory import keep_freed
from joinwise.actors.kv.producing import FrameProducer, TransferEndedError, Wanted
from joinwise.actors.kv.sending import NoSuchTransferError, SendTable, SendTransfer, WrongEpochError
from joinwise.proto import kv_pb2

_SERVICE = kv_pb2.DESCRIPTOR.services_by_name["KvService"].full_name
FETCH = f"/{_SERVICE}/Fetch"
LAYOUT = f"/{_SERVICE}/Layout"
LONGEST_FETCH_S = 86_400.0
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
STALE_INSTANCE = "the caller has agreed with another instance of this worker"
_LANE_WAIT_S = 5.0
_Abort = Callable[[grpc.StatusCode, str], None]


class KvServer:
    """Serves this rank's KV.

    Args:
        table: the transfers to serve.
        blocks: the cache to read from.
        bind: address to listen on, `host:0` for a free port.
        frame_bytes: payload bytes a frame aims at.
        claim_timeout_s: how long a stream waits for its transfer to be opened.
        max_streams: streams open at once, those included that wait for their prefill: each holds a
            (mostly sleeping) thread. More are refused with RESOURCE_EXHAUSTED: if they queued behind
            waiting ones, the blocks that they would free could be what those wait for.
        token: what callers must show; empty for none.
        credentials: TLS; None listens in plain text.
        lanes: where receivers may open lanes; stopped with this.
        lane_kinds: the kinds that it offers.
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
        lanes: LaneServer | None = None,
        lane_kinds: Collection[str] = (),
    ) -> None:
        keep_freed()
        self._table = table
        self._blocks = blocks
        self._frame_bytes = frame_bytes
        self._producer = FrameProducer(blocks, frame_bytes)
        self._coding = CodingSpeeds(blocks)
        self._claim_timeout_s = claim_timeout_s
        self._lanes = lanes
        self._lane_kinds = tuple(lane_kinds) if lanes is not None else ()
        self._open_streams = 0
        self._count_lock = threading.Lock()
        self.instance = time.time_ns()
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
        """End all streams and the listeners."""
        stopped = self._server.stop(grace=0.2)
        if self._lanes is not None:
            self._lanes.stop()
        stopped.wait()

    def _layout(self, request: kv_pb2.LayoutRequest, context: grpc.ServicerContext) -> kv_pb2.LayoutResponse:
        mine = self._blocks.layout
        for name in ("protocol_version", "model_digest"):
            if getattr(mine, name) != getattr(request.layout, name):
                context.abort(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"KV layouts differ in {name}: {getattr(request.layout, name)!r} here {getattr(mine, name)!r}",
                )
        return kv_pb2.LayoutResponse(
            layout=mine,
            instance=self.instance,
            lane_address=self._lanes.address if self._lanes is not None else "",
            lane_kinds=self._lane_kinds,
            largest_payload=max(self._frame_bytes, *self._blocks.block_bytes),
            coding=[
                kv_pb2.CodingSpeed(encoding=encoding, numbers_per_s=speed)  # type: ignore[arg-type]
                for encoding, speed in (self._coding.encoding if request.coding else {}).items()
            ],
        )

    def _fetch(self, request: kv_pb2.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        wanted = self._check(request, context)
        streams = request.streams or 1
        with self._count_lock:
            self._open_streams += 1
        transfer: SendTransfer | None = None
        outcome, delivered_of = "the receiver went away", 0
        try:
            transfer = self._claim(request, context, streams)
            if problem := _other_prompt(request, transfer, self._blocks.block_size):
                outcome = problem
                context.abort(grpc.StatusCode.OUT_OF_RANGE, problem)
            if wanted is None:
                outcome = "the receiver needs nothing of this rank"
                return
            context.add_callback(functools.partial(_wake, transfer))
            try:
                if request.lane_id:
                    self._send_on_lane(request.lane_id, context, transfer, wanted)
                    outcome, delivered_of = "sent", streams
                    return
                sequence = 0
                for raw, payload in self._producer.frames(transfer, wanted, context.is_active):
                    yield b"".join((raw, *payload))
                    transfer.moved_at = time.monotonic()
                    sequence += 1
            except TransferEndedError as error:
                context.abort(grpc.StatusCode.ABORTED, f"transfer ended: {error}")
            # Said before the last frame: its receiver may close the stream as soon as it has it.
            outcome, delivered_of = "sent", streams
            yield self._producer.end(transfer, sequence)
        finally:
            if transfer is not None:
                self._table.release(transfer, outcome, delivered_of=delivered_of)
            with self._count_lock:
                self._open_streams -= 1

    def _check(self, request: kv_pb2.FetchRequest, context: grpc.ServicerContext) -> Wanted | None:
        """What the caller wants, None for nothing; aborts where it cannot be had."""
        if request.instance != self.instance:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, STALE_INSTANCE)
        if context.time_remaining() > LONGEST_FETCH_S:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a fetch needs a deadline: it holds this worker's blocks")
        if request.encoding == kv_pb2.ENCODING_UNSPECIFIED:
            return None
        layers = tuple(request.layers) or tuple(range(len(self._blocks.layer_names)))
        heads = range(request.first_head, request.first_head + request.num_heads)
        problem = ""
        dtype = dtype_of("torch.float32")
        if list(layers) != sorted(set(layers)) or layers[-1] >= len(self._blocks.layer_names):
            problem = f"layers {list(request.layers)[:10]} of {len(self._blocks.layer_names)}"
        elif request.encoding == WHOLE:
            if request.first_token % self._blocks.block_size:
                problem = f"token {request.first_token} does not begin a block of {self._blocks.block_size}"
        elif request.encoding in CODECS:
            try:
                dtype = dtype_of(request.wire_dtype)
            except LayoutMismatchError as error:
                problem = str(error)
            for layer in layers:
                mine = self._blocks.layout.layers[layer]
                if not heads or heads.start < mine.first_head or heads.stop > mine.first_head + mine.num_heads:
                    problem = f"heads {heads.start} to {heads.stop} of layer {mine.name!r} are not here"
        else:
            problem = f"encoding {request.encoding} is not known here"
        if problem:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
        return Wanted(request.first_token, request.encoding, heads, layers, dtype)

    def _claim(self, request: kv_pb2.FetchRequest, context: grpc.ServicerContext, streams: int) -> SendTransfer:
        deadline = time.monotonic() + self._claim_timeout_s
        context.add_callback(self._table.wake_claims)
        try:
            return self._table.claim(request.transfer_id, request.epoch, deadline, context.is_active, streams)
        except NoSuchTransferError as error:
            context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except WrongEpochError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        raise AssertionError("abort raises")

    def _send_on_lane(
        self, lane_id: int, context: grpc.ServicerContext, transfer: SendTransfer, wanted: Wanted
    ) -> None:
        if self._lanes is None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this worker has no lanes")
            return
        try:
            lane = self._lanes.claim(lane_id, _LANE_WAIT_S)
        except LaneClosedError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            return
        over = threading.Event()

        def ended() -> None:
            if not over.is_set():
                lane.interrupt()

        context.add_callback(ended)
        try:
            sequence = 0
            for raw, payload in self._producer.frames(transfer, wanted, context.is_active, lane.load, lane.most_bytes):
                lane.send(raw, payload)
                transfer.moved_at = time.monotonic()
                sequence += 1
            lane.send(self._producer.end(transfer, sequence), [])
            over.set()
        except LaneClosedError as error:
            context.abort(grpc.StatusCode.ABORTED, f"the lane broke: {error}")
        finally:
            self._lanes.give_back(lane, clean=over.is_set())


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


def _other_prompt(request: kv_pb2.FetchRequest, transfer: SendTransfer, block_size: int) -> str:
    """Why the caller cannot mean this transfer; empty when it can."""
    if request.num_tokens != transfer.num_tokens:
        return f"the receiver has another prompt: of {request.num_tokens} tokens, here {transfer.num_tokens}"
    if request.first_token >= request.num_tokens:
        return f"the receiver asked for tokens from {request.first_token} on, the prompt has {transfer.num_tokens}"
    return ""


def _wake(transfer: SendTransfer) -> None:
    with transfer.changed:
        transfer.changed.notify_all()
