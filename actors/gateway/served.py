"""One model in a gateway: vLLM's front end over the workers that serve it.

What models share (Redis, the router, the listeners) is the gateway's; everything here is of one model, down to the
links: a worker serves one model, and what it says reaches no other one's requests.
"""

import asyncio
import copy
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from starlette.middleware.exceptions import ExceptionMiddleware
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from joinwise.actors.auth import bearer
from joinwise.actors.gateway.adapters import Adapters
from joinwise.actors.gateway.front import error_body, error_headers
from joinwise.actors.gateway.ledgers import Ledgers
from joinwise.actors.gateway.links import Links
from joinwise.actors.gateway.tickets import TicketOffice
from joinwise.actors.gateway.tracing import Traces
from joinwise.actors.gateway.utilities import Utilities
from joinwise.actors.models import resolve_model
from joinwise.actors.phases import Phases
from joinwise.actors.tls import Certificates
from joinwise.actors.vllm.build import gateway_config
from joinwise.actors.vllm.core_client import ClusterCore
from joinwise.actors.vllm.kv_events import BlockNames
from joinwise.actors.vllm.llm import ClusterLLM, cluster_llm
from joinwise.actors.vllm.series import ModelSeries
from joinwise.cluster.config_model import GatewayConfig, JoinwiseConfig, ModelConfig, PoolConfig
from joinwise.cluster.errors import ConfigError, JoinwiseError, NoWorkerError, StoreUnavailableError, WorkerLostError
from joinwise.cluster.router.prefix_index import PrefixIndex
from joinwise.cluster.router.registry import Registry, WorkerInfo
from joinwise.cluster.router.router import Router, WorkerRef

logger = logging.getLogger(__name__)

_JOIN_POLL_S = 0.2


@dataclass(frozen=True)
class Shared:
    """What all models of a gateway share. `series`: where several models show vLLM's series."""

    config: JoinwiseConfig
    gateway_id: str
    registry: Registry
    router: Router
    prefixes: PrefixIndex
    ledgers: Ledgers
    peers: Certificates | None
    series: ModelSeries | None
    traces: Traces | None
    phases: Phases


@dataclass(frozen=True)
class ServedModel:
    """A model that is ready to be asked.

    Attributes:
        name: the name that clients ask for.
        digest: of the model's files; a worker with others is none of this model's, whatever it says.
        app: vLLM's HTTP application, with vLLM's objects for this model in its `state`.
        prefix_events: workers tell what their caches hold.
    """

    name: str
    digest: str
    app: FastAPI
    llm: ClusterLLM
    core: ClusterCore
    links: Links
    adapters: Adapters
    prefix_events: bool = False

    def observe(self, workers: Sequence[WorkerInfo], *, alone: bool) -> frozenset[str]:
        """Remember who serves this model, of all who take requests; returns their roles. `alone`: there is no other."""
        named = [each for each in workers if each.model == self.name]
        own = [each for each in named if each.model_digest == self.digest]
        self.llm.holders = None if alone else frozenset(each.worker_id for each in own)
        strangers = frozenset(each.worker_id for each in named) - {each.worker_id for each in own}
        if strangers - self.llm.strangers:
            logger.error(
                "not used, since their files are not those of %r here: %s", self.name, ", ".join(sorted(strangers))
            )
        self.llm.strangers = strangers
        if own and self.prefix_events and self.llm.blocks is None:  # of the first, where there was none at the start
            self.llm.blocks = BlockNames(self.llm.vllm_config, own[0].block_size)
        return frozenset(each.role for each in own)

    async def close(self) -> None:
        """End the front end, and its links."""
        self.llm.shutdown()
        await self.links.close()


async def serve_model(model: ModelConfig, shared: Shared, beside: FastAPI | None = None) -> ServedModel:
    """Build a model's front end; waits for a worker, whose limits it takes over. Where a model's pools may be at zero,
    and are, it takes those of the configuration.

    Args:
        beside: the application of another model of this gateway; its routes and middleware are used again.

    Raises:
        NoWorkerError: no worker of the model has registered within `ray.start_timeout_s`.
        JoinwiseError: Redis or the model cannot be reached, or workers have other files.
    """
    config, name, registry = shared.config, model.public_name, shared.registry
    files = await asyncio.to_thread(resolve_model, model.model, revision=model.revision)
    shared.phases.done("model")
    # As workers will have it, in all likelihood: made while they start.
    arguments = config.engine_arguments(_serving_pool(config, model))
    vllm_config = await asyncio.to_thread(gateway_config, str(files.path), arguments, [name])
    shared.phases.done("configuration")
    worker = await _first_worker(registry, name, config.ray.start_timeout_s, needed=name not in config.wakes)
    shared.phases.done("waiting for a worker")
    if worker is not None and worker.model_digest != files.digest:
        raise ConfigError(f"workers serve {name!r} with other files (digest {worker.model_digest}) than this gateway's")
    links = Links(
        config.cluster,
        shared.gateway_id,
        on_message=lambda *message: core.on_message(*message),
        on_lost=lambda *loss: core.on_lost(*loss),
        check=membership(registry, name, files.digest),
        certificates=shared.peers,
    )
    links.metadata = bearer(await registry.token())
    utilities = Utilities(registry, links, name)
    core = ClusterCore(
        shared.router,
        links,
        utilities,
        on_ledger=shared.ledgers.add,
        transfer_timeout_s=config.kv.transfer_timeout_s,
        in_turn=config.kv.transport == "nixl",
        traces=shared.traces,
    )
    if worker is not None and vllm_config.model_config.max_model_len != worker.max_model_len:
        arguments["max_model_len"] = worker.max_model_len
        vllm_config = await asyncio.to_thread(gateway_config, str(files.path), arguments, [name])
    prefix_events = config.router.prefix_events
    blocks = BlockNames(vllm_config, worker.block_size) if prefix_events and worker is not None else None
    llm = cluster_llm(vllm_config, core, TicketOffice(shared.router, name), shared.prefixes, blocks)
    if shared.series is not None:
        shared.series.take()
    args = front_end_args(config.gateway, model, str(files.path), vllm_config.model_config.max_model_len)
    if beside is None:
        app = build_app(args, ("generate",), vllm_config.model_config)
        _answer_our_errors(app)
    else:
        app = copy.copy(beside)  # only what is served differs, and that is in the state
        app.state = State()
    await init_app_state(llm, app.state, args, ("generate",))
    enabled = vllm_config.lora_config is not None
    adapters = Adapters(registry, utilities, app.state.openai_serving_models, name, enabled=enabled)
    await adapters.sync()
    shared.phases.done("front end")
    return ServedModel(name, files.digest, app, llm, core, links, adapters, prefix_events)


def membership(registry: Registry, name: str, digest: str) -> Callable[[WorkerRef], Awaitable[None]]:
    """The check that a worker is of a model and has its files; made once in each life of a worker, before it is used.

    The registry compares a worker with those of its model that live, and there may be none.
    """

    async def check(worker: WorkerRef) -> None:
        try:
            states = await registry.states_of([worker.worker_id])
        except StoreUnavailableError:  # then the router knows only workers that `observe` has seen
            return
        for info in (state.info for state in states):
            if info.epoch == worker.epoch and (info.model, info.model_digest) != (name, digest):
                raise WorkerLostError(
                    f"worker {worker.worker_id} has other files (model {info.model!r}, digest {info.model_digest}) "
                    f"than this gateway's {name!r}: it is not used"
                )

    return check


async def _first_worker(registry: Registry, model: str, patience_s: float, *, needed: bool = True) -> WorkerInfo | None:
    """A worker of a model, once there is one, or without being `needed` None. While everything starts Redis may answer
    late: that ends nothing."""
    deadline, unheard = time.monotonic() + patience_s, None
    while time.monotonic() < deadline:
        try:
            workers, unheard = await registry.list(), None
        except StoreUnavailableError as error:
            workers, unheard = (), error
        for worker in workers:
            if worker.model == model:
                return worker
        if not needed and unheard is None:
            return None
        await asyncio.sleep(_JOIN_POLL_S)
    raise unheard or NoWorkerError(
        f"no worker of {model!r} has registered: see `joinwise status` and the workers' logs"
    )


def _serving_pool(config: JoinwiseConfig, model: ModelConfig) -> PoolConfig:
    pools = [pool for pool in config.pools if pool.model == model.name and pool.role != "draft"]
    return next((pool for pool in pools if pool.role in ("decode", "mixed")), pools[0])


def front_end_args(gateway: GatewayConfig, model: ModelConfig, path: str, max_model_len: int) -> Any:
    """vLLM's own arguments of its own front end.

    Raises:
        ConfigError: `gateway.vllm_args` names one that there is not.
    """
    argv = ["--model", path, "--served-model-name", model.public_name, "--max-model-len", str(max_model_len)]
    argv += ["--enable-request-id-headers", "--enable-prompt-tokens-details"]
    if chat_template := model.chat_template or gateway.chat_template:
        argv += ["--chat-template", chat_template]
    if gateway.enable_auto_tools:
        argv += ["--enable-auto-tool-choice"]
    if tool_parser := model.tool_parser or gateway.tool_parser:
        argv += ["--tool-call-parser", tool_parser]
    if reasoning_parser := model.reasoning_parser or gateway.reasoning_parser:
        argv += ["--reasoning-parser", reasoning_parser]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(argv)
    for key, value in gateway.vllm_args.items():
        if not hasattr(args, key.replace("-", "_")):
            raise ConfigError(f"gateway.vllm_args: vLLM's front end has no argument {key!r}")
        setattr(args, key.replace("-", "_"), value)
    # vLLM's front end looks for it here, where building an engine of these arguments would have put it.
    args.structured_outputs_config = copy.copy(args.structured_outputs_config)
    args.structured_outputs_config.reasoning_parser = args.reasoning_parser
    if gateway.default_max_tokens is not None:
        args.override_generation_config = {
            **(args.override_generation_config or {}),
            "max_new_tokens": gateway.default_max_tokens,
        }
    return args


def _answer_our_errors(app: FastAPI) -> None:
    """Let the application answer with our errors.

    vLLM has built the middleware already. It must not be built anew: that of the HTTP metrics registers its series once
    in a process, and a second one counts nothing.
    """
    layer: Any = app.middleware_stack
    while not isinstance(layer, ExceptionMiddleware):
        layer = layer.app
    layer.add_exception_handler(JoinwiseError, _on_error)


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, JoinwiseError)
    return JSONResponse(error_body(error), status_code=error.http_status, headers=error_headers(error))
