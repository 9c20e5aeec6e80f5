"""`joinwise profile`: from timings to tables that the simulator reads; and the measuring, on an engine of formulas."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from joinwise.actors import profile as command
from joinwise.cluster.errors import ConfigError
from joinwise.cluster.simulate import fit as fitting
from joinwise.cluster.simulate import profile as profiles
from joinwise.cluster.simulate.fit import Facts, Timing
from joinwise.cluster.simulate.pools import parse_pools
from joinwise.cluster.simulate.run import simulate
from joinwise.cluster.simulate.trace import poisson

# Recorded with `joinwise profile --longest 512 --batch 8 --context 128 --seconds 100`: SmolLM2-135M in bfloat16 on two
# cores that others used. Milliseconds, two rounds.
RECORDED = {
    ("prefill", 1, 32): [836, 511],
    ("prefill", 1, 64): [1448, 1207],
    ("prefill", 1, 128): [2323, 1807],
    ("prefill", 1, 256): [4095, 3773],
    ("prefill", 1, 512): [7181, 7396],
    ("step", 1, 64): [84, 91, 78, 95, 74, 79, 78, 83, 100, 84, 116, 98, 85, 104, 102, 112],
    ("step", 8, 128): [213, 212, 204, 223, 206, 198, 199, 211, 311, 274, 238, 278, 263, 262, 275, 271],
    ("step", 4, 128): [128, 153, 171, 164, 156, 161, 155, 154, 196, 211, 229, 215, 220, 190, 259, 199],
    ("step", 2, 128): [101, 118, 112, 113, 104, 121, 78, 84, 153, 171, 171, 172, 159, 139, 149, 168],
    ("step", 1, 128): [91, 86, 118, 103, 87, 87, 85, 89, 127, 143, 193, 167, 202, 156, 154, 139],
    ("step", 1, 256): [108, 83, 100, 83, 81, 77, 75, 74, 153, 199, 166, 166, 127, 158, 148, 143],
    ("step", 1, 512): [90, 101, 113, 71, 73, 72, 75, 82, 55, 52, 51, 53, 57, 59, 73, 75],
}
TIMINGS = [Timing(*key, ms / 1000) for key, found in RECORDED.items() for ms in found]  # type: ignore[arg-type]
FACTS = Facts(
    kind="cpu2",
    llm="smollm2-135m-instruct",
    weight_bytes=269_060_552,
    kv_bytes=23_040,
    kv_tokens=46_592,
    layers=30,
    link_bytes_s=1.25e9,
    price=1.0,
    power=0.1,
)


# --- fitting ----------------------------------------------------------------------------------------------------------


def test_recorded_timings_become_the_tables_of_a_profile(tmp_path: Path) -> None:
    found = fitting.fit(TIMINGS, 128)
    assert found.tables["prefill_ms"] == pytest.approx({32: 673.5, 64: 1327.5, 128: 2065, 256: 3934, 512: 7288.5})
    assert found.tables["step_by_batch_ms"][8] == statistics.median(RECORDED["step", 8, 128])
    # The longest context came out faster than the shorter ones: noise, and so the three share a value.
    contexts = found.tables["step_by_context_ms"]
    assert contexts[128] == contexts[256] == contexts[512] > contexts[64]
    assert 0.3 < found.lifted < 0.6 and 0.1 < found.spread < 0.5  # and both are told
    path = tmp_path / "here.yaml"
    fitting.save(path, FACTS, found)
    kind = profiles.load(path, FACTS.llm).kind("cpu2")
    assert kind.prefill(512) == pytest.approx(7.2885)
    assert kind.batch(8) == pytest.approx(found.tables["step_by_batch_ms"][8] / 1000, abs=1e-6)
    assert (kind.kv_tokens, kind.kv_bytes, kind.layers, kind.batch_context) == (46_592, 23_040, 30, 128)
    assert (kind.price, kind.power, kind.link_bytes_s) == (1.0, 0.1, 1.25e9)
    trace = poisson(rate=0.05, seconds=200, seed=1, prompt=100, output=20)
    done = simulate(trace, parse_pools("mixed=2xcpu2"), profiles.load(path, FACTS.llm), policy="token_jsq").figures
    assert done["refused"] == 0 and done["ttft_p50_s"] > 0.6


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 1e4), st.integers(1, 9)), min_size=1, max_size=12))
def test_what_rises_is_the_nearest_that_does(points: list[tuple[float, int]]) -> None:
    values, weights = [value for value, _ in points], [weight for _, weight in points]
    found = fitting.rising(values, weights)
    assert len(found) == len(values)
    assert all(one <= other * (1 + 1e-12) for one, other in itertools.pairwise(found))
    assert fitting.rising(sorted(values), weights) == pytest.approx(sorted(values))
    total = sum(weights)  # what is pooled keeps its mean
    assert sum(f * w for f, w in zip(found, weights, strict=True)) / total == pytest.approx(
        sum(v * w for v, w in zip(values, weights, strict=True)) / total
    )


def test_a_second_machine_is_added_and_another_model_beside_it(tmp_path: Path) -> None:
    path, found = tmp_path / "p.yaml", fitting.fit(TIMINGS, 128)
    fitting.save(path, FACTS, found)
    fitting.save(path, FACTS.__class__(**{**FACTS.__dict__, "kind": "fast", "price": 3.0}), found)
    fitting.save(path, FACTS.__class__(**{**FACTS.__dict__, "llm": "other", "layers": 12}), found)
    loaded = profiles.load(path, FACTS.llm)
    assert set(loaded.kinds) == {"cpu2", "fast"} and loaded.reference == "cpu2"
    assert profiles.load(path, "other").kind("cpu2").layers == 12
    with pytest.raises(ConfigError, match="with layers 30, and it is 31 here"):
        fitting.save(path, FACTS.__class__(**{**FACTS.__dict__, "layers": 31}), found)


def test_what_cannot_be_fitted_or_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing was measured for prefill_ms"):
        fitting.fit([each for each in TIMINGS if each.kind == "step"], 128)
    with pytest.raises(ConfigError, match="nothing was measured for step_by_batch_ms"):
        fitting.fit(TIMINGS, 100)
    with pytest.raises(ConfigError, match=r"cannot take 0.0 s"):
        fitting.fit([Timing("step", 1, 1, 0.0)], 1)
    found = fitting.fit(TIMINGS, 128)
    for text in ("[]", "machines: 3", "a: [", "cluster: mine"):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"is no profile|cannot read the profile|name another file"):
            fitting.save(tmp_path / "x.yaml", FACTS, found)
        assert (tmp_path / "x.yaml").read_text() == text
    with pytest.raises(ConfigError, match="cannot write the profile"):
        fitting.save(tmp_path / "none" / "x.yaml", FACTS, found)


# --- measuring --------------------------------------------------------------------------------------------------------


class Formula:
    """An engine whose times are known, and a clock that goes with it."""

    max_model_len = 4096
    max_tokens = 2048
    layers = 4
    kv_bytes = 100

    def __init__(self, kv_tokens: int = 100_000) -> None:
        self.kv_tokens = kv_tokens
        self.now = 0.0
        self.prompts: list[int] = []
        self.batches: list[tuple[int, int]] = []

    def prefill(self, tokens: int) -> float:
        self.prompts.append(tokens)
        return self._takes(0.001 * tokens)

    def decode(self, batches: Sequence[int], context: int, steps: int) -> Iterator[tuple[int, float]]:
        for batch in sorted(batches, reverse=True):
            self.batches.append((batch, context))
            for _ in range(steps):
                yield batch, self._takes(0.01 + 0.001 * batch + 1e-6 * batch * context)

    def _takes(self, seconds: float) -> float:
        self.now += seconds
        return seconds


def test_a_formula_is_found_again(tmp_path: Path) -> None:
    engine = Formula()
    timings = command.measure(engine, 2000, 12, 512, 0.0)
    found = fitting.fit(timings, 512)
    assert sorted(set(engine.prompts)) == [32, 64, 128, 256, 512, 1024, 2000]
    assert sorted({batch for batch, context in engine.batches if context == 512}) == [1, 2, 4, 8, 12]
    assert {context for batch, context in engine.batches if batch == 1} == {64, 128, 256, 512, 1024, 2000}
    assert found.lifted < 1e-9 and found.spread < 1e-9
    fitting.save(tmp_path / "p.yaml", FACTS, found)
    kind = profiles.load(tmp_path / "p.yaml", FACTS.llm).kind("cpu2")
    assert kind.prefill(777) == pytest.approx(0.777, rel=1e-3)
    assert kind.context_s == pytest.approx(1e-6, rel=1e-2)
    assert kind.batch(10) == pytest.approx(0.01 + 0.010 + 1e-6 * 10 * 512, rel=1e-2)
    assert "2000: 2000.0" in printed(command.render(found, len(timings)))


def printed(what: object) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(what)
    return console.export_text()


def test_rounds_go_on_until_the_time_is_over() -> None:
    one, many = Formula(), Formula()
    first = command.measure(one, 256, 2, 64, 0.0, clock=lambda: one.now)
    round_s = one.now
    said: list[str] = []
    found = command.measure(many, 256, 2, 64, 2.5 * round_s, said.append, clock=lambda: many.now)
    assert len(found) == 3 * len(first)
    assert found[: len(first)] == first  # each round takes all points in the same order
    assert said[0].startswith("round 1:") and said[-1].startswith("round 3:")


@pytest.mark.parametrize(
    ("longest", "batch", "context", "says"),
    [
        (4096, 1, 64, "the model takes 4096 tokens"),
        (64, 1, 4090, "the model takes 4096 tokens"),
        (3000, 1, 64, "at most 2048 tokens"),
        (1024, 64, 1024, "need .* tokens of KV cache, and 50000 fit"),
    ],
)
def test_what_the_engine_cannot_hold_is_said_before(longest: int, batch: int, context: int, says: str) -> None:
    engine = Formula(kv_tokens=50_000)
    with pytest.raises(ConfigError, match=says):
        command.measure(engine, longest, batch, context, 1.0)
    assert not engine.prompts


def test_engine_arguments_are_read_as_yaml() -> None:
    assert command._arguments(["dtype=float32", "max-num-seqs=4", "enforce_eager=true"]) == {
        "dtype": "float32",
        "max_num_seqs": 4,
        "enforce_eager": True,
    }
    for text in ("dtype", "=3"):
        with pytest.raises(ConfigError, match="is no argument"):
            command._arguments([text])


def test_the_command_is_registered() -> None:
    from joinwise.cluster.cli.shell import ENGINE_COMMANDS

    named = Path(__file__).parents[2] / "pyproject.toml"
    assert 'profile = "joinwise.actors.profile:profile"' in named.read_text()
    assert "profile" in ENGINE_COMMANDS


def test_a_profile_without_a_context_has_that_of_the_paper_s_tables() -> None:
    assert profiles.shipped().kind("h100").batch_context == 512
