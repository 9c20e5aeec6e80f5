"""A causal model as drafter: whatever was drafted, rolled back, evicted or put off, drafts are the model's own."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_target import tiny_draft
from transformers import Qwen2Config

from joinwise.actors.draft.causal import _AT_ONCE, _PIECE, CausalDrafter, load_model
from joinwise.actors.draft.drafter import Ask
from joinwise.actors.draft.linears import PackedLinear

IDS = 97


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_draft(IDS, positions=512, seed=5)


@pytest.fixture(params=["launched", "recorded"])
def drafter(model: Any, request: Any) -> CausalDrafter:
    """One as it is on CPUs, and one that computes in the fixed shapes of a GPU's graphs."""
    made = CausalDrafter(model, slots=4, max_tokens=400, name="tiny", threads=1)
    if request.param == "recorded":
        made._compute.record(lambda compute: compute)
    return made


def greedy(model: Any, tokens: Sequence[int], k: int) -> list[int]:
    """The model without any cache."""
    text = list(tokens)
    with torch.inference_mode():
        for _ in range(k):
            text.append(int(model(torch.tensor([text], device=model.device)).logits[0, -1].argmax()))
    return text[len(tokens) :]


def ask(key: str, tokens: Sequence[int], k: int = 4) -> Ask:
    return Ask(key, np.array(tokens, np.int32), k)


def prompt(seed: int, size: int) -> list[int]:
    return random.Random(seed).choices(range(IDS), k=size)


def test_drafts_are_the_models_own(model: Any, drafter: CausalDrafter) -> None:
    text = prompt(1, 20)
    assert drafter.draft([ask("a", text, 6)]) == [greedy(model, text, 6)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=f"drafts of a GPU: torch {torch.__version__} sees none")
def test_a_gpu_drafts_what_the_model_says_there(model: Any) -> None:
    there = copy.deepcopy(model).to("cuda")
    drafter = CausalDrafter(there, slots=4, max_tokens=400, name="tiny", threads=1)
    assert drafter._compute._recorded
    texts = [prompt(2, 1), prompt(3, 30), prompt(4, 7)]
    for _ in range(4):
        drafts = drafter.draft([ask(str(index), text) for index, text in enumerate(texts)])
        assert drafts == [greedy(there, text, 4) for text in texts]
        texts = [[*text, *drafted[:2], 5] for text, drafted in zip(texts, drafts, strict=True)]


def test_a_batch_of_unequal_rows_drafts_what_each_would_alone(model: Any, drafter: CausalDrafter) -> None:
    texts = [prompt(2, 1), prompt(3, 30), prompt(4, 7)]
    lengths = [5, 1, 3]
    asks = [ask(str(index), text, k) for index, (text, k) in enumerate(zip(texts, lengths, strict=True))]
    assert drafter.draft(asks) == [greedy(model, text, k) for text, k in zip(texts, lengths, strict=True)]


def test_after_any_mixture_of_accepted_and_rejected_drafts(model: Any, drafter: CausalDrafter) -> None:
    """A target that accepts what it likes: three sequences, each step of each continued by a part of its drafts."""
    chance = random.Random(6)
    texts = {name: prompt(seed, 5 + 9 * seed) for seed, name in enumerate("abc")}
    for _ in range(15):
        asks = [ask(name, text, chance.randint(1, 5)) for name, text in texts.items() if chance.random() < 0.8]
        drafts = drafter.draft(asks)
        assert drafts == [greedy(model, each.tokens.tolist(), each.k) for each in asks]
        for each, drafted in zip(asks, drafts, strict=True):
            accepted = drafted[: chance.randint(0, len(drafted))]
            own = chance.randrange(IDS)  # seldom what was drafted next
            texts[each.key] += [*accepted, own]  # type: ignore[index]


def test_a_sequence_that_goes_back_and_differs_early(model: Any, drafter: CausalDrafter) -> None:
    text = prompt(7, 40)
    drafter.draft([ask("a", text, 8)])
    for other in (text[:10], [*text[:9], 3, *text[10:]], [4], text):
        assert drafter.draft([ask("a", other, 3)]) == [greedy(model, other, 3)]


def test_computed_tokens_are_not_computed_again(model: Any, drafter: CausalDrafter, monkeypatch: Any) -> None:
    widths: list[int] = []
    forward = drafter._forward
    monkeypatch.setattr(
        drafter, "_forward", lambda rows: (widths.append(max(len(new) for _, new in rows)), forward(rows))[1]
    )
    text = prompt(8, 30)
    (drafts,) = drafter.draft([ask("a", text, 4)])
    drafter.draft([ask("a", [*text, *drafts], 2)])  # all accepted: only the last draft has no KV yet
    drafter.draft([ask("a", [*text, drafts[0], (drafts[1] + 1) % IDS], 1)])  # one accepted, then the target's own
    assert widths == [30, 1, 1, 1, 1, 1, 1]


@pytest.fixture
def ahead(model: Any, monkeypatch: Any) -> CausalDrafter:
    """One that drafts ahead, and counts in `forwards` the rows of each forward pass."""
    drafter = CausalDrafter(model, slots=4, max_tokens=400, name="tiny", threads=1, ahead=True)
    drafter.forwards = []  # type: ignore[attr-defined]
    forward = drafter._forward
    monkeypatch.setattr(drafter, "_forward", lambda rows: (forwards(drafter).append(len(rows)), forward(rows))[1])
    return drafter


def forwards(drafter: CausalDrafter) -> list[int]:
    counted: list[int] = drafter.forwards  # type: ignore[attr-defined]
    return counted


def idle(drafter: CausalDrafter) -> int:
    """Nobody asks for long; returns the forward passes."""
    before = len(forwards(drafter))
    while drafter.catch_up():
        assert len(forwards(drafter)) - before < 50
    return len(forwards(drafter)) - before


def test_what_was_drafted_ahead_answers_at_once(model: Any, ahead: CausalDrafter) -> None:
    text = prompt(20, 30)
    whole = greedy(model, text, 40)
    assert ahead.draft([ask("a", text)]) == [whole[:4]]
    assert idle(ahead) == 0  # it is not known yet whether it drafts well
    assert ahead.draft([ask("a", text + whole[:5])]) == [whole[5:9]]
    assert idle(ahead) == 5  # the engine's token, and a round
    done = len(forwards(ahead))
    assert ahead.draft([ask("a", text + whole[:10])]) == [whole[10:14]]
    assert len(forwards(ahead)) == done
    assert ahead.draft([ask("a", text + whole[:15], 6)]) == [whole[15:21]]  # there was no time in between
    assert len(forwards(ahead)) == done + 6


def test_after_a_wrong_draft_nothing_is_drafted_ahead(model: Any, ahead: CausalDrafter) -> None:
    text = prompt(21, 30)
    whole = greedy(model, text, 40)
    ahead.draft([ask("a", text)])
    ahead.draft([ask("a", text + whole[:5])])
    assert idle(ahead)
    other = [*text, *whole[:7], (whole[7] + 1) % IDS]
    assert ahead.draft([ask("a", other)]) == [greedy(model, other, 4)]
    assert idle(ahead) == 0


def test_ahead_or_not_drafts_are_the_models_own(model: Any, ahead: CausalDrafter) -> None:
    """Engines that accept what they like, and come back sooner or later; nothing is drafted beyond what fits."""
    chance = random.Random(22)
    texts = {name: prompt(seed, 5 + 9 * seed) for seed, name in enumerate("abc")} | {"long": prompt(9, 380)}
    while ahead.draft([ask("long", texts["long"])]) == [[]]:
        idle(ahead)
    for _ in range(25):
        asks = [ask(name, text, chance.randint(1, 5)) for name, text in texts.items() if chance.random() < 0.8]
        drafts = ahead.draft(asks)
        for each, drafted in zip(asks, drafts, strict=True):
            fits = len(each.tokens) + each.k <= 400
            assert drafted == (greedy(model, each.tokens.tolist(), each.k) if fits else [])
            whole = greedy(model, each.tokens.tolist(), each.k + 1)
            right = chance.choice([len(whole), len(whole), chance.randint(0, each.k)])
            texts[str(each.key)] = [*each.tokens.tolist(), *whole[:right], *([] if right else [chance.randrange(IDS)])]
        for _ in range(chance.randint(0, 7)):
            ahead.catch_up()


def test_a_sequence_that_ends_while_it_is_drafted_ahead(model: Any, ahead: CausalDrafter) -> None:
    text = prompt(23, 10)
    whole = greedy(model, text, 9)
    ahead.draft([ask("a", text)])
    ahead.draft([ask("a", text + whole[:5])])
    assert ahead.catch_up()
    ahead.forget("a")
    assert not ahead.catch_up()
    assert ahead.held == 0


def test_more_sequences_than_slots(model: Any, drafter: CausalDrafter) -> None:
    texts = [prompt(seed, 12) for seed in range(6)]
    drafts = drafter.draft([ask(str(index), text) for index, text in enumerate(texts)])
    assert drafts == [*(greedy(model, text, 4) for text in texts[:4]), [], []]  # none loses its slot in mid-batch
    assert drafter.held == 4
    assert drafter.draft([ask("5", texts[5])]) == [greedy(model, texts[5], 4)]  # in the place of the oldest
    assert drafter.draft([ask("3", texts[3]), ask("0", texts[0])]) == [greedy(model, texts[i], 4) for i in (3, 0)]


def test_a_slot_that_was_freed_is_clean(model: Any, drafter: CausalDrafter) -> None:
    for seed in range(9):
        text = prompt(seed, 50 - 5 * seed)
        assert drafter.draft([ask("same", text)]) == [greedy(model, text, 4)]
        drafter.forget("same")
        assert drafter.held == 0
    drafter.forget("never known")


def test_a_long_prompt_is_put_off_and_computed_in_pieces(model: Any, drafter: CausalDrafter) -> None:
    long, short = prompt(10, 300), prompt(11, 20)
    assert not drafter.catch_up()
    assert drafter.draft([ask("long", long), ask("short", short)]) == [[], greedy(model, short, 4)]
    assert drafter.catch_up()  # a piece
    longer = [*long, 1, 2]
    assert drafter.draft([ask("long", longer)]) == [[]]  # nor is what came meanwhile lost
    pieces = 0
    while drafter.catch_up():
        pieces += 1
        assert pieces <= 300 // _PIECE + 2
    assert drafter.draft([ask("long", longer)]) == [greedy(model, longer, 4)]


def test_a_sequence_that_ends_while_it_is_put_off(drafter: CausalDrafter) -> None:
    drafter.draft([ask("long", prompt(12, _AT_ONCE + 1))])
    drafter.forget("long")
    assert not drafter.catch_up()
    assert drafter.held == 0


def test_what_cannot_be_drafted_for_harms_no_other(model: Any, drafter: CausalDrafter) -> None:
    good = prompt(13, 10)
    asks = [ask("too long", prompt(14, 398)), ask("foreign", [1, IDS]), ask("negative", [-1]), ask("good", good)]
    assert drafter.draft(asks) == [[], [], [], greedy(model, good, 4)]
    assert drafter.held == 1
    assert drafter.draft([ask("fits", prompt(14, 396))]) == [[]]  # it is only put off


def test_a_model_with_other_caches_is_refused(tmp_path: Path) -> None:
    from transformers import Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sliding_attention"):
        CausalDrafter.load(tmp_path, "float32", slots=1, max_tokens=64, name="m", threads=1)


def test_a_model_from_a_folder(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    drafter = CausalDrafter.load(tmp_path, "float32", slots=1, max_tokens=64, name="m", threads=1)
    drafter.begin()
    text = prompt(15, 9)
    assert drafter.draft([ask("a", text)]) == [greedy(model, text, 4)]


def test_int8_weights_are_near_their_own_by_output_channel() -> None:
    torch.manual_seed(9)
    linear = torch.nn.Linear(64, 32).to(torch.bfloat16)
    with torch.no_grad():
        linear.weight[3] *= 1000  # a loud channel must not cost a quiet one its digits
        linear.weight[4] = 0
    x = torch.randn(2, 5, 64).to(torch.bfloat16)
    exact, found = (layer(x).float() for layer in (linear, PackedLinear(linear, int8=True)))
    assert found.shape == exact.shape == (2, 5, 32)
    # A weight is off by half a step, of which 127 make the largest of its channel.
    off = x.float().abs().sum(-1, keepdim=True) * linear.weight.float().abs().amax(1) / 254
    assert ((found - exact).abs() <= off + 0.02 * exact.abs() + 1e-3).all()
    assert torch.equal(found[..., 4], linear.bias[4].float().expand(2, 5))


def test_a_drafter_of_int8_weights_drafts_what_its_model_says(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    drafter = CausalDrafter.load(tmp_path, "int8", slots=2, max_tokens=64, name="m", threads=1)
    quantized = load_model(tmp_path, "int8")
    assert not any(isinstance(each, torch.nn.Linear) for each in quantized.modules())
    text = prompt(16, 9)
    assert drafter.draft([ask("a", text, 6)]) == [greedy(quantized, text, 6)]
