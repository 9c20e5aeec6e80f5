"""Replay (see `replay.py`) in vLLM's second model runner, which GPU engines use unless they are told otherwise.

Its processors know requests by slots and rows by the step's layout, and read positions instead of lists of output.
"""

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from joinwise.actors.vllm.handoff import replay_of
from joinwise.actors.vllm.replay import force


class ReplayLogitsProcessorV2(LogitsProcessor):
    """Forces output `i` of a request to be replay token `i`, while there is one."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        self._prompt_len = req_states.prompt_len.np
        self._replays: dict[int, list[int]] = {}

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """A request has this slot now, whoever had it before; one that comes back after a preemption has it anew."""
        replay = replay_of(sampling_params)
        self._replays.pop(req_idx, None)
        if replay:
            self._replays[req_idx] = replay
        return bool(replay)

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Mask every other token of the rows that still repeat.

        The layout is read from the device, which waits for it, only in steps in which somebody repeats.

        Args:
            logits: shape (rows, vocabulary).
            ctx: which row is whose, and where in its sequence.
        """
        if self._replays.keys().isdisjoint(ctx.idx_mapping_np.tolist()):
            return logits
        over = set()
        for row, (slot, position) in enumerate(zip(ctx.expanded_idx_mapping.tolist(), ctx.pos.tolist(), strict=True)):
            replay = self._replays.get(slot, [])
            at = position + 1 - int(self._prompt_len[slot])
            if 0 <= at < len(replay):
                force(logits, row, replay[at])
            elif replay and at >= len(replay):
                over.add(slot)
        for slot in over:
            del self._replays[slot]
        return logits
