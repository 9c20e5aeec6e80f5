"""What is asked of the router, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from joinwise.cluster.errors import InvalidRequestError
from joinwise.cluster.router.terms import PLAIN, Terms

#: Token counts from here on are mistakes.
MAX_TOKENS = 1 << 31
MAX_SAMPLES = 1 << 14


@dataclass(frozen=True)
class Held:
    """A prefix that a worker has in its KV cache.

    Attributes:
        epoch: the life of the worker that was seen to have it; in another life it has nothing.
        tokens: prompt tokens from the start on.
    """

    epoch: int
    tokens: int


@dataclass(frozen=True)
class Demand:
    """What a request asks of its workers.

    Attributes:
        request_id: named in errors and in `snapshot`; need not be unique.
        model: served name of the model.
        prompt_tokens: at least 1.
        max_new_tokens: most tokens that may be generated for one sample, at least 1.
        whole: one worker must do all of it.
        needs: capabilities; a LoRA adapter is "lora:<name>".
        exclude: ids of workers that may not be taken, such as one that has just failed.
        samples: answers to the one prompt; all are decoded by one worker, and share the prompt's KV.
        held: worker id -> the longest prefix of the prompt that it holds; a few workers at most.
        terms: whose request it is, and what was promised to it.
        urgent: it has been admitted before (its worker was lost): it passes the queue and its tenant's limits.
    """

    request_id: str
    model: str
    prompt_tokens: int
    max_new_tokens: int
    whole: bool = False
    needs: frozenset[str] = frozenset()
    exclude: frozenset[str] = frozenset()
    samples: int = 1
    held: Mapping[str, Held] = field(default_factory=dict)
    terms: Terms = PLAIN
    urgent: bool = False

    def __post_init__(self) -> None:
        limits = {"prompt_tokens": MAX_TOKENS, "max_new_tokens": MAX_TOKENS, "samples": MAX_SAMPLES}
        for name, limit in limits.items():
            if not 1 <= (value := getattr(self, name)) < limit:
                raise InvalidRequestError(
                    f"{name} must be at least 1 and less than {limit}, not {value}", request_id=self.request_id
                )


@dataclass(frozen=True)
class WorkerRef:
    """A worker, in the life that the router meant."""

    worker_id: str
    epoch: int
    engine_address: str
    kv_address: str


@dataclass(frozen=True)
class Assignment:
    """One sample's part of a lease on one worker, or two.

    Attributes:
        prefill: None when `decode` does the whole request.
        reason: why so; the words are those of docs/routing.md.
        expires_ms: milliseconds since 1970 on the router's clock, unless renewed.
        sample: which of the lease's samples this is; each is settled by itself.
        ttft_ms, tpot_ms: estimates of the time to the first token and between tokens.
    """

    lease_id: str
    lease_epoch: int
    prefill: WorkerRef | None
    decode: WorkerRef
    reason: str
    expires_ms: int
    sample: int = 0
    ttft_ms: float = 0.0
    tpot_ms: float = 0.0


@dataclass(frozen=True)
class Running:
    """A sample that runs, as its gateway knows it: enough to write its lease again where Redis has lost it."""

    assignment: Assignment
    demand: Demand
    prefill_done: bool
