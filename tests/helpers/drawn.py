"""Whether what was drawn is distributed as it should be: Pearson's chi-square test, with a stated false-alarm rate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping

import torch

FALSE_ALARM = 1e-6
"""Of one test of draws that are right. Seeds are fixed, so that a run that passed passes again."""
_LEAST = 5.0
"""Draws that a cell of its own must let expect (Cochran, "Some Methods for Strengthening the Common Chi-Square Tests",
1954); rarer ones are counted together."""


def p_value(drawn: Iterable[Hashable], chances: Mapping[Hashable, float]) -> float:
    """How likely draws would differ at least as much from what `chances` let expect if they were drawn by them.

    Args:
        drawn: outcomes; one that has no chance is certainly wrong, and gives 0.
        chances: of each outcome; they sum to 1.
    """
    counts = Counter(drawn)
    total = counts.total()
    assert total and abs(sum(chances.values()) - 1) < 1e-4, chances
    if any(chances.get(outcome, 0.0) <= 0 for outcome in counts):
        return 0.0
    cells: list[tuple[float, int]] = []
    rest, rest_count = 0.0, 0
    for outcome, chance in chances.items():
        if chance * total >= _LEAST:
            cells.append((chance * total, counts[outcome]))
        else:
            rest, rest_count = rest + chance * total, rest_count + counts[outcome]
    if rest:
        cells.append((rest, rest_count))
    assert len(cells) > 1, "one cell says nothing"
    statistic = sum((count - expected) ** 2 / expected for expected, count in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
