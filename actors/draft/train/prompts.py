"""The prompts that a head is trained on, and those that are kept from it to see what it is worth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from joinwise.cluster.errors import ConfigError

_LEAST = 5
HELD_OUT = "held-out"
"""What the report calls the prompts that were kept from training; others go by their file's name."""


@dataclass(frozen=True)
class Split:
    """Prompts, none of which is in both parts."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """What there is to train and to measure with, before the target has made any prompts.

    Attributes:
        prompts: to train on, and to keep some of.
        share: of prompts that are kept, of these and of the target's own.
        limit: of `prompts`, by `split`'s order.
        measured: prompts by the name of their file, which are measured with and never trained on.
    """

    prompts: tuple[str, ...]
    share: float
    limit: int | None = None
    measured: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def with_own(self, own: Sequence[str]) -> Split:
        """Both parts of all prompts, the target's own among them.

        Raises:
            ConfigError: there are too few.
        """
        never = {prompt for some in self.measured.values() for prompt in some}
        first = sorted(set(self.prompts), key=_place)[: self.limit]
        return split([*first, *own], self.share, never)


def read_prompts(files: Sequence[Path]) -> list[str]:
    """Prompts of JSON-lines files, each line `{"turns": [...]}`, of which the first counts, or `{"prompt": "..."}`.

    Raises:
        ConfigError: a file that cannot be read, or a line that is neither.
    """
    prompts = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the prompts {file} cannot be read: {error}") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                prompt = entry["prompt"] if "prompt" in entry else entry["turns"][0]
            except (ValueError, KeyError, IndexError, TypeError):
                prompt = None
            if not isinstance(prompt, str) or not prompt.strip():
                raise ConfigError(f'{file}:{number} is no prompt: a line is {{"turns": ["…"]}} or {{"prompt": "…"}}')
            prompts.append(prompt)
    return prompts


def _place(prompt: str) -> bytes:
    return hashlib.sha256(prompt.encode()).digest()


def split(prompts: Sequence[str], share: float, never: Collection[str] = ()) -> Split:
    """Keep about so large a share of the prompts from training, whatever their order; each counts once.

    Args:
        share: above 0, below 1.
        never: prompts that are in neither part.

    Raises:
        ConfigError: there are too few.
    """
    different = sorted(set(prompts) - set(never), key=_place)
    if len(different) < _LEAST:
        raise ConfigError(
            f"{len(different)} different prompts are too few: some are trained on and some kept to see what the head "
            f"is worth, so there must be {_LEAST} at least"
        )
    kept = min(max(1, round(share * len(different))), len(different) - 1)
    return Split(tuple(different[kept:]), tuple(different[:kept]))
