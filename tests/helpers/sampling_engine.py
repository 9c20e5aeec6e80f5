"""An engine that speculates, in a process of its own, whose first tokens are drawn many times."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from helpers.small_engine import finished, small_engine

from joinwise.actors.bench.remote import Remote
from joinwise.actors.cpu import environment

_TOLD = 20
"""Tokens whose chances are told, the most that vLLM tells."""


class SamplingEngine:
    """vLLM's engine with a proposer that has nobody to ask: nothing is drafted, unless vLLM drafts by itself.

    Args:
        folder: of the model.
        k: drafts a step.
    """

    def __init__(self, folder: Path, k: int) -> None:
        from vllm.v1.sample import rejection_sampler

        self._sampler: Any = rejection_sampler
        self._repeat = {False: rejection_sampler.expand_batch_to_tokens}
        self._engine = small_engine(folder, k, max_num_seqs=16, kv_cache_memory_bytes=400_000_000)
        self._scheduler: Any = self._engine.engine_core.engine_core.scheduler
        self._lookup = self._scheduler.dynamic_sd_lookup
        self._repeat[True] = rejection_sampler.expand_batch_to_tokens
        assert self._lookup is not None
        assert self._repeat[True] is not self._repeat[False]

    def guard(self, setting: bool, mended: bool) -> None:
        """Be as an engine without what guards ours.

        Args:
            setting: the one that keeps vLLM from padding (`proposer.speculation`).
            mended: what repeats a request's temperature for each of its drafts (`rejection.mend_rejection`).
        """
        self._scheduler.dynamic_sd_lookup = self._lookup if setting else None
        self._sampler.expand_batch_to_tokens = self._repeat[mended]

    def chances(self, prompt: list[int]) -> dict[int | None, float]:
        """Of the first token, by the model's own log probabilities, None for all but the most likely; keeps its KV."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=_TOLD, detokenize=False)
        self._engine.add_request("chances", {"prompt_token_ids": prompt}, params)
        (output,) = finished(self._engine)
        found: dict[int | None, float] = {
            token: math.exp(each.logprob) for token, each in output.outputs[0].logprobs[0].items()
        }
        return found | {None: 1 - sum(found.values())}

    def first_tokens(self, prompt: list[int], draws: int) -> list[int]:
        """Draw the first token so many times, each time as a request of its own."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=1.0, max_tokens=1, detokenize=False)
        for number in range(draws):
            self._engine.add_request(f"draw-{number}", {"prompt_token_ids": prompt}, params)
        return [output.outputs[0].token_ids[0] for output in finished(self._engine)]


def sampling_engine(folder: Path, k: int) -> Remote:
    """Start one; to be closed."""
    return Remote(SamplingEngine, folder, k, environment=environment(1), wait_s=240)
