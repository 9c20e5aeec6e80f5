"""The first token of a request whose prompt is known already, as after a KV import, on an engine that speculates."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.drawn import FALSE_ALARM, p_value
from helpers.sampling_engine import sampling_engine
from helpers.small_engine import BLOCK

pytestmark = [pytest.mark.engine, pytest.mark.model]

DRAWS = 160


def test_first_tokens_are_the_targets_while_either_guard_holds(small_model: Any) -> None:
    """Of 3 * BLOCK + 1 tokens all but the last are found in the cache, which is when vLLM pads a step.

    Without both guards tokens are drawn at temperatures that nobody has written: what comes of it is left to chance.
    """
    engine = sampling_engine(small_model.path, 4)
    try:
        prompt = [1000 + 37 * place for place in range(3 * BLOCK + 1)]
        chances = engine("chances", prompt)

        def chance_of_draws(*, setting: bool, mended: bool) -> float:
            engine("guard", setting, mended)
            drawn = engine("first_tokens", prompt, DRAWS)
            return p_value((token if token in chances else None for token in drawn), chances)

        assert chance_of_draws(setting=True, mended=True) > FALSE_ALARM
        assert chance_of_draws(setting=False, mended=True) > FALSE_ALARM
        assert chance_of_draws(setting=True, mended=False) > FALSE_ALARM
    finally:
        engine.close()
