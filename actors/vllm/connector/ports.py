"""What the process that steps an engine asks of the connector on each rank, wherever that runs.

The functions run in each rank through vLLM's `collective_rpc`; the first argument is vLLM's worker.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.v1.executor import Executor

from joinwise.actors.kv.layout import signature
from joinwise.actors.kv.links import merged
from joinwise.actors.kv.metrics import KvFigures
from joinwise.actors.vllm.connector import JoinwiseConnector
from joinwise.actors.vllm.connector.worker import KvPort, KvSettings, KvStatus, WorkerConnector
from joinwise.actors.vllm.layout import describe
from joinwise.proto import kv_pb2


@dataclass(frozen=True)
class KvPorts:
    """All ranks' ports: their addresses in one string, and what peers must share with this worker."""

    addresses: str
    signature: str


def open_ports(executor: Executor, settings: KvSettings) -> KvPorts:
    """Open the KV port of every rank, and tell each of the others; none where vLLM's own connector has its own.

    Raises:
        UnsupportedKvCacheError: a layer whose cache cannot be shipped.
    """
    if settings.transport == "nixl":
        return KvPorts("", "nixl")
    ports: list[KvPort] = executor.collective_rpc(_open, args=(settings,))
    layouts = [port.layout for port in ports]
    executor.collective_rpc(_set_ranks, args=(layouts,))
    shared = signature(kv_pb2.KvLayout.FromString(layouts[0]), len(ports))
    return KvPorts(",".join(port.address for port in ports), shared)


def status(executor: Executor) -> KvStatus:
    """What all ranks hold and have done, added up."""
    first, *others = executor.collective_rpc(_status)
    for other in others:
        first.entries += other.entries
        first.streams += other.streams
        first.landing_bytes += other.landing_bytes
        first.landing_limit += other.landing_limit
        first.landing_waits += other.landing_waits
        first.counters += Counter(other.counters)
        first.links = merged(first.links, other.links)
    return first


def needed(executor: Executor) -> frozenset[str]:
    """Ids of the transfers whose KV a peer may still take from any rank."""
    return frozenset().union(*executor.collective_rpc(_needed))


def figures(status: KvStatus) -> KvFigures:
    """The part of it that is shown to operators."""
    landing = status.landing_bytes, status.landing_limit
    return KvFigures(status.links, status.streams, *landing, status.counters, status.landing_waits)


def _connector() -> WorkerConnector:
    group = get_kv_transfer_group()
    assert isinstance(group, JoinwiseConnector)
    return group.worker


def _is_ours() -> bool:
    return isinstance(get_kv_transfer_group(), JoinwiseConnector)


def _open(worker: Any, settings: KvSettings) -> KvPort:
    connector = _connector()
    geometry, interior = describe(worker, connector.caches)
    return connector.open(settings, geometry, interior)


def _set_ranks(worker: Any, layouts: Sequence[bytes]) -> None:
    _connector().set_ranks(worker.rank, layouts)


def _needed(_: Any) -> set[str]:
    return _connector().needed() if _is_ours() else set()


def _status(_: Any) -> KvStatus:
    return _connector().status() if _is_ours() else KvStatus([], 0, 0, 0, 0, Counter(), [])
