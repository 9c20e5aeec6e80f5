"""The draft actor: a drafter behind its gRPC port, which tells the cluster every second where it is.

Knows nothing of Ray, as the engine actor does not, and nothing of vLLM.
"""

import asyncio
import contextlib
import logging
import os
from dataclasses import replace
from functools import partial
from typing import Any

from prometheus_client import REGISTRY

from joinwise.actors import cpu
from joinwise.actors.auth import is_loopback
from joinwise.actors.draft.desk import Desk
from joinwise.actors.draft.drafter import Drafter
from joinwise.actors.draft.lookup import PromptLookup
from joinwise.actors.draft.metrics import DeskMetrics
from joinwise.actors.draft.service import DraftService
from joinwise.actors.draft.vocabulary import Vocabulary
from joinwise.actors.draft.wire import CHANNEL_OPTIONS
from joinwise.actors.models import resolve_model
from joinwise.actors.ops import OpsServer
from joinwise.actors.phases import Phases
from joinwise.actors.spec import WorkerSpec
from joinwise.actors.tls import Certificates, peers
from joinwise.actors.worker_ports import GrpcPort, open_ops
from joinwise.cluster.config import JoinwiseConfig
from joinwise.cluster.config_model import DraftConfig
from joinwise.cluster.drafts import DraftInfo, Drafts
from joinwise.cluster.errors import ConfigError, JoinwiseError
from joinwise.cluster.router.registry import Registry
from joinwise.cluster.store.client import connect
from joinwise.proto import draft_pb2, draft_pb2_grpc

logger = logging.getLogger(__name__)

_SERVICE = draft_pb2.DESCRIPTOR.services_by_name["DraftService"].full_name
_LEAVE_S = 10.0


class DraftWorker:
    """One drafter and everything around it. All methods run on one event loop."""

    def __init__(self, config: JoinwiseConfig, spec: WorkerSpec, redis_url: str) -> None:
        self._config = config
        self._spec = spec
        self._pool = next(pool for pool in config.pools if pool.name == spec.pool)
        self._redis = connect(redis_url, config.redis)
        self._drafts = Drafts(self._redis, config.cluster, config.router)
        self._desk: Desk | None = None
        self._port: GrpcPort | None = None
        self._metrics: DeskMetrics | None = None
        self._ops: OpsServer | None = None
        self._heart: asyncio.Task[None] | None = None
        self._dead: BaseException | None = None
        self._leaving = False
        self.phases = Phases()

    async def start(self) -> dict[str, Any]:
        """Load the drafter and begin to serve.

        Returns:
            Worker id, addresses and process.

        Raises:
            ConfigError: the draft model cannot be used.
            JoinwiseError: it cannot be found, or Redis does not answer.
        """
        cpu.pin(self._spec.cores)
        drafter, vocabulary, hidden_size = await asyncio.to_thread(self._load, self._pool.draft or DraftConfig())
        self.phases.done("drafter")
        self._desk = desk = Desk(drafter, hidden_size=hidden_size, on_dead=self._on_dead)
        service = DraftService(desk, cluster=self._config.cluster, drafter=drafter.name, vocabulary=vocabulary)
        self._service = service
        self._metrics = DeskMetrics(lambda: desk.figures, lambda: drafter.held, lambda: service.engines)
        REGISTRY.register(self._metrics)
        desk.start()
        certificates = peers(self._config.tls)
        address = await self._serve(service, certificates)
        self._ops = open_ops(
            self._spec.host,
            self._pool,
            live=self.failure,
            ready=self._unready,
            drain=self._leave,
            patience_s=_LEAVE_S,
            certificates=certificates,
        )
        metrics_address = f"{self._spec.host}:{self._ops.port}"
        info = DraftInfo(self._spec.worker_id, address, metrics_address, drafter.name)
        if vocabulary is not None:
            info = replace(
                info,
                vocabulary_model=vocabulary.model,
                vocabulary_size=vocabulary.size,
                vocabulary_digest=vocabulary.digest,
            )
        await self._drafts.beat(self._pool.name, info)
        self._heart = asyncio.create_task(self._beat(info))
        self.phases.done("registration")
        logger.info("draft actor %s is ready after %.1f s", self._spec.worker_id, self.phases.total)
        return {
            "worker_id": self._spec.worker_id,
            "draft_address": address,
            "metrics_address": metrics_address,
            "pid": os.getpid(),
        }

    async def stop(self, drain_s: float = 0.0) -> None:
        """Leave and close everything. Nothing is waited for: engines go on without drafts."""
        if self._port is not None:
            await self._port.leave()
        await self._leave()
        if self._port is not None:
            await self._port.close()
        if self._desk is not None:
            await asyncio.to_thread(self._desk.stop)
        if self._metrics is not None:
            REGISTRY.unregister(self._metrics)
        if self._ops is not None:
            await asyncio.to_thread(self._ops.close)
        await self._redis.aclose()

    def failure(self) -> str:
        """Why this actor is sick; empty when it is well."""
        if self._dead is not None:
            return f"the drafter has failed: {self._dead}"
        return "" if self._desk is None or self._desk.alive else "the drafter's thread has ended"

    # Inside.

    def _load(self, settings: DraftConfig) -> tuple[Drafter, Vocabulary | None, int]:
        """The drafter, its vocabulary, and the numbers in a hidden state that it takes."""
        if settings.head is not None:
            return self._load_head(settings, settings.head)
        if settings.model is None:
            return PromptLookup(), None, 0
        from joinwise.actors.draft.causal import CausalDrafter

        model = resolve_model(settings.model, revision=settings.revision)
        vocabulary = Vocabulary.read(settings.model, model.path)
        try:
            drafter = CausalDrafter.load(
                model.path,
                settings.dtype,
                slots=settings.slots,
                max_tokens=settings.max_tokens,
                name=settings.model,
                threads=self._pool.compute_threads,
                device=self._device,
                ahead=settings.ahead if settings.ahead is not None else self._apart,
            )
        except (ValueError, OSError, RuntimeError) as error:
            raise ConfigError(f"pool {self._pool.name!r} cannot draft with {settings.model!r}: {error}") from error
        return drafter, vocabulary, 0

    def _load_head(self, settings: DraftConfig, name: str) -> tuple[Drafter, Vocabulary, int]:
        from joinwise.actors.draft.head import head_folder
        from joinwise.actors.draft.head_drafter import HeadDrafter

        served = self._config.model_named(self._pool.model)
        target = resolve_model(served.model, revision=served.revision)
        vocabulary = Vocabulary.read(served.name, target.path)
        try:
            drafter = HeadDrafter.load(
                head_folder(name),
                target,
                settings.dtype,
                slots=settings.slots,
                max_tokens=settings.max_tokens,
                threads=self._pool.compute_threads,
                device=self._device,
            )
        except RuntimeError as error:
            raise ConfigError(f"pool {self._pool.name!r} cannot draft with the head {name!r}: {error}") from error
        return drafter, vocabulary, drafter.hidden_size

    @property
    def _device(self) -> str:
        return "cuda" if self._pool.device == "gpu" else "cpu"

    @property
    def _apart(self) -> bool:
        """Whether it drafts where nothing else runs."""
        return self._device == "cuda" or self._pool.cores is not None

    async def _serve(self, service: DraftService, certificates: Certificates | None) -> str:
        self._port = GrpcPort(
            self._spec.host,
            _SERVICE,
            partial(draft_pb2_grpc.add_DraftServiceServicer_to_server, service),
            token="" if is_loopback(self._spec.host) else await self._registry_token(),
            certificates=certificates,
            options=CHANNEL_OPTIONS,
        )
        await self._port.open()
        return self._port.address

    async def _registry_token(self) -> str:
        return await Registry(self._redis, self._config.cluster, self._config.router).token()

    def _unready(self) -> str:
        return "it drains" if self._leaving else self.failure()

    def _on_dead(self, error: BaseException) -> None:
        self._dead = error
        self._service.end_all()

    async def _leave(self) -> None:
        """Be given to no engine any more."""
        self._leaving = True
        if self._heart is not None:
            self._heart.cancel()
        with contextlib.suppress(JoinwiseError):
            await self._drafts.leave(self._pool.name, self._spec.worker_id)

    async def _beat(self, info: DraftInfo) -> None:
        while not self.failure():
            await asyncio.sleep(self._config.router.heartbeat_s)
            try:
                round_ms = 1000 * self._desk.figures.round_s if self._desk is not None else 0.0
                await self._drafts.beat(self._pool.name, replace(info, round_ms=round(round_ms, 3)))
            except JoinwiseError as error:
                logger.warning("heartbeat failed: %s", error)
        logger.error("draft actor %s is sick: %s", self._spec.worker_id, self.failure())
