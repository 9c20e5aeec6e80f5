"""The two processes of `joinwise bench kv`: real KV endpoints over caches of one shape, without engines.

Each end also speaks the baseline, blocking TCP on loopback, over the same memory. Both serve calls from
the benchmark's own process, one at a time, so that nothing else runs while something is timed.
"""

import contextlib
import resource
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import xxhash

from joinwise.actors.kv.blocks import KvBlocks
from joinwise.actors.kv.client import KvClient
from joinwise.actors.kv.fetching import Fetch
from joinwise.actors.kv.frames import SealedHeader
from joinwise.actors.kv.lanes.kinds import KINDS
from joinwise.actors.kv.lanes.lane import LaneOptions
from joinwise.actors.kv.lanes.pool import LanePool
from joinwise.actors.kv.lanes.server import LaneServer
from joinwise.actors.kv.receiving import FetchSpec, LandingBudget
from joinwise.actors.kv.sending import SendTable, SendTransfer
from joinwise.actors.kv.server import KvServer
from joinwise.actors.tls import peers
from joinwise.cluster.config import PeerTlsConfig

BASELINE_PIECE = 4 << 20
"""Bytes that one `sendall` or `recv_into` of the baseline is given."""
_LANDING_BYTES = 256 << 20
_WAIT_S = 120.0


@dataclass(frozen=True)
class Shape:
    """A KV cache: sizes of SmolLM2-135M in float32, in blocks of 32 tokens."""

    num_blocks: int
    layers: int = 30
    heads: int = 3
    head_dim: int = 64
    block_size: int = 32
    frame_bytes: int = 2 << 20

    @property
    def layer_block_bytes(self) -> int:
        """Bytes of one block of one layer."""
        return 2 * self.heads * self.head_dim * self.block_size * 4

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of all layers."""
        return self.layers * self.layer_block_bytes


class End:
    """A cache in one piece of memory, and the layers that are views of it."""

    def __init__(self, shape: Shape, seed: int) -> None:
        torch.set_num_threads(1)
        self.shape = shape
        generator = torch.Generator().manual_seed(seed)
        size = shape.num_blocks * shape.block_bytes // 8
        self.memory = torch.randint(-(2**63), 2**63 - 1, (size,), generator=generator).view(torch.float32)
        layers = self.memory.view(shape.layers, shape.num_blocks, shape.heads, 2 * shape.block_size, shape.head_dim)
        caches = {f"layers.{index}": layer for index, layer in enumerate(layers)}
        self.blocks = KvBlocks(caches, block_size=shape.block_size, interior="bench", model_digest="bench")
        slot_bytes = max(shape.frame_bytes, shape.layer_block_bytes)
        self.lane_options = LaneOptions(slot_bytes=slot_bytes)

    def cpu_seconds(self) -> float:
        """CPU that this process has used, in user space and in the kernel."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    def digest(self, block_ids: Sequence[int]) -> str:
        """Of all bytes of some blocks, layer after layer."""
        digest = xxhash.xxh3_128()
        for layer in range(self.shape.layers):
            for view in self.blocks.read(layer, block_ids):
                digest.update(view)
        return digest.hexdigest()

    def bytes(self, size: int) -> memoryview:
        """The first bytes of the cache."""
        return self.memory.view(torch.uint8).numpy().data[:size]


class Sender(End):
    """A prefill worker whose prompts are all computed; with `tls` its ports speak nothing else, but the baseline's."""

    def __init__(self, shape: Shape, tls: PeerTlsConfig | None = None) -> None:
        super().__init__(shape, seed=1)
        certificates = peers(tls)
        self._table = SendTable(lambda: None)
        self._server = KvServer(
            self._table,
            self.blocks,
            bind="127.0.0.1:0",
            frame_bytes=shape.frame_bytes,
            claim_timeout_s=10.0,
            max_streams=8,
            credentials=certificates.grpc_server() if certificates is not None else None,
            lanes=LaneServer(
                "127.0.0.1:0",
                options=self.lane_options,
                tls=certificates.server_context() if certificates is not None else None,
            ),
            lane_kinds=KINDS,
        )
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve_baseline, daemon=True).start()

    def addresses(self) -> tuple[str, int]:
        """Of the KV port, and the port of the baseline."""
        return self._server.address, self._listener.getsockname()[1]

    def offer(self, name: str, block_ids: Sequence[int]) -> None:
        """Open a transfer of these blocks, all computed; forget those that are over."""
        self._table.take_releasable(time.monotonic())
        size = self.shape.block_size
        transfer = SendTransfer(
            name, name, 1, len(block_ids), self.shape.layers, len(block_ids) * size, _WAIT_S, size, list(block_ids)
        )
        for layer in range(self.shape.layers):
            self._table.advance(transfer, layer, len(block_ids))
        self._table.open(transfer)
        self._table.end(name)

    def _serve_baseline(self) -> None:
        connected, _ = self._listener.accept()
        while request := connected.recv(8, socket.MSG_WAITALL):
            content = self.bytes(int.from_bytes(request, "little"))
            for start in range(0, len(content), BASELINE_PIECE):
                connected.sendall(content[start : start + BASELINE_PIECE])


class Receiver(End):
    """A decode worker that fetches from one sender, by any transport."""

    def __init__(
        self,
        shape: Shape,
        transports: Sequence[str],
        address: str,
        baseline_port: int,
        tls: PeerTlsConfig | None = None,
    ) -> None:
        super().__init__(shape, seed=2)
        certificates = peers(tls)
        self._address = address
        self._clients = {
            transport: KvClient(
                self.blocks,
                LandingBudget(_LANDING_BYTES),
                transport=transport,
                lanes=LanePool(
                    options=self.lane_options,
                    tls=certificates.client_context if certificates is not None else None,
                    server_name=certificates.server_name if certificates is not None else "",
                ),
                slot_bytes=self.lane_options.slot_bytes,
                certificates=certificates,
            )
            for transport in transports
        }
        self._baseline = socket.create_connection(("127.0.0.1", baseline_port))

    def fetch(self, transport: str, name: str, block_ids: Sequence[int]) -> float:
        """Fetch an offered transfer.

        Returns:
            Seconds from the wish to the last block's being in its place, its checksum compared.
        """
        size = self.shape.block_size
        spec = FetchSpec(name, name, 1, (self._address,), 0, tuple(block_ids), len(block_ids) * size, _WAIT_S)
        begin = time.perf_counter()
        report = self._clients[transport].fetch(Fetch(spec))
        seconds = time.perf_counter() - begin
        if report.transport != transport or report.bytes != len(block_ids) * self.shape.block_bytes:
            raise RuntimeError(f"{transport}: {report}")
        return seconds

    def check(self, transport: str, name: str, block_ids: Sequence[int]) -> tuple[str, int]:
        """Fetch into wiped blocks, untimed.

        Returns:
            Digest of what landed, and the payload bytes whose checksums were compared on the way.
        """
        for layer in range(self.shape.layers):
            for view in self.blocks.place(layer, block_ids) or []:
                view[:] = bytes(view.nbytes)
        with _counting_checksums() as checked:
            self.fetch(transport, name, block_ids)
        return self.digest(block_ids), sum(checked)

    def baseline(self, size: int) -> float:
        """Seconds from asking for this many bytes to having them."""
        target = self.bytes(size)
        begin = time.perf_counter()
        self._baseline.sendall(size.to_bytes(8, "little"))
        for start in range(0, size, BASELINE_PIECE):
            piece = target[start : start + BASELINE_PIECE]
            while piece.nbytes:
                if not (count := self._baseline.recv_into(piece)):
                    raise ConnectionError("the baseline's sender has ended")
                piece = piece[count:]
        return time.perf_counter() - begin


@contextlib.contextmanager
def _counting_checksums() -> Iterator[list[int]]:
    """The sizes of all payloads whose checksums are compared meanwhile."""
    verify, checked = SealedHeader.verify, []

    def counting(self: SealedHeader, checksum: int) -> None:
        verify(self, checksum)
        checked.append(self.payload_bytes)

    SealedHeader.verify = counting  # type: ignore[method-assign]
    try:
        yield checked
    finally:
        SealedHeader.verify = verify  # type: ignore[method-assign]
