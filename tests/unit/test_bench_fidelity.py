"""`joinwise bench fidelity` without a cluster: what is fitted to one trace, and what is compared on another."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from joinwise.actors.bench.fidelity import METRICS, Beside, Got, Seen, compared, fitted, times_of
from joinwise.cluster.simulate.pools import PoolSpec
from joinwise.cluster.simulate.profile import Curve, Kind, Profile
from joinwise.cluster.simulate.report import PERCENTILES
from joinwise.cluster.simulate.run import simulate
from joinwise.cluster.simulate.trace import poisson

KIND = Kind(
    name="core0",
    prefill=Curve({32: 0.2, 512: 2.3}),
    tokens=Curve({64: 0.08}),
    batch=Curve({1: 0.08, 8: 0.12}),
    context_s=1e-5,
    kv_bytes=46_080,
    kv_tokens=8_000,
    link_bytes_s=1e9,
    layers=30,
    price=1.0,
    power=1.0,
)
PROFILE = Profile("m", {"core0": KIND, "core1": KIND}, "core0")
POOLS = [PoolSpec("prefill", "core0", 1), PoolSpec("decode", "core1", 1)]


def seen(seed: int, beside: Beside, rate: float = 0.3) -> Seen:
    """A cluster that is as the simulator says, beside something, with a gateway's ledgers."""
    trace = poisson(rate, 60, seed, 64, 20)
    kinds = {name: replace(kind, send_s=beside.send_s) for name, kind in PROFILE.kinds.items()}
    jobs = simulate(trace, POOLS, Profile("m", kinds, "core0"), policy="round_robin").outcome.jobs
    answers = []
    for job in jobs:
        ledger = {
            "arrived": 1e9 + job.at + beside.front_s,
            "ttft_s": job.ttft,
            "prefill_s": job.first - job.began,
            "total_s": job.e2e,
        }
        answers.append(Got(times_of(job.ttft + beside.front_s, job.e2e + beside.front_s, job.output), ledger))
    return Seen(trace, answers)


def test_what_is_beside_a_cluster_is_found_and_holds_for_another_trace() -> None:
    truth = Beside(0.09, 0.02)
    found = fitted(seen(1, truth), KIND)
    assert (found.send_s, found.front_s) == pytest.approx((0.09, 0.02), abs=1e-6)
    figures, rows = compared(seen(2, truth), POOLS, PROFILE, found)
    assert figures["median_error"] < 1e-4 < 0.01 < figures["median_error_alone"]
    assert len(rows) == figures["requests"] == len(poisson(0.3, 60, 2, 64, 20).arrivals)


def test_nothing_is_found_where_no_prompt_was_alone() -> None:
    with pytest.raises(RuntimeError, match="lower --rate"):
        fitted(seen(1, Beside(), rate=20.0), KIND)


def test_every_figure_is_of_its_side() -> None:
    figures, rows = compared(seen(2, Beside(1.0)), POOLS, PROFILE, Beside())
    for metric in METRICS:
        for percent in PERCENTILES:
            name = f"{metric}_p{percent}"
            assert figures[f"{name}_simulated"] < figures[f"{name}_real"] or metric == "tpot_s"
            expected = figures[f"{name}_simulated"] / figures[f"{name}_real"] - 1
            assert figures[f"{name}_error"] == figures[f"{name}_error_alone"] == pytest.approx(expected, abs=1e-3)
    assert all(row["real_ttft_s"] > row["simulated_ttft_s"] == row["alone_ttft_s"] for row in rows)


def test_a_single_token_has_no_time_between() -> None:
    assert times_of(1.0, 1.0, 1).tpot_s is None
    assert times_of(1.0, 3.0, 5).tpot_s == 0.5


def test_the_table_and_the_picture_are_made_of_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, rows = compared(seen(2, Beside(1.0)), POOLS, PROFILE, Beside())
    figures["median_error_fitted"] = 0.5
    result = tmp_path / "fidelity.json"
    result.write_text(json.dumps({"bench": "fidelity", "figures": figures, "rows": rows}))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: fidelity -->\nold\n<!-- end of table -->\nafter\n")
    tables, plots = script("tables"), script("plots")
    monkeypatch.setattr(tables, "PAGE", page)
    monkeypatch.setattr(plots, "IMAGES", tmp_path)
    for _ in range(2):
        tables.main(result)
    text = page.read_text()
    assert text.startswith("before\n<!-- table: fidelity -->\n| |") and text.endswith("<!-- end of table -->\nafter\n")
    assert f"| between tokens, s | {figures['tpot_s_p50_real']:.3f}, {figures['tpot_s_p50_simulated']:.3f} |" in text
    assert text.count(f"**{figures['median_error']:.1%}**") == 1 and "old" not in text
    assert plots.draw(result) == tmp_path / "fidelity.svg"
    assert "seconds between tokens" in (tmp_path / "fidelity.svg").read_text()
    with pytest.raises(ValueError, match="0 places"):
        tables.put("", "fidelity", [])


def script(name: str) -> Any:
    """A module of scripts/."""
    path = Path(__file__).parents[2] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
