"""The engine actor: one class for every role.

Builds one vLLM engine, serves gateways and peers, registers, and says every second how loaded it
is. Knows nothing of Ray: `ray_api.py` runs it as an actor, tests run it in a process.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import vllm
from prometheus_client import REGISTRY
from vllm.config import KVTransferConfig, VllmConfig
from vllm.lora.request import LoRARequest

from joinwise.actors import cpu
from joinwise.actors.auth import is_loopback
from joinwise.actors.draft.binding import Binding
from joinwise.actors.draft.metrics import AskMetrics
from joinwise.actors.draft.vocabulary import Vocabulary
from joinwise.actors.engine_service import PROTOCOL_VERSION, EngineService, WorkerIdentity
from joinwise.actors.kv.draining import drain
from joinwise.actors.kv.metrics import KvMetrics
from joinwise.actors.models import resolve_model
from joinwise.actors.ops import OpsServer
from joinwise.actors.phases import Phases
from joinwise.actors.spec import WorkerSpec
from joinwise.actors.tls import Certificates, peers
from joinwise.actors.vllm import build, connector, nixl, proposer
from joinwise.actors.vllm.connector import ports
from joinwise.actors.vllm.connector.worker import KvSettings
from joinwise.actors.vllm.engine_loop import EngineLoop
from joinwise.actors.vllm.kv_events import report_blocks
from joinwise.actors.worker_ports import GrpcPort, open_ops
from joinwise.cluster.config import JoinwiseConfig
from joinwise.cluster.config_model import DraftConfig, SpeculationConfig
from joinwise.cluster.drafts import Drafts
from joinwise.cluster.errors import ConfigError, JoinwiseError, RegistrationRefusedError, StoreUnavailableError
from joinwise.cluster.router.prefix_log import PrefixLog
from joinwise.cluster.router.registry import ALL_SAMPLING, Registry, WorkerInfo, WorkerLoad
from joinwise.cluster.store.client import connect
from joinwise.proto import engine_pb2, engine_pb2_grpc

logger = logging.getLogger(__name__)

_STUCK_S = 60.0
_ADAPTER_ATTEMPTS = 5
_CLOSE_S = 10.0
_SERVICE = engine_pb2.DESCRIPTOR.services_by_name["EngineService"].full_name
_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


class EngineWorker:
    """One engine and everything around it. All methods run on one event loop."""

    def __init__(self, config: JoinwiseConfig, spec: WorkerSpec, redis_url: str) -> None:
        self._config = config
        self._spec = spec
        self._pool = next(pool for pool in config.pools if pool.name == spec.pool)
        self._model = config.model_named(self._pool.model)
        self._redis = connect(redis_url, config.redis)
        self._registry = Registry(self._redis, config.cluster, config.router)
        self._service: EngineService | None = None
        self._engine: EngineLoop | None = None
        self._port: GrpcPort | None = None
        self._info: WorkerInfo | None = None
        self._heart: asyncio.Task[None] | None = None
        self._dead: BaseException | None = None
        self._prefixes = PrefixLog(self._redis, config.cluster, config.router.prefix_log)
        self._telling: asyncio.Task[None] | None = None
        self._kv = KvMetrics()
        self._watching: asyncio.Task[None] | None = None
        self._token = ""
        self._certificates: Certificates | None = None
        self._ops: OpsServer | None = None
        self._binding: Binding | None = None
        self._bound: asyncio.Task[None] | None = None
        self._asked = AskMetrics()
        self._registered = False
        self._draining = False
        self._beaten = time.monotonic()
        self.phases = Phases()

    async def start(self) -> dict[str, Any]:
        """Build the engine and register it.

        Returns:
            Worker id, epoch and addresses.

        Raises:
            ConfigError: vLLM refuses the pool's engine arguments.
            RegistrationRefusedError: the cluster runs another model or KV layout under this name.
        """
        cpu.pin(self._spec.cores)
        self._certificates = peers(self._config.tls)
        self._ops = self._open_ops()
        self._token = "" if is_loopback(self._spec.host) else await self._registry.token()
        model = await asyncio.to_thread(resolve_model, self._model.model, revision=self._model.revision)
        self.phases.done("model")
        arguments = self._config.engine_arguments(self._pool)
        self._service = EngineService(WorkerIdentity(self._config.cluster, self._spec.worker_id, 0), self._kv)
        config = await asyncio.to_thread(
            build.worker_config,
            str(model.path),
            arguments,
            kv_events=self._config.router.prefix_events,
            drafts=self._pool.speculation.k if self._pool.speculation is not None else 0,
            transfer=self._foreign_transfer(),
        )
        self.phases.done("configuration")
        self._engine = await asyncio.to_thread(self._build_engine, config, model.digest)
        self.phases.done("engine")
        self._service.bind(self._engine)
        if self._config.router.prefix_events:
            report_blocks(self._engine.core.scheduler, self._prefixes.note)
        self._engine.start()
        REGISTRY.register(self._kv)
        self._watching = asyncio.create_task(self._watch_kv())
        if self._pool.speculation is not None:
            self._binding = await self._bind(self._pool.speculation, self._engine, model.path)
            self._bound = asyncio.create_task(self._binding.keep(self._config.router.heartbeat_s))
        address = await self._serve()
        self._info = self._describe(config, model.digest, address)
        await self._register()
        self._heart = asyncio.create_task(self._beat())
        if self._config.router.prefix_events:
            self._telling = asyncio.create_task(self._prefixes.tell(self._who, self._config.router.heartbeat_s))
        self.phases.done("registration")
        logger.info("worker %s is ready after %.1f s", self._spec.worker_id, self.phases.total)
        return {
            "worker_id": self._info.worker_id,
            "epoch": self._service.identity.epoch,
            "engine_address": address,
            "kv_address": self._info.kv_address,
            "metrics_address": self._info.metrics_address,
            "pid": os.getpid(),
        }

    async def stop(self, drain_s: float = 0.0) -> None:
        """Leave: no new work, let what runs end for up to `drain_s` seconds, then close everything; see `drain`."""
        if self._port is not None:
            await self._port.leave()
        await self.drain(drain_s)
        if self._port is not None:
            await self._port.close()
        if self._watching is not None:
            self._watching.cancel()
            REGISTRY.unregister(self._kv)
        if self._bound is not None and self._binding is not None:
            self._bound.cancel()
            REGISTRY.unregister(self._asked)
            await self._binding.end()
        if self._engine is not None:
            if self._binding is not None and self._engine.alive:
                closed = self._engine.between_steps(partial(proposer.close_links, self._engine.core.model_executor))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.wrap_future(closed), _CLOSE_S)
            await asyncio.to_thread(self._engine.stop)
        if self._ops is not None:
            await asyncio.to_thread(self._ops.close)
        await self._redis.aclose()

    async def drain(self, drain_s: float) -> str:
        """Leave the registry, and wait until what runs has ended and no peer needs KV of this worker any more.

        Links stay open, new transfers are refused, and a peer that takes nothing is not waited for beyond its lease.

        Args:
            drain_s: seconds to wait at most.

        Returns:
            What was waited for, and what was left behind.
        """
        self._draining = True
        for task in (self._heart, self._telling):
            if task is not None:
                task.cancel()
        await self._deregister()
        engine = self._engine
        if engine is None or not engine.alive:
            return "nothing runs"
        engine.stop_sending()
        if drain_s <= 0:
            return "nothing was waited for"
        drained = await drain(lambda: asyncio.wrap_future(engine.pending()), drain_s)
        clean = drained.answered and not drained.left
        logger.log(logging.INFO if clean else logging.WARNING, "drained: %s", drained)
        return str(drained)

    def failure(self) -> str:
        """Why this worker is sick; empty when it is well. An engine that has work and steps no more is sick."""
        if self._dead is not None:
            return f"the engine has died: {self._dead}"
        engine = self._engine
        if engine is not None and not engine.alive:
            return "the engine's thread has ended"
        if engine is not None and engine.stuck_for() > _STUCK_S:
            return f"the engine has not stepped for {engine.stuck_for():.0f} s"
        return ""

    # Inside.

    def _build_engine(self, config: VllmConfig, digest: str) -> EngineLoop:
        assert self._service is not None
        kv = self._config.kv
        settings = KvSettings(
            host=self._spec.host,
            transport=kv.transport,
            codec=kv.codec,
            lossy=kv.lossy,
            frame_bytes=kv.frame_bytes,
            landing_bytes=kv.landing_bytes,
            lease_s=kv.lease_s,
            model_digest=digest,
            token=self._token,
            tls=self._config.tls,
        )
        connector.host.on_report = self._service.on_report
        return EngineLoop(config, settings, on_outputs=self._service.on_outputs, on_dead=self._on_dead)

    async def _bind(self, settings: SpeculationConfig, engine: EngineLoop, model: Path) -> Binding:
        """Let the engine ask the pool's draft actors; refuse a pool of another vocabulary."""
        executor = engine.core.model_executor
        vocabulary = Vocabulary.read(self._model.name, model)
        with_ = next(pool.draft for pool in self._config.pools if pool.name == settings.draft) or DraftConfig()
        ours = proposer.DraftSettings(
            cluster=self._config.cluster,
            worker_id=self._spec.worker_id,
            vocabulary=vocabulary,
            deadline_s=settings.deadline_ms / 1000 if settings.deadline_ms is not None else None,
            adaptive=settings.adaptive,
            lookup=with_.lookup and (with_.model is not None or with_.head is not None),
            recall=with_.recall,
            token=self._token,
            tls=self._config.tls,
        )

        async def point(address: str) -> None:
            await asyncio.wrap_future(engine.between_steps(partial(proposer.point_links, executor, address)))

        await asyncio.wrap_future(engine.between_steps(partial(proposer.open_links, executor, ours)))
        REGISTRY.register(self._asked)
        drafts = Drafts(self._redis, self._config.cluster, self._config.router)
        binding = Binding(drafts, settings.draft, self._spec.worker_id, vocabulary, point)
        await binding.renew()
        return binding

    def _foreign_transfer(self) -> KVTransferConfig | None:
        """How KV is shipped where vLLM does it by itself."""
        if self._config.kv.transport != "nixl":
            return None
        nixl.listen_on(self._spec.host)
        return nixl.transfer_config(self._config.kv.lease_s)

    def _on_dead(self, error: BaseException) -> None:
        self._dead = error
        assert self._service is not None
        self._service.on_dead(error)

    async def _serve(self) -> str:
        assert self._service is not None
        self._port = GrpcPort(
            self._spec.host,
            _SERVICE,
            partial(engine_pb2_grpc.add_EngineServiceServicer_to_server, self._service),
            token=self._token,
            certificates=self._certificates,
            options=_OPTIONS,
        )
        await self._port.open()
        return self._port.address

    def _describe(self, config: VllmConfig, digest: str, address: str) -> WorkerInfo:
        assert self._ops is not None, "it opens first of all"
        assert self._engine is not None
        kv = self._engine.kv_ports
        scheduler, cache = config.scheduler_config, config.cache_config
        parallel = config.parallel_config.tensor_parallel_size
        speculates = config.speculative_config is not None
        facts = [digest, str(config.model_config.dtype), cache.block_size, scheduler.max_num_seqs, parallel]
        facts += [scheduler.max_num_batched_tokens, config.model_config.max_model_len]
        if speculates:
            facts += ["speculates"]
        if quantization := config.model_config.quantization:
            facts += [quantization]
        return WorkerInfo(
            worker_id=self._spec.worker_id,
            epoch=0,
            model=self._model.public_name,
            pool=self._pool.name,
            role=self._pool.role,
            fingerprint=hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16],
            model_digest=digest,
            engine_address=address,
            kv_address=kv.addresses,
            metrics_address=f"{self._spec.host}:{self._ops.port}",
            capabilities=frozenset({"kv_grpc"} if speculates else {"kv_grpc", "replay", ALL_SAMPLING}),
            kv_layout=kv.signature,
            max_model_len=config.model_config.max_model_len,
            block_size=cache.block_size,
            num_blocks=cache.num_gpu_blocks or 0,
            max_num_seqs=scheduler.max_num_seqs,
            adapters=frozenset(),
            vllm_version=vllm.__version__,
            protocol_version=PROTOCOL_VERSION,
            started_ms=int(time.time() * 1000),
        )

    async def _register(self) -> None:
        """Load the cluster's adapters, then become routable."""
        assert self._info is not None
        assert self._service is not None
        for attempt in range(_ADAPTER_ATTEMPTS):
            self._info = replace(self._info, adapters=await self._load_adapters())
            try:
                epoch = await self._registry.register(self._info)
                break
            except RegistrationRefusedError:
                # One that was recorded while we loaded the others is loaded next.
                recorded = await self._registry.adapters(self._model.public_name)
                if attempt == _ADAPTER_ATTEMPTS - 1 or {each.name for each in recorded} <= self._info.adapters:
                    raise
        self._service.identity = self._service.identity.again(epoch)
        if self._token:
            await self._registry.token(self._token)
        self._registered = True

    async def _deregister(self) -> None:
        if self._info is not None and self._service is not None:
            with contextlib.suppress(JoinwiseError):
                await self._registry.deregister(self._info.worker_id, self._service.identity.epoch)
        self._registered = False

    def _open_ops(self) -> OpsServer:
        patience = self._config.gateway.drain_s
        return open_ops(
            self._spec.host,
            self._pool,
            live=self._sick,
            ready=self._unready,
            drain=partial(self.drain, patience),
            patience_s=patience + 10,
            certificates=self._certificates,
        )

    def _sick(self) -> str:
        """Why this process should be restarted; asked by threads. Nothing of it waits for the event loop."""
        if self._registered and not self._draining and (silent := time.monotonic() - self._beaten) > _STUCK_S:
            return f"the event loop has not run for {silent:.0f} s"
        return self.failure()

    def _unready(self) -> str:
        if self._draining:
            return "it drains"
        return self._sick() or ("" if self._registered else "the worker has not registered yet")

    async def _load_adapters(self) -> frozenset[str]:
        """Adapters that the cluster serves are here before the first request can be."""
        assert self._engine is not None
        adapters = await self._registry.adapters(self._model.public_name)
        for adapter in adapters:
            lora = LoRARequest(adapter.name, adapter.lora_id, adapter.path)
            try:
                await asyncio.wrap_future(self._engine.utility("add_lora", [lora]))
            except Exception as error:
                raise ConfigError(f"the adapter {adapter.name!r} cannot be loaded: {error}") from error
        return frozenset(adapter.name for adapter in adapters)

    async def _beat(self) -> None:
        """Heartbeats; after a Redis that has lost its data, register again."""
        assert self._info is not None
        assert self._service is not None
        while not self.failure():
            self._beaten = time.monotonic()
            try:
                epoch = self._service.identity.epoch
                if not await self._registry.heartbeat(self._info.worker_id, epoch, self._load()):
                    logger.warning("the registry does not know this worker any more: registering again")
                    await self._register()
            except StoreUnavailableError as error:
                logger.warning("heartbeat failed: %s", error)
            except JoinwiseError:
                logger.exception("the cluster refuses this worker")
            await asyncio.sleep(self._config.router.heartbeat_s)
        logger.error("worker %s is sick: %s", self._spec.worker_id, self.failure())

    async def _watch_kv(self) -> None:
        """Keep what `/metrics` and `joinwise status` say of KV links current; apart from heartbeats, which wait for no
        step."""
        assert self._engine is not None
        try:
            while self._engine.alive:
                self._kv.note(ports.figures(await asyncio.wrap_future(self._engine.kv_status())))
                if self._binding is not None:
                    ask = partial(proposer.asked, self._engine.core.model_executor)
                    self._asked.note(await asyncio.wrap_future(self._engine.between_steps(ask)))
                await asyncio.sleep(self._config.router.heartbeat_s)
        except Exception:
            logger.exception("the figures of KV links are no longer current")

    def _who(self) -> tuple[str, int]:
        assert self._service is not None
        return self._spec.worker_id, self._service.identity.epoch

    def _load(self) -> WorkerLoad:
        assert self._engine is not None
        scheduler = self._engine.core.scheduler
        running, waiting = scheduler.get_request_counts()
        pool = scheduler.kv_cache_manager.block_pool
        return WorkerLoad(
            running=running,
            waiting=waiting,
            kv_blocks_free=pool.get_num_free_blocks(),
            kv_blocks_total=pool.num_gpu_blocks - 1,
            decode_step_ms=self._engine.speeds.decode_step_s * 1000,
            prefill_tokens_per_s=self._engine.speeds.prefill_tokens_per_s,
        )
