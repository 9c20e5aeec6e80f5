"""The head that joinwise brings for its small model: it is found, it fits, and it is worth more than lookup alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.threads import single_thread
from transformers import AutoModelForCausalLM, AutoTokenizer

from joinwise.actors.draft.head import BUILT_IN, head_folder, load_head
from joinwise.actors.draft.head_drafter import HeadDrafter
from joinwise.actors.draft.lookup import PromptLookup
from joinwise.actors.draft.train.continuing import ATTENTION, go_on
from joinwise.actors.draft.train.measuring import AT_ONCE, Worth, measure
from joinwise.actors.draft.train.recording import Recording

NAME = "smollm2-135m-instruct"
PROMPTS = (
    "Complete this function:\n\ndef count_vowels(text: str) -> int:\n    '''How many letters of text are vowels.'''\n",
    "Write a Python class for a stack with push, pop and peek, and show how it is used.",
    "A train leaves at 9:40 and arrives at 13:05. It stops for 25 minutes on the way. How long does it move?",
    "Maria buys 4 notebooks at $3 each and 2 pens at $1.50 each. She pays with $20. How much change does she get?",
    "Explain to a child why the sky is blue.",
    "Give me five tips for learning a foreign language on my own.",
)


one_thread = pytest.fixture(single_thread, autouse=True, scope="module")


@pytest.fixture(scope="module")
def answers(small_model: Any) -> list[Recording]:
    tokenizer = AutoTokenizer.from_pretrained(small_model.path)
    turns = [[{"role": "user", "content": each}] for each in PROMPTS]
    texts = [list(tokenizer.apply_chat_template(each, add_generation_prompt=True, return_dict=False)) for each in turns]
    model = AutoModelForCausalLM.from_pretrained(small_model.path, dtype=torch.float32, attn_implementation=ATTENTION)
    found = go_on(model.eval(), texts, lambda logits: logits.argmax(-1), ends=[tokenizer.eos_token_id], most=64)
    return [
        Recording(np.array(each.tokens, np.int32), len(text), each.hidden.to(torch.float16).numpy())
        for text, each in zip(texts, found, strict=True)
    ]


@pytest.mark.model
def test_it_is_worth_more_than_lookup(small_model: Any, answers: list[Recording]) -> None:
    """On prompts that were written for this test: greedy, four drafts a round, the head told as an engine tells it."""
    longest = max(len(each.tokens) for each in answers) + 4
    head = load_head(head_folder(NAME), small_model)

    def drafter() -> HeadDrafter:
        return HeadDrafter(head, slots=AT_ONCE, max_tokens=longest, name="head", threads=1)

    alone, lookup = measure(drafter(), answers, 4), measure(PromptLookup(), answers, 4)
    both = measure(drafter(), answers, 4, lookup=True)  # as an engine has it
    said = f"head {_said(alone)}, lookup {_said(lookup)}, both {_said(both)}"
    assert min(alone.rounds, lookup.rounds, both.rounds) > 50
    assert alone.accepted_length > lookup.accepted_length, said
    assert both.accepted_length > 1.3 * lookup.accepted_length, said
    assert both.tokens_per_round > 1.2 * lookup.tokens_per_round, said


def _said(worth: Worth) -> str:
    return f"{worth.accepted_length:.2f} right drafts a round, {worth.right}"


def test_it_is_small_and_found_by_its_name(tmp_path: Path) -> None:
    folder = head_folder(NAME)
    assert folder == BUILT_IN / NAME
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10_500_000
    assert head_folder(str(tmp_path)) == tmp_path
    assert head_folder("heads/of/mine") == Path("heads/of/mine")
