"""Plain requests on an engine that speculates: they take over without replay.

vLLM allows no logits processor on such an engine, so that it cannot be made to repeat tokens that were emitted
elsewhere. A plain request (`split.needs_of`) does not need that: nothing of it depends on where the prompt ends. Its
emitted tokens are appended to the prompt, and said again to the gateway before the first new one, as if they had been
repeated. One that waits for a prefill worker is held back until the first token is known; the KV of the prompt is
fetched then, from blocks that the prefill worker keeps.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest

from joinwise.actors.vllm import split
from joinwise.actors.vllm.handoff import KV_TRANSFER_KEY, REPLAY_KEY, Handoff, replay_of


@dataclass(frozen=True)
class _Held:
    slot: int
    request: EngineCoreRequest
    handoff: Handoff


class PlainTakeover:
    """The requests of one engine that were begun elsewhere. Used on the stepping thread."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}
        self._to_say: dict[str, list[int]] = {}

    @property
    def held(self) -> frozenset[str]:
        """Requests that wait for their first token."""
        return frozenset(self._held)

    def admit(self, slot: int, request: EngineCoreRequest) -> EngineCoreRequest | None:
        """What of a new request vLLM is to be given now; None while its first token is not known.

        Raises:
            ValueError: it is not plain, or its id is in use.
        """
        params = request.sampling_params
        assert params is not None
        extra = dict(params.extra_args or {})
        handoff, replay = Handoff.from_params(extra.pop(KV_TRANSFER_KEY, None)), replay_of(params)
        extra.pop(REPLAY_KEY, None)
        bare = copy.copy(params)
        bare.extra_args = extra or None
        if split.needs_of(bare, has_embeds=request.prompt_embeds is not None):
            raise ValueError("an engine that speculates serves plain requests only")
        if request.request_id in self._held:
            raise ValueError(f"request id {request.request_id} is in use")
        if handoff is not None and handoff.half == "recv":
            self._held[request.request_id] = _Held(slot, request, handoff)
            return None
        return self._going_on(request, replay, handoff)

    def release(
        self, request_id: str, epoch: int, replay: list[int], *, recompute: bool
    ) -> tuple[int, EngineCoreRequest] | None:
        """Give up a request that was held, with its gateway's slot; None for one that was not, or of another epoch."""
        held = self._held.get(request_id)
        if held is None or held.handoff.epoch != epoch:
            return None
        del self._held[request_id]
        prompt = len(held.request.prompt_token_ids or ())
        handoff = None if recompute else replace(held.handoff, num_tokens=prompt)
        return held.slot, self._going_on(held.request, replay, handoff)

    def forget(self, request_ids: Iterable[str]) -> None:
        """Requests that are over."""
        for request_id in request_ids:
            self._held.pop(request_id, None)
            self._to_say.pop(request_id, None)

    def complete(self, outputs: EngineCoreOutputs) -> None:
        """Say the tokens that requests took over, before the first of their own."""
        if not self._to_say:
            return
        before = []
        for output in outputs.outputs:
            said = self._to_say.pop(output.request_id, None)
            if said:
                before.append(EngineCoreOutput(output.request_id, said))
        outputs.outputs[:0] = before

    def _going_on(self, request: EngineCoreRequest, replay: list[int], handoff: Handoff | None) -> EngineCoreRequest:
        """A request that begins after the tokens it has emitted."""
        request = copy.copy(request)
        request.sampling_params = params = copy.copy(request.sampling_params)
        assert params is not None
        params.extra_args = {KV_TRANSFER_KEY: handoff.to_params()} if handoff is not None else None
        if replay:
            request.prompt_token_ids = [*(request.prompt_token_ids or ()), *replay]
            if params.max_tokens is not None:
                params.max_tokens -= len(replay)
            self._to_say[request.request_id] = list(replay)
        return request
