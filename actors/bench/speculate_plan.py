"""What `joinwise bench speculate` is told, and what an engine tells of answers: what its processes share."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from joinwise.actors.bench.speculate_rows import ADAPTIVE, BASELINE, OWN
from joinwise.actors.draft.asking import AskFigures
from joinwise.cluster.errors import ConfigError

CLUSTER = "bench"
_DRAFTERS = {"lookup": "lookup", "fixed": "causal", "ahead": "ahead"} | {name: name for name in OWN}


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        target, draft: the models.
        dtype: of the target's weights; `draft_dtype` is of the draft's.
        k: drafts a sequence and step of the sides whose number is fixed.
        most: of the adaptive one, and of those that replay.
        max_tokens: of an answer.
        engine: more arguments of vLLM's, for both engines.
        together: both engines in memory at once, so that they take turns; else the baseline is all done first, and
            times are not to be compared.
        draft_core: a core for the drafts, with the engines on the others; None for all on all.
        draft_gpu: the draft model is on a GPU.
        draft_python: the interpreter of the draft actors, since vLLM for CPUs has no torch for GPUs beside it; None for
            ours.
    """

    target: str
    draft: str
    dtype: str
    draft_dtype: str
    k: int
    most: int
    max_tokens: int
    together: bool
    engine: Mapping[str, Any] = field(default_factory=dict)
    draft_core: int | None = None
    draft_gpu: bool = False
    draft_python: str | None = None

    @property
    def cores(self) -> tuple[list[int], list[int]]:
        """Those of the engines, and those of the drafts.

        Raises:
            ConfigError: the drafts' core is not there, or the only one.
        """
        every = sorted(os.sched_getaffinity(0))
        if self.draft_core is None:
            return every, every
        others = [core for core in every if core != self.draft_core]
        if not 0 < len(others) < len(every):
            raise ConfigError(f"there is no core {self.draft_core} for the drafts beside others: there are {every}")
        return others, [self.draft_core]

    def wanted(self, side: str) -> int:
        """Drafts that a side asks for, at most."""
        if side in (BASELINE, "silent"):
            return 0
        return self.most if side in ADAPTIVE or side in OWN else self.k

    def drafter(self, side: str) -> str:
        """Whom a side asks; the adaptive one asks the model as a draft pool has it by itself."""
        return _DRAFTERS.get(side, "ahead" if self.draft_gpu else "causal")


@dataclass
class Answers:
    """What became of one batch of prompts.

    Attributes:
        token_ids: of each answer.
        prefill_s: of steps in which prompts were computed, without what they waited for drafts.
        decode_s: of everything after them, and what they waited for drafts.
        row_steps: steps of `decode_s`, each counted for every sequence in it.
        steps: of those steps, tokens that the target computed and seconds without waiting, (n, 2).
        asked: what asking has brought, in this batch alone.
    """

    token_ids: list[list[int]]
    prefill_s: float = 0.0
    decode_s: float = 0.0
    row_steps: int = 0
    steps: list[tuple[int, float]] = field(default_factory=list)
    asked: AskFigures = field(default_factory=AskFigures)

    @property
    def gained(self) -> int:
        """Tokens of decoding: the first of each answer comes with its prompt."""
        return sum(len(ids) - 1 for ids in self.token_ids)

    @property
    def rate(self) -> float:
        """Of them, a second."""
        return self.gained / self.decode_s if self.decode_s else 0.0
