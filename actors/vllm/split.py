"""How one request becomes two, and two outputs one again: pure functions, no I/O.

The rules are DESIGN.md's ("A request's life", 9). Ids on workers are `<id>.<attempt>.<p|d>`.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, EngineCoreRequest, FinishReason

from joinwise.actors.vllm.handoff import KV_TRANSFER_KEY, RESERVED_PREFIX, Handoff, replay_of, set_replay
from joinwise.cluster.errors import InvalidRequestError
from joinwise.cluster.router.registry import ALL_SAMPLING

Transfer = Handoff | dict[str, Any]
"""Ours, or what a connector of vLLM's takes as `kv_transfer_params`."""
_RESERVED_KEYS = (KV_TRANSFER_KEY, "ec_transfer_params")


def refuse_reserved(params: SamplingParams) -> None:
    """Refuse what only joinwise may put into a request.

    Raises:
        InvalidRequestError: a reserved key in the client's extra arguments.
    """
    for key in params.extra_args or ():
        if key in _RESERVED_KEYS or key.startswith(RESERVED_PREFIX):
            raise InvalidRequestError(f"{key!r} belongs to the cluster and cannot be set by a client: leave it out")
    if params.trace_decode_token_ids is not None:
        raise InvalidRequestError("'trace_decode_token_ids' is not supported: leave it out")


def whole_reason(params: SamplingParams, *, has_embeds: bool = False, resumable: bool = False) -> str:
    """Why a request must run on one worker; empty when it may be split."""
    if params.max_tokens == 1:
        return "one token only"
    if params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None:
        return "prompt log probabilities"
    if params.skip_reading_prefix_cache:
        return "the prefix cache may not be read"
    if has_embeds:
        return "prompt embeddings"
    if resumable:
        return "streaming input"
    if params.thinking_token_budget is not None:
        return "a thinking budget counts from its own first token"
    if params.routed_experts_prompt_start:
        return "routed experts of the prompt"
    return ""


#: What a plain request may ask for: drawing a token does not depend on those before it, or how the text is shown.
_PLAIN_FIELDS = frozenset(
    {
        *("n", "temperature", "top_p", "top_k", "stop", "stop_token_ids", "ignore_eos", "max_tokens"),
        *("logprobs", "flat_logprobs", "detokenize", "skip_special_tokens", "spaces_between_special_tokens"),
        *("include_stop_str_in_output", "output_kind", "stream_interval", "output_text_buffer_length", "skip_clone"),
        *("_eos_token_id", "_all_stop_token_ids", "_watermarking_skipped"),
    }
)
_DEFAULTS = SamplingParams()
_SPECIAL_FIELDS = tuple(name for name in SamplingParams.__struct_fields__ if name not in _PLAIN_FIELDS)


def needs_of(params: SamplingParams, *, has_embeds: bool = False) -> frozenset[str]:
    """Capabilities that a worker must have to serve a request exactly.

    Speculation is exact for temperature without a seed, top_p, top_k, stops, lengths and log probabilities; anything
    else, whatever vLLM may add to it, needs a worker without it.
    """
    plain = not has_embeds
    for name in _SPECIAL_FIELDS:
        value = getattr(params, name)
        asks_nothing = value is False or (isinstance(value, list | dict) and not value)
        if value != getattr(_DEFAULTS, name) and not asks_nothing:
            plain = plain and name == "seed" and params.temperature == 0
    return frozenset() if plain else frozenset({ALL_SAMPLING})


def part_id(request_id: str, attempt: int, part: str) -> str:
    """Worker-side id of one part (`p` or `d`)."""
    return f"{request_id}.{attempt}.{part}"


def origin_of(worker_request_id: str) -> tuple[str, str]:
    """Gateway-side id and part of a worker-side id."""
    request_id, _, part = worker_request_id.rsplit(".", 2)
    return request_id, part


def prefill_part(request: EngineCoreRequest, part: str, handoff: Transfer) -> EngineCoreRequest:
    """The copy that prefills: one token, then hand over."""
    copied = _copy(request, part, handoff)
    params = copied.sampling_params
    assert params is not None
    params.max_tokens = 1
    params.min_tokens = min(params.min_tokens, 1)
    return copied


def decode_part(
    request: EngineCoreRequest, part: str, handoff: Transfer | None, replay: list[int]
) -> EngineCoreRequest:
    """The copy that decodes; without a hand-off it computes the prompt itself."""
    copied = _copy(request, part, handoff)
    assert copied.sampling_params is not None
    if len(replay) > len(replay_of(copied.sampling_params)):  # a stream that is resumed has some of its own
        set_replay(copied.sampling_params, replay)
    return copied


def _copy(request: EngineCoreRequest, part: str, handoff: Transfer | None) -> EngineCoreRequest:
    """Copy a request. Parameters are copied too: the children of n > 1 share one object."""
    copied = copy.copy(request)
    copied.request_id = part
    params = copy.copy(request.sampling_params)
    assert params is not None
    params.extra_args = dict(params.extra_args or {})
    if handoff is not None:
        params.extra_args[KV_TRANSFER_KEY] = handoff.to_params() if isinstance(handoff, Handoff) else dict(handoff)
    copied.sampling_params = params
    return copied


@dataclass
class Merge:
    """Joins the outputs of one request's parts.

    Attributes:
        max_tokens: of the client's request.
        emitted: tokens given to the client so far.
        to_skip: replayed tokens that the decode part still has to repeat.
    """

    max_tokens: int | None
    emitted: list[int] = field(default_factory=list)
    to_skip: int = 0
    finished: bool = False

    def from_prefill(self, output: EngineCoreOutput) -> EngineCoreOutput:
        """Prefill's first token, with its log probabilities and prompt statistics."""
        output.kv_transfer_params = None
        if output.finish_reason is FinishReason.LENGTH and self.max_tokens != 1 and output.new_token_ids:
            output.finish_reason = None
        self._keep(output)
        return output

    def from_decode(self, output: EngineCoreOutput, *, joined: bool) -> EngineCoreOutput | None:
        """What of a decode output is new; None when nothing is.

        Args:
            output: of the decode part, changed in place.
            joined: a prefill part has reported the prompt already.
        """
        output.kv_transfer_params = None
        skipped = min(self.to_skip, len(output.new_token_ids))
        if skipped:
            self.to_skip -= skipped
            output.new_token_ids = output.new_token_ids[skipped:]
            left = len(output.new_token_ids)
            if output.new_logprobs is not None:
                output.new_logprobs = output.new_logprobs.slice_request(skipped, left) if left else None
            if output.new_sampling_mask is not None:
                output.new_sampling_mask = output.new_sampling_mask.slice_request(skipped, left) if left else None
        if joined:
            output.prefill_stats = None
            output.events = [e for e in output.events or () if e.type is EngineCoreEventType.PREEMPTED] or None
        if not output.new_token_ids and output.finish_reason is None and not output.events:
            return None
        self._keep(output)
        return output

    def _keep(self, output: EngineCoreOutput) -> None:
        self.emitted.extend(output.new_token_ids)
        self.finished = output.finish_reason is not None


def shift_times(output: EngineCoreOutput, seconds: float) -> None:
    """Move a worker's event times to the gateway's monotonic clock."""
    for event in output.events or ():
        event.timestamp += seconds


def step_seconds(output: EngineCoreOutput, now: float) -> float:
    """Seconds from an output's last SCHEDULED event to `now`; 0 when it carries none."""
    scheduled = [e.timestamp for e in output.events or () if e.type is EngineCoreEventType.SCHEDULED]
    return max(0.0, now - scheduled[-1]) if scheduled else 0.0
