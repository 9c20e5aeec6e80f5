"""An engine and a draft actor that wants hidden states: which it gets, and that whatever it drafts changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers.draft_rig import ServedDesk
from helpers.head_engine import head_engine

from joinwise.actors.bench.remote import Remote
from joinwise.actors.draft.drafter import Ask
from joinwise.actors.draft.head import DovetailHead, HeadShape, TargetEnds, head_folder
from joinwise.actors.draft.head_drafter import HeadDrafter
from joinwise.actors.draft.lookup import PromptLookup

pytestmark = [pytest.mark.engine, pytest.mark.model]

PROMPTS = [[1000 + 37 * place for place in range(size)] for size in (45, 7, 20)]
TOKENS = 24


class Knowing(PromptLookup):
    """Knows how each answer goes on, says so more or less rightly, and keeps what it was told."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self._texts = [list(text) for text in texts]
        self.told: list[dict[int, np.ndarray]] = [{} for _ in texts]

    def draft(self, asks: Sequence[Ask]) -> list[list[int]]:
        return [self._one(each) for each in asks]

    def _one(self, each: Ask) -> list[int]:
        size = len(each.tokens)
        which = next(n for n, text in enumerate(self._texts) if text[:size] == each.tokens.tolist())
        states = each.hidden if each.hidden is not None else np.empty((0, 0))
        for place, state in enumerate(states, size - 1 - len(states)):
            assert place not in self.told[which]
            self.told[which][place] = state
        drafted = self._texts[which][size : size + each.k]
        right = (size * 7 + which) % (each.k + 1)
        return [*drafted[:right], *((token + 1) % 1000 for token in drafted[right:])]


@pytest.fixture(scope="module")
def engine(small_model: Any) -> Iterator[Remote]:
    running = head_engine(small_model.path, 4)
    yield running
    running.close()


@pytest.fixture(scope="module")
def answers(engine: Remote) -> list[list[int]]:
    """Without drafts."""
    found: list[list[int]] = engine("answer", PROMPTS, TOKENS)
    return found


def test_it_is_told_what_the_target_thought_of_each_token_once(
    small_model: Any, engine: Remote, answers: list[list[int]]
) -> None:
    from transformers import AutoModelForCausalLM

    texts = [[*prompt, *answer] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    drafter = Knowing(texts)
    with ServedDesk(drafter, hidden_size=576) as served:
        engine("point", served.address)
        assert engine("answer", PROMPTS, TOKENS) == answers
        engine("point", "")
    model = AutoModelForCausalLM.from_pretrained(small_model.path, dtype=torch.float32).eval()
    for prompt, text, told in zip(PROMPTS, texts, drafter.told, strict=True):
        assert sorted(told) == list(range(len(prompt) - 1, max(told) + 1))  # from the prompt's last token on
        assert max(told) >= len(text) - 8  # of the last step nobody asks any more
        with torch.inference_mode():
            thought = model.base_model(torch.tensor([text])).last_hidden_state[0].numpy()
        for place, state in told.items():
            np.testing.assert_allclose(state.astype(np.float32), thought[place], rtol=0.02, atol=0.05)


@pytest.mark.parametrize("learnt", [False, True])
def test_a_head_changes_no_token(small_model: Any, engine: Remote, answers: list[list[int]], learnt: bool) -> None:
    if learnt:
        folder = head_folder("smollm2-135m-instruct")
        drafter = HeadDrafter.load(folder, small_model, "float32", slots=2, max_tokens=256, threads=1)
    else:
        head = DovetailHead(
            HeadShape.like(small_model.path, 1), TargetEnds.read(small_model.path, torch.float32)
        ).eval()
        drafter = HeadDrafter(head, slots=2, max_tokens=256, name="head", threads=1)
    with ServedDesk(drafter, hidden_size=576) as served:
        engine("point", served.address)
        assert engine("answer", PROMPTS, TOKENS) == answers  # three sequences, two slots
        engine("point", "")
        assert served.desk.figures.drafted > 0
