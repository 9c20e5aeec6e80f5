"""When a pool grows and shrinks: by its work, its queue, and how long both have lasted."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.workers import worker as registered
from hypothesis import given, settings
from hypothesis import strategies as st

from joinwise.cluster.autoscale import Autoscaler, work_s
from joinwise.cluster.config import JoinwiseConfig
from joinwise.cluster.config_check import problems
from joinwise.cluster.config_model import AutoscaleConfig, PoolConfig, SpeculationConfig
from joinwise.cluster.router.registry import AsleepPool, WorkerLoad, WorkerState


def pool(name: str = "decode", replicas: int = 1, **settings: object) -> PoolConfig:
    bounds = {"least": 1, "most": 4, "target_s": 5, "up_s": 10, "down_s": 100} | settings
    return PoolConfig(name=name, model="m", role="decode", replicas=replicas, autoscale=AutoscaleConfig(**bounds))


def worker(seconds: float, name: str = "decode", role: str = "decode") -> WorkerState:
    """One with so many seconds of prompts before it."""
    info = registered("w", role, pool=name, max_num_seqs=8)
    return WorkerState(info, WorkerLoad(prefill_tokens_per_s=100), 0, round(seconds * 100), 0, 0, 0, 0)


def run(scaler: Autoscaler, times: range, workers: list[WorkerState], waiting: int = 0) -> list[tuple[int, int]]:
    """When the pool changed, and to how many."""
    queue = {"m:": waiting} if waiting else {}
    return [(now, scaler.workers["decode"]) for now in times if "decode" in scaler.look(workers, queue, now)]


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
        changed = scaler.look([worker(1), worker(3, "other")], {"m:": 1}, now)
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


# From zero, and back to it.


def sleepy(name: str = "decode", role: str = "decode", model: str = "m", **changes: Any) -> PoolConfig:
    """A pool at zero."""
    bounds = AutoscaleConfig(**{"least": 0, "most": 2, "target_s": 5, "up_s": 10, "down_s": 100} | changes)
    return PoolConfig(name=name, model=model, role=role, replicas=0, autoscale=bounds)  # type: ignore[arg-type]


def test_a_request_that_waits_wakes_a_pool_at_once_and_an_idle_one_sleeps_after_the_longer_window():
    scaler = Autoscaler([sleepy()])
    assert run(scaler, range(20), []) == []
    assert run(scaler, range(20, 50), [], waiting=1) == [(20, 1)]  # and no more while that one starts
    assert run(scaler, range(50, 100), [worker(1)]) == []
    assert run(scaler, range(100, 220), [worker(0)]) == [(200, 0)]
    assert scaler.asleep([worker(0, role="draining")]) == [AsleepPool("decode", "m", "decode")]
    assert scaler.asleep([worker(0)]) == []


def test_a_request_that_comes_and_goes_between_two_looks_keeps_a_pool_awake():
    scaler = Autoscaler([sleepy()])
    scaler.look([], {"m:": 1}, 0, {"m": 5})
    for now in range(1, 300):
        scaler.look([worker(0)], {}, now, {"m": now // 90})
        assert scaler.workers == {"decode": 1}, now
    assert [now for now in range(300, 420) if scaler.look([worker(0)], {}, now, {"m": 3})] == [371]
    again = Autoscaler([sleepy()])  # a launcher that starts knows when it was, not that it is news
    assert not again.look([], {}, 0, {"m": 3}) and not again.look([], {}, 1, {"m": 3})
    assert list(again.look([], {}, 2, {"m": 4})) == ["decode"]


def test_only_the_model_that_is_asked_for_wakes_with_both_of_its_pools():
    pools = [sleepy("p", "prefill"), sleepy("d"), sleepy("p2", "prefill", "m2"), sleepy("d2", model="m2")]
    scaler = Autoscaler(pools, {"m": "org/m", "m2": "org/m:2"})
    assert scaler.look([], {"org/m:2:all_sampling,lora:x": 1}, 0) == {
        "p2": "those who ask for org/m:2",
        "d2": "those who ask for org/m:2",
    }
    assert list(scaler.look([], {"org/m:": 1}, 2)) == ["p", "d"]


def test_a_pool_at_zero_stays_there_while_another_does_its_work():
    base, burst = pool("base", most=1), sleepy("burst")
    scaler = Autoscaler([base, burst])
    for now in range(60):
        scaler.look([worker(50, "base")], {}, now)
    assert scaler.workers == {"base": 1, "burst": 0}
    changed = {now: each for now in range(60, 80) if (each := scaler.look([worker(50, "base")], {"m:": 2}, now))}
    assert [(now, list(each)) for now, each in changed.items()] == [(70, ["burst"])]  # a peak that passes wakes nobody


def test_one_of_two_pools_that_do_the_same_wakes():
    scaler = Autoscaler([sleepy("a", "mixed"), sleepy("b", "mixed")])
    assert list(scaler.look([], {"m:": 3}, 0)) == ["a"]


def test_a_prefill_pool_at_zero_wakes_with_what_decode_workers_do_alone():
    scaler = Autoscaler([sleepy("p", "prefill"), pool("d")])
    assert not scaler.look([worker(0, "d")], {}, 0)
    assert list(scaler.look([worker(1, "d")], {}, 2)) == ["p"]
    mixed = PoolConfig(name="d", model="m", role="mixed")
    assert not Autoscaler([sleepy("p", "prefill"), mixed]).look([worker(1, "d")], {}, 2)


def test_requests_that_speculating_workers_cannot_serve_wake_the_pool_that_can():
    drafts = PoolConfig(name="n", model="m", role="draft")
    quick = PoolConfig(name="q", model="m", role="mixed", speculation=SpeculationConfig(draft="n"))
    scaler = Autoscaler([drafts, quick, sleepy("plain", "mixed")])
    assert not scaler.look([worker(1, "q")], {}, 0)
    assert list(scaler.look([worker(1, "q")], {"m:all_sampling": 1}, 2)) == ["plain"]


def test_what_still_runs_on_a_worker_that_leaves_wakes_its_pool():
    scaler = Autoscaler([sleepy()])
    assert list(scaler.look([worker(1, role="draining")], {}, 0)) == ["decode"]


def test_a_launcher_that_takes_over_leaves_pools_at_zero():
    awake = sleepy("awake").model_copy(update={"replicas": 2})
    scaler = Autoscaler([sleepy(), awake, pool("always", replicas=2)])
    scaler.resume({"decode": 0, "awake": 0, "always": 1})
    assert scaler.workers == {"decode": 0, "awake": 0, "always": 1}


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1000), st.integers(0, 5)), max_size=60), st.integers(1, 4))
def test_it_stays_within_its_bounds_and_says_why(loads: list[tuple[float, int]], start: int):
    scaler = Autoscaler([pool(replicas=start, up_s=2, down_s=5)])
    for now, (seconds, waiting) in enumerate(loads):
        before = scaler.workers["decode"]
        why = scaler.look([worker(seconds)], {"m:": waiting}, now)
        assert 1 <= scaler.workers["decode"] <= 4
        assert bool(why) == (scaler.workers["decode"] != before)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"replicas": 5, "autoscale": {"least": 1, "most": 4}}, "begins with 5 replicas"),
        ({"role": "draft", "autoscale": {"least": 1, "most": 4}}, "leave out `autoscale`"),
        ({"replicas": 0, "autoscale": {"least": 1, "most": 4}}, "begins with 0 replicas"),
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


def test_a_cluster_may_begin_with_nothing():
    bounds = {"least": 0, "most": 1}
    pools = [
        {"name": role, "model": "m", "role": role, "replicas": 0, "autoscale": {**bounds, "wake_s": wake_s}}
        for role, wake_s in (("prefill", 20), ("decode", 40))
    ]
    raw = {"models": [{"name": "m", "served_name": "org/m", "model": "m"}], "pools": pools}
    config = JoinwiseConfig.model_validate(raw)
    assert problems(config) == []
    assert config.wakes == {"org/m": 40}
    fixed = JoinwiseConfig.model_validate({**raw, "pools": [{**pools[0], "autoscale": None}, pools[1]]})
    assert any("has only decode pools" in each for each in problems(fixed))


def test_bounds_out_of_order_are_refused():
    with pytest.raises(ValueError, match=r"least \(3\) is more than most \(2\)"):
        AutoscaleConfig(least=3, most=2)
