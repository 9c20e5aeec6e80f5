"""`joinwise bench simulate` measures what it says."""

from __future__ import annotations

import pytest

from joinwise.actors.bench import simulate as bench


def test_a_run_is_measured_and_repeats_itself() -> None:
    first, again = bench.one(8, 200), bench.one(8, 200)
    assert first["digest"] == again["digest"]
    assert first["requests"] == 200 and first["refused"] == 0
    assert first["requests_per_s"] == pytest.approx(200 / first["wall_s"])
    assert 0.01 < first["gib"] < 4


def test_figures_have_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_alone", lambda machines, requests: bench.one(machines // 10, requests // 100))
    figures, rows = bench.run(10_000, lambda text: None)
    assert set(figures) == {"requests_per_s_40", "requests_per_s_1000", "deterministic"}
    assert figures["deterministic"] == 1.0
    assert [row["machines"] for row in rows] == [4, 4, 100]
