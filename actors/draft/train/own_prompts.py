"""Prompts that a target makes itself: where there are too few of people's, it is asked what a user would say.

An aligned model has learnt chats as a whole. Given its chat template up to where the user's words begin, it goes on
with words such as users have said (Magpie: Xu et al., arXiv:2406.08464). A few words to open with steer what about.
A folder of them is filled piece by piece; what a piece holds follows from its number and the seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from joinwise.actors.draft.train.continuing import go_on
from joinwise.actors.draft.train.saying import Say
from joinwise.cluster.errors import ConfigError

_AT_ONCE, _MOST_TOKENS = 64, 96
_TOP_P, _TOP_K = 0.95, 128
_FEWEST_WORDS = 4
_MARK = "THE USER'S WORDS"
_FRUITLESS = 20
"""Pieces in a row that may bring nothing new."""


class Asker:
    """Lets a target speak as its user.

    Args:
        model: a causal model of transformers, in evaluation mode.
        tokenizer: its own, with a chat template.
        openings: what the user's words begin with, of a piece each in turn; "" for nothing.

    Raises:
        ConfigError: there is no chat template, or none that a user's words stand in as they are.
    """

    def __init__(self, model: Any, tokenizer: Any, openings: Sequence[str]) -> None:
        before, marked, after = "", "", ""
        if tokenizer.chat_template is not None:
            turn = [{"role": "user", "content": _MARK}]
            before, marked, after = tokenizer.apply_chat_template(turn, tokenize=False).partition(_MARK)
        ends = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
        if not marked or not ends:
            raise ConfigError("this target has no chat template by which it could make prompts itself: give --prompts")
        self._model, self._tokenizer, self._openings = model, tokenizer, list(openings)
        self._before, self._end = before, int(ends[0])

    def piece(self, seed: int, number: int) -> list[str]:
        """Some prompts; those that did not end in time, or are hardly any words, are left out."""
        opening = self._openings[number % len(self._openings)]
        begin, opened = (
            self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in (self._before + opening, opening)
        )
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)

        def pick(logits: torch.Tensor) -> torch.Tensor:
            chances, ids = logits.float().softmax(-1).topk(min(_TOP_K, logits.shape[1]))
            chances[chances.cumsum(-1) - chances >= _TOP_P] = 0.0
            return ids.gather(1, torch.multinomial(chances, 1, generator=generator))[:, 0]

        found = go_on(self._model, [begin] * _AT_ONCE, pick, ends=[self._end], most=_MOST_TOKENS)
        said = [each.tokens[len(begin) : -1] for each in found if each.tokens[-1] == self._end]
        texts = [self._tokenizer.decode([*opened, *ids], skip_special_tokens=True).strip() for ids in said]
        return [text for text in texts if len(text.split()) >= _FEWEST_WORDS]


def own_prompts(make: Callable[[], Asker], count: int, seed: int, folder: Path, say: Say) -> list[str]:
    """So many different prompts: those in `folder`, and what is lacking.

    Args:
        make: called once if anything is lacking; it may load a model.

    Raises:
        ConfigError: a piece cannot be read, or the target says nothing new any more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, None] = {}
    asker: Asker | None = None
    number, last = 0, 0
    while len(found) < count:
        say("own prompts", len(found), count, "")
        file = folder / f"{number:05d}.json"
        if not file.exists():
            asker = asker or make()
            draft = file.with_suffix(".part")
            draft.write_text(json.dumps(asker.piece(seed, number), indent=1) + "\n", encoding="utf-8")
            draft.replace(file)
        before = len(found)
        found |= dict.fromkeys(_read(file))
        number, last = number + 1, number + 1 if len(found) > before else last
        if number - last >= _FRUITLESS:
            raise ConfigError(f"the target makes no more than {len(found)} different prompts: ask for fewer")
    say("own prompts", count, count, "")
    return list(found)[:count]


def _read(file: Path) -> list[str]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, list) and all(isinstance(each, str) for each in found):
            return found
        raise ValueError("it is no list of prompts")
    except (OSError, ValueError) as error:
        raise ConfigError(f"the prompts {file} cannot be read ({error}): remove it, and it is made again") from error
