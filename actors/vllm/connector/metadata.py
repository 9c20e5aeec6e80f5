"""What the two halves of the connector tell each other, once per engine step."""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from joinwise.actors.kv.fetching import FetchReport
from joinwise.actors.kv.receiving import FetchSpec


@dataclass(frozen=True, slots=True)
class SendStep:
    """Progress of one sending request in this step.

    Attributes:
        request_id: vLLM's request.
        block_ids: all its blocks so far, in prompt order.
        ready_after: tokens whose KV is final after it.
    """

    request_id: str
    block_ids: tuple[int, ...]
    ready_after: int


@dataclass(frozen=True, slots=True)
class OpenSend:
    """A request that begins to send. Ids as in `Handoff`; `num_tokens` is the prompt's length."""

    request_id: str
    transfer_id: str
    epoch: int
    num_tokens: int


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Everything the worker half must do in one step."""

    open_sends: list[OpenSend] = field(default_factory=list)
    sends: list[SendStep] = field(default_factory=list)
    receives: list[FetchSpec] = field(default_factory=list)
    released: set[str] = field(default_factory=set)
    """Receiving requests that may go on as soon as their KV is there."""
    stop_receives: set[str] = field(default_factory=set)
    """Receiving requests that were aborted: fence, then report once."""
    fail_receives: set[str] = field(default_factory=set)
    """Receiving requests whose sender failed: stop the fetch, recompute."""
    close_sends: dict[str, str] = field(default_factory=dict)
    """Sending requests to stop, with the reason."""
    preempted: set[str] = field(default_factory=set)
    stopping: bool = False
    """The worker drains: no transfer is opened after this step's."""


@dataclass
class StepReports(KVConnectorWorkerMetadata):
    """What the imports that have ended on a rank since its last step have cost."""

    reports: list[FetchReport] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "StepReports":
        """The reports of several ranks."""
        assert isinstance(other, StepReports)
        return StepReports([*self.reports, *other.reports])
