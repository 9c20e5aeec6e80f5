"""Ageing of preempted requests: what has lost its KV blocks once is not the first to lose them again.

vLLM preempts the request with the largest priority number, the youngest of equals, and puts it back into the waiting
queue under the same number. A worker in Splitwise's mixed pool decodes while prompts keep coming, so that one decode
could lose its blocks over and over. Here every preemption makes a request more urgent by one step.
"""

from vllm.v1.core.sched.request_queue import PriorityRequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus


class AgeingQueue(PriorityRequestQueue):
    """vLLM's waiting queue; preempted requests come back to it with `prepend_request`."""

    def __init__(self) -> None:
        super().__init__()
        self._aged: dict[str, int] = {}

    def prepend_request(self, request: Request) -> None:
        """Take back a request; one that was preempted since it was last here has aged."""
        preempted = request.status == RequestStatus.PREEMPTED
        if preempted and self._aged.get(request.request_id) != request.num_preemptions:
            self._aged[request.request_id] = request.num_preemptions
            request.priority -= 1
        super().prepend_request(request)

    def remove_request(self, request: Request) -> None:
        """Forget a request that ends while it waits."""
        self._aged.pop(request.request_id, None)
        super().remove_request(request)

    def pop_request(self) -> Request:
        """The most urgent request."""
        request = super().pop_request()
        self._aged.pop(request.request_id, None)
        return request


def age_preempted(scheduler: Scheduler) -> None:
    """Have a scheduler age what it preempts, if it goes by priority. Before its first request."""
    if type(scheduler.waiting) is PriorityRequestQueue:
        scheduler.waiting = AgeingQueue()
