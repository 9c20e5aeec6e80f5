"""KV endpoints without engines: real sockets, real tensors, and a prefill that a test drives."""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent import futures
from dataclasses import dataclass, field

import grpc
import numpy as np
import torch

from joinwise.actors.kv.blocks import KvBlocks
from joinwise.actors.kv.client import KvClient
from joinwise.actors.kv.fetching import Fetch as KvFetch
from joinwise.actors.kv.fetching import FetchReport
from joinwise.actors.kv.frames import FLAG_END, HEADER_BYTES, FrameHeader, parse, split
from joinwise.actors.kv.lanes.lane import LaneOptions
from joinwise.actors.kv.lanes.pool import LanePool
from joinwise.actors.kv.lanes.server import LaneServer
from joinwise.actors.kv.lanes.tcp import TcpSend
from joinwise.actors.kv.receiving import FetchSpec, Importer, LandingBudget
from joinwise.actors.kv.sending import SendTable, SendTransfer
from joinwise.actors.kv.server import FETCH, LAYOUT, KvServer
from joinwise.kernels import kv_hash
from joinwise.proto import kv_pb2

BLOCK_SIZE = 4
LAYERS = {"layers.0": (2, 4, 8), "layers.1": (2, 4, 8), "layers.2": (1, 4, 8), "layers.3": (2, 4, 8)}


def eventually(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """Wait for a condition that other threads make true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.002)


def make_caches(
    num_blocks: int,
    seed: int,
    layers: dict[str, tuple[int, ...]] = LAYERS,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Cache tensors full of noise."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn((num_blocks, *shape), generator=generator).to(dtype) for name, shape in layers.items()}


def decode(frame: bytes) -> tuple[FrameHeader, memoryview]:
    """Header and payload of a frame in one piece, both verified."""
    sealed, payload = split(frame)
    sealed.verify(kv_hash.digest([payload]))
    return sealed.header, payload


class Sender:
    """A prefill worker: a table, a port, and a prefill that a test drives."""

    def __init__(
        self,
        num_blocks: int = 64,
        *,
        seed: int = 1,
        frame_bytes: int = 600,
        claim_timeout_s: float = 5.0,
        max_streams: int = 64,
        bind: str = "127.0.0.1:0",
        token: str = "",
        kinds: Collection[str] = ("tcp", "shm", "nccl"),
        **layout: object,
    ) -> None:
        layers, dtype = layout.pop("layers", LAYERS), layout.pop("dtype", torch.float32)
        self.caches = make_caches(num_blocks, seed, layers, dtype)  # type: ignore[arg-type]
        self.idle_calls = 0
        self.table = SendTable(self._on_idle)
        self.blocks = KvBlocks(self.caches, **{**_LAYOUT, **layout})  # type: ignore[arg-type]
        kinds = [kind for kind in kinds if kind != "grpc"]  # that one needs no lane
        self.lanes = LaneServer("127.0.0.1:0", token=token, kinds=kinds)
        self.server = KvServer(
            self.table,
            self.blocks,
            bind=bind,
            frame_bytes=frame_bytes,
            claim_timeout_s=claim_timeout_s,
            max_streams=max_streams,
            token=token,
            lanes=self.lanes,
            lane_kinds=kinds,
        )
        self._noise = np.random.default_rng(seed)

    def _on_idle(self) -> None:
        self.idle_calls += 1

    def open(
        self, name: str, block_ids: Iterable[int], *, epoch: int = 1, lease_s: float = 60.0, num_tokens: int = 0
    ) -> SendTransfer:
        """Open a transfer of these blocks; nothing is computed yet."""
        ids = list(block_ids)
        transfer = SendTransfer(
            transfer_id=name,
            request_id=f"{name}.p",
            epoch=epoch,
            num_blocks=len(ids),
            num_layers=len(self.caches),
            num_tokens=num_tokens or len(ids) * self.blocks.block_size,
            lease_s=lease_s,
            block_size=self.blocks.block_size,
        )
        transfer.block_ids = ids
        self.table.open(transfer)
        return transfer

    def compute(self, transfer: SendTransfer, until: int | None = None, pause_s: float = 0.0) -> None:
        """One forward pass: each layer writes its blocks, and only then says so.

        Args:
            transfer: whose prompt.
            until: blocks that are final afterwards; all when None.
            pause_s: seconds a layer takes.
        """
        until = transfer.num_blocks if until is None else until
        for layer, cache in enumerate(self.caches.values()):
            begin = transfer.ready[layer]
            if pause_s:
                time.sleep(pause_s)
            for block in transfer.block_ids[begin:until]:
                cache[block] = torch.from_numpy(self._noise.standard_normal(cache[block].shape))
            self.table.advance(transfer, layer, until)

    def finish(self, transfer: SendTransfer) -> None:
        """VLLM has finished the request."""
        self.table.end(transfer.request_id)

    def content(self, transfer: SendTransfer) -> dict[str, torch.Tensor]:
        """What the receiver must have, in prompt order."""
        return {name: cache[transfer.block_ids].clone() for name, cache in self.caches.items()}

    def sweep(self) -> set[str]:
        """What an engine step does: free what is over."""
        return self.table.take_releasable(time.monotonic())

    def assert_idle(self) -> None:
        """Nothing is held: no stream, no transfer."""
        eventually(lambda: self.server.open_streams == 0, "streams end")
        self.sweep()
        assert self.table.held() == []

    def stop(self) -> None:
        """Close the port."""
        self.server.stop()


_LAYOUT = {"block_size": BLOCK_SIZE, "interior": "test", "model_digest": "model"}


class Receiver:
    """A decode worker: blocks to import into, a budget, channels."""

    def __init__(
        self,
        num_blocks: int = 64,
        *,
        seed: int = 2,
        landing_bytes: int = 1 << 20,
        token: str = "",
        transport: str = "grpc",
        codec: str = "none",
        lossy: str = "none",
        **layout: object,
    ) -> None:
        layers, dtype = layout.pop("layers", LAYERS), layout.pop("dtype", torch.float32)
        self.caches = make_caches(num_blocks, seed, layers, dtype)  # type: ignore[arg-type]
        self.before = {name: cache.clone() for name, cache in self.caches.items()}
        self.blocks = KvBlocks(self.caches, **{**_LAYOUT, **layout})  # type: ignore[arg-type]
        self.budget = LandingBudget(landing_bytes)
        self.lanes = LanePool(token=token, options=LaneOptions(slot_bytes=1 << 20, slots=2))
        self.client = KvClient(
            self.blocks,
            self.budget,
            token=token,
            transport=transport,
            codec=codec,
            lossy=lossy,
            lanes=self.lanes,
            slot_bytes=1 << 20,
        )

    def fetch(
        self,
        name: str,
        block_ids: Iterable[int],
        peer: str,
        *,
        first_block: int = 0,
        epoch: int = 1,
        timeout_s: float = 20.0,
        start_s: float = 20.0,
        num_tokens: int = 0,
    ) -> "Fetch":
        """Begin a fetch on a thread of its own."""
        ids = tuple(block_ids)
        spec = FetchSpec(
            request_id=f"{name}.d",
            transfer_id=name,
            epoch=epoch,
            peers=tuple(peer.split(",")),
            first_token=first_block * self.blocks.block_size,
            block_ids=ids,
            num_tokens=num_tokens or (first_block + len(ids)) * self.blocks.block_size,
            timeout_s=timeout_s,
            start_s=start_s,
        )
        return Fetch(self, KvFetch(spec))

    def expect(self, transfer: dict[str, torch.Tensor], block_ids: Iterable[int], first_block: int = 0) -> None:
        """These blocks hold the transfer's content from `first_block` on: part of what must be there."""
        for name, content in transfer.items():
            self.before[name][list(block_ids)] = content[first_block:]

    def assert_cache(self) -> None:
        """Every byte is where it was expected, and nothing else has changed."""
        for name, cache in self.caches.items():
            wrong = (cache != self.before[name]).flatten(1).any(1).nonzero().flatten().tolist()
            assert not wrong, f"{name}: blocks {wrong} are not as expected"

    def assert_unchanged_but(self, block_ids: Iterable[int]) -> None:
        """Nothing outside these blocks has changed."""
        for name, cache in self.caches.items():
            cache[list(block_ids)] = self.before[name][list(block_ids)]
        self.assert_cache()

    def assert_idle(self) -> None:
        """Nothing lies between the wire and its blocks."""
        assert self.budget.used == 0

    def stop(self) -> None:
        """Close the channels."""
        self.client.close()


@dataclass
class Fetch:
    """One fetch under way."""

    receiver: Receiver
    fetch: KvFetch
    report: FetchReport | None = None
    error: Exception | None = None
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.report = self.receiver.client.fetch(self.fetch)
        except Exception as error:
            self.error = error

    @property
    def importer(self) -> Importer:
        """The importer of its (first) stream, once it has begun."""
        eventually(lambda: bool(self.fetch.importers), "the sender is agreed with")
        return self.fetch.importers[0]

    @property
    def landed(self) -> list[int]:
        """Blocks that have landed, by layer."""
        importer = self.importer
        size = self.receiver.blocks.block_size
        return [(tokens - self.fetch.spec.first_token) // size for tokens in importer.landed.values()]

    @property
    def bytes(self) -> int:
        """Payload bytes of a fetch that succeeded."""
        assert self.report is not None
        return self.report.bytes

    def cancel(self) -> None:
        """Cancel its streams, and nothing else."""
        eventually(lambda: bool(self.fetch._streams), "a stream is attached")  # its sender may know of it sooner
        for cancel in list(self.fetch._streams):
            cancel()

    def join(self, seconds: float = 20.0) -> Exception | None:
        """Wait for its end; the error that ended it."""
        self.thread.join(seconds)
        assert not self.thread.is_alive(), "the fetch hangs"
        return self.error

    def succeed(self) -> None:
        """Wait for its end, which must be a good one."""
        error = self.join()
        assert error is None, error
        assert self.fetch.complete

    def fail(self, code: grpc.StatusCode | None = None) -> Exception:
        """Wait for its end, which must be a bad one; its error."""
        error = self.join()
        assert error is not None
        assert not self.fetch.complete
        if code is not None:
            assert isinstance(error, grpc.RpcError)
            assert error.code() is code, error
        return error


class FrameProxy:
    """Stands between two workers and does to raw frames what a bad wire or peer would.

    Args:
        upstream: the real sender's address.
        tamper: gets all frames of a transfer, gives those to pass on.
    """

    def __init__(self, upstream: str, tamper: Callable[[list[bytes]], Iterable[bytes]]) -> None:
        self._channel = grpc.insecure_channel(upstream)
        self._tamper = tamper
        self.fired = 0
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        self._server.add_generic_rpc_handlers((self,))  # type: ignore[arg-type]
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Grpc's hook."""
        if details.method == LAYOUT:
            return grpc.unary_unary_rpc_method_handler(self._layout)
        if details.method == FETCH:
            return grpc.unary_stream_rpc_method_handler(self._fetch, kv_pb2.FetchRequest.FromString)
        return None

    def stop(self) -> None:
        """Close the port."""
        self._server.stop(None).wait()
        self._channel.close()

    def _layout(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        return self._channel.unary_unary(LAYOUT)(request, timeout=5)

    def _fetch(self, request: kv_pb2.FetchRequest, context: grpc.ServicerContext) -> Iterable[bytes]:
        fetch = self._channel.unary_stream(FETCH, kv_pb2.FetchRequest.SerializeToString)
        frames = list(fetch(request, timeout=5))
        changed = list(self._tamper(frames))
        self.fired += changed != frames
        yield from changed


class TamperedLanes:
    """Does to a sender's frames on lanes what a bad wire or peer would.

    Args:
        sender: whose lanes.
        tamper: gets all frames of a transfer, gives those to send.
    """

    def __init__(self, sender: Sender, tamper: Callable[[list[bytes]], Iterable[bytes]]) -> None:
        self.address = sender.server.address
        self.fired = 0
        self._claim = sender.lanes.claim
        self._give_back = sender.lanes.give_back
        self._sender = sender
        self._tamper = tamper
        sender.lanes.claim = lambda *args: _TamperedLane(self._claim(*args), self)  # type: ignore[method-assign]
        sender.lanes.give_back = lambda lane, clean: self._give_back(lane.lane, clean=clean)  # type: ignore[method-assign]

    def stop(self) -> None:
        """Leave the lanes alone."""
        self._sender.lanes.claim = self._claim  # type: ignore[method-assign]
        self._sender.lanes.give_back = self._give_back  # type: ignore[method-assign]

    def tampered(self, frames: list[bytes]) -> list[bytes]:
        """What is sent instead of these."""
        changed = list(self._tamper(frames))
        self.fired += changed != frames
        return changed


class _TamperedLane:
    """Gathers the frames of one transfer until its end, then sends what the test wants."""

    most_bytes = None

    def __init__(self, lane: TcpSend, tampers: TamperedLanes) -> None:
        self.lane = lane
        self._tampers = tampers
        self._frames: list[bytes] = []

    def load(self, payload: Sequence[memoryview]) -> int:
        return kv_hash.digest(payload)

    def send(self, header: bytes, payload: Sequence[memoryview]) -> None:
        self._frames.append(b"".join((header, *payload)))
        if not parse(header).header.flags & FLAG_END:
            return
        for frame in self._tampers.tampered(self._frames):
            if len(frame) < HEADER_BYTES:
                self.lane.wire.send([frame])
            else:
                self.lane.send(frame[:HEADER_BYTES], [memoryview(frame)[HEADER_BYTES:]])

    def interrupt(self) -> None:
        self.lane.interrupt()
