"""What joinwise puts into a request's `extra_args`, parsed once at the seam.

vLLM carries `extra_args` untouched from the gateway to the connector and the logits processors. Two
keys of it are ours: the hand-off (which half of a transfer this request is) and the replayed tokens.
Clients may set neither: the gateway refuses both.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from vllm.sampling_params import SamplingParams

KV_TRANSFER_KEY = "kv_transfer_params"
REPLAY_KEY = "joinwise_replay"
RESERVED_PREFIX = "joinwise_"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Handoff:
    """One half of a KV transfer.

    `half` says whether this request sends (prefill) or receives (decode); `peer` is the sender's KV
    address, for the receiver only; `timeout_s` bounds the wait for each
    frame after the first; `num_tokens` is what the sender has where that is less than the prompt (a
    receiver that appends tokens to the prompt sets it), 0 for all of it.
    """

    half: Literal["send", "recv"]
    transfer_id: str
    epoch: int
    peer: str = ""
    timeout_s: float = 60.0
    num_tokens: int = 0

    def to_params(self) -> dict[str, Any]:
        """The dict that travels as `kv_transfer_params`."""
        return {"joinwise": _VERSION, **asdict(self)}

    @classmethod
    def from_params(cls, params: dict[str, Any] | None) -> "Handoff | None":
        """Parse `kv_transfer_params`; None where there is no hand-off of ours in it.

        Keys that a newer gateway has added are ignored: a worker one release behind still works.
        """
        if not params or params.get("joinwise") != _VERSION:
            return None
        known = {each.name for each in fields(cls)}
        return cls(**{key: value for key, value in params.items() if key in known})


def replay_of(params: SamplingParams) -> list[int]:
    """Tokens that this request has emitted already, elsewhere."""
    return list((params.extra_args or {}).get(REPLAY_KEY, ()))


def set_replay(params: SamplingParams, token_ids: list[int]) -> None:
    """Make the request begin by repeating these tokens."""
    params.extra_args = {**(params.extra_args or {}), REPLAY_KEY: list(token_ids)}
