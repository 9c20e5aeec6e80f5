"""The policy that says how many gateways there should be, with Serve's own wrapping where it is installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from joinwise.actors.scaling import RUNNING, gateways


def context(reports: dict[str, float] | None, replicas: int, target: float = 10) -> Any:
    metrics = None if reports is None else {RUNNING: reports}
    return SimpleNamespace(
        current_num_replicas=replicas,
        aggregated_metrics=metrics,
        policy_state={"kept": 1},
        config=SimpleNamespace(target_ongoing_requests=target),
    )


@pytest.mark.parametrize(
    ("reports", "replicas", "wanted"),
    [
        ({"a": 10.0, "b": 10.0}, 2, 2),
        ({"a": 35.0, "b": 5.0}, 2, 4),
        ({"a": 0.0, "b": 0.0}, 2, 0),
        ({"a": 20.0}, 2, 4),  # b has not reported: it is taken for an equal of a
        ({}, 3, 3),
        (None, 3, 3),
        ({"a": 5.0, "gone": 5.0}, 1, 1),  # a report of one that has just left does not shrink the others'
    ],
)
def test_gateways_wanted(reports: dict[str, float] | None, replicas: int, wanted: float) -> None:
    assert gateways(context(reports, replicas)) == (wanted, {"kept": 1})
