"""What a change of configuration touches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from joinwise.cluster.changes import gateway_build, refusals, worker_build
from joinwise.cluster.config_model import JoinwiseConfig


def config(change: Callable[[dict[str, Any]], None] = lambda raw: None) -> JoinwiseConfig:
    raw: dict[str, Any] = {
        "models": [{"name": "m", "model": "smollm2-135m-instruct"}],
        "pools": [
            {"name": "prefill", "model": "m", "role": "prefill", "engine": {"max_num_seqs": 8}},
            {"name": "decode", "model": "m", "role": "decode", "replicas": 2},
        ],
        "gateway": {},
        "router": {},
        "kv": {},
        "redis": {},
    }
    change(raw)
    return JoinwiseConfig.model_validate(raw)


def touched(change: Callable[[dict[str, Any]], None]) -> set[str]:
    old, new = config(), config(change)
    found = {
        mine.name
        for mine, theirs in zip(old.pools, new.pools, strict=True)
        if worker_build(old, mine) != worker_build(new, theirs)
    }
    return found | ({"gateway"} if gateway_build(old) != gateway_build(new) else set())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda raw: None, set()),
        (lambda raw: raw["pools"][1].update(replicas=3), set()),  # another slot; those there are stay
        (lambda raw: raw["pools"][1].update(autoscale={"least": 1, "most": 3}), set()),
        (lambda raw: raw["pools"][1].update(autoscale={"least": 0, "most": 3}), {"gateway"}),  # its requests may wait
        (lambda raw: raw["pools"][0]["engine"].update(max_num_seqs=4), {"prefill"}),
        (lambda raw: raw["pools"][1].update(engine={"max_num_seqs": 4}), {"decode", "gateway"}),
        (lambda raw: raw["pools"][0].update(role="mixed"), {"prefill", "gateway"}),
        (lambda raw: raw["pools"][0].update(threads=2), {"prefill"}),
        (lambda raw: raw["gateway"].update(tool_parser="hermes"), {"gateway"}),
        (lambda raw: raw["gateway"].update(drain_s=5), {"prefill", "decode", "gateway"}),
        (lambda raw: raw["router"].update(tenants={"a": {"concurrent": 1}}), {"gateway"}),
        (lambda raw: raw["kv"].update(codec="lossless"), {"prefill", "decode", "gateway"}),
        (lambda raw: raw["models"][0].update(reasoning_parser="x"), {"gateway"}),
        (lambda raw: raw["models"][0].update(max_model_len=128), {"prefill", "decode", "gateway"}),
    ],
)
def test_only_what_changes_is_renewed(change: Callable[[dict[str, Any]], None], expected: set[str]) -> None:
    assert touched(change) == expected


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda raw: raw.update(cluster="other"), "cluster"),
        (lambda raw: raw["redis"].update(url="redis://host"), "redis"),
        (lambda raw: raw["redis"].update(timeout_s=9), "redis"),
        (lambda raw: raw.update(ray={"address": "auto"}), "ray"),
        (lambda raw: raw["gateway"].update(http_port=1), "gateway.http_port"),
        (lambda raw: raw["models"][0].update(dtype="float32"), "model 'm'"),
        (lambda raw: raw["models"][0].update(served_name="x"), "model 'm'"),
    ],
)
def test_what_a_running_cluster_cannot_change(change: Callable[[dict[str, Any]], None], word: str) -> None:
    (said,) = refusals(config(), config(change))
    assert said.startswith(word)


def test_what_it_can_change_is_not_refused() -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["models"].append({"name": "n", "model": "smollm2-135m-instruct", "dtype": "float32"})
        raw["pools"] = [raw["pools"][1], {"name": "new", "model": "n", "role": "mixed"}]

    assert refusals(config(), config(change)) == []
