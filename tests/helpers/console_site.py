"""A gateway's console on a real port, over a cluster whose engines are only told of.

Redis, registry, router, ledgers, the workers' answer about their KV links, `Console`, `Guard` and uvicorn are the real
ones; what an engine would do takes its time here (`Traffic`) and computes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import grpc
import uvicorn
from helpers.workers import worker as registered
from prometheus_client import CollectorRegistry, Counter, start_http_server
from redis.asyncio import Redis
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput

from joinwise.actors.engine_service import EngineService, WorkerIdentity
from joinwise.actors.gateway.acceptance import acceptance
from joinwise.actors.gateway.audit import Audit
from joinwise.actors.gateway.console import Console
from joinwise.actors.gateway.console_feed import Feed, Sources
from joinwise.actors.gateway.federate import Federation
from joinwise.actors.gateway.front import Front
from joinwise.actors.gateway.guard import Guard
from joinwise.actors.gateway.identity import Authenticator
from joinwise.actors.gateway.kv_links import kv_links
from joinwise.actors.gateway.ledgers import LedgerBuilder, Ledgers
from joinwise.actors.gateway.links import Links
from joinwise.actors.kv.links import LinkTable
from joinwise.cluster.config import GatewayConfig, RouterConfig
from joinwise.cluster.errors import JoinwiseError
from joinwise.cluster.router.pulse import take_pulse
from joinwise.cluster.router.registry import Registry, WorkerInfo, WorkerLoad
from joinwise.cluster.router.router import Assignment, Demand, Router
from joinwise.cluster.router.why import decisions_on, latest_decisions
from joinwise.proto import engine_pb2, engine_pb2_grpc

_BLOCK = 16


class Drafts:
    """vLLM's counters of an engine that speculates."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        names = ("draft_tokens", "accepted_tokens", "drafts")
        self.drafted, self.accepted, self.steps = (
            Counter(f"vllm:spec_decode_num_{name}", name, ["engine"], registry=self.registry).labels("0")
            for name in names
        )

    def step(self, drafted: int, accepted: int) -> None:
        """One sequence's drafts were verified."""
        self.drafted.inc(drafted)
        self.accepted.inc(accepted)
        self.steps.inc()


@dataclass
class Worker:
    """A worker that is only told of: its speeds, and what is there of its state."""

    info: WorkerInfo
    prefill_tokens_per_s: float
    step_ms: float
    transport: str = "shm"
    links: LinkTable = field(default_factory=LinkTable)
    prefilling: asyncio.Lock = field(default_factory=asyncio.Lock)
    drafts: Drafts | None = None
    running: int = 0
    waiting: int = 0
    kv_tokens: int = 0

    @property
    def figures(self) -> Any:
        """As `KvMetrics` has them."""
        return SimpleNamespace(links=[link.status() for link in self.links.values()])

    @property
    def load(self) -> WorkerLoad:
        used = min(self.info.num_blocks, self.kv_tokens // _BLOCK)
        return WorkerLoad(
            running=self.running,
            waiting=self.waiting,
            kv_blocks_free=self.info.num_blocks - used,
            kv_blocks_total=self.info.num_blocks,
            decode_step_ms=self.step_ms * (1 + self.running / 40),
            prefill_tokens_per_s=self.prefill_tokens_per_s,
        )


class Site:
    """See the module's text.

    Args:
        redis: where the cluster is.
        cluster: its name.
        settings: of the gateway.
        router: of the router.
    """

    def __init__(self, redis: Redis, cluster: str, settings: GatewayConfig, router: RouterConfig | None = None) -> None:
        router = router or RouterConfig(worker_ttl_s=60)
        self.registry, self.router = Registry(redis, cluster, router), Router(redis, cluster, router)
        self.ledgers = Ledgers(None)
        self.workers: dict[str, Worker] = {}
        self.cluster, self.url = cluster, ""
        self._links = Links(cluster, "gateway", on_message=lambda *_: None, on_lost=self._on_lost)
        self._servers: list[grpc.aio.Server] = []
        self._metrics: list[Any] = []
        sources = Sources(
            pulse=partial(take_pulse, redis, cluster),
            links=self._kv_links,
            decisions=partial(latest_decisions, redis, cluster),
            acceptance=self._acceptance,
            ledgers=self.ledgers,
        )
        console = settings.console
        hello = {"cluster": cluster, "gateway": "gateway", "every_s": console.every_s}
        self.feed = Feed(sources, hello, every_s=console.every_s, pages=console.pages)
        self.console = Console(
            Front(nothing_else, self.ledgers, max_body_bytes=1000), self.feed, partial(decisions_on, redis, cluster)
        )
        self.app = Guard(self.console, Authenticator(settings), settings.limits, Audit(None), self.console.open_paths)

    async def add(
        self, worker_id: str, role: str, pool: str, model: str, *, speculates: bool = False, **more: Any
    ) -> Worker:
        """Register a worker, and let it answer about its links, and about its drafts."""
        speeds = {key: more.pop(key) for key in ("prefill_tokens_per_s", "step_ms", "transport") if key in more}
        drafts = Drafts() if speculates else None
        server = grpc.aio.server()
        port = server.add_insecure_port("127.0.0.1:0")
        fields: dict[str, Any] = {
            "model": model,
            "pool": pool,
            "fingerprint": f"{model}-{pool}",
            "model_digest": model,
            "engine_address": f"127.0.0.1:{port}",
            "kv_address": f"{worker_id}:9000",
            "metrics_address": "127.0.0.1:1" if drafts is None else self._tell(drafts),
            "capabilities": frozenset({"replay"} if drafts is None else ()),
            "kv_layout": model,
            "max_model_len": 32768,
            "block_size": _BLOCK,
            "num_blocks": 4096,
            "max_num_seqs": 32,
        }
        info = registered(worker_id, role, **{**fields, **more})
        speeds = {"prefill_tokens_per_s": 8000.0, "step_ms": 20.0, **speeds}
        worker = self.workers[worker_id] = Worker(info, drafts=drafts, **speeds)
        epoch = await self.registry.register(info)
        worker.info = info.__class__(**{**info.__dict__, "epoch": epoch})
        service = EngineService(WorkerIdentity(self.cluster, worker_id, epoch), worker)  # type: ignore[arg-type]
        engine_pb2_grpc.add_EngineServiceServicer_to_server(service, server)
        await server.start()
        self._servers.append(server)
        return worker

    async def beat(self) -> None:
        """One heartbeat of every worker."""
        for worker in self.workers.values():
            await self.registry.heartbeat(worker.info.worker_id, worker.info.epoch, worker.load)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Site]:
        """Listen on a free port of the loopback address."""
        config = uvicorn.Config(self.app, port=0, log_level="critical", lifespan="off", timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
        task = asyncio.create_task(server.serve())
        try:
            while not server.started:
                assert not task.done()
                await asyncio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            self.url = f"http://127.0.0.1:{port}"
            yield self
        finally:
            self.feed.close()
            server.should_exit = True
            await task

    def _tell(self, drafts: Drafts) -> str:
        """Serve a worker's metrics; returns where."""
        server, _ = start_http_server(0, "127.0.0.1", drafts.registry)
        self._metrics.append(server)
        return f"127.0.0.1:{server.server_port}"

    async def close(self) -> None:
        """Stop what the workers answer with."""
        for metrics in self._metrics:
            await asyncio.to_thread(metrics.shutdown)
            metrics.server_close()
        for each in self._servers:
            await each.stop(0)
        await self._links.close()

    async def _kv_links(self) -> Any:
        return await kv_links(await self.registry.list(), self._links)

    async def _acceptance(self) -> Any:
        return await acceptance(await self.registry.list(), Federation(self.registry.list, None).ask)

    async def _on_lost(self, *_: Any) -> None:
        """No stream is ever opened."""


class Traffic:
    """Requests that are routed, take the time that engines would, and leave a ledger.

    Args:
        site: where.
        seed: of lengths and pauses.
    """

    def __init__(self, site: Site, seed: int = 1) -> None:
        self._site = site
        self._random = random.Random(seed)
        self._numbers = 0

    async def flow(self, model: str, per_s: float, prompt: tuple[int, int], answer: tuple[int, int]) -> None:
        """Requests of a model until cancelled, at Poisson times."""
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(self._random.expovariate(per_s))
                self._numbers += 1
                size = self._random.randint(*prompt), self._random.randint(*answer)
                name = f"chatcmpl-{self._random.getrandbits(64):016x}"
                group.create_task(self.request(name, model, *size))

    async def beats(self, every_s: float = 0.5) -> None:
        """Heartbeats until cancelled."""
        while True:
            await self._site.beat()
            await asyncio.sleep(every_s)

    async def request(self, request_id: str, model: str, prompt: int, answer: int) -> None:
        """One request from its rendering to its last token; a refused one ends at once."""
        created = time.monotonic()
        demand = Demand(request_id=request_id, model=model, prompt_tokens=prompt, max_new_tokens=answer)
        try:
            assignment = await self._site.router.route(demand)
        except JoinwiseError:
            return
        builder = LedgerBuilder(
            request_id=request_id,
            call_id=request_id,
            model=model,
            created=created,
            routed_s=time.monotonic() - created,
            prompt_tokens=prompt,
        )
        builder.assigned(assignment, 0)
        try:
            await self._compute(builder, assignment, prompt, answer)
        finally:
            self._site.ledgers.add(request_id, builder)
            await self._site.router.settle(assignment, answer)

    async def _compute(self, builder: LedgerBuilder, assignment: Assignment, prompt: int, answer: int) -> None:
        workers = self._site.workers
        decode = workers[assignment.decode.worker_id]
        prefill = workers[assignment.prefill.worker_id] if assignment.prefill else decode
        prefill.waiting += 1
        prefill.kv_tokens += prompt
        async with prefill.prefilling:
            prefill.waiting -= 1
            prefill.running += 1
            begun = EngineCoreEvent.new_event(EngineCoreEventType.SCHEDULED)
            await asyncio.sleep(prompt / prefill.prefill_tokens_per_s)
            prefill.running -= 1
        builder.produced(EngineCoreOutput("", [1], events=[begun]), time.monotonic())
        await self._site.router.prefill_done(assignment)
        if prefill is not decode:
            await self._hand_over(builder, prefill, decode, prompt)
            prefill.kv_tokens -= prompt
            decode.kv_tokens += prompt
            builder.replayed(1, decode.step_ms / 1000)
        decode.running += 1
        decode.kv_tokens += answer
        left = answer - 1
        while left > 0:
            await asyncio.sleep(decode.load.decode_step_ms / 1000 * self._random.uniform(0.9, 1.1))
            accepted = self._random.choices(range(5), (2, 2, 3, 3, 4))[0] if decode.drafts else 0
            if decode.drafts is not None:
                decode.drafts.step(4, accepted)
            builder.produced(EngineCoreOutput("", [1] * min(left, 1 + accepted)), time.monotonic())
            left -= 1 + accepted
        decode.running -= 1
        decode.kv_tokens -= prompt + answer
        builder.finish("length" if answer % 5 == 0 else "stop", time.monotonic())

    async def _hand_over(self, builder: LedgerBuilder, prefill: Worker, decode: Worker, prompt: int) -> None:
        size = prompt * 28_672
        wire_s = size / {"shm": 3.2e9, "tcp": 0.9e9, "grpc": 0.25e9}[decode.transport] * self._random.uniform(0.8, 1.3)
        exposed_s = wire_s * self._random.uniform(0.05, 0.3)
        await asyncio.sleep(exposed_s)
        peer = prefill.info.kv_address
        with decode.links.using([peer]) as (link,):
            link.transport, link.why = (
                decode.transport,
                "auto" if decode.transport == "shm" else "auto; shm: another host",
            )
            link.add(link.transport, "none", bytes=size, streams=1, wire_seconds=wire_s, exposed_seconds=exposed_s)
            link.measure(size, wire_s)
        builder.transferred(
            engine_pb2.TransferReport(
                bytes=size,
                wire_seconds=wire_s,
                exposed_seconds=exposed_s,
                import_seconds=wire_s * 0.4,
                transport=decode.transport,
            )
        )


async def nothing_else(scope: Any, receive: Any, send: Any) -> None:
    """The application behind the console."""
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": b"nothing else"})
