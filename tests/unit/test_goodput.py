"""The arithmetic of `joinwise bench goodput`; its engines are real, and measured by hand."""

import pytest

from joinwise.actors.bench.goodput import OURS, PLAIN, RATES, Limits, figures_of, parse
from joinwise.actors.bench.serve import Answer
from joinwise.cluster.errors import ConfigError


def rows(side, attained, gap, trace="chat"):
    return [
        {"trace": trace, "side": side, "share": share, "seed": seed, "attained": kept + seed / 100, "gap_p99_s": gap}
        for share, kept in zip(RATES, attained, strict=True)
        for seed in (-1, 0, 1)
    ]


def test_goodput_lies_where_attainment_crosses_ninety_per_cent():
    found = figures_of(rows(PLAIN, [1.0, 0.95, 0.9, 0.5, 0.1], 0.4) + rows(OURS, [1.0, 0.95, 0.92, 0.9, 0.4], 0.1))
    assert found["goodput_ratio_best_other"] == pytest.approx(1.25)
    assert found["attainment_margin_min"] == pytest.approx(0.0)
    assert found["p99_gap_ratio_plain_pair"] == pytest.approx(0.25)
    assert found["equal_load_share_chat"] == 1.0


def test_figures_are_the_worst_over_the_traces():
    good = rows(PLAIN, [1.0, 0.95, 0.9, 0.5, 0.1], 0.4) + rows(OURS, [1.0, 0.95, 0.92, 0.9, 0.4], 0.1)
    bad = rows(PLAIN, [1.0, 0.95, 0.9, 0.5, 0.1], 0.1, "code") + rows(OURS, [0.9, 0.8, 0.7, 0.6, 0.5], 0.2, "code")
    found = figures_of(good + bad)
    assert found["goodput_ratio_best_other_chat"] == pytest.approx(1.25)
    assert found["goodput_ratio_best_other"] == found["goodput_ratio_best_other_code"] == pytest.approx(0.5)
    assert found["attainment_margin_min"] == found["attainment_margin_min_code"] == pytest.approx(-0.2)
    assert found["p99_gap_ratio_plain_pair"] == found["p99_gap_ratio_plain_pair_code"] == pytest.approx(2.0)


def test_goodput_between_two_rates_and_never_reached():
    ours = rows(OURS, [0.8, 0.7, 0.6, 0.5, 0.4], 0.1)
    plain = rows(PLAIN, [1.0, 1.0, 1.0, 0.8, 0.1], 0.1)
    found = figures_of(ours + plain)
    # From nothing at rate 0 (all attain) to 0.8 at half the rate: 0.9 halfway; and halfway between 1 and 1.25.
    assert found["goodput_ratio_best_other"] == pytest.approx(0.25 / 1.125, abs=1e-4)
    assert found["attainment_margin_min"] == pytest.approx(-0.4)
    assert found["equal_load_share_chat"] == RATES[0]


def test_a_request_attains_by_its_first_token_and_its_mean_gap():
    limits = Limits(1.0, 0.1)
    assert limits.kept(Answer(times=[0.9, 1.03, 1.08]), 3)
    assert not limits.kept(Answer(times=[1.1, 1.15, 1.20]), 3)
    assert not limits.kept(Answer(times=[0.9, 1.0, 1.3]), 3)
    assert not limits.kept(Answer(times=[0.9, 1.0]), 3)
    assert limits.kept(Answer(times=[0.9]), 1)


@pytest.mark.parametrize("text", ["trace.csv", "trace.csv:1", "trace.csv:a:b", "no/such.csv:1:1"])
def test_a_trace_that_cannot_be_is_refused(text):
    with pytest.raises(ConfigError):
        parse(text)
