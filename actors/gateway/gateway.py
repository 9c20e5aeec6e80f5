"""One gateway: vLLM's front end over the cluster for each model, behind one HTTP and one gRPC listener.

Owns its Redis client, its models (`served.py`), and the two background jobs that keep leases alive and
bury the dead. Stateless: another gateway, or this one restarted, knows as much.
"""

import asyncio
import contextlib
import logging
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import uvicorn
from prometheus_client import REGISTRY, Gauge
from vllm.envs import enable_envs_cache

from joinwise.actors.gateway.acceptance import Acceptance, acceptance
from joinwise.actors.gateway.adapters import adapter_routes
from joinwise.actors.gateway.audit import Audit
from joinwise.actors.gateway.console import Console
from joinwise.actors.gateway.console_feed import Feed, Sources
from joinwise.actors.gateway.dispatch import Dispatch
from joinwise.actors.gateway.federate import Federation
from joinwise.actors.gateway.front import Front
from joinwise.actors.gateway.grpc_server import GrpcOptions, GrpcServer, serve_grpc
from joinwise.actors.gateway.guard import Guard
from joinwise.actors.gateway.http_limits import limited_protocol
from joinwise.actors.gateway.identity import Authenticator
from joinwise.actors.gateway.inference import InferenceService
from joinwise.actors.gateway.kv_links import kv_links
from joinwise.actors.gateway.ledgers import Ledgers
from joinwise.actors.gateway.models import Models
from joinwise.actors.gateway.population import Population
from joinwise.actors.gateway.served import ServedModel, Shared, serve_model
from joinwise.actors.gateway.tickets import on_terms
from joinwise.actors.gateway.tracing import Traces
from joinwise.actors.ops import OpsServer
from joinwise.actors.phases import Phases
from joinwise.actors.tls import Certificates, peers
from joinwise.actors.vllm.series import ModelSeries
from joinwise.cluster.client.types import ClusterStatus, KvLinkStatus, WorkerStatus
from joinwise.cluster.config import JoinwiseConfig
from joinwise.cluster.errors import ConfigError, JoinwiseError
from joinwise.cluster.router.away import SteadyRouter
from joinwise.cluster.router.prefix_index import PrefixFollower, PrefixIndex
from joinwise.cluster.router.pulse import take_pulse
from joinwise.cluster.router.registry import Registry
from joinwise.cluster.router.why import decisions_on, latest_decisions
from joinwise.cluster.store.client import connect

logger = logging.getLogger(__name__)

_JOIN_POLL_S = 0.2
_QUIET_S = 5.0  # without a request, while draining: load balancers need a moment to turn away
_STUCK_S = 60.0
_RUNNING = Gauge("joinwise:requests_running", "Requests that have not ended")


@dataclass(frozen=True)
class Addresses:
    """Where a gateway listens."""

    http: str
    grpc: str


class Gateway:
    """A gateway of one cluster, for all its models.

    Args:
        config: the cluster's configuration.
        redis_url: the cluster's Redis, the embedded one's address included.
    """

    def __init__(self, config: JoinwiseConfig, redis_url: str) -> None:
        self._config = config
        self.gateway_id = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self._redis = connect(redis_url, config.redis)
        self._registry = Registry(self._redis, config.cluster, config.router)
        self._router = SteadyRouter(self._redis, config.cluster, config.router, wakes=config.wakes)
        self._prefixes = PrefixIndex()
        tracing = config.tracing
        self._traces = Traces(tracing, config.cluster, self.gateway_id) if tracing is not None else None
        self._ledgers = Ledgers(REGISTRY, self._traces)
        self._population = Population(lambda: sum(len(model.core.assignments()) for model in self._models))
        self._jobs: list[asyncio.Task[None]] = []
        self._http: uvicorn.Server | None = None
        self._http_task: asyncio.Task[None] | None = None
        self._grpc: GrpcServer | None = None
        self._service: InferenceService | None = None
        self._models: list[ServedModel] = []
        self._series = ModelSeries(REGISTRY) if len(config.models) > 1 else None
        tls = config.gateway.tls
        self._certificates = Certificates.of_gateway(tls) if tls is not None else None
        self._peers = peers(config.tls)
        self._authenticator = Authenticator(config.gateway)
        self._audit = Audit(config.gateway.audit_file)
        self._ops: OpsServer | None = None
        self._feed: Feed | None = None
        self._served: dict[str, frozenset[str]] = {}  # of each model, the roles with a live worker
        self._draining = False
        self._beaten = time.monotonic()
        self.phases = Phases()

    async def build(self) -> Any:
        """Make the ASGI application; waits for a worker of each model, unless its pools may be at zero.

        Raises:
            NoWorkerError: no worker of another model has registered within `ray.start_timeout_s`.
            JoinwiseError: Redis or a model cannot be reached.
        """
        config = self._config
        shared = Shared(
            config=config,
            gateway_id=self.gateway_id,
            registry=self._registry,
            router=self._router,
            prefixes=self._prefixes,
            ledgers=self._ledgers,
            peers=self._peers,
            series=self._series,
            traces=self._traces,
            phases=self.phases,
        )
        for model in config.models:
            beside = self._models[0].app if self._models else None
            self._models.append(await serve_model(model, shared, beside))
        enable_envs_cache()  # vLLM asks for some of its settings with every token
        if self._series is not None:
            names = [each.name for each in self._models]
            self._series.show(names, tools=any(each.app.state.args.tool_call_parser for each in self._models))
        models = Models({each.name: each.app for each in self._models})
        adapters = [each.adapters for each in self._models]
        models.first.include_router(adapter_routes(adapters, admin=config.gateway.admin))
        models.first.include_router(Federation(self._registry.list, self._peers).routes())
        models.first.include_router(self._ledgers.routes())
        self._service = InferenceService(models, status=self._status, ledger=self._ledger_of, admission=on_terms)
        _RUNNING.set_function(lambda: len(self.running()))
        REGISTRY.register(self._population)
        jobs = [self._renew(), self._expire(), self._watch()]
        jobs += [each.follow(config.router.heartbeat_s) for each in adapters]
        if config.router.prefix_events:
            jobs.append(PrefixFollower(self._redis, config.cluster, self._prefixes).follow())
        self._jobs = [asyncio.create_task(job) for job in jobs]
        app = models.first if len(self._models) == 1 else Dispatch(models)
        front = Front(app, self._ledgers, max_body_bytes=config.gateway.max_body_bytes)
        console = self._console(front) if config.gateway.console.enabled else None
        open_paths = console.open_paths if console is not None else ()
        return Guard(console or front, self._authenticator, config.gateway.limits, self._audit, open_paths)

    async def start(self) -> Addresses:
        """Build, and open both listeners."""
        gateway, tls = self._config.gateway, self._certificates
        if gateway.ops_port is not None:
            self._ops = self._open_ops(gateway.ops_port)
        app = await self.build()
        listener = _listen(gateway.host, gateway.http_port)
        self._http = _Listener(
            uvicorn.Config(
                app,
                http=limited_protocol(gateway.limits),
                log_level="warning",
                access_log=False,
                lifespan="off",
                timeout_keep_alive=75,
                ssl_context_factory=(lambda *_: tls.server_context()) if tls is not None else None,
            )
        )
        self._http_task = asyncio.create_task(self._http.serve(sockets=[listener]))
        grpc_address = await self.start_grpc()
        self.phases.done("listeners")
        scheme = "https" if tls else "http"
        return Addresses(f"{scheme}://{gateway.host}:{listener.getsockname()[1]}", grpc_address)

    async def start_grpc(self) -> str:
        """Open the gRPC listener alone; returns its address."""
        assert self._service is not None, "build() comes first"
        gateway = self._config.gateway
        self._grpc = await serve_grpc(
            self._service,
            GrpcOptions(
                host=gateway.host,
                port=gateway.grpc_port,
                max_body_bytes=gateway.max_body_bytes,
                certificates=self._certificates,
                max_concurrent=gateway.limits.concurrent,
                max_metadata_bytes=gateway.limits.header_bytes,
                authenticator=self._authenticator,
            ),
        )
        return f"{gateway.host}:{self._grpc.port}"

    async def stop(self) -> None:
        """Let running requests end, then close everything."""
        grace = self._config.gateway.drain_s
        if self._grpc is not None:
            await self._grpc.stop(grace)
        if self._feed is not None:
            self._feed.close()
        if self._http is not None and self._http_task is not None:
            self._http.config.timeout_graceful_shutdown = int(grace)
            self._http.should_exit = True
            await self._http_task
        for job in self._jobs:
            job.cancel()
        for model in self._models:
            for assignment in model.core.assignments():
                await self._router.settle(assignment)
            await model.close()
        if self._series is not None:
            self._series.close()
        with contextlib.suppress(KeyError):  # it was never built
            REGISTRY.unregister(self._population)
        if self._ops is not None:
            await asyncio.to_thread(self._ops.close)
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)
        self._audit.close()
        await self._redis.aclose()

    async def drain(self, drain_s: float) -> None:
        """Say that this gateway should get no more requests, and return when none runs, or after `drain_s` seconds.

        Both listeners stay open: whoever still sends here, while load balancers learn of it, is still served.
        """
        self._draining = True
        if self._grpc is not None:
            await self._grpc.set_serving(False)
        quiet_since, deadline = time.monotonic(), time.monotonic() + drain_s
        while time.monotonic() < min(deadline, quiet_since + _QUIET_S):
            if self.running():
                quiet_since = time.monotonic()
            await asyncio.sleep(_JOIN_POLL_S)

    def running(self) -> list[str]:
        """Ids of requests that have not ended, for `assert_idle`."""
        return [request_id for model in self._models for request_id in model.core.running]

    # Inside.

    async def _renew(self) -> None:
        """Keep the leases of running requests alive."""
        while True:
            await asyncio.sleep(self._config.router.lease_s / 3)
            with contextlib.suppress(JoinwiseError):
                if assignments := [each for model in self._models for each in model.core.assignments()]:
                    lost = set(await self._router.renew(assignments))
                    await self._router.adopt(each for model in self._models for each in model.core.lost_leases(lost))

    async def _expire(self) -> None:
        """Bury leases that nobody renews, and workers that have gone silent."""
        while True:
            await asyncio.sleep(self._config.router.heartbeat_s)
            with contextlib.suppress(JoinwiseError):
                await self._router.expire()

    async def _watch(self) -> None:
        """Remember the live workers and their roles; a Redis that does not answer changes nothing."""
        while True:
            self._beaten = time.monotonic()
            with contextlib.suppress(JoinwiseError):
                live = await self._registry.states()
                self._population.observe(each.info for each in live)
                workers = [each.info for each in live if each.info.role != "draining"]
                alone = len(self._models) == 1
                self._served = {each.name: each.observe(workers, alone=alone) for each in self._models}
                strangers = frozenset[str]().union(*(each.llm.strangers for each in self._models))
                self._router.observe(tuple(each for each in live if each.info.worker_id not in strangers))
                self._prefixes.keep({each.worker_id: each.epoch for each in workers})
            await asyncio.sleep(self._config.router.heartbeat_s)

    def _open_ops(self, port: int) -> OpsServer:
        gateway, loop = self._config.gateway, asyncio.get_running_loop()

        def drain() -> None:
            patience = gateway.drain_s
            asyncio.run_coroutine_threadsafe(self.drain(patience), loop).result(patience + 10)

        try:
            tls = self._peers.server_context(clients=False) if self._peers else None
            return OpsServer(gateway.host, port, live=self._sick, ready=self._unready, drain=drain, tls=tls)
        except OSError as error:
            raise ConfigError(f"gateway.ops_port: cannot listen on {gateway.host}:{port}: {error.strerror}") from error

    def _sick(self) -> str:
        """Why this process should be restarted; asked by threads. Nothing of it waits for the event loop."""
        if self._http is not None and (silent := time.monotonic() - self._beaten) > _STUCK_S:
            return f"the event loop has not run for {silent:.0f} s"
        return ""

    def _unready(self) -> str:
        if self._draining:
            return "it drains"
        if self._http is None or not self._http.started:
            return "it has not started yet"
        if self._config.wakes or any(
            "mixed" in roles or roles >= {"prefill", "decode"} for roles in self._served.values()
        ):
            return self._sick()  # requests for another model, with no worker now, get their 503 one by one
        roles = sorted({role for each in self._served.values() for role in each})
        return f"no worker for every role is registered, only: {', '.join(roles) or 'none'}"

    async def _ledger_of(self, request_id: str) -> bytes | None:
        kept = [ledger.to_json() for ledger in self._ledgers.of_call(request_id)]
        if not kept:
            return None
        return (kept[0] if len(kept) == 1 else f"[{','.join(kept)}]").encode()

    async def _status(self) -> ClusterStatus:
        snapshot = await self._router.snapshot()
        return ClusterStatus(
            cluster=self._config.cluster,
            workers=tuple(WorkerStatus(**worker) for worker in snapshot["workers"]),
            leases=snapshot["leases"],
            kv_links=await self._kv_links(),
            troubles=await self._registry.troubles(),
            asleep=tuple(pool.name for pool in await self._registry.asleep()),
        )

    async def _kv_links(self) -> tuple[KvLinkStatus, ...]:
        return await kv_links(await self._registry.list(), self._models[0].links) if self._models else ()

    async def _acceptance(self) -> tuple[Acceptance, ...]:
        return await acceptance(await self._registry.list(), Federation(self._registry.list, self._peers).ask)

    def _console(self, front: Front) -> Console:
        client, cluster, settings = self._redis, self._config.cluster, self._config.gateway.console
        sources = Sources(
            pulse=partial(take_pulse, client, cluster),
            links=self._kv_links,
            decisions=partial(latest_decisions, client, cluster),
            acceptance=self._acceptance,
            ledgers=self._ledgers,
        )
        hello = {"cluster": cluster, "gateway": self.gateway_id, "every_s": settings.every_s}
        self._feed = Feed(sources, hello, every_s=settings.every_s, pages=settings.pages)
        return Console(front, self._feed, partial(decisions_on, client, cluster))


class _Listener(uvicorn.Server):
    """uvicorn without its signal handlers: the process is not its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"the HTTP listener cannot bind {host}:{port}: {error.strerror}; is another cluster running? "
            "Set gateway.http_port, or stop it with `joinwise down`"
        ) from error
    return listener
