"""When a pool grows and shrinks: by its work, its queue, and how long both have lasted."""

from __future__ import annotations

import pytest
from helpers.workers import worker as registered
from hypothesis import given, settings
from hypothesis import strategies as st

from joinwise.cluster.autoscale import Autoscaler, work_s
from joinwise.cluster.config import JoinwiseConfig
from joinwise.cluster.config_check import problems
from joinwise.cluster.config_model import AutoscaleConfig, PoolConfig
from joinwise.cluster.router.registry import WorkerLoad, WorkerState


def pool(name: str = "decode", replicas: int = 1, **settings: object) -> PoolConfig:
    bounds = {"least": 1, "most": 4, "target_s": 5, "up_s": 10, "down_s": 100} | settings
    return PoolConfig(name=name, model="m", role="decode", replicas=replicas, autoscale=AutoscaleConfig(**bounds))


def worker(seconds: float, name: str = "decode", role: str = "decode") -> WorkerState:
    """One with so many seconds of prompts before it."""
    info = registered("w", role, pool=name, max_num_seqs=8)
    return WorkerState(info, WorkerLoad(prefill_tokens_per_s=100), 0, round(seconds * 100), 0, 0, 0, 0)


def run(scaler: Autoscaler, times: range, workers: list[WorkerState], waiting: int = 0) -> list[tuple[int, int]]:
    """When the pool changed, and to how many."""
    return [(now, scaler.workers["decode"]) for now in times if "decode" in scaler.look(workers, waiting, now)]


def test_the_work_of_a_worker_is_what_is_pending_over_its_speed():
    state = worker(0)
    busy = WorkerState(state.info, WorkerLoad(prefill_tokens_per_s=200, decode_step_ms=50), 0, 400, 0, 160, 3, 0)
    assert work_s(busy) == pytest.approx(400 / 200 + 160 / 8 * 0.05)
    unknown = WorkerState(state.info, WorkerLoad(), 0, 1000, 0, 0, 0, 0)
    assert work_s(unknown) == pytest.approx(1.0)


def test_a_pool_grows_once_there_has_been_too_much_for_long_enough():
    scaler = Autoscaler([pool()])
    assert run(scaler, range(10), [worker(12)]) == []
    assert run(scaler, range(10, 12), [worker(12)]) == [(10, 3)]


def test_a_peak_that_passes_adds_nobody():
    scaler = Autoscaler([pool()])
    for begin in range(0, 60, 12):
        assert run(scaler, range(begin, begin + 9), [worker(50)]) == []
        assert run(scaler, range(begin + 9, begin + 12), [worker(1)]) == []


def test_it_grows_by_what_was_needed_all_the_time_and_never_beyond_its_bound():
    scaler = Autoscaler([pool()])
    run(scaler, range(5), [worker(100)])
    assert run(scaler, range(5, 11), [worker(8)]) == [(10, 2)]
    assert run(scaler, range(11, 40), [worker(100), worker(100)])[-1][1] == 4


def test_a_pool_shrinks_after_the_longer_window_to_the_most_that_was_needed_in_it():
    scaler = Autoscaler([pool(replicas=4)])
    four = [worker(0)] * 3
    assert run(scaler, range(50), [worker(9), *four]) == []
    assert run(scaler, range(50, 101), [worker(1), *four]) == [(100, 2)]
    assert run(scaler, range(101, 250), [worker(0), worker(0)]) == [(201, 1)]
    assert run(scaler, range(250, 400), [worker(0)]) == []


def test_a_pool_that_lends_a_worker_has_none_to_spare():
    scaler = Autoscaler([pool(replicas=3)])
    assert run(scaler, range(200), [worker(0), worker(0), worker(0, role="mixed")]) == []
    assert run(scaler, range(200, 302), [worker(0)] * 3) == [(300, 1)]  # 100 s after it came back


def test_requests_that_wait_need_one_more_than_there_are_once_those_asked_for_are_there():
    scaler = Autoscaler([pool()])
    assert run(scaler, range(12), [worker(1)], waiting=3) == [(10, 2)]
    assert run(scaler, range(12, 60), [worker(1)], waiting=3) == []  # the second is starting
    assert run(scaler, range(60, 72), [worker(1), worker(1)], waiting=3) == [(70, 3)]


def test_they_wait_for_the_pool_with_the_most_to_do():
    scaler = Autoscaler([pool("decode"), pool("other")])
    for now in range(12):
        changed = scaler.look([worker(1), worker(3, "other")], 1, now)
    assert scaler.workers == {"decode": 1, "other": 2}
    assert changed == {}


def test_workers_that_leave_and_pools_of_a_fixed_size_count_nothing():
    fixed = PoolConfig(name="fixed", model="m", role="decode")
    scaler = Autoscaler([pool(), fixed])
    assert run(scaler, range(20), [worker(90, role="draining"), worker(90, "fixed")]) == []
    assert scaler.workers == {"decode": 1}
    assert not Autoscaler([fixed])


def test_another_configuration_keeps_the_workers_within_its_bounds():
    scaler = Autoscaler([pool()])
    run(scaler, range(12), [worker(100)])
    assert scaler.workers == {"decode": 4}
    scaler.configure([pool(most=3), pool("new", replicas=2)])
    assert scaler.workers == {"decode": 3, "new": 2}


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1000), st.integers(0, 5)), max_size=60), st.integers(1, 4))
def test_it_stays_within_its_bounds_and_says_why(loads: list[tuple[float, int]], start: int):
    scaler = Autoscaler([pool(replicas=start, up_s=2, down_s=5)])
    for now, (seconds, waiting) in enumerate(loads):
        before = scaler.workers["decode"]
        why = scaler.look([worker(seconds)], waiting, now)
        assert 1 <= scaler.workers["decode"] <= 4
        assert bool(why) == (scaler.workers["decode"] != before)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"replicas": 5, "autoscale": {"least": 1, "most": 4}}, "begins with 5 replicas"),
        ({"role": "draft", "autoscale": {"least": 1, "most": 4}}, "leave out `autoscale`"),
    ],
)
def test_contradictions_are_found_before_anything_starts(changed: dict[str, object], said: str):
    config = JoinwiseConfig.model_validate(
        {
            "models": [{"name": "m", "model": "m"}],
            "pools": [
                {"name": "mixed", "model": "m", "role": "mixed"},
                {"name": "d", "model": "m", "role": "decode", **changed},
            ],
        }
    )
    assert any(said in problem for problem in problems(config))


def test_bounds_out_of_order_are_refused():
    with pytest.raises(ValueError, match=r"least \(3\) is more than most \(2\)"):
        AutoscaleConfig(least=3, most=2)
