"""Ageing: a preempted request comes back more urgent, once for each time that it was preempted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.request_queue import FCFSRequestQueue, PriorityRequestQueue
from vllm.v1.request import Request, RequestStatus

from joinwise.actors.vllm.ageing import AgeingQueue, age_preempted


def request(name: str, arrival: float, priority: int = 0) -> Request:
    return Request(name, [1, 2], SamplingParams(max_tokens=4), None, arrival_time=arrival, priority=priority)


def preempt(queue: AgeingQueue, each: Request) -> None:
    each.status = RequestStatus.PREEMPTED
    each.num_preemptions += 1
    queue.prepend_request(each)


def test_a_preempted_request_passes_its_equals_and_in_the_end_its_betters() -> None:
    queue = AgeingQueue()
    victim, peer, better = request("victim", 3.0), request("peer", 1.0), request("better", 2.0, priority=-2)
    for each in (peer, better):
        queue.add_request(each)
    order = []
    for _ in range(3):
        preempt(queue, victim)
        order.append([each.request_id for each in queue].index("victim"))
        queue.remove_request(victim)
    assert order == [1, 1, 0]
    assert victim.priority == -3


def test_one_preemption_ages_once_and_others_do_not() -> None:
    queue = AgeingQueue()
    victim, skipped = request("victim", 1.0), request("skipped", 2.0)
    preempt(queue, victim)
    queue.prepend_request(victim)
    queue.prepend_request(skipped)
    assert (victim.priority, skipped.priority) == (-1, 0)


def test_only_a_scheduler_that_goes_by_priority_ages() -> None:
    for before, after in ((PriorityRequestQueue(), AgeingQueue), (FCFSRequestQueue(), FCFSRequestQueue)):
        scheduler: Any = SimpleNamespace(waiting=before)
        age_preempted(scheduler)
        assert type(scheduler.waiting) is after
