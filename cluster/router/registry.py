"""Who the workers are. A worker registers once per life, says every second that it lives and how loaded it is, and is
forgotten when it falls silent. Gateways read the registry; only the router's scripts change pending tokens.

Promises: live workers of one model have equal files and equal KV layout, so any two of them can share a request; an
epoch is never given twice, so nothing meant for an earlier life of a worker touches a later one; a worker that is
routable has every adapter recorded for its model.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from typing import Any, cast

from redis.asyncio import Redis

from joinwise.cluster.config_model import Role, RouterConfig
from joinwise.cluster.errors import RegistrationRefusedError
from joinwise.cluster.store.client import Scripts, StoreClock, store_errors
from joinwise.cluster.store.keys import Keys

ADAPTER_CAPABILITY = "lora:"
#: A worker without it (one that speculates) samples plainly only; see docs/speculation.md.
ALL_SAMPLING = "all_sampling"

_LOAD = ("common", "load")
_MEMBERS = (*_LOAD, "members")
_AT_ONCE = 128  # workers in one reading: Redis answers nobody else meanwhile

# Microseconds until a worker has measured its own: a slow one's, so that nothing is promised too early.
_UNKNOWN_US_PER_TOKEN = 1000
_UNKNOWN_US_PER_STEP = 30_000
_MAX_US_PER_TOKEN = 10_000_000
_MAX_US_PER_STEP = 100_000_000
_MAX_SEQS = 1 << 20


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker registers: fixed for one life of it, but for `role`, which the router may change.

    Attributes:
        worker_id: unique in the cluster.
        epoch: this life's number, given by `Registry.register`; 0 before.
        model: the model's served name.
        fingerprint: equal for workers between which a change of role is one write.
        model_digest: digest of weights, tokenizer and chat template.
        kv_layout: digest of the KV cache's layout.
        capabilities: what the worker can do, such as "replay" or "kv_grpc".
        num_blocks: KV blocks in all, each of `block_size` tokens.
        adapters: LoRA adapters that it has loaded.
        started_ms: when it started, milliseconds since 1970.
    """

    worker_id: str
    epoch: int
    model: str
    pool: str
    role: str
    fingerprint: str
    model_digest: str
    engine_address: str
    kv_address: str
    metrics_address: str
    capabilities: frozenset[str]
    kv_layout: str
    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    adapters: frozenset[str]
    vllm_version: str
    protocol_version: int
    started_ms: int


@dataclass(frozen=True)
class WorkerLoad:
    """What a worker says of itself with each heartbeat.

    Attributes:
        running, waiting: requests.
        decode_step_ms: median milliseconds of a decode step; 0 when not known yet.
        prefill_tokens_per_s: measured; 0 when not known yet.
    """

    running: int = 0
    waiting: int = 0
    kv_blocks_free: int = 0
    kv_blocks_total: int = 0
    decode_step_ms: float = 0.0
    prefill_tokens_per_s: float = 0.0


@dataclass(frozen=True)
class WorkerState:
    """A worker as the registry sees it. `role` in `info` is the current one, "draining" while it leaves.

    Attributes:
        beat_ms: when it was last heard of, milliseconds since 1970.
        pending_prefill, pending_decode: reserved prompt tokens, and tokens of KV cache.
        pending_new: tokens that are still to be generated, of those.
        sequences: that decode there, or will.
        capacity: of the KV cache, in tokens; 0 when not known.
    """

    info: WorkerInfo
    load: WorkerLoad
    beat_ms: int
    pending_prefill: int
    pending_decode: int
    pending_new: int
    sequences: int
    capacity: int

    @property
    def pending_tokens(self) -> int:
        """Reserved tokens of both phases."""
        return self.pending_prefill + self.pending_decode


@dataclass(frozen=True)
class AsleepPool:
    """A pool without a worker, that gets one with the next request for its model. `model`: its served name."""

    name: str
    model: str
    role: str


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that every worker of a model has loaded."""

    name: str
    path: str
    lora_id: int


class Registry:
    """The registry of one cluster.

    Every method raises StoreUnavailableError when Redis does not answer.

    Args:
        client: from `store.client.connect`.
        cluster: the cluster's name.
        settings: `worker_ttl_s` decides how long silence is tolerated.
        clock: milliseconds since 1970, instead of Redis' own clock.
    """

    def __init__(
        self, client: Redis, cluster: str, settings: RouterConfig, clock: Callable[[], int] | None = None
    ) -> None:
        self._client = client
        self._keys = Keys(cluster)
        self._scripts = Scripts(client, self._keys.base)
        self._clock = StoreClock(client, clock)
        self._ttl_ms = int(settings.worker_ttl_s * 1000)

    async def register(self, info: WorkerInfo) -> int:
        """Admit a worker; it is routable at once.

        Returns:
            The epoch of this life of the worker.

        Raises:
            RegistrationRefusedError: a live worker of the model has other files or another KV layout, or an adapter
                recorded for the model is not among `info.adapters`.
        """
        if any("\0" in str(value) for value in astuple(info)):
            raise RegistrationRefusedError(f"worker {info.worker_id!r} may not register with a zero byte in its name")
        now = await self._clock.now_ms()
        with store_errors(f"registering worker {info.worker_id}"):
            verdict, *details = await self._scripts.run(
                "register",
                info.worker_id,
                info.model,
                info.role,
                info.model_digest,
                info.kv_layout,
                now,
                self._ttl_ms,
                _capability_text(info),
                json.dumps(sorted(info.adapters)),
                _info_json(info),
                info.engine_address,
                info.kv_address,
                info.fingerprint,
                min(_MAX_SEQS, max(1, info.max_num_seqs)),
                max(0, info.num_blocks * info.block_size),
                _UNKNOWN_US_PER_TOKEN,
                _UNKNOWN_US_PER_STEP,
                preludes=(*_LOAD, "pick", "members"),
            )
        if verdict != "ok":
            raise RegistrationRefusedError(_refusal(info, verdict, *details))
        return int(details[0])

    async def heartbeat(self, worker_id: str, epoch: int, load: WorkerLoad, now_ms: int | None = None) -> bool:
        """Say that a worker lives. False: the registry does not know this life of it, so it must register again."""
        now = await self._clock.now_ms() if now_ms is None else now_ms
        with store_errors(f"sending the heartbeat of worker {worker_id}"):
            return bool(
                await self._scripts.run(
                    "heartbeat", worker_id, epoch, now, json.dumps(asdict(load)), *_speeds(load), preludes=_LOAD
                )
            )

    async def deregister(self, worker_id: str, epoch: int) -> bool:
        """Forget a worker that leaves; False if this life of it was not registered."""
        with store_errors(f"removing worker {worker_id}"):
            return bool(await self._scripts.run("deregister", worker_id, epoch, preludes=_LOAD))

    async def set_role(self, worker_id: str, epoch: int, role: Role) -> bool:
        """Route the worker for another phase from now on; what it has begun it ends. False for a stale epoch."""
        return await self._change(worker_id, epoch, role)

    async def drain(self, worker_id: str, epoch: int) -> bool:
        """Route nothing more to the worker, which goes on with what it has. False for a stale epoch."""
        return await self._change(worker_id, epoch, "draining")

    async def _change(self, worker_id: str, epoch: int, role: str) -> bool:
        with store_errors(f"changing the role of worker {worker_id}"):
            return bool(await self._scripts.run("change", worker_id, epoch, "role", role, preludes=_MEMBERS))

    async def set_adapters(self, info: WorkerInfo, adapters: Iterable[str]) -> bool:
        """Record which adapters a registered worker has loaded now. False for a stale `info.epoch`."""
        info = replace(info, adapters=frozenset(adapters))
        with store_errors(f"recording the adapters of worker {info.worker_id}"):
            return bool(
                await self._scripts.run(
                    "change",
                    info.worker_id,
                    info.epoch,
                    "caps",
                    _capability_text(info),
                    _info_json(info),
                    preludes=_MEMBERS,
                )
            )

    async def list(self, now_ms: int | None = None) -> tuple[WorkerInfo, ...]:
        """Live workers that take requests, by id, with their current roles."""
        return tuple(state.info for state in await self.states(now_ms) if state.info.role != "draining")

    async def states(self, now_ms: int | None = None) -> tuple[WorkerState, ...]:
        """Live workers, draining ones too, with load and pending tokens, by id."""
        now = await self._clock.now_ms() if now_ms is None else now_ms
        with store_errors("listing the workers"):
            live: Any = await self._client.zrangebyscore(self._keys.beats, now - self._ttl_ms, "+inf")
        ids = sorted(map(str, live))
        found: list[WorkerState] = []
        for at in range(0, len(ids), _AT_ONCE):
            found += await self.states_of(ids[at : at + _AT_ONCE])
        return tuple(found)

    async def states_of(self, worker_ids: Sequence[str]) -> tuple[WorkerState, ...]:
        """Those of these workers that are registered, live or not, in this order; some hundred at most."""
        if not worker_ids:
            return ()
        with store_errors("reading workers"):
            return tuple(_state(record) for record in await self._scripts.run("states", *worker_ids))

    async def token(self, known: str = "") -> str:
        """The secret that the cluster's processes show each other; made by the first that asks.

        Args:
            known: what it was before; a Redis that has lost its data is told.
        """
        with store_errors("reading the cluster's token"):
            await self._client.set(self._keys.token, known or secrets.token_urlsafe(32), nx=True)
            return str(await self._client.get(self._keys.token))

    async def set_troubles(self, sentences: Sequence[str], ttl_s: int) -> None:
        """Record what the controller cannot mend, for people; forgotten after `ttl_s` seconds."""
        with store_errors("recording troubles"):
            if sentences:
                await self._client.set(self._keys.troubles, json.dumps(list(sentences)), ex=ttl_s)
            else:
                await self._client.delete(self._keys.troubles)

    async def troubles(self) -> tuple[str, ...]:
        """What `set_troubles` has recorded last."""
        with store_errors("reading troubles"):
            return tuple(json.loads(await self._client.get(self._keys.troubles) or "[]"))

    async def set_asleep(self, pools: Iterable[AsleepPool], ttl_s: int) -> None:
        """Record which pools are at zero, and would be woken; forgotten after `ttl_s` seconds."""
        with store_errors("recording pools at zero"):
            if found := [astuple(each) for each in pools]:
                await self._client.set(self._keys.asleep, json.dumps(found), ex=ttl_s)
            else:
                await self._client.delete(self._keys.asleep)

    async def asleep(self) -> tuple[AsleepPool, ...]:
        """What `set_asleep` has recorded last."""
        with store_errors("reading pools at zero"):
            return tuple(AsleepPool(*each) for each in json.loads(await self._client.get(self._keys.asleep) or "[]"))

    async def add_adapter(self, model: str, name: str, path: str, lora_id: int) -> None:
        """Record an adapter: from now on a worker registers only with it loaded."""
        with store_errors(f"recording the adapter {name}"):
            value = json.dumps({"path": path, "lora_id": lora_id})
            await self._client.hset(self._keys.adapters(model), name, value)

    async def remove_adapter(self, model: str, name: str) -> bool:
        """Forget an adapter; False if it was not recorded."""
        with store_errors(f"removing the adapter {name}"):
            return bool(await self._client.hdel(self._keys.adapters(model), name))

    async def adapters(self, model: str) -> tuple[Adapter, ...]:
        """The adapters recorded for a model, by name."""
        with store_errors(f"reading the adapters of {model}"):
            held = await cast(Awaitable[dict[str, str]], self._client.hgetall(self._keys.adapters(model)))
        return tuple(Adapter(name=name, **json.loads(value)) for name, value in sorted(held.items()))


def adapter_id(name: str) -> int:
    """vLLM's number for an adapter: the same in every gateway and every life of one, and never 0."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 0x7FFFFFFF + 1


def capabilities_of(info: WorkerInfo) -> frozenset[str]:
    """What a worker can do; adapters count as capabilities."""
    return info.capabilities | {ADAPTER_CAPABILITY + name for name in info.adapters}


def _capability_text(info: WorkerInfo) -> str:
    """Every capability between newlines, as `pick.lua` looks for them."""
    return "\n" + "".join(f"{name}\n" for name in sorted(capabilities_of(info)))


def _info_json(info: WorkerInfo) -> str:
    return json.dumps({**asdict(info), "capabilities": sorted(info.capabilities), "adapters": sorted(info.adapters)})


def _state(record: list[str]) -> WorkerState:
    """Parse what `states.lua` says of a worker; fields that a newer release has added are passed over."""
    info, load, epoch, role, numbers = record
    known = {field.name for field in fields(WorkerInfo)}
    raw: dict[str, Any] = {key: value for key, value in json.loads(info).items() if key in known}
    raw |= {"capabilities": frozenset(raw["capabilities"]), "adapters": frozenset(raw["adapters"])}
    raw |= {"epoch": int(epoch), "role": role}
    return WorkerState(WorkerInfo(**raw), parse_load(load), *map(int, numbers.split()))


def parse_load(text: str) -> WorkerLoad:
    """The load in a heartbeat; an unloaded worker when there was none yet."""
    known = {field.name for field in fields(WorkerLoad)}
    return WorkerLoad(**{key: value for key, value in json.loads(text or "{}").items() if key in known})


def _speeds(load: WorkerLoad) -> tuple[int, int]:
    """Microseconds of a prompt token and of a decode step; 0 where a worker does not know, or says what cannot be."""
    per_token = 1e6 / load.prefill_tokens_per_s if load.prefill_tokens_per_s > 0 else 0.0
    return _between(per_token, _MAX_US_PER_TOKEN), _between(load.decode_step_ms * 1000, _MAX_US_PER_STEP)


def _between(value: float, most: int) -> int:
    return max(1, round(value)) if 0.5 <= value <= most else 0


def _refusal(info: WorkerInfo, verdict: str, other: str, theirs: str = "") -> str:
    who = f"worker {info.worker_id} may not join the model {info.model!r}"
    if verdict == "adapter":
        return (
            f"{who}: it has not loaded the adapter {other!r}; load it (or remove it from the model) and register again"
        )
    what, mine = ("model files", info.model_digest) if verdict == "digest" else ("KV layout", info.kv_layout)
    return (
        f"{who}: its {what} ({mine}) differ from those of worker {other} ({theirs}); "
        "give both the same model, revision, dtype and engine arguments, or serve it under another name"
    )
