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
        total_s: from rendered to the last token.
    """

    request_id: str
    model: str = ""
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

    def summary_table(self) -> list[str]:
        """Lines for a terminal, a label and a value each."""
        rows = [
            ("request", self.request_id + (f" (attempt {self.attempt + 1})" if self.attempt else "")),
            ("workers", self._workers()),
            ("tokens", f"{self.prompt_tokens} prompt ({self.cached_tokens} cached), {self.output_tokens} output"),
            ("queued", _ms(self.queued_s)),
            ("routed", _ms(self.routed_s)),
            ("prefill", _ms(self.prefill_s)),
            ("first token", _ms(self.ttft_s)),
        ]
        if self.wire_bytes:
            rows += [
                ("KV", f"{self.wire_bytes / 1e6:.2f} MB over {self.transport or 'an unknown transport'}"),
                ("on the wire", f"{_ms(self.wire_seconds_hidden)} hidden, {_ms(self.wire_seconds_exposed)} exposed"),
                ("import", _ms(self.import_s)),
            ]
        if self.replayed_steps:
            rows.append(("replayed", f"{self.replayed_steps} steps in {_ms(self.replayed_step_s)}"))
        if self.recomputed:
            rows.append(("recomputed", "yes"))
        if self.output_tokens > 1:
            rows += [
                ("second token", f"{_ms(self.second_token_gap_s)} after the first"),
                ("later tokens", f"{_ms(self.token_gap_median_s)} median, {_ms(self.token_gap_max_s)} longest"),
            ]
        rows.append(("total", f"{_ms(self.total_s)}, {self.finish_reason or 'unfinished'}"))
        width = max(len(label) for label, _ in rows)
        return [f"{label:<{width}}  {value}" for label, value in rows]

    def _workers(self) -> str:
        if self.prefill_worker is None:
            return f"{self.decode_worker or '-'} ({self.assignment_reason or 'unknown'})"
        return f"{self.prefill_worker} -> {self.decode_worker} ({self.assignment_reason})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms" if seconds < 10 else f"{seconds:,.2f} s"
