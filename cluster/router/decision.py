"""What is asked of the router, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from joinwise.cluster.errors import InvalidRequestError

#: Token counts from here on are mistakes.
MAX_TOKENS = 1 << 31


@dataclass(frozen=True)
class Demand:
    """What a request asks of its workers.

    Attributes:
        request_id: named in errors and in `snapshot`; need not be unique.
        model: served name of the model.
        prompt_tokens: at least 1.
        max_new_tokens: most tokens that may be generated, at least 1.
        whole: one worker must do all of it.
        needs: capabilities; a LoRA adapter is "lora:<name>".
        exclude: ids of workers that may not be taken, such as one that has just failed.
    """

    request_id: str
    model: str
    prompt_tokens: int
    max_new_tokens: int
    whole: bool = False
    needs: frozenset[str] = frozenset()
    exclude: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name, value in (("prompt_tokens", self.prompt_tokens), ("max_new_tokens", self.max_new_tokens)):
            if not 1 <= value < MAX_TOKENS:
                raise InvalidRequestError(f"{name} must be at least 1, not {value}", request_id=self.request_id)


@dataclass(frozen=True)
class WorkerRef:
    """A worker, in the life that the router meant."""

    worker_id: str
    epoch: int
    engine_address: str
    kv_address: str


@dataclass(frozen=True)
class Assignment:
    """A lease on one worker, or two.

    Attributes:
        prefill: None when `decode` does the whole request.
        reason: split, whole, mixed, no_prefill_worker or no_decode_worker.
        expires_ms: milliseconds since 1970 on the router's clock, unless renewed.
    """

    lease_id: str
    lease_epoch: int
    prefill: WorkerRef | None
    decode: WorkerRef
    reason: str
    expires_ms: int
