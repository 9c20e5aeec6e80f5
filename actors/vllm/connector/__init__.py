"""The KV connector as vLLM loads it: thin, it hands every call to the half that this object is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput

from joinwise.actors.kv.fetching import FetchReport
from joinwise.actors.vllm.connector.metadata import StepMetadata, StepReports
from joinwise.actors.vllm.connector.scheduler import SchedulerConnector
from joinwise.actors.vllm.connector.worker import WorkerConnector

if TYPE_CHECKING:
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

MODULE = __name__
NAME = "JoinwiseConnector"


@dataclass
class ConnectorHost:
    """What the process that steps an engine gives to its connector, and gets from it.

    vLLM builds the connector from its configuration alone; this is the one place where the two
    meet. Such a process has one engine and therefore one host (`host`). Ranks may run in processes
    of their own, where it stays empty: see `ports`.
    """

    wake: Callable[[], None] = lambda: None
    on_report: Callable[[FetchReport], None] = lambda _: None
    scheduler: SchedulerConnector | None = None


host = ConnectorHost()


class JoinwiseConnector(KVConnectorBase_V1):
    """Layer-wise KV hand-off between engines; one instance per role, both in the engine's process."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        if len(groups) != 1:
            names = [name for group in groups[1:] for name in group.layer_names]
            raise NotImplementedError(f"KV hand-off supports one KV cache group; layer {names[0]!r} is in another")
        block_size = groups[0].kv_cache_spec.block_size
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = host.scheduler = SchedulerConnector(
                block_size, host.on_report, ranks=vllm_config.parallel_config.world_size
            )
        else:
            self.worker = WorkerConnector(block_size, kv_cache_config.num_blocks, wake=host.wake)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Layers are sent as they are computed; a graph of the whole model would not say when."""
        return True

    @property
    def requires_kv_delivery(self) -> bool:
        """A preempted sender closes its transfer, and the receiver computes the prompt itself."""
        return False

    # Worker half.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """See `WorkerConnector.register`."""
        self.worker.register(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """See `WorkerConnector.preempt`."""
        assert isinstance(kv_connector_metadata, StepMetadata)
        self.worker.preempt(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """First call of a step: senders are opened before the forward pass."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMetadata)
        self.worker.begin(connector_metadata)

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        """Asynchronous loads only; vLLM may call this after the forward pass."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        self.worker.start_receives(metadata)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request is scheduled only when its KV is there."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: "AttentionMetadata", **kwargs: Any
    ) -> None:
        """See `WorkerConnector.layer_done`."""
        self.worker.layer_done(layer_name)

    def wait_for_save(self) -> None:
        """Blocks are kept until sent, so nothing is waited for."""
        self.worker.end_step()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """See `WorkerConnector.transfer_results`."""
        return self.worker.transfer_results(finished_req_ids)

    def build_connector_worker_meta(self) -> StepReports | None:
        """See `WorkerConnector.take_reports`."""
        return self.worker.take_reports()

    def shutdown(self) -> None:
        """End all transfers."""
        if self.role is KVConnectorRole.WORKER:
            self.worker.shutdown()

    # Scheduler half.

    def on_new_request(self, request: "Request") -> None:
        """See `SchedulerConnector.on_new_request`."""
        self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        """See `SchedulerConnector.matched_tokens`."""
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        """See `SchedulerConnector.after_alloc`."""
        self._scheduler.after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """See `SchedulerConnector.build_metadata`."""
        return self._scheduler.build_metadata(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """See `SchedulerConnector.on_worker_output`."""
        self._scheduler.on_worker_output(connector_output)

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """See `SchedulerConnector.request_finished`."""
        return self._scheduler.request_finished(request), None
