"""What is sampled with drafts is distributed as the target's own samples, by any drafter: through vLLM's own sampler,
the draft actor's real drafters and a small target whose every probability is known.

Each test draws sequences of a few tokens, round by round as an engine does, and compares the sequences with their exact
chances. What is known to be wrong goes through the same rig, which must notice it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers.drawn import FALSE_ALARM, p_value
from transformers import LlamaConfig, LlamaForCausalLM
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from joinwise.actors.draft.causal import CausalDrafter
from joinwise.actors.draft.drafter import Ask, Drafter
from joinwise.actors.draft.lookup import PromptLookup
from joinwise.actors.vllm.rejection import mend_rejection

IDS = 6
LENGTH = 3
"""Tokens of a drawn sequence: 216 outcomes."""
DRAWS = 12_000
PROMPT = (1, 2, 3, 1, 2)
"""Repeats itself, so that it can be looked up."""
K = 2
Drafts = Callable[[Sequence[int], int], list[int]]


@pytest.fixture(scope="module", autouse=True)
def cpu_kernels() -> None:
    """What vLLM's workers do on a CPU before they load a model."""
    import vllm._custom_ops  # noqa: F401 - loads the library
    from vllm.platforms import current_platform

    current_platform.register_triton_kernel_overrides()


class Target:
    """Logits that depend on the last two tokens."""

    def __init__(self) -> None:
        self._logits = torch.randn(IDS, IDS, IDS, generator=torch.Generator().manual_seed(1)) * 1.5

    def logits(self, text: Sequence[int]) -> torch.Tensor:
        return self._logits[text[-2], text[-1]]

    def chances(self, top_k: int | None) -> dict[Any, float]:
        """Of every sequence."""
        found = {}
        for sequence in itertools.product(range(IDS), repeat=LENGTH):
            chance = 1.0
            for at, token in enumerate(sequence):
                logits = self.logits((*PROMPT, *sequence[:at]))
                if top_k is not None:
                    logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
                chance *= float(logits.softmax(-1)[token])
            found[sequence] = chance
        return found


class Fixed:
    """Drafts the same for everybody: always wrong, if it likes."""

    name, held = "fixed", 0

    def __init__(self, token: int) -> None:
        self._token = token

    def begin(self) -> None: ...

    def draft(self, asks: Sequence[Ask]) -> list[list[int]]:
        return [[self._token] * ask.k for ask in asks]

    def catch_up(self) -> bool:
        return False

    def forget(self, key: Any) -> None: ...


def causal() -> CausalDrafter:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=IDS,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return CausalDrafter(LlamaForCausalLM(config).eval(), slots=1, max_tokens=32, name="tiny", threads=1)


def drafts_of(drafter: Drafter) -> Drafts:
    """What a drafter says of a text, remembered: drafts are greedy, so that it says it again."""

    @cache
    def drafted(text: tuple[int, ...], k: int) -> list[int]:
        return drafter.draft([Ask(0, np.array(text, np.int32), k)])[0]

    return lambda text, k: drafted(tuple(text), k)


def sampling(rows: int, top_k: int | None) -> SamplingMetadata:
    nothing = torch.empty(0)
    return SamplingMetadata(
        temperature=torch.ones(rows),
        all_greedy=False,
        all_random=True,
        top_p=None,
        top_k=None if top_k is None else torch.full((rows,), top_k, dtype=torch.int32),
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=nothing,
        presence_penalties=nothing,
        repetition_penalties=nothing,
        output_token_ids=[],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


def steps(target: Target, texts: Sequence[Sequence[int]], drafts: Sequence[Sequence[int]]) -> SpecDecodeMetadata:
    """A step's metadata as the model runner makes them: rows of each sequence's drafts, then of its next token."""
    metadata = SpecDecodeMetadata.make_dummy([list(each) for each in drafts], torch.device("cpu"))
    ends = torch.tensor([len(each) + 1 for each in drafts]).cumsum(0)
    metadata.bonus_logits_indices = (ends - 1).int()
    bonus = torch.zeros(int(ends[-1]), dtype=torch.bool)
    bonus[ends - 1] = True
    metadata.target_logits_indices = (~bonus).nonzero().flatten().int()
    return metadata


def drawn(
    target: Target,
    drafts: Drafts,
    *,
    top_k: int | None = None,
    draft_logits: Callable[[Sequence[int]], torch.Tensor] | None = None,
) -> list[tuple[int, ...]]:
    """Sequences, drawn as an engine draws them.

    Args:
        target: whose tokens are wanted.
        drafts: asked for up to K ids each round.
        top_k: of every request.
        draft_logits: tell the sampler that drafts were drawn by these.
    """
    mend_rejection()
    torch.manual_seed(7)
    sampler = RejectionSampler(Sampler())
    texts = [PROMPT for _ in range(DRAWS)]
    done: list[tuple[int, ...]] = []
    while texts:
        offered = [drafts(text, K) for text in texts]
        seen = [(*text, *each[:at]) for text, each in zip(texts, offered, strict=True) for at in range(len(each) + 1)]
        logits = torch.stack([target.logits(text) for text in seen])
        metadata = steps(target, texts, offered)
        probabilities = None
        if draft_logits is not None:
            before = [(*text, *each[:at]) for text, each in zip(texts, offered, strict=True) for at in range(len(each))]
            probabilities = torch.stack([draft_logits(text) for text in before]).softmax(-1)
        sampled = sampler(metadata, probabilities, logits, sampling(len(texts), top_k)).sampled_token_ids
        gained, _ = RejectionSampler.parse_output(sampled, IDS)
        texts = [(*text, *new) for text, new in zip(texts, gained, strict=True)]
        done += [text[len(PROMPT) :][:LENGTH] for text in texts if len(text) >= len(PROMPT) + LENGTH]
        texts = [text for text in texts if len(text) < len(PROMPT) + LENGTH]
    return done


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("drafter", [PromptLookup(), causal(), Fixed(4)], ids=["lookup", "causal", "always the same"])
def test_sampled_sequences_are_distributed_as_the_targets(drafter: Drafter, top_k: int | None) -> None:
    target, drafts = Target(), drafts_of(drafter)
    assert drafts(PROMPT, K)  # it does draft
    assert p_value(drawn(target, drafts, top_k=top_k), target.chances(top_k)) > FALSE_ALARM


def test_the_known_wrong_acceptance_rule_is_noticed() -> None:
    """Drafts are what a model finds most likely; to test them as if they had been drawn from what it finds is wrong."""
    target = Target()
    model = Target()._logits.roll(1, 0)

    def likely(text: Sequence[int]) -> torch.Tensor:
        return model[text[-2], text[-1]]

    def greedy(text: Sequence[int], k: int) -> list[int]:
        ids: list[int] = []
        for _ in range(k):
            ids.append(int(likely([*text, *ids]).argmax()))
        return ids

    chances = target.chances(None)
    assert p_value(drawn(target, greedy), chances) > FALSE_ALARM
    assert p_value(drawn(target, greedy, draft_logits=likely), chances) < FALSE_ALARM


def test_the_test_itself() -> None:
    chances = {"a": 0.5, "b": 0.3, "c": 0.2}
    assert p_value("a" * 500 + "b" * 300 + "c" * 200, chances) == 1
    assert p_value("a" * 540 + "b" * 290 + "c" * 170, chances) > 0.005
    assert p_value("a" * 700 + "b" * 200 + "c" * 100, chances) < FALSE_ALARM
    assert p_value("aaad", chances) == 0
