"""Replay in vLLM's second model runner: with its own layout of a step, and as its own loader finds it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, loader

from joinwise.actors.vllm import build
from joinwise.actors.vllm.connector import JoinwiseConnector
from joinwise.actors.vllm.handoff import REPLAY_KEY
from joinwise.actors.vllm.replay_v2 import ReplayLogitsProcessorV2

VOCABULARY = 11


class Runner:
    """Slots as the model runner fills them, and steps that put any of them in any order."""

    def __init__(self) -> None:
        self.prompt_len = np.zeros(8, dtype=np.int32)
        states = SimpleNamespace(prompt_len=SimpleNamespace(np=self.prompt_len))
        self.processor = ReplayLogitsProcessorV2(None, states)  # type: ignore[arg-type]
        self.length: dict[int, int] = {}

    def add(self, slot: int, replay: list[int] | None, prompt: int = 4, output: int = 0) -> bool:
        self.prompt_len[slot] = prompt
        self.length[slot] = prompt + output
        extra = None if replay is None else {REPLAY_KEY: replay}
        return self.processor.add_request(slot, SamplingParams(extra_args=extra))

    def step(self, *slots: int, computed: dict[int, int] | None = None) -> list[int | None]:
        """What each row is forced to, None for untouched; each slot then has one token more, if its prompt is done."""
        ends = [(computed or {}).get(slot, self.length[slot]) for slot in slots]
        mapping, position = torch.tensor(slots), torch.tensor(ends) - 1
        zeros = torch.zeros_like(mapping)
        context = LogitsContext(mapping, mapping, mapping.numpy(), zeros, mapping, position, np.array(ends))
        before = torch.randn(len(slots), VOCABULARY)
        after = self.processor.apply(before.clone(), context)
        forced: list[int | None] = []
        for old, new in zip(before, after, strict=True):
            finite = torch.isfinite(new).nonzero().flatten().tolist()
            assert len(finite) in (1, VOCABULARY)
            assert torch.equal(new[finite], old[finite])
            forced.append(finite[0] if len(finite) == 1 else None)
        for slot, end in zip(slots, ends, strict=True):
            self.length[slot] += end >= self.prompt_len[slot]
        return forced


def test_repeats_the_list_and_then_lets_go() -> None:
    runner = Runner()
    assert runner.add(2, [5, 3, 5])
    assert [runner.step(2) for _ in range(5)] == [[5], [3], [5], [None], [None]]
    assert not runner.processor._replays, "nothing is kept of it"


def test_rows_are_of_slots_in_any_order() -> None:
    runner = Runner()
    runner.add(0, [1, 2])
    runner.add(5, [7], prompt=9)
    assert not runner.add(3, None)
    assert runner.step(5, 3, 0) == [7, None, 1]
    assert runner.step(0, 3, 5) == [2, None, None]


def test_a_chunk_of_a_prompt_is_untouched() -> None:
    runner = Runner()
    runner.add(1, [6], prompt=100)
    assert runner.step(1, computed={1: 64}) == [None]
    assert runner.step(1, computed={1: 100}) == [6]


def test_goes_on_where_a_preempted_request_was() -> None:
    runner = Runner()
    runner.add(1, [5, 3, 8], output=1)
    assert [runner.step(1) for _ in range(3)] == [[3], [8], [None]]


def test_a_new_request_takes_over_its_slot() -> None:
    runner = Runner()
    runner.add(1, [5, 6])
    assert not runner.add(1, None)
    assert runner.step(1) == [None]
    runner.add(1, [9])
    assert runner.step(1) == [9]


def test_a_forbidden_token_is_repeated_all_the_same() -> None:
    runner = Runner()
    runner.add(0, [4])
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 4] = float("-inf")
    slot = torch.tensor([0])
    context = LogitsContext(slot, slot, slot.numpy(), slot, slot, torch.tensor([3]), np.array([4]))
    after = runner.processor.apply(logits, context)
    assert torch.isfinite(after[0]).nonzero().flatten().tolist() == [4]


def test_each_runner_finds_its_own() -> None:
    assert loader._load_v2_logitsprocs_by_fqcns([build.REPLAY_V2]) == [ReplayLogitsProcessorV2]
    with pytest.raises(ValueError, match="subclass"):
        loader._load_v2_logitsprocs_by_fqcns([build.REPLAY])


@pytest.mark.parametrize(("second", "expected"), [(True, [build.REPLAY_V2]), (False, [build.REPLAY])])
def test_a_worker_is_given_the_one_of_its_runner(second: bool, expected: list[str], monkeypatch) -> None:
    def made(path: str, arguments: dict) -> SimpleNamespace:
        model = SimpleNamespace(logits_processors=arguments["logits_processors"])
        return SimpleNamespace(use_v2_model_runner=second, model_config=model)

    monkeypatch.setattr(build, "_config", made)
    assert build.worker_config("model", {}).model_config.logits_processors == expected


def test_no_graph_of_the_whole_model_hides_the_layers() -> None:
    assert JoinwiseConnector.requires_piecewise_for_cudagraph({})
