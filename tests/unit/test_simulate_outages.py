"""Machines that die in the simulator: no request is lost in silence, no token comes twice, and memory returns."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from typer.testing import CliRunner

from joinwise.cluster.cli.main import app
from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.errors import ConfigError
from joinwise.cluster.router.router import Router
from joinwise.cluster.simulate import profile as profiles
from joinwise.cluster.simulate.live_router import LiveRouter
from joinwise.cluster.simulate.models import MODELS
from joinwise.cluster.simulate.outages import MOST_MOVES, Failures, Outage, parse_failures
from joinwise.cluster.simulate.policy import POLICIES, Counted, Splitwise
from joinwise.cluster.simulate.pools import parse_pools
from joinwise.cluster.simulate.profile import Curve, Kind, Profile
from joinwise.cluster.simulate.simulator import Simulation
from joinwise.cluster.simulate.trace import Arrival, Trace, poisson
from joinwise.cluster.store.embedded import EmbeddedRedis

#: 1 ms a prompt token, 10 ms a step of one sequence, 1 MB/s for caches of 1 kB a token.
KIND = Kind(
    name="a",
    prefill=Curve({1: 0.001, 1000: 1.0}),
    tokens=Curve({1: 0.01, 1001: 0.02}),
    batch=Curve({1: 0.010, 11: 0.020}),
    context_s=0.0,
    kv_bytes=1000,
    kv_tokens=10_000,
    link_bytes_s=1e6,
    layers=10,
    price=1.0,
    power=1.0,
)
PROFILE = Profile("m", {"a": KIND}, "a")


def simulation(
    arrivals: list[Arrival], pools: str, outages: list[Outage], policy: str = "round_robin", model: str = "vllm"
) -> Simulation:
    return Simulation(
        Trace("t", arrivals),
        parse_pools(pools),
        PROFILE,
        MODELS[model],
        lambda run: POLICIES[policy](run.engines, 0),
        outages,
    )


# --- times that can be worked out by hand -----------------------------------------------------------------------------


def test_an_answer_goes_on_elsewhere_with_what_it_has() -> None:
    run = simulation([Arrival(0.0, 100, 101)], "mixed=2xa", [Outage(0.1 + 0.505, 0, notice_s=1.0)])
    outcome = run.run()
    (job,) = outcome.jobs
    assert job.first == pytest.approx(0.1)
    # 50 steps are over when it dies, a second until that is known, then 151 tokens anew and the 49 that are left.
    assert job.end == pytest.approx(0.605 + 1.0 + 0.151 + 49 * 0.010)
    assert (job.moves, job.prompt, job.output) == (1, 151, 50)
    assert (outcome.moved, outcome.failed, outcome.again_tokens) == (1, 0, 151)


def test_a_prompt_that_is_lost_is_computed_where_the_answer_is() -> None:
    run = simulation([Arrival(0.0, 1000, 2)], "prefill=1xa,decode=1xa", [Outage(0.5, 0, notice_s=0.25)])
    (job,) = run.run().jobs
    assert job.first == pytest.approx(0.75 + 1.0) and job.end == pytest.approx(0.75 + 1.0 + 0.010)
    assert job.moves == 0


def test_a_cache_that_is_lost_on_its_way_is_computed_again() -> None:
    # The prompt takes 1 s, its cache another 0.1 s; the sender dies between the two.
    run = simulation([Arrival(0.0, 1000, 2)], "prefill=1xa,decode=1xa", [Outage(1.05, 0, notice_s=0.25)])
    (job,) = run.run().jobs
    assert job.first == pytest.approx(1.0)
    assert job.end == pytest.approx(1.3 + 1.001)


def test_the_receiver_of_a_cache_dies() -> None:
    run = simulation([Arrival(0.0, 1000, 3)], "prefill=1xa,decode=2xa", [Outage(1.05, 1, notice_s=0.25)])
    (job,) = run.run().jobs
    assert job.first == pytest.approx(1.0)
    assert job.end == pytest.approx(1.3 + 1.001 + 0.010)
    assert job.moves == 1
    assert all(engine.memory == 0 for engine in run.engines)  # type: ignore[attr-defined]


def test_a_machine_that_comes_back_serves_again() -> None:
    arrivals = [Arrival(0.0, 100, 2), Arrival(20.0, 100, 2)]
    gone = simulation(arrivals, "mixed=1xa", [Outage(5.0, 0)])
    assert [job.end > 0 for job in gone.run().jobs] == [True, False]
    assert gone.refused == 1
    back = simulation(arrivals, "mixed=1xa", [Outage(5.0, 0, back=15.0)])
    assert [job.end > 0 for job in back.run().jobs] == [True, True]


def test_one_that_loses_too_many_machines_fails() -> None:
    outages = [Outage(0.2 + place, place, notice_s=0.5) for place in range(MOST_MOVES)]
    outcome = simulation([Arrival(0.0, 100, 1000)], "mixed=4xa", outages).run()
    assert outcome.failed == 1 and outcome.jobs[0].end < 0
    assert outcome.jobs[0].moves == MOST_MOVES
    spared = simulation([Arrival(0.0, 100, 1000)], "mixed=4xa", outages[:-1]).run()
    assert spared.failed == 0 and spared.jobs[0].end > 0


# --- what holds always ------------------------------------------------------------------------------------------------

ARRIVALS = st.lists(
    st.builds(Arrival, st.floats(0, 5), st.integers(1, 3000), st.integers(1, 60)), min_size=1, max_size=20
).map(lambda found: sorted(found))
CLUSTERS = st.sampled_from(["mixed=3xa", "prefill=2xa,decode=2xa", "prefill=1xa,decode=1xa,mixed=2xa"])
DEATHS = st.dictionaries(
    st.integers(0, 2), st.tuples(st.floats(0, 8), st.floats(0, 2), st.sampled_from([0.0, 0.5, 3.0, math.inf]))
)


@settings(max_examples=80, deadline=None)
@given(ARRIVALS, CLUSTERS, DEATHS, st.sampled_from(sorted(POLICIES)), st.sampled_from(sorted(MODELS)))
def test_whatever_dies_every_request_ends_or_is_told(
    arrivals: list[Arrival], pools: str, deaths: dict[int, tuple[float, float, float]], policy: str, model: str
) -> None:
    outages = [Outage(at, place, at + down, notice) for place, (at, notice, down) in deaths.items()]
    run = simulation(arrivals, pools, outages, policy, model)
    outcome = run.run()
    ended = [job for job in outcome.jobs if job.end >= 0]
    assert len(ended) + outcome.refused + outcome.failed == len(arrivals)
    for job in ended:
        assert job.at <= job.first <= job.end
        assert job.prompt + job.output == job.arrival.prompt + job.arrival.output
        assert job.end - job.first >= (job.arrival.output - 1) * KIND.least_s * (1 - 1e-9)
    for engine in run.engines:
        assert engine.memory == 0 and not list(engine.tasks())  # type: ignore[attr-defined]
    assert not run.choices and not run.given_back
    if isinstance(run.policy, Counted):
        assert not any(run.policy.pending.values())
    if isinstance(run.policy, Splitwise):
        assert not any(run.policy.memory.values())


TRACE = poisson(rate=30, seconds=8, seed=3, prompt=600, output=40)
FAILING = [Outage(2.0, 0, 6.0, 0.5), Outage(3.0, 3, math.inf, 0.5), Outage(3.1, 2, 4.0, 0.0)]


@pytest.mark.parametrize("pools", ["prompt=2xh100,token=3xh100", "mixed=5xh100"])
async def test_the_router_asked_ahead_and_one_by_one_agree(
    redis_server: EmbeddedRedis, redis_client: Redis, pools: str
) -> None:
    found = []
    for ahead in (True, False):
        made: list[LiveRouter] = []

        def policy(run: Simulation, ahead: bool = ahead, made: list[LiveRouter] = made) -> LiveRouter:
            made.append(LiveRouter(run, RouterConfig(max_pending_tokens=1 << 30), redis_server, ahead=ahead))
            return made[0]

        run = Simulation(TRACE, parse_pools(pools), profiles.shipped(), MODELS["vllm"], policy, FAILING)
        outcome = run.run()
        found.append([(job.first, job.end, job.moves) for job in outcome.jobs])
        assert outcome.moved > 5
        assert sum(job.end < 0 for job in outcome.jobs) == outcome.failed + outcome.refused
        made[0].flush()
        made[0].close()
        assert await Router(redis_client, made[0].cluster, RouterConfig()).leftovers() == []
    assert found[0] == found[1]


# --- what a command says ----------------------------------------------------------------------------------------------

POOLS = parse_pools("prompt=2xh100,token=3xh100")


def test_a_schedule_takes_the_last_of_a_pool() -> None:
    found = parse_failures("at=30,pool=token,machines=2,down=120,start=20,notice=3").outages(POOLS, 60.0, 0)
    assert found == [Outage(30.0, 3, 170.0, 3.0), Outage(30.0, 4, 170.0, 3.0)]
    assert parse_failures("at=1,pool=prompt").outages(POOLS, 60.0, 0) == [Outage(1.0, 1, math.inf, 1.0)]


def test_a_rate_draws_the_same_again_and_about_as_often_as_it_says() -> None:
    failures = Failures(mtbf_s=100.0, down_s=40.0, start_s=10.0)
    found = failures.outages(parse_pools("mixed=50xh100"), 10_000.0, 1)
    assert found == failures.outages(parse_pools("mixed=50xh100"), 10_000.0, 1)
    assert found != failures.outages(parse_pools("mixed=50xh100"), 10_000.0, 2)
    assert len(found) == pytest.approx(50 * 10_000 / 150, rel=0.1)
    for one, other in ((a, b) for a in found for b in found if a.place == b.place and a.at < b.at):
        assert other.at >= one.back


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "either at="),
        ("at=1,mtbf=5", "either at="),
        ("mtbf=5,pool=token", "either at="),
        ("at=-1", "not above zero"),
        ("mtbf=0", "not above zero"),
        ("at=nan", "not above zero"),
        ("at=1,machines=0", "not above zero"),
        ("at=1,pool=cloud", "'pool=cloud' .* is not one of"),
        ("when=3", "'when=3' .* is not one of"),
    ],
)
def test_failures_that_cannot_be(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_failures(text)


def test_machines_that_are_not_there_cannot_fail() -> None:
    with pytest.raises(ConfigError, match="the pool decode has 3"):
        parse_failures("at=1,pool=token,machines=4").outages(POOLS, 60.0, 0)
    with pytest.raises(ConfigError, match="is not back by then"):
        simulation([Arrival(0.0, 1, 1)], "mixed=2xa", [Outage(1.0, 0, 5.0), Outage(4.0, 0)])


def test_the_command_says_what_moved() -> None:
    options = ["--trace", "poisson:rate=20,seconds=10", "--pools", "mixed=4xh100", "--policy", "p2c"]
    ran = CliRunner().invoke(app, ["simulate", *options, "--fail", "at=5,down=1,start=1"])
    assert ran.exit_code == 0, ran.output
    assert "lost its machine and went on elsewhere" in ran.output
