"""What would end a healthy engine, and does not: a seeded prompt in chunks on a CPU, a request after a long rest."""

from __future__ import annotations

import queue
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from joinwise.actors.vllm.cpu_seeds import spare_generators
from joinwise.actors.vllm.engine_loop import EngineLoop


def runner(device: str, unfinished: list[int], sample: Any) -> Any:
    generators = {row: torch.Generator() for row in (0, 2)}
    mask = np.zeros(8, dtype=bool)
    mask[unfinished] = True
    return SimpleNamespace(
        device=torch.device(device),
        input_batch=SimpleNamespace(num_reqs=3, generators=generators),
        discard_request_mask=SimpleNamespace(np=mask),
        sample_tokens=sample,
    )


def test_rows_of_unfinished_prompts_draw_from_no_generator() -> None:
    seen: list[list[int]] = []

    def sample(grammar: Any) -> Any:
        seen.append(sorted(made.input_batch.generators))
        return grammar

    made = runner("cpu", [1, 2, 5], sample)  # row 5 is of an earlier, larger batch
    before = dict(made.input_batch.generators)
    spare_generators(SimpleNamespace(model_runner=made))
    assert made.sample_tokens("grammar") == "grammar"
    assert seen == [[0]]
    assert made.input_batch.generators == before


def test_generators_come_back_when_sampling_fails() -> None:
    def sample(grammar: Any) -> Any:
        raise RuntimeError("no")

    made = runner("cpu", [0, 2], sample)
    spare_generators(SimpleNamespace(model_runner=made))
    with pytest.raises(RuntimeError):
        made.sample_tokens(None)
    assert sorted(made.input_batch.generators) == [0, 2]


def test_other_devices_are_left_alone() -> None:
    made = runner("meta", [0], lambda grammar: grammar)
    sample = made.sample_tokens
    spare_generators(SimpleNamespace(model_runner=made))
    assert made.sample_tokens is sample


def test_cpu_generators_still_have_no_offset() -> None:
    """Once they have, `cpu_seeds` can go."""
    with pytest.raises(RuntimeError, match="offset"):
        torch.Generator().get_offset()


def resting_loop() -> tuple[EngineLoop, SimpleNamespace]:
    """A loop that has rested for long, and its scheduler."""
    loop = EngineLoop.__new__(EngineLoop)
    scheduler = SimpleNamespace(busy=False, has_requests=lambda: scheduler.busy)
    loop.core = SimpleNamespace(scheduler=scheduler)  # type: ignore[assignment]
    loop._threads, loop._stopping = torch.get_num_threads(), False
    loop._work, loop._wake, loop._rests = queue.SimpleQueue(), threading.Event(), True
    loop.last_step_at = time.monotonic() - 1000
    return loop, scheduler


def test_an_engine_that_hangs_between_two_steps_is_stuck() -> None:
    loop, _ = resting_loop()
    thread = threading.Thread(target=loop._run, daemon=True)
    thread.start()
    hangs, go_on = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        go_on.wait(10)
        loop._stopping = True
        loop._wake.set()  # as `stop` does

    loop._submit(hang)
    assert hangs.wait(5)
    first = loop.stuck_for()
    time.sleep(0.02)
    assert 0 <= first < loop.stuck_for() < 5
    go_on.set()
    thread.join(5)
    assert not thread.is_alive()


def test_an_engine_that_rested_is_not_stuck() -> None:
    loop, scheduler = resting_loop()
    stepping = threading.Event()

    def step() -> bool:
        stepping.set()
        time.sleep(0.05)
        return True

    loop._step = step  # type: ignore[method-assign]
    thread = threading.Thread(target=loop._run, daemon=True)
    thread.start()
    time.sleep(0.05)
    assert loop.stuck_for() == 0

    def arrive() -> None:
        scheduler.busy = True

    loop._submit(arrive)
    assert stepping.wait(5)
    assert loop.stuck_for() < 10
    loop._stopping = True
    thread.join(5)
    assert not thread.is_alive()
