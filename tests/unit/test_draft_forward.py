"""Forward passes over slots: a pass of a recorded shape computes what one of just the right shape does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_target import tiny_draft
from transformers import LlamaForCausalLM

from joinwise.actors.draft.forward import _NARROWEST, Pass, SlotForward
from joinwise.actors.draft.slots import Span

IDS, SLOTS, COLUMNS = 89, 5, 1500
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason=f"CUDA graphs: torch {torch.__version__} sees no GPU")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_draft(IDS, positions=2048, seed=6)


class Repeats:
    """Records nothing, and notes what is repeated: the number of rows that come out."""

    def __init__(self) -> None:
        self.recorded = 0
        self.rows: list[int] = []

    def __call__(self, compute: Pass) -> Pass:
        self.recorded += 1

        def repeat() -> torch.Tensor:
            found = compute()
            self.rows.append(len(found))
            return found

        return repeat


def span(slot: int, at: int, *tokens: int) -> Span:
    return Span(slot, at, np.array(tokens, np.int32))


def rounds(seed: int) -> Iterator[list[Span]]:
    """Spans that fill slots, go back and write anew, of one token and more, wider and wider."""
    chance = random.Random(seed)
    held = [0] * SLOTS
    for _ in range(60):
        slots = chance.sample(range(SLOTS), chance.randint(1, SLOTS))
        sizes = {slot: chance.choice([1, 1, 1, 2, 2, 40]) for slot in slots}
        for slot in slots:
            held[slot] = max(0, held[slot] - chance.randint(0, 3))
        yield [span(slot, held[slot], *chance.choices(range(IDS), k=sizes[slot])) for slot in slots]
        for slot, size in sizes.items():
            held[slot] += size


def test_a_recorded_pass_computes_what_one_of_the_right_shape_does(model: Any) -> None:
    repeats = Repeats()
    plain, recorded = (SlotForward(model, SLOTS, COLUMNS) for _ in range(2))
    recorded.record(repeats)
    for spans in rounds(1):
        assert recorded(spans) == plain(spans)
    assert set(repeats.rows) == {1, 2, 4, 5}


def test_what_is_recorded_is_bounded(model: Any) -> None:
    forward, repeats = SlotForward(model, SLOTS, COLUMNS), Repeats()
    forward.record(repeats)
    assert {each.rows for each in forward._recorded} == {1, 2, 4, 5}
    assert {each.width for each in forward._recorded} == {_NARROWEST, 4 * _NARROWEST, COLUMNS}
    assert repeats.recorded == len(forward._recorded) == 4 * 3 * 2


def test_the_smallest_pass_that_holds_a_step_is_repeated(model: Any) -> None:
    forward, repeats = SlotForward(model, SLOTS, COLUMNS), Repeats()
    forward.record(repeats)
    forward([span(3, 0, *range(40))])
    assert repeats.rows == []  # a prompt
    forward([span(3, 40, 1)])
    forward([span(3, 41, 1), span(0, 0, 5), span(1, 0, 6)])
    assert repeats.rows == [1, 4]
    width = _NARROWEST
    by_width = {(each.rows, each.tokens, each.width): each for each in forward._recorded}
    forward([span(2, 0, *range(60))])
    forward([span(2, width - 1, 7)])  # its last column is the narrowest pass' last
    assert by_width[1, 1, width].input[0, 2] == width - 1
    forward([span(2, width, 7)])
    assert by_width[1, 1, 4 * width].input[0, 2] == width


def test_rows_that_are_computed_for_nobody_leave_slots_as_they_are(model: Any) -> None:
    forward = SlotForward(model, SLOTS, COLUMNS)
    forward.record(lambda compute: compute)
    for slot in range(SLOTS):
        forward([span(slot, 0, *range(slot, slot + 30))])
    before = [tensor[:, :, :COLUMNS].clone() for layer in forward._cache._layers.values() for tensor in layer]
    forward([span(2, 30, 4), span(3, 30, 4), span(4, 30, 4)])  # a pass of four rows
    after = [tensor[:, :, :COLUMNS] for layer in forward._cache._layers.values() for tensor in layer]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:2], new[:2])
        assert torch.equal(old[2:, :, :30], new[2:, :, :30])
        assert not torch.equal(old[2:, :, 30], new[2:, :, 30])


def test_a_cpu_records_nothing(model: Any) -> None:
    forward = SlotForward(model, SLOTS, COLUMNS)
    forward.warm_up()
    assert not forward._recorded


@pytest.mark.gpu
@on_gpu
def test_graphs_compute_what_launched_kernels_do(model: Any) -> None:
    there = LlamaForCausalLM(model.config).eval()
    there.load_state_dict(model.state_dict())
    plain, graphs = (SlotForward(there.to("cuda"), SLOTS, COLUMNS) for _ in range(2))
    graphs.warm_up()
    assert len(graphs._recorded) == 24
    for spans in rounds(2):
        assert graphs(spans) == plain(spans)


@pytest.mark.gpu
@on_gpu
def test_a_model_that_no_graph_can_hold_drafts_without(model: Any, caplog: Any) -> None:
    there = LlamaForCausalLM(model.config).eval()
    there.load_state_dict(model.state_dict())
    there.to("cuda").model.layers[0].register_forward_hook(lambda *_: torch.cuda.synchronize())
    forward = SlotForward(there, SLOTS, COLUMNS)
    forward.warm_up()
    assert not forward._recorded
    assert "without CUDA graphs" in caplog.text
    assert len(forward([span(0, 0, 1, 2, 3)])) == 1
