"""Traces: the published formats, made ones, and everything that can be wrong with a file."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from joinwise.cluster.errors import ConfigError
from joinwise.cluster.simulate.trace import Arrival, Trace, load, parse, poisson

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
)
SIM = "request_id,arrival_timestamp,prompt_size,token_size\n0,0.5,391,96\n1,0.75,373,89\n"
MOONCAKE = "\n".join(
    json.dumps({"timestamp": at, "input_length": 1000, "output_length": 5, "hash_ids": [7, 8]}) for at in (0, 3000)
)


def written(folder: Path, text: str, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def test_azure(tmp_path: Path) -> None:
    trace = load(written(tmp_path, AZURE))
    assert [each.prompt for each in trace.arrivals] == [374, 396]
    assert [each.output for each in trace.arrivals] == [44, 109]
    assert trace.arrivals[0].at == 0.0
    assert trace.arrivals[1].at == pytest.approx(4.314579, abs=1e-6)


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_splitwise_sim(tmp_path: Path, name: str) -> None:
    trace = load(written(tmp_path, SIM, name))
    assert list(trace.arrivals) == [Arrival(0.5, 391, 96), Arrival(0.75, 373, 89)]
    assert trace.block_tokens == 0


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_mooncake_with_its_blocks(tmp_path: Path, name: str) -> None:
    trace = load(written(tmp_path, MOONCAKE, name))
    assert list(trace.arrivals) == [Arrival(0.0, 1000, 5, (7, 8)), Arrival(3.0, 1000, 5, (7, 8))]
    assert trace.block_tokens == 512


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "it is empty"),
        ("a,b\n1,2\n", "unknown trace format"),
        (SIM.splitlines()[0], "is empty"),
        (SIM + "2,0.6,10,10\n", r"request 3: it arrives 0.15 s before the one above"),
        (SIM + "2,0.8,-5,10\n", r"request 3: its prompt has -5 tokens"),
        (SIM + "2,0.8,5,0\n", r"request 3: its answer has 0 tokens"),
        (SIM + "2,0.8,5,99999999\n", r"request 3: its answer has 99999999 tokens"),
        (SIM + "2,soon,5,5\n", r"line 4: this is no request"),
        (SIM + "2,nan,5,5\n", r"request 3: nan is no time"),
        (SIM + "2,0.8\n", r"line 4: this is no request"),
        (AZURE + "yesterday,5,5\n", r"line 4: this is no request"),
        (MOONCAKE + "\n{", r"line 3: this is no request"),
        (MOONCAKE + '\n{"timestamp": 4000}', r"line 3: this is no request"),
        (MOONCAKE + "\n[]", r"line 3: this is no request"),
    ],
)
def test_what_cannot_be_is_refused_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(written(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "no.csv.gz").write_bytes(b"plain")
    (tmp_path / "half.csv.gz").write_bytes(gzip.compress(SIM.encode() * 100)[:60])
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    for name in ("none.csv", "no.csv.gz", "half.csv.gz", "bytes.csv"):
        with pytest.raises(ConfigError, match="cannot read the trace"):
            load(tmp_path / name)


@settings(max_examples=50, deadline=None)
@given(
    st.floats(0.1, 50),
    st.integers(0, 1 << 30),
    st.floats(0.1, 10),
    st.floats(0.1, 10),
    st.floats(0.1, 10),
    st.integers(1, 5),
)
def test_scaling(seconds: float, seed: int, rate: float, prompt: float, output: float, limit: int) -> None:
    trace = poisson(3.0, seconds, seed)
    assert poisson(3.0, seconds, seed) == trace
    scaled = trace.scaled(rate, prompt, output, limit)
    assert len(scaled.arrivals) == min(limit, len(trace.arrivals))
    for before, after in zip(trace.arrivals, scaled.arrivals, strict=False):
        assert after.at == pytest.approx(before.at / rate)
        assert after.prompt == max(1, round(before.prompt * prompt))
        assert after.output == max(1, round(before.output * output))


def test_a_poisson_trace_is_one() -> None:
    trace = poisson(50.0, 200.0, 1)
    assert trace.rate == pytest.approx(50, rel=0.03)
    gaps = [right.at - left.at for left, right in zip(trace.arrivals, trace.arrivals[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert deviation == pytest.approx(mean, rel=0.05)  # as for an exponential distribution
    assert sorted(each.prompt for each in trace.arrivals)[len(gaps) // 2] == pytest.approx(1024, rel=0.05)
    assert poisson(50.0, 200.0, 2) != trace


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("poisson:rate=2", "needs rate and seconds"),
        ("poisson:rate=x,seconds=2", "'rate=x' in"),
        ("poisson:speed=2,seconds=2", "'speed=2' in"),
        ("poisson:rate=-2,seconds=2", "above 0"),
        ("poisson:rate=2,seconds=2,prompt=0", "at least one token"),
    ],
)
def test_made_traces_that_cannot_be(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(text, 0)


def test_a_made_trace_by_its_name() -> None:
    trace = parse("poisson:rate=2,seconds=30,prompt=100,output=10,spread=0", 5)
    assert {(each.prompt, each.output) for each in trace.arrivals} == {(100, 10)}
    assert trace == poisson(2.0, 30.0, 5, 100, 10, 0.0)


def test_factors_that_cannot_be() -> None:
    trace = Trace("t", [Arrival(0.0, 512, 1, (1,))], 512)
    for wrong in ({"rate": 0.0}, {"output": math.nan}, {"prompt": -1.0}):
        with pytest.raises(ConfigError, match="must be above 0"):
            trace.scaled(**wrong)
    with pytest.raises(ConfigError, match="at least one request"):
        trace.scaled(limit=0)
    with pytest.raises(ConfigError, match="names the blocks"):
        trace.scaled(prompt=2.0)
    assert trace.rate == math.inf


def test_lengths_of_a_trace_come_independently() -> None:
    given = Trace("t", [Arrival(60.0 * number, 10 + number, 5, (number,)) for number in range(4000)], 512)
    found = given.redrawn(70.0, 3)
    assert [each[1:] for each in found.arrivals] == [each[1:] for each in given.arrivals]
    assert found.rate == pytest.approx(70, rel=0.05) and found.block_tokens == 512
    gaps = [later.at - earlier.at for earlier, later in itertools.pairwise(found.arrivals)]
    assert min(gaps) >= 0 and statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.1)  # exponential
    assert found == given.redrawn(70.0, 3) != given.redrawn(70.0, 4)
    for rate in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="above 0"):
            given.redrawn(rate, 0)


def test_traces_that_are_made_follow_one_another() -> None:
    both = parse("poisson:rate=5,seconds=10,prompt=10,spread=0+poisson:rate=5,seconds=20,prompt=99,spread=0", 3)
    alone = parse("poisson:rate=5,seconds=10,prompt=10,spread=0", 3)
    first = [each for each in both.arrivals if each.prompt == 10]
    rest = [each for each in both.arrivals if each.prompt == 99]
    assert first == list(alone.arrivals)
    assert len(first) + len(rest) == len(both.arrivals)
    assert all(10 <= each.at < 30 for each in rest)
    assert [each.at for each in both.arrivals] == sorted(each.at for each in both.arrivals)


def test_each_of_them_must_be_whole() -> None:
    with pytest.raises(ConfigError, match="needs rate and seconds"):
        parse("poisson:rate=5,seconds=10+poisson:rate=5", 0)
