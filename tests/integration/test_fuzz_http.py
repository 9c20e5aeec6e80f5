"""Generated calls at the gateway's HTTP interface, by its own OpenAPI document, for a bounded time: no answer is a
crash, none holds the key that it was asked with, and afterwards nothing is held and a right call still works.

The engine is a stub, whose tokens cost nothing. `FUZZ_SECONDS` says for how long; the time is shared by the paths.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from helpers.cluster import ENGINE, MODEL, RunningCluster, mixed_config, running_cluster
from helpers.idle import assert_idle
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

pytestmark = [pytest.mark.cluster, pytest.mark.model, pytest.mark.timeout(300)]

SECONDS = float(os.environ.get("FUZZ_SECONDS", "20"))
KEY = "a-key-that-nobody-may-be-told"
_STUB = "joinwise.actors.bench.stub_executor.StubExecutor"
#: What a call may be answered with beside its own successes: never 500, which is an exception that nobody foresaw.
_FORESEEN = frozenset({501, 503, 504})
_ANSWER_S = 10.0


@pytest.fixture(scope="module")
def fuzzed(small_model: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    config = mixed_config("fuzzed")
    config["pools"][0]["engine"] = {**ENGINE, "distributed_executor_backend": _STUB}
    config["gateway"] |= {"api_keys": [KEY], "admin": True, "limits": {"request_s": 5}}
    with running_cluster(config, tmp_path_factory.mktemp("fuzzed")) as cluster:
        yield cluster


class _EnoughError(Exception):
    """The time for an operation is over."""


def calls(operation: Any, mode: GenerationMode, seconds: float, check: Callable[[Any], None]) -> None:
    """Call an operation with generated input, once at least, for so many seconds."""
    until = math.inf

    @settings(
        max_examples=10_000,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def one(case: Any) -> None:
        nonlocal until
        if time.monotonic() > until:
            raise _EnoughError
        until = min(until, time.monotonic() + seconds)  # it may take longer to know what to send
        check(case)

    with contextlib.suppress(_EnoughError, Unsatisfiable):  # of some operations no wrong call can be made
        one()


async def test_generated_calls_are_answered_as_declared(fuzzed: RunningCluster) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    document = httpx.get(f"{fuzzed.http}/openapi.json", headers=headers).json()
    operations = [each.ok() for each in schemathesis.openapi.from_dict(document).get_all_operations()]
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize"} <= {each.path for each in operations}
    seen: Counter[tuple[str, int]] = Counter()
    crashes: list[str] = []

    def check(case: Any) -> None:
        answer = case.call(base_url=fuzzed.http, headers=headers, timeout=_ANSWER_S)
        seen[case.operation.path, answer.status_code] += 1
        assert KEY not in answer.text
        if answer.status_code >= 500 and answer.status_code not in _FORESEEN:
            crashes.append(f"{answer.status_code} {case.as_curl_command()}\n{answer.text[:300]}")

    share = SECONDS / len(operations) / 2
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            calls(operation, mode, share, check)
    print(*(f"{path} {status}: {count}" for (path, status), count in sorted(seen.items())), sep="\n")
    assert not crashes, "\n".join(dict.fromkeys(crashes))
    assert {path for path, _ in seen} == {each.path for each in operations}
    body = {"model": MODEL, "prompt": "One,", "max_tokens": 2}
    assert httpx.post(f"{fuzzed.http}/v1/completions", json=body, headers=headers, timeout=30).status_code == 200
    assert KEY not in fuzzed.log.read_text()
    await assert_idle(fuzzed)
