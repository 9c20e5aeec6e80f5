"""The draft head: whatever was drafted, rolled back, evicted, put off or not told, drafts are those of the whole."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_target import IDS, saved, tiny
from transformers import Qwen2Config, Qwen2ForCausalLM

from joinwise.actors.draft.drafter import Ask
from joinwise.actors.draft.head import (
    CONFIG,
    WEIGHTS,
    DovetailHead,
    DynamicGatingFusion,
    HeadShape,
    TargetEnds,
    load_head,
    save_head,
)
from joinwise.actors.draft.head_drafter import _AT_ONCE, _PIECE, HeadDrafter
from joinwise.actors.models import LocalModel
from joinwise.cluster.errors import ConfigError

SIZE = 64


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    return LocalModel("tiny", saved(tmp_path_factory.mktemp("tiny"), tiny()), "a" * 32)


@pytest.fixture(scope="module", params=[1, 2])
def head(target: LocalModel, request: pytest.FixtureRequest) -> DovetailHead:
    made = DovetailHead(HeadShape.like(target.path, request.param), TargetEnds.read(target.path, torch.float32), seed=4)
    with torch.no_grad():
        for weight in made.blocks.layers.parameters():  # loud enough that every input counts
            weight.mul_(8)
        for weight in made.trained().values():  # as they are stored
            weight.copy_(weight.bfloat16())
    return made.eval()


@pytest.fixture
def drafter(head: DovetailHead) -> HeadDrafter:
    return HeadDrafter(head, slots=4, max_tokens=200, name="head", threads=1)


class Told:
    """A sequence with what was told of it, and what a head without any cache makes of that."""

    def __init__(self, head: DovetailHead, key: str, seed: int, size: int) -> None:
        self.head, self.key, self.chance = head, key, random.Random(seed)
        self.tokens = self.chance.choices(range(IDS), k=size)
        self.features = torch.zeros(256, SIZE)
        self.known = torch.zeros(256, dtype=torch.bool)

    def ask(self, k: int = 4, hidden: int = 0) -> Ask:
        """Tell the features that go in at the last `hidden` tokens."""
        told = np.random.default_rng(self.chance.randrange(1 << 30)).normal(size=(hidden, SIZE)).astype(np.float16)
        at = slice(len(self.tokens) - hidden, len(self.tokens))
        self.features[at], self.known[at] = torch.from_numpy(told).float(), True
        return Ask(self.key, np.array(self.tokens, np.int32), k, told if hidden else None)

    def go_on(self, ids: Sequence[int]) -> None:
        self.tokens += ids

    def expected(self, k: int = 4) -> list[int]:
        tokens, features, known = list(self.tokens), self.features.clone(), self.known.clone()
        with torch.inference_mode():
            for _ in range(k):
                size = len(tokens)
                guessed = self.head(torch.tensor([tokens]), features[None, :size], known[None, :size])[0, -1]
                tokens.append(int(self.head.output(guessed).argmax()))
                features[size], known[size] = guessed, True
        return tokens[len(self.tokens) :]


def test_a_gate_mixes_both_and_can_take_either_alone() -> None:
    torch.manual_seed(1)
    fusion = DynamicGatingFusion(8, 1e-6)
    feature, embedding = torch.randn(2, 3, 8) * 5, torch.randn(2, 3, 8)
    mixed = fusion(feature, embedding)
    assert mixed.shape == (2, 3, 8)
    assert not torch.allclose(mixed, fusion(torch.randn(2, 3, 8), embedding))
    assert not torch.allclose(mixed, fusion(feature, torch.randn(2, 3, 8)))
    # The gate is of each element and each input: no single number mixes the two.
    one, other = fusion.feature(fusion.feature_norm(feature)), fusion.embedding(fusion.embedding_norm(embedding))
    gates = (mixed - other) / (one - other)
    assert ((gates > 0) & (gates < 1)).all()
    assert gates.std(-1).min() > 0.01 and gates.std((0, 1)).min() > 0.01
    with torch.no_grad():
        fusion.gate.bias.fill_(1e4)
        assert torch.allclose(fusion(feature, embedding), one)
        fusion.gate.bias.fill_(-1e4)
        assert torch.allclose(fusion(feature, embedding), other)


def test_what_was_not_told_is_not_looked_at_and_stands_for_something(head: DovetailHead) -> None:
    tokens, features = torch.randint(IDS, (1, 9)), torch.randn(1, 9, SIZE)
    known = torch.tensor([[False, False, True, True, False, True, True, False, True]])
    with torch.inference_mode():
        first = head(tokens, features, known)
        assert torch.equal(first, head(tokens, torch.where(known[..., None], features, float("nan")), known))
        assert not torch.allclose(first[0, -1], head(tokens, features, torch.ones_like(known))[0, -1])
        later = features.clone()
        later[0, 6] += 1
        changed = (head(tokens, later, known) != first).any(-1)[0]
    assert not changed[:6].any() and changed[6]  # causal


def test_drafts_are_those_of_the_whole(head: DovetailHead, drafter: HeadDrafter) -> None:
    told = Told(head, "a", 1, 20)
    assert drafter.draft([told.ask(6, hidden=3)]) == [told.expected(6)]


def test_a_batch_of_unequal_rows_drafts_what_each_would_alone(head: DovetailHead, drafter: HeadDrafter) -> None:
    several = [Told(head, "a", 2, 2), Told(head, "b", 3, 30), Told(head, "c", 4, 7)]
    lengths, hidden = [5, 1, 3], [1, 9, 0]
    asks = [told.ask(*each) for told, *each in zip(several, lengths, hidden, strict=True)]
    assert drafter.draft(asks) == [told.expected(k) for told, k in zip(several, lengths, strict=True)]


def test_after_any_mixture_of_accepted_rejected_and_lost(head: DovetailHead, drafter: HeadDrafter) -> None:
    """A target that accepts what it likes; some rounds bring no features, some of too few tokens."""
    chance = random.Random(6)
    several = [Told(head, name, seed, 5 + 9 * seed) for seed, name in enumerate("abc")]
    fresh = dict.fromkeys("abc", 1)
    for _ in range(12):
        asked = [told for told in several if chance.random() < 0.8]
        asks = [told.ask(chance.randint(1, 5), chance.choice([0, 1, fresh[told.key]])) for told in asked]
        drafts = drafter.draft(asks)
        assert drafts == [told.expected(each.k) for told, each in zip(asked, asks, strict=True)]
        for told, drafted in zip(asked, drafts, strict=True):
            accepted = [*drafted[: chance.randint(0, len(drafted))], chance.randrange(IDS)]
            told.go_on(accepted)
            fresh[told.key] = len(accepted)


def test_a_sequence_that_goes_back_loses_what_was_told_of_other_tokens(
    head: DovetailHead, drafter: HeadDrafter
) -> None:
    told = Told(head, "a", 7, 40)
    drafter.draft([told.ask(8, hidden=30)])
    whole = list(told.tokens)
    for at, tokens in ((20, [*whole[:20], (whole[20] + 1) % IDS, *whole[21:]]), (9, whole[:10])):
        told.tokens = tokens
        told.known[at + 1 :] = False  # the feature at `at` is of the tokens before it
        assert drafter.draft([told.ask(3)]) == [told.expected(3)]
    told.tokens = whole
    told.known[10 + 1 :] = False
    assert drafter.draft([told.ask(3)]) == [told.expected(3)]


def test_features_that_come_after_all_are_used(head: DovetailHead, drafter: HeadDrafter) -> None:
    told = Told(head, "a", 8, 30)
    without = drafter.draft([told.ask(6)])
    assert without == [told.expected(6)]
    having = drafter.draft([told.ask(6, hidden=20)])
    assert having == [told.expected(6)] != without


@pytest.mark.parametrize(
    "hidden",
    [
        np.zeros((3, SIZE - 1), np.float16),
        np.zeros((3,), np.float16),
        np.zeros((0, SIZE), np.float16),
        np.zeros((20, SIZE), np.float16),
        np.full((3, SIZE), np.nan, np.float16),
        np.full((3, SIZE), np.inf, np.float16),
    ],
    ids=["narrow", "flat", "none", "of more tokens than there are before the last", "nan", "infinite"],
)
def test_features_that_cannot_be_are_not_used(head: DovetailHead, drafter: HeadDrafter, hidden: np.ndarray) -> None:
    told = Told(head, "a", 9, 20)
    plain = told.ask()
    assert drafter.draft([Ask("a", plain.tokens, 4, hidden)]) == [told.expected()]


def test_computed_tokens_are_not_computed_again(
    head: DovetailHead, drafter: HeadDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    forward = drafter._forward

    def watched(rows: Any) -> torch.Tensor:
        widths.append(max(len(tokens) - start for _, start, tokens in rows))
        return forward(rows)

    monkeypatch.setattr(drafter, "_forward", watched)
    told = Told(head, "a", 8, 30)
    (drafts,) = drafter.draft([told.ask(4, hidden=1)])
    told.go_on([*drafts, 5])
    drafter.draft([told.ask(2, hidden=5)])  # what was drafted is computed again, with the target's features
    drafter.draft([told.ask(1)])
    assert widths == [30, 1, 1, 1, 5, 1, 1]


def test_more_sequences_than_slots(head: DovetailHead, drafter: HeadDrafter) -> None:
    several = [Told(head, str(seed), seed, 12) for seed in range(6)]
    drafts = drafter.draft([told.ask(hidden=2) for told in several])
    assert drafts == [*(told.expected() for told in several[:4]), [], []]  # none loses its slot in mid-batch
    assert drafter.held == 4
    for evicted in (Told(head, "5", 5, 12), Told(head, "0", 0, 12)):  # nothing of them is left, or was ever there
        assert drafter.draft([evicted.ask()]) == [evicted.expected()]
    for seed in range(6):
        drafter.forget(str(seed))
    drafter.forget("never known")
    assert drafter.held == 0


def test_a_slot_that_was_freed_is_clean(head: DovetailHead, drafter: HeadDrafter) -> None:
    for seed in range(6):
        told = Told(head, "same", seed, 50 - 5 * seed)
        assert drafter.draft([told.ask(hidden=9 if seed % 2 else 0)]) == [told.expected()]
        drafter.forget("same")


def test_a_long_prompt_is_put_off_and_computed_in_pieces(head: DovetailHead, drafter: HeadDrafter) -> None:
    long, short = Told(head, "long", 10, 150), Told(head, "short", 11, 20)
    assert not drafter.catch_up()
    assert drafter.draft([long.ask(hidden=3), short.ask()]) == [[], short.expected()]
    assert drafter.catch_up()  # a piece
    long.go_on([1, 2])
    assert drafter.draft([long.ask(hidden=2)]) == [[]]  # nor is what was told before lost
    pieces = 0
    while drafter.catch_up():
        pieces += 1
        assert pieces <= 150 // _PIECE + 2
    assert drafter.draft([long.ask()]) == [long.expected()]
    drafter.draft([Told(head, "gone", 12, _AT_ONCE + 1).ask()])
    drafter.forget("gone")
    assert not drafter.catch_up()


def test_what_cannot_be_drafted_for_harms_no_other(head: DovetailHead, drafter: HeadDrafter) -> None:
    good = Told(head, "good", 13, 10)
    asks = [
        Ask("too long", np.zeros(198, np.int32), 4),
        Ask("foreign", np.array([1, IDS], np.int32), 4),
        Ask("negative", np.array([-1], np.int32), 4),
        good.ask(),
    ]
    assert drafter.draft(asks) == [[], [], [], good.expected()]
    assert drafter.held == 1


def test_a_head_from_its_folder_is_the_same(target: LocalModel, head: DovetailHead, tmp_path: Path) -> None:
    save_head(head, tmp_path / "new" / "head", target)
    loaded = load_head(tmp_path / "new" / "head", target)
    tokens, features, known = torch.randint(IDS, (2, 7)), torch.randn(2, 7, SIZE), torch.rand(2, 7) < 0.5
    with torch.inference_mode():
        assert torch.equal(loaded(tokens, features, known), head(tokens, features, known))
        assert torch.equal(loaded.output(features), head.output(features))
    stored = (tmp_path / "new" / "head" / WEIGHTS).stat().st_size
    assert stored < 2 * sum(each.numel() for each in head.trained().values()) + 4096  # nothing of the target's
    assert not any(name.startswith(("output", "embeddings")) for name in head.trained())
    modes = {(tmp_path / "new" / "head" / name).stat().st_mode for name in (WEIGHTS, CONFIG)}
    assert len(modes) == 1  # whoever may read the one may read the other


def test_a_head_of_another_target_is_refused_naming_both(
    target: LocalModel, head: DovetailHead, tmp_path: Path
) -> None:
    save_head(head, tmp_path, target)
    with pytest.raises(ConfigError, match=r"trained for 'tiny' \(aaaaaaaa\).*not for 'other' \(bbbbbbbb\)"):
        load_head(tmp_path, LocalModel("other", target.path, "b" * 32))


def test_a_broken_head_is_refused(target: LocalModel, head: DovetailHead, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no draft head in"):
        load_head(tmp_path, target)
    save_head(head, tmp_path, target)
    facts = json.loads((tmp_path / CONFIG).read_text())
    for change, words in (
        ({"version": 9}, "version 9"),
        ({"blocks": 3}, "its tensors"),
        ({"what": 1}, "no draft head"),
    ):
        (tmp_path / CONFIG).write_text(json.dumps({**facts, **change}))
        with pytest.raises(ConfigError, match=words):
            load_head(tmp_path, target)
    (tmp_path / CONFIG).write_text(json.dumps(facts))
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_head(tmp_path, target)


def test_a_target_whose_attention_adds_biases(tmp_path: Path) -> None:
    """Qwen2's does to queries, keys and values, not to what comes out; its configuration does not say so."""
    torch.manual_seed(7)
    words = {"hidden_size": SIZE, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    words |= {"num_key_value_heads": 2, "vocab_size": IDS, "max_position_embeddings": 256}
    model = Qwen2ForCausalLM(Qwen2Config(**words))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".bias"):
                weight.normal_()
    folder = saved(tmp_path / "biased", model)
    shape = HeadShape.like(folder, 2)
    assert shape.attention_bias
    head = DovetailHead(shape, TargetEnds.read(folder, torch.float32))
    head.begin_like(folder)
    for theirs, ours in zip(model.model.layers[1:], head.blocks.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj"):
            assert torch.equal(getattr(ours.self_attn, name).bias, getattr(theirs.self_attn, name).bias)
        assert not ours.self_attn.o_proj.bias.any()
    target = LocalModel("biased", folder, "c" * 32)
    save_head(head, tmp_path / "head", target)
    assert torch.equal(
        load_head(tmp_path / "head", target).blocks.layers[0].self_attn.k_proj.bias,
        head.blocks.layers[0].self_attn.k_proj.bias.bfloat16().float(),
    )
    assert not HeadShape.like(saved(tmp_path / "plain", tiny()), 1).attention_bias


def test_a_target_without_the_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        HeadShape.like(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"no model\.embed_tokens\.weight, model\.norm\.weight in its weights"):
        TargetEnds.read(tmp_path, torch.float32)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="cannot be read"):
        TargetEnds.read(tmp_path, torch.float32)


def test_blocks_may_begin_as_the_targets_last(target: LocalModel) -> None:
    made = DovetailHead(HeadShape.like(target.path, 2), TargetEnds.read(target.path, torch.float32))
    made.begin_like(target.path)
    theirs = tiny().model.layers
    for own, other in zip(made.blocks.layers, theirs[2:], strict=True):
        for name, weight in own.named_parameters():
            assert torch.equal(weight, other.get_parameter(name)), name
    six = DovetailHead(HeadShape.like(target.path, 6), TargetEnds.read(target.path, torch.float32))
    before = [each.clone() for each in six.blocks.layers[0].parameters()]
    six.begin_like(target.path)  # the target has four
    assert all(torch.equal(*pair) for pair in zip(six.blocks.layers[0].parameters(), before, strict=True))
    assert torch.equal(six.blocks.layers[2].mlp.up_proj.weight, theirs[0].mlp.up_proj.weight)


def test_a_target_whose_output_is_its_own(tmp_path: Path) -> None:
    model = tiny(5, layers=1, tied=False)
    ends = TargetEnds.read(saved(tmp_path, model), torch.float32)
    assert torch.equal(ends.output, model.lm_head.weight)
    assert torch.equal(ends.embeddings, model.model.embed_tokens.weight)
    assert not torch.equal(ends.output, ends.embeddings)
