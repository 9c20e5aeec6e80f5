"""How fast an engine has been lately; the router counts with it."""

from __future__ import annotations

from vllm.v1.core.sched.output import SchedulerOutput

_MEANINGFUL = 32
_NEWEST_PROMPTS, _NEWEST_STEP = 0.2, 0.1


def prompt_tokens(output: SchedulerOutput) -> int:
    """Tokens of prompts that a step computes: all but those of requests that have answered something already.

    A prompt that is cut into pieces counts in each step with its piece.
    """
    new = {each.req_id for each in output.scheduled_new_reqs}
    cached = output.scheduled_cached_reqs
    return sum(
        tokens
        for request_id, tokens in output.num_scheduled_tokens.items()
        if request_id in new or cached.is_context_phase(request_id)
    )


class Speeds:
    """Running means over steps. The first step of a kind counts at once.

    Attributes:
        prefill_tokens_per_s: of steps that compute prompts, whatever decodes beside them.
        decode_step_s: of steps that compute none.
    """

    def __init__(self) -> None:
        self.prefill_tokens_per_s = self.decode_step_s = 0.0

    def stepped(self, prompt_tokens: int, seconds: float) -> None:
        """Count a step; one with a few tokens of prompts tells neither speed."""
        if not prompt_tokens:
            self.decode_step_s = _mean(self.decode_step_s, seconds, _NEWEST_STEP)
        elif prompt_tokens >= _MEANINGFUL:
            self.prefill_tokens_per_s = _mean(self.prefill_tokens_per_s, prompt_tokens / seconds, _NEWEST_PROMPTS)


def _mean(before: float, value: float, weight: float) -> float:
    return before + weight * (value - before) if before else value
