"""Pools that follow their work in the simulator: they grow, lend and shrink, and no request is lost for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from joinwise.cluster.cli.main import app
from joinwise.cluster.errors import ConfigError
from joinwise.cluster.simulate import profile as profiles
from joinwise.cluster.simulate.outages import parse_failures
from joinwise.cluster.simulate.pools import parse_pools
from joinwise.cluster.simulate.run import Result, simulate
from joinwise.cluster.simulate.scaling import Bounds, parse_bounds
from joinwise.cluster.simulate.trace import Arrival, Trace, parse
from joinwise.cluster.store.embedded import EmbeddedRedis

PROFILE = profiles.shipped("llama2-70b")
_BUSY = "poisson:rate=5,seconds=60,prompt=600,output=350"
_LONG = "poisson:rate=7,seconds=40,prompt=4000,output=40"
_CALM = "poisson:rate=1,seconds=100,prompt=800,output=100"


def scaled(redis_server: EmbeddedRedis, trace: str, **bounds: float) -> Result:
    wanted = Bounds("decode", **{"target_s": 2.0, "up_s": 6.0, "down_s": 30.0, "start_s": 10.0} | bounds)  # type: ignore[arg-type]
    pools = parse_pools("prefill=1xh100,decode=3xh100")
    return simulate(parse(trace, 0), pools, PROFILE, server=redis_server, bounds=[wanted])


@pytest.fixture(scope="module")
def result(redis_server: EmbeddedRedis) -> Result:
    return scaled(redis_server, f"{_BUSY}+{_LONG}+{_CALM}")


def test_a_pool_grows_with_its_work_and_shrinks_when_it_is_gone(result: Result) -> None:
    rows = result.timeline
    assert rows is not None
    workers = [row["decode_workers"] for row in rows]
    assert (workers[0], max(workers), workers[-1]) == (1, 3, 1)
    grown = workers.index(3)
    assert any(row["decode_starting"] for row in rows[:grown])
    assert {row["prefill_workers"] for row in rows} == {1}


def test_workers_are_lent_while_prompts_are_long_and_are_not_let_go_then(result: Result) -> None:
    rows = result.timeline
    assert rows is not None
    lent = [row for row in rows if row["decode_pulled"]]
    assert lent and all(row["t"] > 60 for row in lent)
    assert {row["decode_workers"] for row in lent} == {3}


def test_no_request_is_lost_and_each_has_its_tokens(result: Result) -> None:
    jobs = result.outcome.jobs
    assert result.figures["refused"] == 0
    assert all(job.end > job.at for job in jobs)
    assert result.outcome.busy_s["decode-h100-2"] > 0


def test_attainment_falls_while_machines_are_missing(result: Result) -> None:
    rows = result.timeline
    assert rows is not None
    shares = [row["attained"] for row in rows if row["attained"] is not None]
    assert min(shares) < 0.9 and shares[-1] == 1.0
    assert all(row["rate"] > 0 for row in rows if row["attained"] is not None)


def test_the_same_again_gives_the_same(redis_server: EmbeddedRedis) -> None:
    first, second = (scaled(redis_server, _BUSY) for _ in range(2))
    assert first.timeline == second.timeline and first.figures == second.figures


def test_machines_that_start_are_not_waited_for_when_the_work_is_gone(redis_server: EmbeddedRedis) -> None:
    rows = scaled(redis_server, f"{_BUSY}+{_CALM}+{_CALM}", start_s=1000.0).timeline
    assert rows is not None
    assert {row["decode_workers"] for row in rows} == {1}
    assert max(row["decode_starting"] for row in rows) > 0 and rows[-1]["decode_starting"] == 0


def test_a_pool_as_a_command_names_it() -> None:
    assert parse_bounds("pool=token,least=2,target=3,up=4,down=5,start=6") == Bounds("decode", 2, 3.0, 4.0, 5.0, 6.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("least=1", "needs a pool"),
        ("pool=decode,up=0", "seconds above zero"),
        ("pool=nowhere", "is not one of"),
        ("pool=decode,least=few", "is not one of"),
        ("pool=decode,most=3", "is not one of"),
    ],
)
def test_what_is_no_pool(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_bounds(text)


@pytest.mark.parametrize(
    ("bounds", "policy", "failures", "said"),
    [
        ([Bounds("decode", least=4)], "auto", [], "cannot begin with 4"),
        ([Bounds("mixed")], "auto", [], "is not there"),
        ([Bounds("decode"), Bounds("decode")], "auto", [], "named twice"),
        ([Bounds("decode")], "round_robin", [], "scale with the policies"),
        ([Bounds("decode")], "auto", [parse_failures("at=1,pool=decode")], "no machine dies"),
    ],
)
def test_pools_that_cannot_scale(
    redis_server: EmbeddedRedis, bounds: list[Bounds], policy: str, failures: list[object], said: str
) -> None:
    pools = parse_pools("prefill=1xh100,decode=3xh100")
    trace = Trace("t", [Arrival(0.0, 10, 10)])
    with pytest.raises(ConfigError, match=said):
        simulate(trace, pools, PROFILE, policy=policy, server=redis_server, failures=failures, bounds=bounds)  # type: ignore[arg-type]


def test_the_command_writes_the_pools_over_time(tmp_path: Path) -> None:
    file = tmp_path / "scaling.json"
    arguments = ["simulate", "--llm", "llama2-70b", "--pools", "prompt=1xh100,token=2xh100", "--json", str(file)]
    arguments += ["--trace", "poisson:rate=1,seconds=30", "--autoscale", "pool=token"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    written = json.loads(file.read_text())
    assert written["bench"] == "scaling" and written["machine"]["autoscale"] == ["pool=token"]
    assert {"t", "rate", "attained", "decode_workers", "decode_pulled"} <= written["rows"][0].keys()
