"""The planner's search, on clusters whose quality is a formula; and once with the simulator."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from helpers.chart import Rendered, validate, validate_rayservice
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from joinwise.cluster.cli.main import app
from joinwise.cluster.config_model import JoinwiseConfig
from joinwise.cluster.errors import ConfigError
from joinwise.cluster.plan.page import Story, page, reasons
from joinwise.cluster.plan.recommend import configuration, headroom, helm_values
from joinwise.cluster.plan.search import Candidate, Plan, Search, dominates
from joinwise.cluster.plan.space import Shape, machines, price, prompt_share, shapes, work
from joinwise.cluster.simulate import profile as profiles
from joinwise.cluster.simulate.pools import PoolSpec
from joinwise.cluster.simulate.report import PERCENTILES, SLOS
from joinwise.cluster.simulate.trace import poisson

TRACE = poisson(rate=20, seconds=30, seed=1)
PROFILE = profiles.shipped()
NAMES = [f"{name}_slowdown_p{percent}" for name in SLOS for percent in PERCENTILES]


def verdict(ttft: float = 0.5, tbt: float = 0.5) -> dict[str, float]:
    """Figures with medians so many times their limits."""
    figures = dict.fromkeys(NAMES, 0.5)
    medians = {"ttft_slowdown_p50": SLOS["ttft"][0] * ttft, "tbt_slowdown_p50": SLOS["tbt"][0] * tbt}
    return {**figures, **medians, "refused": 0.0}


class Formula:
    """Enough machines for each phase are enough; remembers what it was asked."""

    def __init__(self, prefill: int, decode: int, whole: int) -> None:
        self.need = {"prefill": prefill, "decode": decode, "mixed": whole}
        self.asked: list[tuple[str, float]] = []

    def __call__(self, pools: Sequence[PoolSpec], rate: float) -> Mapping[str, float]:
        self.asked.append((",".join(map(str, pools)), rate))
        short = {pool.home: self.need[pool.home] * rate / pool.size for pool in pools}
        return verdict(short.get("prefill", short.get("mixed", 0.5)), short.get("decode", 0.5))


def search(prefill: int = 5, decode: int = 3, whole: int = 11) -> tuple[Search, Formula]:
    formula = Formula(prefill, decode, whole)
    return Search(TRACE, PROFILE, formula), formula


# --- the space --------------------------------------------------------------------------------------------------------


def test_every_shape_once() -> None:
    found = list(shapes(["a100", "h100"]))
    assert len(found) == len(set(found)) == 2 + 4
    assert [str(shape) for shape in found if shape.mixed] == ["a100, whole", "h100, whole"]


@pytest.mark.parametrize("shape", list(shapes(["a100", "h100"])), ids=str)
def test_prompts_get_a_share(shape: Shape) -> None:
    assert 0 < prompt_share(TRACE, shape, PROFILE) < 1
    pools = shape.pools(3, 4)
    assert machines(pools) == 7 and len(pools) == (1 if shape.mixed else 2)


def test_faster_machines_have_less_work() -> None:
    slow, fast = PROFILE.kind("a100"), PROFILE.kind("h100")
    assert all(more > less for more, less in zip(work(TRACE, slow, slow), work(TRACE, fast, fast), strict=True))
    pools = Shape("h100", "a100").pools(2, 3)
    assert price(pools, PROFILE) == pytest.approx(2 * fast.price + 3 * slow.price)


# --- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [3, 8, 11, 17])
def test_the_fewest_machines_are_found(whole: int) -> None:
    hunt, formula = search(whole=whole)
    found = hunt.fewest(Shape("h100", "h100", mixed=True), 64)
    assert found.meets and found.machines == whole
    assert len(formula.asked) == len(set(formula.asked)) <= 8  # bisected, and nothing twice


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30))
def test_the_smallest_split_is_found_wherever_it_is(prefill: int, decode: int) -> None:
    hunt, formula = search(prefill=prefill, decode=decode)
    found = hunt.fewest(Shape("h100", "a100"), 64)
    assert [pool.size for pool in found.pools] == [prefill, decode]
    assert len(formula.asked) <= 50


def test_not_splitting_wins_where_it_is_cheaper() -> None:
    assert search(whole=7)[0].iso_throughput(["h100"], 32).cheapest().shape.mixed
    assert not search(whole=20)[0].iso_throughput(["h100"], 32).cheapest().shape.mixed


def test_what_cannot_be_kept_is_named() -> None:
    hunt, _ = search(prefill=100, decode=100, whole=50)
    found = hunt.iso_throughput(["h100"], 20)
    assert not found.feasible and found.front == ()
    with pytest.raises(ConfigError, match=r"nearest is mixed=20xh100: ttft_slowdown_p50 is 2.50 times its limit"):
        found.cheapest()


def test_a_budget_goes_to_the_shape_that_bears_most() -> None:
    hunt, _ = search(prefill=4, decode=2, whole=10)
    kind = PROFILE.kind("h100")
    found = hunt.iso_budget(["h100"], 12 * kind.price, lambda name: PROFILE.kind(name).price, 4.0)
    best = found.fastest()
    assert best.price <= 12 * kind.price
    whole = next(each for each in found.candidates if each.shape.mixed)
    assert whole.rate == pytest.approx(1.2, abs=0.2) and whole.meets
    assert best.rate >= whole.rate
    with pytest.raises(ConfigError, match="buys no cluster"):
        hunt.iso_budget(["h100"], 1.0, lambda name: PROFILE.kind(name).price, 4.0)


def test_headroom_is_measured_while_machines_die() -> None:
    hunt, _ = search(prefill=4, decode=2, whole=10)
    best = hunt.look(Shape("h100", "h100"), 6, 4)
    asked = []

    def failing(pools: Sequence[PoolSpec], rate: float, home: str, lost: int) -> Mapping[str, float]:
        asked.append((home, lost))
        bad = (home, lost) == ("decode", 2)
        return {**verdict(tbt=1.5 if bad else 0.5), "refused": 0.0}

    assert headroom(hunt, best, failing) == 1
    assert asked == [("prefill", 1), ("decode", 1), ("prefill", 2), ("decode", 2)]
    whole = hunt.look(Shape("h100", "h100", mixed=True), 12, 0)
    assert (
        headroom(hunt, whole, lambda pools, rate, home, lost: hunt.measure(whole.shape.pools(12 - lost, 0), rate)) == 2
    )
    assert headroom(hunt, best, lambda *_: {**verdict(), "refused": 1.0}) == 0
    assert headroom(hunt, best, lambda *_: verdict()) == 3
    assert headroom(hunt, hunt.look(Shape("h100", "h100"), 1, 9), lambda *_: verdict()) == 0


POINTS = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.booleans()), min_size=1, max_size=25
)


@settings(max_examples=80, deadline=None)
@given(POINTS)
def test_the_front_is_what_nothing_dominates(points: list[tuple[int, int, int, bool]]) -> None:
    shape = Shape("h100", "h100", mixed=True)
    found = Plan(
        [
            Candidate(
                shape, shape.pools(1, 0), float(rate), float(cost), float(kw), verdict(), {} if good else {"x": 2}
            )
            for rate, cost, kw, good in points
        ]
    )
    assert all(each.meets for each in found.front)
    for each in found.feasible:
        beaten = any(dominates(other, each) for other in found.front)
        assert beaten != (each in found.front)
    if found.feasible:
        assert found.cheapest().price == min(each.price for each in found.feasible)
        assert found.frugal().power == min(each.power for each in found.feasible)
        assert found.fastest().rate == max(each.rate for each in found.feasible)
        assert found.cheapest() in found.front


def test_the_configuration_is_one() -> None:
    hunt, _ = search()
    text = configuration(hunt.look(Shape("h100", "a100"), 5, 3), "bloom-176b")
    config = JoinwiseConfig.model_validate(yaml.safe_load(text))
    assert [(pool.name, pool.role, pool.replicas) for pool in config.pools] == [
        ("prefill-h100", "prefill", 5),
        ("decode-a100", "decode", 3),
    ]


def test_the_values_are_those_of_the_chart() -> None:
    hunt, _ = search()
    values = yaml.safe_load(helm_values(hunt.look(Shape("h100", "a100"), 5, 3), "bloom-176b"))
    rendered = Rendered(values)
    validate(rendered)
    assert [(pool["name"], pool["replicas"]) for pool in values["pools"]] == [("prefill-h100", 5), ("decode-a100", 3)]
    group = rendered.groups["prefill-h100"]
    assert group["replicas"] == 5
    assert group["template"]["spec"]["nodeSelector"] == {"joinwise.io/kind": "h100"}
    validate_rayservice(rendered)


# --- the page ---------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """What a browser would have to load, the numbers that a drawing is made of, and whether tags match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.numbers: list[float] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "rect", "line"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href") or "url(" in (value or ""):
                self.loads.append(f"{tag} {name}")
            if name in ("cx", "cy", "x", "y", "width", "r", "x1", "x2") and value:
                self.numbers.append(float(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("iso", ["throughput", "cost"])
def test_a_page_loads_nothing_and_says_what_was_found(iso: str) -> None:
    hunt, _ = search(whole=20)
    found = hunt.iso_throughput(["h100", "a100"], 32)
    best, tried = found.cheapest(), list(hunt.tried.values())
    text = page(found, Story("<a&b>", 20.0, iso, best, 3, tried, False, "joinwise plan --kinds 'x<y'"))
    read = Reader(text)
    assert read.open == [] and read.loads == [] and "<script" not in text and "http" not in text
    assert "<a&b>" in read.text and "x<y" in read.text
    assert str(best) in read.text and "or more" in read.text and "misses the nine objectives" in read.text
    assert read.text.count("misses one") == 1 and f"{len(tried)} clusters" in read.text
    assert text.count('class="front"') == len(found.front)
    assert text.count('class="met" cx') + text.count('class="missed"') == len(tried)
    assert all(-1 <= number <= 640 for number in read.numbers)
    assert len([line for line in SLOS for _ in PERCENTILES]) == text.count('<rect class="met"')


def test_reasons_know_what_else_there_was() -> None:
    hunt, _ = search(whole=20)
    found = hunt.iso_throughput(["h100"], 32)
    best = found.cheapest()
    story = Story("t", 1.0, "throughput", best, 0, [], None, "")
    assert reasons(found, story)[0].startswith("Split: the best that does otherwise costs 2.50 times")
    alone = Plan([best])
    assert "no cluster of machines that do everything" in reasons(alone, story)[0]
    assert len(reasons(alone, story)) == 2  # the router was not asked


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_plan_from_a_trace(tmp_path: Path) -> None:
    options = ["--trace", "poisson:rate=6,seconds=20", "--kinds", "h100", "--most", "12", "--limit", "150"]
    out, config = tmp_path / "out.json", tmp_path / "joinwise.yaml"
    values, drawn = tmp_path / "values.yaml", tmp_path / "plan.html"
    written_to = ["--json", str(out), "--yaml", str(config), "--helm", str(values), "--html", str(drawn)]
    ran = CliRunner().invoke(app, ["plan", *options, *written_to])
    assert ran.exit_code == 0, ran.output
    written = json.loads(out.read_text())
    figures = written["figures"]
    assert 1 <= figures["machines"] <= 12 and figures["price_per_hour"] == figures["machines"] * 38
    assert {row["shape"] for row in written["rows"]} == {"h100, whole", "h100 + h100"}
    assert sum(pool["replicas"] for pool in yaml.safe_load(config.read_text())["pools"]) == figures["machines"]
    assert sum(pool["replicas"] for pool in yaml.safe_load(values.read_text())["pools"]) == figures["machines"]
    assert Reader(drawn.read_text()).open == []
    assert "recommended:" in ran.output and "the router that serves" in ran.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--iso", "cost"], "with a --budget"),
        (["--iso", "beauty", "--budget", "3"], "--iso is throughput"),
        (["--budget", "3"], "--iso is throughput"),
        (["--kinds", "b200"], "no machine of the kind 'b200'"),
    ],
)
def test_options_that_cannot_be(options: list[str], says: str) -> None:
    ran = CliRunner().invoke(app, ["plan", "--trace", "poisson:rate=2,seconds=5", *options])
    assert ran.exit_code == 1
    assert says in ran.output + ran.stderr
