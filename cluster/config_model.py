"""The configuration tree: what `joinwise.yaml` may say, with units, defaults and limits.

Only shapes live here. `config.py` reads files and the environment, `config_check.py` looks at how the parts fit.
A unit ends every name that has one: `_s` seconds, `_bytes` bytes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

Role = Literal["prefill", "decode", "mixed"]
PoolRole = Literal["prefill", "decode", "mixed", "draft"]
Device = Literal["auto", "cpu", "gpu"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86400)]
Bytes = Annotated[int, Field(gt=0, le=1 << 40)]

#: vLLM engine arguments that joinwise sets itself, with what to write instead.
RESERVED_ENGINE_ARGUMENTS = {
    "model": "set models[].model",
    "revision": "set models[].revision",
    "tokenizer": "set models[].tokenizer",
    "served_model_name": "set models[].served_name",
    "kv_transfer_config": "set kv",
    "logits_processors": "they carry the replay of tokens",
    "speculative_config": "set pools[].speculation",
}


class Section(BaseModel):
    """Any part of the tree: unknown keys are refused, values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)


class AdapterConfig(Section):
    """A LoRA adapter, loaded by every worker of its model before it takes requests."""

    name: str = Field(min_length=1)
    """The name clients ask for."""
    path: str = Field(min_length=1)
    """Folder or hub id, found by every worker."""


class ModelConfig(Section):
    """One model that the cluster serves."""

    name: str = Field(min_length=1, max_length=256)
    """The name pools refer to."""
    model: str = Field(min_length=1)
    """A built-in name (smollm2-135m-instruct), a folder, a hub id or an object-store URI."""
    revision: str | None = None
    """Hub revision; None takes the hub's default branch."""
    served_name: str = ""
    """The name clients ask for; empty means `name`."""
    tokenizer: str | None = None
    """Another tokenizer than the model's own."""
    dtype: Dtype = "bfloat16"
    """Element type of weights and KV cache; float32 for output that equals any single engine, token for token."""
    max_model_len: int | None = Field(default=None, ge=16)
    """Tokens of prompt and answer together; None takes the model's own limit."""
    adapters: list[AdapterConfig] = []
    """LoRA adapters known from the start."""
    chat_template: str | None = None
    """File or text of a chat template; None takes `gateway.chat_template`, and without that the model's own."""
    tool_parser: str | None = None
    """vLLM's --tool-call-parser; None takes `gateway.tool_parser`."""
    reasoning_parser: str | None = None
    """vLLM's --reasoning-parser; None takes `gateway.reasoning_parser`."""

    @property
    def public_name(self) -> str:
        """The name clients ask for."""
        return self.served_name or self.name


class RedisTlsConfig(Section):
    """TLS to a rediss:// server. Files are read again for every new connection."""

    ca: str | None = None
    """PEM file of the authority of the server's certificate; None takes the system's."""
    cert: str | None = None
    """PEM file of a client certificate, where the server asks for one; needs `key`."""
    key: str | None = None
    """PEM file of its private key."""


class RedisConfig(Section):
    """Where decisions are made and remembered."""

    url: str = Field(default="embedded", pattern=r"^(embedded|(rediss?|unix|redis\+sentinel|rediss?\+cluster)://.+)$")
    """`embedded` starts one with the cluster; else redis://, rediss:// (TLS), unix://, redis+sentinel://, redis+cluster://."""
    port: Port = 0
    """Port of the embedded server on loopback; 0 picks a free one."""
    data_dir: str | None = None
    """Folder where the embedded server keeps its data over restarts; None keeps it in memory."""
    connect_timeout_s: Seconds = 2.0
    """Seconds until a connection attempt is given up."""
    timeout_s: Seconds = 2.0
    """Seconds until an unanswered command is given up."""
    retries: int = Field(default=1, ge=0, le=20)
    """Further attempts after a failed one. Every script can be repeated safely."""
    max_connections: int = Field(default=64, ge=1, le=10_000)
    """Connections one process may hold."""
    tls: RedisTlsConfig | None = None


class Resources(Section):
    """What Ray reserves for one replica."""

    num_cpus: float = Field(default=1.0, ge=0)
    """Logical CPUs."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs; a pool with `device: gpu` needs some."""
    custom: dict[str, float] = {}
    """Custom Ray resources by name."""


class DraftConfig(Section):
    """What the actors of a draft pool draft with."""

    model: str | None = None
    """A small model of the same vocabulary, named as models[].model is; without it and `head` the answer is looked up
    in the prompt."""
    head: str | None = None
    """A draft head for the pool's model, instead of `model`: the folder that `joinwise train-draft` made, or a
    built-in name (smollm2-135m-instruct)."""
    revision: str | None = None
    """Hub revision; None takes the hub's default branch."""
    dtype: Dtype | Literal["int8"] = "bfloat16"
    """Element type of its weights and KV; int8, on CPUs, is of the weights alone, and the KV bfloat16."""
    slots: int = Field(default=8, ge=1, le=4096)
    """Sequences of which an actor keeps KV at once."""
    max_tokens: int = Field(default=4096, ge=16, le=1 << 20)
    """Longest sequence that is drafted for; slots x max_tokens of KV are reserved."""
    lookup: bool = True
    """Let engines draft from the text itself where it repeats itself, and ask elsewhere; without a model it is all that
    the pool does."""
    recall: int = Field(default=0, ge=0, le=1 << 24)
    """Tokens of its latest answers that each engine keeps, to draft from them where another answer goes on like one.
    What others were answered then tells in how fast an answer comes, never in what it says. 0 keeps none."""
    ahead: bool | None = None
    """Let the model draft on while the engine verifies what it sent. None does so on GPUs, and on cores that are given
    to the pool by `cores`; where it shares cores with engines it slows them down."""

    @model_validator(mode="after")
    def _one_of_both(self) -> DraftConfig:
        if self.model is not None and self.head is not None:
            raise ValueError("it drafts with a model or with a head: leave out `model` or `head`")
        return self


class SpeculationConfig(Section):
    """Engines that verify what a draft pool proposes."""

    draft: Name
    """The draft pool to ask."""
    k: int = Field(default=4, ge=1, le=64)
    """Ids proposed for a sequence in one step, at most."""
    adaptive: bool = True
    """Choose fewer, down to none, by what steps and drafts are measured to cost and how many are accepted."""
    deadline_ms: float | None = Field(default=None, gt=0, le=10_000)
    """Milliseconds that a step waits for proposals at most; without an answer it is an ordinary step. None waits for as
    long as two steps take, as they are measured."""


class AutoscaleConfig(Section):
    """How many workers a pool keeps, by the work that is pending on them."""

    least: int = Field(ge=0, le=10_000)
    """Workers that it never goes below; with 0 it ends its last one while its model has nothing to do, and the next
    request waits for a new one."""
    most: int = Field(ge=1, le=10_000)
    """Workers that it never goes above."""
    target_s: Seconds = 5.0
    """Seconds of work that there should be for a worker at most."""
    up_s: Seconds = 10.0
    """Seconds for which there must have been more before workers are added."""
    down_s: Seconds = 300.0
    """Seconds for which fewer workers must have been enough before some are let go, drained."""
    wake_s: Seconds = 300.0
    """With `least: 0`: seconds that a request waits for the first worker before it gets 503."""

    @model_validator(mode="after")
    def _in_order(self) -> AutoscaleConfig:
        if self.least > self.most:
            raise ValueError(f"least ({self.least}) is more than most ({self.most})")
        return self


class PoolConfig(Section):
    """Workers that are alike: one model, one role, one set of engine arguments."""

    name: Name
    """Unique name."""
    model: str
    """`name` of a model above."""
    role: PoolRole
    """What its workers start as: prefill, decode, mixed for both, or draft to propose tokens for engines of `model`."""
    replicas: int = Field(default=1, ge=0, le=10_000)
    """Workers to keep running; with `autoscale`, to begin with."""
    autoscale: AutoscaleConfig | None = None
    """Add and let go workers as there is more and less to do; None keeps `replicas`."""
    device: Device = "auto"
    """`auto` takes the GPU where there is one."""
    resources: Resources = Field(default_factory=Resources)
    threads: int | None = Field(default=None, ge=1, le=1024)
    """Compute threads of a CPU worker; None takes num_cpus, at least 1."""
    cores: list[int] | None = None
    """CPU cores shared out among the replicas in turn; None lets the launcher choose."""
    engine: dict[str, Any] = {}
    """vLLM engine arguments by name, checked by vLLM when the worker starts."""
    ops_port: Port = 0
    """Port of /livez, /readyz and /metrics of each worker; 0 picks a free one, else one worker a machine (or pod)."""
    draft: DraftConfig | None = None
    """Of a draft pool: what it drafts with; None looks the answer up in the prompt."""
    speculation: SpeculationConfig | None = None
    """Of a decode or mixed pool: its engines speculate, and serve plain requests only; see docs/speculation.md."""

    @field_validator("engine")
    @classmethod
    def _refuse_reserved(cls, engine: dict[str, Any]) -> dict[str, Any]:
        for name in engine:
            if hint := RESERVED_ENGINE_ARGUMENTS.get(name.replace("-", "_")):
                raise ValueError(f"engine argument '{name}' belongs to joinwise: {hint}")
        return {name.replace("-", "_"): value for name, value in engine.items()}

    @property
    def compute_threads(self) -> int:
        """Threads of one CPU worker."""
        return self.threads or max(1, int(self.resources.num_cpus))


class KvConfig(Section):
    """How KV caches cross between workers."""

    transport: Literal["auto", "grpc", "tcp", "shm", "nccl", "nixl"] = "auto"
    """`auto` picks for each pair: shared memory on one host, else TCP, else gRPC. `nccl` (gloo between CPUs) is never
    picked by itself: its connections carry no token. `nixl` leaves KV to vLLM's own NixlConnector: no token, no
    TLS, no codec, and alike pools only."""
    codec: Literal["auto", "none", "lossless", "int8", "fp8"] = "none"
    """How KV is coded on the wire; `int8` and `fp8` lose precision. `auto` codes where the wire is measured to be
    slower than coding, without loss unless `lossy` allows one."""
    lossy: Literal["none", "int8", "fp8"] = "none"
    """The codec with loss that `codec: auto` may choose too."""
    frame_bytes: Bytes = 2 << 20
    """Upper bound of one frame's payload."""
    landing_bytes: Bytes = 256 << 20
    """Landing buffer of one worker; a full one holds up senders."""
    lease_s: Seconds = 60.0
    """Seconds for which a prefill worker keeps blocks that nobody fetches."""
    transfer_timeout_s: Seconds = 30.0
    """Seconds without progress after which a transfer has failed and the prompt is recomputed."""


class TenantConfig(Section):
    """Limits of one caller, over all gateways. None is no limit."""

    requests_per_min: float | None = Field(default=None, gt=0, le=1e9)
    """Requests a minute; a minute's worth may come at once."""
    tokens_per_min: float | None = Field(default=None, gt=0, le=1e12)
    """Tokens of prompts and answers a minute. What an answer could use is taken, and what it did not is given back."""
    concurrent: int | None = Field(default=None, ge=1, le=1_000_000)
    """Requests that run at once."""
    weight: float = Field(default=1.0, gt=0.001, le=1000)
    """Share of the turns when requests wait, against other tenants' weights."""


class RouterConfig(Section):
    """How requests are shared out."""

    lease_s: Seconds = 30.0
    """Seconds for which a reservation lives without being renewed."""
    heartbeat_s: Seconds = 1.0
    """Seconds between two heartbeats of a worker."""
    worker_ttl_s: Seconds = 5.0
    """Seconds without a heartbeat after which a worker gets no more requests."""
    split: Literal["auto", "always"] = "auto"
    """`always` splits whatever can be split; `auto` runs a request whole where that costs less time in all."""
    max_pending_tokens: int = Field(default=65_536, ge=1)
    """Pending tokens per worker beyond which requests are refused; an idle worker takes any request."""
    max_queue: int = Field(default=256, ge=0)
    """Requests that may wait for a worker to have room, over all gateways."""
    queue_timeout_s: float = Field(default=0.0, ge=0, le=3600)
    """Seconds a request may wait for room before it gets 429; 0 refuses at once."""
    ageing_s: Seconds = 5.0
    """Seconds of waiting that one step of priority is worth."""
    spill_ms: float = Field(default=250.0, ge=0, le=3_600_000)
    """Milliseconds of queue beyond which a pool's requests spill into the mixed pool, and then pull a worker in."""
    away_s: float = Field(default=30.0, ge=0, le=3600)
    """Seconds for which gateways go on with the workers that they saw last while Redis does not answer; 0 refuses."""
    moves: bool = True
    """Pull workers of another pool into mixed where that has the same fingerprint; they go back by themselves."""
    gap_weight: float = Field(default=0.2, ge=0, le=1000)
    """What a millisecond of delay to a decoding neighbour counts, against one of the request's own: less than 1, as
    it is spread over all tokens that the neighbour is still to get."""
    handoff_ms: float = Field(default=10.0, ge=0, le=60_000)
    """Milliseconds by which handing a request from prefill to decode delays its second token."""
    handoff_us_per_token: float = Field(default=35.0, ge=0, le=1_000_000)
    """Microseconds that each prompt token adds to that."""
    session_slack_ms: float = Field(default=100.0, ge=0, le=3_600_000)
    """Milliseconds that a session's worker may cost more than the best one before the session moves."""
    session_ttl_s: Seconds = 600.0
    """Seconds for which a session's worker is remembered."""
    prefix_events: bool = True
    """Workers publish what their KV caches hold, and requests go where their prefix is."""
    prefix_log: int = Field(default=20_000, ge=100)
    """KV events kept for gateways that fall behind, about; one that fell further asks the workers for a snapshot."""
    decisions_kept: int = Field(default=2000, ge=0, le=1_000_000)
    """Decisions kept for `joinwise explain`, about; 0 keeps none."""
    tenants: dict[str, TenantConfig] = {}
    """Limits by tenant; `*` holds for all that have none of their own, together."""


class PeerTlsConfig(Section):
    """Mutual TLS between the cluster's own processes: engine gRPC, KV, operator's ports."""

    cert: str = Field(min_length=1)
    """PEM file of the certificate chain, for servers and clients alike; read again when it changes."""
    key: str = Field(min_length=1)
    """PEM file of the private key."""
    ca: str = Field(min_length=1)
    """PEM file of the authority that all of the cluster's certificates come from, and nobody else's."""
    server_name: str = Field(default="joinwise", min_length=1)
    """Name that all of them carry: addresses of workers are not known when certificates are made."""


class TlsConfig(Section):
    """TLS of the gateway's two listeners. Files are read again when they change."""

    cert: str
    """PEM file of the certificate chain."""
    key: str
    """PEM file of the private key."""
    ca: str | None = None
    """PEM file of the authority that client certificates must come from; None asks for none."""


class JwtConfig(Section):
    """JSON web tokens as credentials of clients, signed by an identity provider."""

    issuer: str = Field(min_length=1)
    """The `iss` that tokens must carry."""
    audience: str = Field(min_length=1)
    """The `aud` that tokens must carry."""
    jwks_file: str | None = None
    """File with the provider's public keys (a JSON web key set); read again when it changes."""
    jwks_url: str | None = Field(default=None, pattern=r"^https://.+$")
    """https:// address of the same; asked again for an unknown key id, at most every 30 s."""
    algorithms: list[Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA"]] = Field(
        default=["RS256", "ES256"], min_length=1
    )
    """Accepted signatures; never a symmetric one."""
    tenant_claim: str = "sub"
    """Claim with the tenant's name."""
    roles_claim: str = "roles"
    """Claim with a list of roles (user, admin, metrics); without it a token has `user`."""
    leeway_s: float = Field(default=30.0, ge=0, le=600)
    """Seconds by which clocks may differ."""


class LimitsConfig(Section):
    """What one client may ask of the gateway's listeners."""

    header_bytes: int = Field(default=32 << 10, ge=1024, le=1 << 20)
    """Bytes of all headers of a request; more get 431."""
    headers: int = Field(default=100, ge=8, le=10_000)
    """Number of headers of a request; more get 431."""
    concurrent: int = Field(default=2048, ge=1, le=1_000_000)
    """Calls at a time on each listener, streams included; more get 429 (RESOURCE_EXHAUSTED over gRPC)."""
    body_s: Seconds = 30.0
    """Seconds in which a request's head must have arrived, and then its body; a late body gets 408."""
    request_s: Seconds = 3600.0
    """Seconds after which a call is ended, whatever it is doing."""


class ConsoleConfig(Section):
    """The live page at /console. It is for whoever may read /metrics."""

    enabled: bool = False
    """Serve it."""
    every_s: float = Field(default=1.0, ge=0.2, le=60)
    """Seconds between two looks at the cluster, while a page is open; with none open nobody looks."""
    pages: int = Field(default=16, ge=1, le=1000)
    """Pages that may be open at one gateway; more get 429."""


class GatewayConfig(Section):
    """The front door."""

    host: str = "127.0.0.1"
    """Address to listen on; anything but loopback is a choice of the operator."""
    http_port: Port = 8000
    """Port of the OpenAI and Anthropic interfaces; 0 picks a free one."""
    grpc_port: Port = 8001
    """Port of the gRPC interface; 0 picks a free one."""
    replicas: int = Field(default=1, ge=1, le=1000)
    """Gateways; more than one needs Serve."""
    max_body_bytes: Bytes = 8 << 20
    """Largest accepted request body; larger ones get 413."""
    default_max_tokens: int | None = Field(default=None, ge=1)
    """max_tokens of requests without one; None leaves it to vLLM (the rest of the context)."""
    api_keys: list[str] = []
    """Accepted bearer tokens, each with all roles; empty, with neither `keys_file` nor `jwt`, accepts everyone."""
    keys_file: str | None = None
    """File of hashed keys with tenants and roles, made by `joinwise keys`; read again when it changes."""
    jwt: JwtConfig | None = None
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    audit_file: str | None = None
    """File to which calls of administration are appended, a JSON object a line; None writes them to the log."""
    ops_port: Port | None = None
    """Port of /livez, /readyz and /metrics for operators; 0 picks a free one, None opens none."""
    console: ConsoleConfig = Field(default_factory=ConsoleConfig)
    tls: TlsConfig | None = None
    chat_template: str | None = None
    """File or text of a chat template that replaces the model's own; of models that name none themselves."""
    enable_auto_tools: bool = False
    """Let models choose tools (vLLM's --enable-auto-tool-choice); each needs a `tool_parser`."""
    tool_parser: str | None = None
    """vLLM's --tool-call-parser, of models that name none themselves."""
    reasoning_parser: str | None = None
    """vLLM's --reasoning-parser, of models that name none themselves."""
    admin: bool = False
    """Serve /v1/load_lora_adapter, /v1/unload_lora_adapter and /v1/reset_prefix_cache to whoever may send requests."""
    vllm_args: dict[str, Any] = {}
    """Further arguments of vLLM's front end by name."""
    drain_s: Seconds = 30.0
    """Seconds for which a stopping gateway lets running requests finish, and a stopping worker also serves KV that
    peers still need."""


class RayConfig(Section):
    """The Ray cluster to run in."""

    address: str = "local"
    """`local` starts one on this machine, `auto` joins the running one, else host:port or ray://…"""
    namespace: str | None = None
    """Ray namespace of the actors; None means `joinwise-<cluster>`."""
    start_timeout_s: Seconds = 600.0
    """Seconds until all workers must be ready."""
    alone_s: Literal[0] | Annotated[float, Field(ge=30, le=86400)] = 600.0
    """Seconds for which workers and gateway serve on when their launcher has died, so that the next one takes them
    over; 0 lets them end with it. Only in a Ray, and with a Redis, that joinwise did not start."""


class LogConfig(Section):
    """What is written down."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Of joinwise's own lines; vLLM's come from warning on, or all with `debug`."""
    format: Literal["text", "json"] = "text"
    """`json` writes an object a line, with the request's id where there is one."""


class TracingConfig(Section):
    """OpenTelemetry traces: one per request, across gateway and workers."""

    endpoint: str = Field(pattern=r"^https?://.+$")
    """OTLP address of a collector: http://host:4317 for gRPC."""
    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of requests that are traced, where the caller has not decided already (W3C traceparent)."""


class JoinwiseConfig(Section):
    """The whole of joinwise.yaml."""

    cluster: Name = "joinwise"
    """Name of the cluster: part of every Redis key, so that clusters can share a Redis."""
    models: list[ModelConfig] = Field(min_length=1)
    pools: list[PoolConfig] = Field(min_length=1)
    redis: RedisConfig = Field(default_factory=RedisConfig)
    kv: KvConfig = Field(default_factory=KvConfig)
    router: RouterConfig = Field(default_factory=RouterConfig)
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)
    ray: RayConfig = Field(default_factory=RayConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    tls: PeerTlsConfig | None = None
    tracing: TracingConfig | None = None

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _short_redis(cls, data: Any) -> Any:
        """`redis: embedded` and `redis: redis://host` stand for `redis: {url: …}`."""
        if isinstance(data, dict) and isinstance(data.get("redis"), str):
            return {**data, "redis": {"url": data["redis"]}}
        return data

    def model_named(self, name: str) -> ModelConfig:
        """The model that a pool refers to. Raises KeyError for an unknown name (`check` has refused those)."""
        for model in self.models:
            if model.name == name:
                return model
        raise KeyError(name)

    @property
    def served(self) -> dict[str, str]:
        """Names that pools refer to -> names that clients ask for."""
        return {model.name: model.public_name for model in self.models}

    @property
    def wakes(self) -> dict[str, float]:
        """Models with a pool that may be at zero, as clients call them -> seconds that a request waits for a worker."""
        found: dict[str, float] = {}
        for pool in self.pools:
            if pool.autoscale is not None and not pool.autoscale.least:
                name = self.model_named(pool.model).public_name
                found[name] = max(found.get(name, 0.0), pool.autoscale.wake_s)
        return found

    def engine_arguments(self, pool: PoolConfig) -> dict[str, Any]:
        """vLLM engine arguments of a pool's workers: the model's, then the pool's own, which win."""
        model = self.model_named(pool.model)
        ours: dict[str, Any] = {"dtype": model.dtype}
        if model.tokenizer is not None:
            ours["tokenizer"] = model.tokenizer
        if model.max_model_len is not None:
            ours["max_model_len"] = model.max_model_len
        if model.adapters:
            ours |= {"enable_lora": True, "max_loras": len(model.adapters)}
        return ours | pool.engine

    def source_of(self, path: str) -> str:
        """Origin of the value at `path` ("pools[0].replicas"): a file and line, a variable, or "default"."""
        return self._sources.get(path, "default")

    def remember_sources(self, sources: dict[str, str]) -> None:
        """Called once by the loader."""
        self._sources = dict(sources)
