"""`joinwise bench gateway` without engines: what it makes of its rounds, and the stub that stands for a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from joinwise.actors.bench.gateway import System, _figures, _round, _row


def _load(front: float, redis: float, ttft: float) -> dict[str, Any]:
    return {"cpu": {"gateway": front, "redis": redis}, "ttft": [ttft]}


def test_a_request_and_a_token_are_told_apart() -> None:
    """100 requests of 1 token cost 0.1 s; 63 tokens more cost 0.63 s more."""
    found = _round(_load(0.73, 0.1, 0.02), _load(0.10, 0.1, 0.01), 100)
    assert found["ttft_ms"] == pytest.approx(10)
    assert found["gateway us/token"] == pytest.approx(100)
    assert found["gateway us/request"] == pytest.approx(900)
    assert found["gateway us"] == pytest.approx(7300)
    assert found["redis us/token"] == pytest.approx(0)


def test_figures_are_of_medians_and_of_pairs() -> None:
    def system(name: str, process: str, cpu: list[float], ttft: list[float]) -> System:
        rounds = [{"ttft_ms": first, f"{process} us": each} for each, first in zip(cpu, ttft, strict=True)]
        return System(name, "", {}, rounds=rounds)

    systems = [
        system("joinwise", "gateway", [110, 500, 90], [12, 14, 13]),
        system("vllm", "server", [100, 250, 100], [10, 10, 10]),
        system("vllm-router", "router", [1, 1, 1], [15, 15, 15]),
        system("joinwise traced", "gateway", [121, 500, 99], [12, 14, 13]),
        system("joinwise tls", "gateway", [132, 500, 108], [12, 14, 13]),
    ]
    figures = _figures(systems, [_row(each) for each in systems])
    assert figures == {
        "cpu_ratio_vllm": 1.1,
        "cpu_ratio_traced": 1.1,
        "cpu_ratio_tls": 1.2,
        "added_ttft_ms_joinwise": 3.0,
        "added_ttft_ms_vllm_router": 5.0,
    }


def test_the_stub_answers_when_a_prompt_is_behind_it() -> None:
    from joinwise.actors.bench.stub_executor import StubExecutor

    stub = object.__new__(StubExecutor)  # its model is not loaded
    stub._prompts, stub._output = {}, None

    def step(new: dict[str, int], cached: dict[str, int], scheduled: dict[str, int], finished: set[str]) -> Any:
        batch = SimpleNamespace(
            scheduled_new_reqs=[
                SimpleNamespace(req_id=name, prompt_token_ids=[1] * length, num_computed_tokens=0)
                for name, length in new.items()
            ],
            scheduled_cached_reqs=SimpleNamespace(req_ids=list(cached), num_computed_tokens=list(cached.values())),
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=sum(scheduled.values()),
            finished_req_ids=finished,
        )
        assert stub.execute_model(batch) is None
        output = stub.sample_tokens(None, non_block=True).result()
        return dict(zip(output.req_ids, output.sampled_token_ids, strict=True))

    assert step({"long": 10, "short": 2}, {}, {"long": 6, "short": 2}, set()) == {"long": [], "short": [1000]}
    assert step({}, {"long": 6, "short": 2}, {"long": 4, "short": 1}, set()) == {"long": [1000], "short": [1000]}
    assert step({}, {"long": 10}, {"long": 1}, {"short"}) == {"long": [1000]}
    assert list(stub._prompts) == ["long"]
