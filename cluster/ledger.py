"""Where a request's time went. The gateway fills one in per request; clients get it as JSON when they ask."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

VERSION = 1


@dataclass
class RequestLedger:
    """One request's account, on the gateway's clock unless said otherwise.

    Attributes:
        arrived: when it was rendered, in seconds since 1970 on the gateway's wall clock; 0 where that is not known.
        assignment_reason: why it was routed so (`router.decision.Assignment.reason`).
        prefill_worker: None when one worker did all of it.
        transport: how its KV crossed; None when none did.
        attempt: 0, and one more for each move to another worker.
        queued_s: from rendered until a worker began with it, without routing.
        routed_s: in the router.
        prefill_s: from scheduled to the first token.
        wire_bytes: KV bytes received.
        wire_seconds_hidden: on the wire while prefill still ran.
        wire_seconds_exposed: on the wire after prefill had ended.
        import_s: copying KV into the decode worker's blocks.
        ttft_s: from rendered to the first token.
        token_gap_median_s, token_gap_max_s: between later tokens.
        second_token_gap_s: from the first token to the second, which holds the hand-off.
        replayed_steps: decode steps that repeated tokens the client already had.
        replayed_step_s: how long those took.
        recomputed: a transfer failed or a worker was lost, and the prompt was computed again.
        cached_tokens: prompt tokens found in a prefix cache.
        draft_rounds: decode steps in which drafts were verified.
        draft_tokens, accepted_drafts: ids proposed in them, and those of them that were right.
        total_s: from rendered to the last token.
    """

    request_id: str
    model: str = ""
    arrived: float = 0.0
    assignment_reason: str = ""
    prefill_worker: str | None = None
    decode_worker: str | None = None
    transport: str | None = None
    attempt: int = 0
    queued_s: float = 0.0
    routed_s: float = 0.0
    prefill_s: float = 0.0
    wire_bytes: int = 0
    wire_seconds_hidden: float = 0.0
    wire_seconds_exposed: float = 0.0
    import_s: float = 0.0
    ttft_s: float = 0.0
    token_gap_median_s: float = 0.0
    token_gap_max_s: float = 0.0
    second_token_gap_s: float = 0.0
    replayed_steps: int = 0
    replayed_step_s: float = 0.0
    recomputed: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    draft_rounds: int = 0
    draft_tokens: int = 0
    accepted_drafts: int = 0
    finish_reason: str = ""
    total_s: float = 0.0

    def to_json(self) -> str:
        """One line of JSON with a version; seconds to the microsecond."""
        data = {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(self).items()}
        return json.dumps({"version": VERSION, **data}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> RequestLedger:
        """Parse `to_json`'s output; fields that a newer release has added are passed over.

        Raises:
            ValueError: not a ledger, or one of a version that this release cannot read.
        """
        data: Any = json.loads(text)
        if not isinstance(data, dict) or data.get("version") != VERSION or not isinstance(data.get("request_id"), str):
            raise ValueError(f"not a ledger of version {VERSION}: {str(data)[:80]}")
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in data.items() if key in known})
