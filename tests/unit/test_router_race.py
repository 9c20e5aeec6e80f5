"""Gateways in processes of their own race for workers: nobody over its limit, nothing left, better than guessing."""

from __future__ import annotations

from joinwise.actors.bench import route
from joinwise.cluster.store.embedded import EmbeddedRedis


def test_race_of_processes(redis_server: EmbeddedRedis) -> None:
    figures = route.race(redis_server.url, processes=4, decisions=300, workers=8)
    assert figures["race_violations"] == 0
    assert figures["race_leftovers"] == 0
    assert figures["race_granted"] + figures["race_refused"] == 1200
    assert figures["race_granted"] > 300
    assert figures["race_imbalance_median"] >= 1
