"""The gateway's streams to workers: one long-lived gRPC stream per worker, for all its requests.

A link is opened when a request first needs it and kept. A link that breaks tells its owner once;
the next request opens a new one, and a worker that has restarted is another worker (its epoch is
part of the key), so nothing of the old one is ever taken for the new one's.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import Context

import grpc
import vllm

from joinwise.actors.engine_service import PROTOCOL_VERSION
from joinwise.actors.tls import Certificates
from joinwise.cluster.errors import WorkerLostError
from joinwise.cluster.router.router import WorkerRef
from joinwise.proto import engine_pb2, engine_pb2_grpc

logger = logging.getLogger(__name__)

_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
]
_CONNECT_TIMEOUT_S = 10.0
Metadata = tuple[tuple[str, str], ...]


class Link:
    """One open stream to one worker."""

    def __init__(self, worker: WorkerRef, channel: grpc.aio.Channel) -> None:
        self.worker = worker
        self._channel = channel
        self._call: grpc.aio.StreamStreamCall | None = None
        self._outgoing: asyncio.Queue[engine_pb2.AttachRequest] = asyncio.Queue()
        self._writer: asyncio.Task[None] | None = None
        self.broken = False

    async def open(self, hello: engine_pb2.Hello, metadata: Metadata = ()) -> None:
        """Introduce the gateway.

        Raises:
            WorkerLostError: nobody answers at the address, or another worker does.
        """
        self._call = engine_pb2_grpc.EngineServiceStub(self._channel).Attach(metadata=metadata)
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await self._call.write(engine_pb2.AttachRequest(hello=hello))
                first = await self._call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError) as error:
            detail = error.details() if isinstance(error, grpc.aio.AioRpcError) else type(error).__name__
            raise WorkerLostError(f"worker {self.worker.worker_id} does not accept this gateway: {detail}") from error
        if not isinstance(first, engine_pb2.AttachResponse) or first.WhichOneof("message") != "welcome":
            raise WorkerLostError(f"worker {self.worker.worker_id} ended the stream at once")
        # A link outlives the request that opens it, and takes nothing of its context along.
        self._writer = asyncio.create_task(self._write(), context=Context())

    def send(self, message: engine_pb2.AttachRequest) -> None:
        """Queue a message; order is kept. A broken link drops it, and its owner has been told."""
        if not self.broken:
            self._outgoing.put_nowait(message)

    async def read(self, on_message: Callable[[engine_pb2.AttachResponse], None]) -> str:
        """Hand over messages until the stream ends; returns why it did."""
        assert self._call is not None
        try:
            while isinstance(message := await self._call.read(), engine_pb2.AttachResponse):
                on_message(message)
            return "the worker ended the stream"
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        except asyncio.InvalidStateError as error:
            return str(error)
        finally:
            self.broken = True

    async def close(self) -> None:
        """End the stream; the worker aborts what is left of it."""
        self.broken = True
        if self._writer is not None:
            self._writer.cancel()
        if self._call is not None:
            self._call.cancel()
        await self._channel.close()

    async def _write(self) -> None:
        assert self._call is not None
        try:
            while True:
                await self._call.write(await self._outgoing.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            self.broken = True
            self._call.cancel()


class Links:
    """All links of one gateway.

    Args:
        cluster: the cluster's name.
        gateway_id: this gateway process.
        on_message: called with every message of a worker.
        on_lost: called once when a link has broken, with the reason.
        check: called before a link is opened; what it raises, `get` raises.
        certificates: the cluster's own, where its processes speak TLS.
    """

    def __init__(
        self,
        cluster: str,
        gateway_id: str,
        *,
        on_message: Callable[[WorkerRef, engine_pb2.AttachResponse], None],
        on_lost: Callable[[WorkerRef, str], Awaitable[None]],
        check: Callable[[WorkerRef], Awaitable[None]] | None = None,
        certificates: Certificates | None = None,
    ) -> None:
        self._cluster = cluster
        self._gateway_id = gateway_id
        self._on_message = on_message
        self._on_lost = on_lost
        self._check = check
        self._certificates = certificates
        self.metadata: Metadata = ()
        """Shown with every call: the cluster's token, where there is one."""
        self._links: dict[tuple[str, int], Link] = {}
        self._opening: dict[tuple[str, int], asyncio.Lock] = {}
        self._readers: set[asyncio.Task[None]] = set()

    async def get(self, worker: WorkerRef) -> Link:
        """The link to a worker, opened if need be.

        Raises:
            WorkerLostError: it cannot be opened.
            JoinwiseError: what `check` says.
        """
        key = (worker.worker_id, worker.epoch)
        async with self._opening.setdefault(key, asyncio.Lock()):
            link = self._links.get(key)
            if link is not None and not link.broken:
                return link
            if self._check is not None:
                await self._check(worker)
            link = Link(worker, self.channel(worker.engine_address))
            hello = engine_pb2.Hello(
                protocol_version=PROTOCOL_VERSION,
                vllm_version=vllm.__version__,
                cluster=self._cluster,
                gateway_id=self._gateway_id,
                worker_id=worker.worker_id,
                worker_epoch=worker.epoch,
            )
            try:
                await link.open(hello, self.metadata)
            except BaseException:
                await link.close()
                raise
            self._links[key] = link
            reader = asyncio.create_task(self._read(key, link), context=Context())
            self._readers.add(reader)
            reader.add_done_callback(self._readers.discard)
            return link

    def find(self, worker: WorkerRef) -> Link | None:
        """The open link to a worker, if there is one."""
        link = self._links.get((worker.worker_id, worker.epoch))
        return None if link is None or link.broken else link

    def channel(self, address: str) -> grpc.aio.Channel:
        """A channel to a worker, for single calls; the caller closes it."""
        if self._certificates is None:
            return grpc.aio.insecure_channel(address, _CHANNEL_OPTIONS)
        options = [*_CHANNEL_OPTIONS, *self._certificates.channel_options]
        return grpc.aio.secure_channel(address, self._certificates.grpc_channel(), options)

    async def close(self) -> None:
        """End all streams."""
        for reader in list(self._readers):
            reader.cancel()
        for link in list(self._links.values()):
            await link.close()
        self._links.clear()

    async def _read(self, key: tuple[str, int], link: Link) -> None:
        reason = await link.read(lambda message: self._on_message(link.worker, message))
        if self._links.get(key) is link:
            del self._links[key]
        logger.warning("link to worker %s lost: %s", link.worker.worker_id, reason)
        await link.close()
        await self._on_lost(link.worker, reason)
