"""Replay: a request that goes on elsewhere repeats its emitted tokens inside vLLM.

While fewer tokens than were emitted have been produced, all other logits are -inf, so vLLM itself
advances its generator, penalties, grammar, min_tokens and stop state exactly as it did the first
time. The gateway drops the repeated positions. One decode step a token.
"""

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor, MoveDirectionality

from joinwise.actors.vllm.handoff import replay_of


class ReplayLogitsProcessor(LogitsProcessor):
    """Forces output `i` of a row to be replay token `i`, while there is one.

    The rows are vLLM's batch slots; `output` is vLLM's own running list of the row's output tokens.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[list[int], list[int]]] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Replay tokens come from the gateway, which has checked them."""

    def is_argmax_invariant(self) -> bool:
        """Replay decides the argmax."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests into, out of and between batch slots."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, _, output in batch_update.added:
            replay = replay_of(params)
            if replay and len(output) < len(replay):
                self._rows[index] = (replay, output)
            else:
                self._rows.pop(index, None)
        for source, target, direction in batch_update.moved:
            moved, displaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if displaced is not None and direction is MoveDirectionality.SWAP:
                self._rows[source] = displaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Mask every other token of the rows that still repeat.

        Args:
            logits: shape (rows, vocabulary).
        """
        for index, (replay, output) in list(self._rows.items()):
            if len(output) >= len(replay):
                del self._rows[index]
                continue
            force(logits, index, replay[len(output)])
        return logits


def force(logits: torch.Tensor, row: int, token: int) -> None:
    """Leave one token possible in a row.

    Args:
        logits: shape (rows, vocabulary); changed in place.
        row: which.
        token: the token.
    """
    kept = logits[row, token].clone()
    logits[row] = float("-inf")
    # A token that penalties or a mask had forbidden must still be repeated.
    logits[row, token] = torch.where(torch.isfinite(kept), kept, torch.zeros_like(kept))
