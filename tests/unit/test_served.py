"""A gateway that starts waits for the first worker of its model."""

from __future__ import annotations

from typing import Any, cast

import pytest
from helpers.workers import worker

from joinwise.actors.gateway.served import _first_worker
from joinwise.cluster.errors import NoWorkerError, StoreUnavailableError
from joinwise.cluster.router.registry import Registry, WorkerInfo


class Answers:
    """A registry that answers what it is told, and the last of it for ever."""

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)

    async def list(self) -> tuple[WorkerInfo, ...]:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return cast(tuple[WorkerInfo, ...], answer)


async def first(*answers: Any, patience_s: float = 30.0) -> WorkerInfo | None:
    return await _first_worker(cast(Registry, Answers(*answers)), "m", patience_s)


AWAY = StoreUnavailableError("Redis does not answer")


async def test_a_redis_that_answers_late_ends_nothing() -> None:
    other, mine = worker("a", model="other"), worker("b", model="m")
    assert await first(AWAY, (), AWAY, (other,), (other, mine)) == mine


async def test_a_model_at_zero_is_served_without_a_worker_once_redis_has_said_so() -> None:
    mine = worker("b", model="m")
    for answers, found in (((AWAY, ()), None), (((mine,),), mine)):
        assert await _first_worker(cast(Registry, Answers(*answers)), "m", 30.0, needed=False) == found


async def test_what_was_missing_in_the_end_is_said() -> None:
    with pytest.raises(NoWorkerError, match="no worker of 'm'"):
        await first(AWAY, (), patience_s=0.5)
    with pytest.raises(StoreUnavailableError):
        await first((), AWAY, patience_s=0.5)
