"""vLLM's side of the seam: rows of a batch in, drafts out, and no failure of ours reaches the engine."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.draft_rig import VOCABULARY, ServedDesk
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.ops import topk_topp_sampler

from joinwise.actors.draft.lookup import PromptLookup
from joinwise.actors.vllm import proposer
from joinwise.actors.vllm.proposer import DraftSettings, RemoteProposer

SETTINGS = DraftSettings(cluster="c", worker_id="w", vocabulary=VOCABULARY, deadline_s=5.0, adaptive=False)


def made(k: int = 3) -> RemoteProposer:
    model = SimpleNamespace(max_model_len=64, get_vocab_size=lambda: 1000)
    config: Any = SimpleNamespace(speculative_config=SimpleNamespace(num_speculative_tokens=k), model_config=model)
    return RemoteProposer(config)


def test_a_step_without_any_draft_harms_nobody_who_asks_for_top_k() -> None:
    def rows(count: int) -> tuple[torch.Tensor, torch.Tensor, None]:
        return torch.arange(count * 100.0).view(count, 100), torch.full((count,), 3), None

    with pytest.raises(RuntimeError, match="max"):  # should vLLM have mended it, ours can go
        topk_topp_sampler.apply_top_k_top_p(*rows(0))
    made()
    for count in (0, 2):
        given = rejection_sampler.apply_top_k_top_p(*rows(count))
        assert given.shape == (count, 100)
        assert given.isfinite().sum() == 3 * count


def test_on_a_cpu_what_a_request_asks_is_repeated_for_each_of_its_drafts() -> None:
    made()
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)  # the second request has no draft
    temperatures = torch.tensor([0.5, 1.0, 0.0])
    given = rejection_sampler.expand_batch_to_tokens(temperatures, ends, 5, replace_from=0, replace_to=1)
    assert given.tolist() == [0.5, 0.5, 1.0, 1.0, 1.0]
    top_k = torch.tensor([3, 4, 5], dtype=torch.int32)
    assert rejection_sampler.expand_batch_to_tokens(top_k, ends, 5).tolist() == [3, 3, 5, 5, 5]


class Batch:
    """Rows as vLLM keeps them: longer than they are in use, with what stood there before."""

    def __init__(self, *rows: list[int]) -> None:
        self.tokens = np.full((8, 64), 7, np.int32)
        self.sizes = np.zeros(8, np.int32)
        for row, ids in enumerate(rows):
            self.tokens[row, : len(ids)] = ids
            self.sizes[row] = len(ids)

    def propose(self, subject: RemoteProposer, sampled: list[list[int]]) -> list[list[int]]:
        return subject.propose(sampled, self.sizes, self.tokens, slot_mappings=None)


class Workers:
    """Stands for an executor of several ranks."""

    def __init__(self, *ranks: tuple[int, Any], world: int, tensor_parallel: int) -> None:
        parallel = SimpleNamespace(
            world_size=world, tensor_parallel_size=tensor_parallel, prefill_context_parallel_size=1
        )
        config = SimpleNamespace(parallel_config=parallel)
        self._workers = [
            SimpleNamespace(rank=rank, vllm_config=config, model_runner=SimpleNamespace(drafter=each))
            if each
            else SimpleNamespace(rank=rank, vllm_config=config, model_runner=SimpleNamespace())
            for rank, each in ranks
        ]

    def collective_rpc(self, call: Any, args: tuple[Any, ...] = ()) -> list[Any]:
        return [call(worker, *args) for worker in self._workers]


def until_asked(subject: RemoteProposer, batch: Batch, sampled: list[list[int]]) -> list[list[int]]:
    deadline = time.monotonic() + 10
    while not any(drafts := batch.propose(subject, sampled)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return drafts


def test_nothing_is_proposed_before_anybody_can_be_asked() -> None:
    subject = made()
    subject.load_model(object())
    assert Batch([1, 2, 1, 2]).propose(subject, [[2]]) == [[]]
    assert subject.figures is None
    subject.open(SETTINGS)
    try:
        assert Batch([1, 2, 1, 2]).propose(subject, [[2]]) == [[]]
    finally:
        subject.close()
    assert Batch([1, 2, 1, 2]).propose(subject, [[2]]) == [[]]


def test_rows_that_only_prefilled_are_not_drafted_for() -> None:
    subject = made(k=2)
    with ServedDesk(PromptLookup(), VOCABULARY) as served:
        subject.open(SETTINGS)
        subject.point(served.address)
        batch = Batch([1, 2, 3, 1, 2], [5, 6, 8, 5, 6], [9])
        assert until_asked(subject, batch, [[2], [], [9]]) == [[3, 1], [], []]
        subject.close()


def test_what_fails_in_here_ends_the_asking_not_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    subject = made()
    with ServedDesk(PromptLookup(), VOCABULARY) as served:
        subject.open(SETTINGS)
        subject.point(served.address)
        until_asked(subject, Batch([1, 2, 3, 1, 2]), [[2]])
        assert subject.propose([[2]], np.array([5]), None) == [[]]  # type: ignore[arg-type]
        assert "no drafts are asked for any more" in caplog.text
        assert Batch([1, 2, 3, 1, 2]).propose(subject, [[2]]) == [[]]


def test_of_several_ranks_only_the_one_that_is_heard_asks() -> None:
    subjects = [made() for _ in range(2)]
    ranks = Workers((0, None), (1, None), (2, subjects[0]), (3, subjects[1]), world=4, tensor_parallel=2)
    with ServedDesk(PromptLookup(), VOCABULARY) as served:
        proposer.open_links(ranks, SETTINGS)  # type: ignore[arg-type]
        proposer.point_links(ranks, served.address)  # type: ignore[arg-type]
        assert until_asked(subjects[0], Batch([1, 2, 3, 1, 2]), [[2]]) == [[3, 1, 2]]
        assert Batch([1, 2, 3, 1, 2]).propose(subjects[1], [[2]]) == [[]]
        assert proposer.asked(ranks).asked >= 1  # type: ignore[arg-type]
        assert subjects[1].figures is None
        proposer.close_links(ranks)  # type: ignore[arg-type]
    assert Batch([1, 2, 3, 1, 2]).propose(subjects[0], [[2]]) == [[]]


def test_what_its_engine_computed_is_told_to_an_actor_that_wants_it() -> None:
    heard: list[list[float]] = []

    class Listening(PromptLookup):
        def draft(self, asks: Any) -> list[list[int]]:
            heard.extend([] if each.hidden is None else each.hidden[:, 0].tolist() for each in asks)
            return super().draft(asks)

    model = SimpleNamespace(compute_logits=lambda states: states)
    plain, rejecting, subject = torch.nn.Identity(), torch.nn.Identity(), made()
    subject.load_model(model)
    with ServedDesk(Listening(), VOCABULARY, hidden_size=1) as served:
        subject.open(SETTINGS, (plain, rejecting))
        subject.point(served.address)
        until_asked(subject, Batch([1, 2, 3, 1, 2]), [[2]])
        heard.clear()
        model.compute_logits(torch.tensor([[1.0], [2.0]]))
        plain(torch.zeros(1))
        Batch([1, 2, 3, 1, 2, 3], [8, 9]).propose(subject, [[3], [9]])
        model.compute_logits(torch.tensor([[3.0], [4.0], [5.0], [6.0]]))
        rejecting(SimpleNamespace(num_draft_tokens=[2, 0]))
        Batch([1, 2, 3, 1, 2, 3, 1, 7], [8, 9, 5]).propose(subject, [[1, 7], [5]])
        subject.close()
    assert heard == [[1], [2], [3, 4], [6]]


def test_the_engine_is_configured_against_padded_drafts() -> None:
    config = proposer.speculation(5)
    assert config["num_speculative_tokens_per_batch_size"] == [(1, 1, 5)]
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    lookup = build_dynamic_sd_schedule_lookup(config["num_speculative_tokens_per_batch_size"], 16, 5)
    assert lookup[1:] == [5] * 16
