"""`joinwise plan --from-live`: a cluster from its registry and ledgers, and which change of it helps."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers.workers import worker as registered
from typer.testing import CliRunner

from joinwise.cluster.cli import plan_live
from joinwise.cluster.cli.main import app
from joinwise.cluster.errors import ConfigError
from joinwise.cluster.ledger import RequestLedger
from joinwise.cluster.plan.advice import advise, changes
from joinwise.cluster.plan.live import Cluster, read, seen, together
from joinwise.cluster.router.registry import WorkerLoad, WorkerState
from joinwise.cluster.simulate.pools import PoolSpec, parse_pools
from joinwise.cluster.simulate.profile import Curve, Kind, Profile
from joinwise.cluster.simulate.report import PERCENTILES, SLOS
from joinwise.cluster.simulate.run import simulate
from joinwise.cluster.simulate.trace import Trace, poisson

NOW = 1_790_000_000.0
MACHINE = Kind(
    name="a",
    prefill=Curve({1: 0.001, 1000: 1.0}),
    tokens=Curve({1: 0.010}),
    batch=Curve({1: 0.010, 11: 0.020}),
    context_s=0.0,
    kv_bytes=1000,
    kv_tokens=64_000,
    link_bytes_s=1e9,
    layers=10,
    price=1.0,
    power=1.0,
)


def worker(name: str, role: str, pool: str = "", **load: Any) -> WorkerState:
    info = registered(
        name, role, pool=pool or role, max_model_len=8192, block_size=32, num_blocks=2000, max_num_seqs=64
    )
    return WorkerState(info, WorkerLoad(**load), 0, 0, 0, 0, 0, 64_000)


def ledgers_of(trace: Trace, pools: str) -> list[RequestLedger]:
    """What a cluster of `MACHINE`s with one worker a role would tell of a trace."""
    jobs = simulate(trace, parse_pools(pools), Profile("m", {"a": MACHINE}, "a"), policy="round_robin").outcome.jobs
    split = "decode" in pools
    return [
        RequestLedger(
            request_id=f"r{job.index}",
            model="m",
            arrived=NOW + job.at,
            prefill_worker="p-0" if split and job.output > 1 else None,
            decode_worker="d-0" if split and job.output > 1 else "p-0",
            prefill_s=job.first - job.began,
            ttft_s=job.ttft,
            token_gap_median_s=(job.end - max(job.landed, job.first)) / (job.output - 1 + split),
            wire_bytes=1000 * job.prompt if split and job.output > 1 else 0,
            wire_seconds_exposed=job.prompt * 1e-6,
            prompt_tokens=job.prompt,
            output_tokens=job.output,
            total_s=job.e2e,
        )
        for job in jobs
    ]


def lines(ledgers: Sequence[RequestLedger]) -> list[str]:
    return [each.to_json() for each in ledgers]


# Of 40 requests of a real cluster, one prefill and one decode engine with SmolLM2 in float32 on a core each: when they
# came, prompt and answer tokens, and their ledgers' ttft_s, prefill_s, token_gap_median_s and total_s.
RECORDED = (
    (0.0, 89, 12, 0.997, 0.543, 0.1405, 3.008),
    (1.74, 123, 20, 0.728, 0.718, 0.1068, 3.265),
    (3.34, 78, 84, 0.595, 0.574, 0.1247, 11.621),
    (6.23, 73, 21, 0.562, 0.553, 0.1513, 3.817),
    (7.2, 110, 16, 0.641, 0.63, 0.1613, 3.622),
    (7.58, 56, 21, 0.635, 0.363, 0.1524, 4.22),
    (8.22, 33, 26, 0.355, 0.329, 0.1493, 4.639),
    (8.22, 67, 30, 0.767, 0.411, 0.152, 5.656),
    (8.93, 62, 23, 0.494, 0.431, 0.1524, 4.138),
    (11.2, 29, 15, 0.301, 0.289, 0.1584, 2.799),
    (11.48, 210, 19, 1.175, 1.146, 0.1231, 3.89),
    (11.86, 40, 46, 1.132, 0.341, 0.1187, 6.906),
    (13.17, 114, 16, 0.568, 0.559, 0.1153, 2.494),
    (15.39, 50, 13, 0.303, 0.297, 0.1101, 1.865),
    (16.49, 151, 9, 0.904, 0.893, 0.143, 2.396),
    (17.37, 56, 18, 0.548, 0.413, 0.112, 2.928),
    (17.72, 77, 11, 0.791, 0.602, 0.1069, 2.245),
    (17.97, 26, 15, 0.781, 0.235, 0.1069, 2.506),
    (19.36, 41, 32, 0.324, 0.316, 0.1134, 4.228),
    (20.24, 73, 10, 0.5, 0.492, 0.1056, 1.802),
    (20.87, 55, 20, 0.448, 0.43, 0.1191, 3.016),
    (20.93, 39, 4, 0.706, 0.321, 0.1195, 1.354),
    (22.05, 48, 25, 0.37, 0.363, 0.113, 3.396),
    (22.92, 178, 18, 0.981, 0.974, 0.1106, 3.197),
    (23.91, 85, 14, 0.656, 0.639, 0.1058, 2.365),
    (24.79, 136, 16, 0.717, 0.708, 0.0842, 2.306),
    (25.56, 58, 42, 0.417, 0.411, 0.072, 3.735),
    (29.5, 183, 21, 0.835, 0.825, 0.0851, 2.624),
    (31.64, 135, 10, 0.668, 0.66, 0.0904, 1.606),
    (33.71, 30, 18, 0.24, 0.233, 0.0806, 1.732),
    (34.41, 200, 30, 0.977, 0.966, 0.0924, 3.863),
    (35.46, 80, 39, 0.493, 0.485, 0.0972, 4.398),
    (36.3, 45, 31, 0.346, 0.332, 0.0982, 3.645),
    (37.26, 35, 11, 0.234, 0.229, 0.1037, 1.541),
    (38.04, 98, 22, 0.588, 0.582, 0.0926, 2.806),
    (38.7, 23, 11, 0.223, 0.215, 0.0927, 1.398),
    (40.27, 88, 7, 0.448, 0.44, 0.1301, 1.468),
    (40.64, 104, 9, 0.603, 0.521, 0.0867, 1.717),
    (40.75, 71, 20, 0.89, 0.399, 0.0782, 2.729),
    (42.52, 64, 27, 0.464, 0.454, 0.1017, 3.555),
)


# --- what is seen -----------------------------------------------------------------------------------------------------


def test_the_machines_times_come_out_of_the_ledgers() -> None:
    trace = poisson(1.5, 200, 1, prompt=300, output=40)
    found = seen(
        [worker("p-0", "prefill"), worker("d-0", "decode", prefill_tokens_per_s=1000.0)],
        read(lines(ledgers_of(trace, "prefill=1xa,decode=1xa"))),
    )
    assert found.pools == (PoolSpec("decode", "decode", 1), PoolSpec("prefill", "prefill", 1))
    assert [each[1:3] for each in found.trace.arrivals] == [each[1:3] for each in trace.arrivals]
    for tokens in (150, 300, 900):
        assert found.profile.kind("prefill").prefill(tokens) == pytest.approx(tokens / 1000, rel=0.05)
    for batch in (1, 2, 3):
        assert found.profile.kind("decode").batch(batch) == pytest.approx(MACHINE.batch(batch), rel=0.08)
    assert found.profile.kind("decode").kv_bytes == found.profile.kind("prefill").kv_bytes
    assert found.profile.kind("prefill").link_bytes_s == pytest.approx(1e9, rel=0.01)
    assert [each for each in found.guessed if "decode" in each] == [
        "decode: prompts at the 1000 tokens a second that it last measured"
    ]


def test_a_recorded_hour_gives_the_times_that_a_profile_measured() -> None:
    told = [
        RequestLedger(
            request_id=f"r{number}",
            model="m",
            arrived=NOW + at,
            prefill_worker="p-0",
            decode_worker="d-0",
            prefill_s=prefill_s,
            ttft_s=ttft_s,
            token_gap_median_s=gap_s,
            prompt_tokens=prompt,
            output_tokens=output,
            total_s=total_s,
        )
        for number, (at, prompt, output, ttft_s, prefill_s, gap_s, total_s) in enumerate(RECORDED)
    ]
    found = seen([worker("p-0", "prefill"), worker("d-0", "decode")], read(lines(told)))
    # `joinwise profile` of the same engines, a minute before: prompts of 64 and 128 tokens; steps of 1 and 4 sequences,
    # means of both cores. A prompt's time holds here what sending its layers costs, up to a tenth of a second.
    for tokens, seconds in ((64, 0.347), (128, 0.594)):
        assert seconds <= found.profile.kind("prefill").prefill(tokens) <= seconds + 0.1
    for batch, seconds in ((1, 0.0985), (4, 0.1075)):
        assert found.profile.kind("decode").batch(batch) == pytest.approx(seconds, rel=0.3)


def test_what_nobody_measured_is_told_or_asked_for() -> None:
    told = ledgers_of(poisson(1.5, 20, 1, prompt=300, output=40), "prefill=1xa,decode=1xa")
    alike = seen([worker("p-0", "prefill"), worker("d-0", "decode")], told)
    assert alike.profile.kind("decode").prefill(300) == alike.profile.kind("prefill").prefill(300)
    assert "decode: prompts as quick as elsewhere in the cluster; it has computed none" in alike.guessed
    cached = [replace(each, cached_tokens=each.prompt_tokens) for each in told]
    with pytest.raises(ConfigError, match=r"computes prompts; give it a --profile"):
        seen([worker("p-0", "prefill"), worker("d-0", "decode")], cached)
    found = seen(
        [worker("p-0", "prefill"), worker("d-0", "decode")],
        told,
        Profile("m", dict.fromkeys(("prefill", "decode"), MACHINE), "prefill"),
    )
    assert found.profile.kind("decode") is MACHINE and not found.guessed
    with pytest.raises(ConfigError, match="no machine of the kind 'decode'"):
        seen([worker("p-0", "prefill"), worker("d-0", "decode")], told, Profile("m", {"prefill": MACHINE}, "prefill"))


def test_only_the_last_hour_counts_each_request_once() -> None:
    old, fresh, again = (
        RequestLedger(f"r{number}", "m", NOW + at, prompt_tokens=5, output_tokens=2)
        for number, at in ((0, 0), (1, 5000), (2, 5001))
    )
    silent = RequestLedger("r3", "m", NOW + 5002, prompt_tokens=5)
    other = RequestLedger("r4", "other", NOW + 5003, prompt_tokens=5, output_tokens=2)
    found = read(["", *lines([again, old, fresh, silent, fresh, other])], "m")
    assert [each.request_id for each in found] == ["r1", "r2"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "0 requests"),
        (["{}"], "line 1 of the ledgers is none"),
        (["", "what\xff"], "line 2"),
        (lines([RequestLedger("r", "m", NOW, prompt_tokens=1, output_tokens=1)]), "1 requests"),
    ],
)
def test_ledgers_that_cannot_be_used(given: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read(given)


def test_workers_that_cannot_be_planned_for() -> None:
    told = ledgers_of(poisson(1.5, 20, 1, prompt=300, output=40), "mixed=1xa")
    for workers in ([], [worker("p-0", "draining")]):
        with pytest.raises(ConfigError, match="serve none"):
            seen(workers, told)


def test_who_decodes_together_is_counted_by_time() -> None:
    spans = [(0.0, 10.0), (5.0, 10.0), (9.0, 11.0), (20.0, 21.0)]
    made = [RequestLedger(f"r{n}", arrived=NOW + begin, total_s=end - begin) for n, (begin, end) in enumerate(spans)]
    assert together(made) == pytest.approx([1 + 0.5 + 0.1, 1 + 1 + 0.2, 1 + 0.5 + 0.5, 1.0])


# --- what would help --------------------------------------------------------------------------------------------------


def figures(worst: float, refused: float = 0.0) -> dict[str, float]:
    found = {
        f"{name}_slowdown_p{percent}": worst * limit
        for name, limits in SLOS.items()
        for percent, limit in zip(PERCENTILES, limits, strict=True)
    }
    return {
        **found,
        "refused": refused,
        "e2e_p50_s": worst,
        "ttft_p90_s": worst,
        "tbt_p90_ms": worst,
        "e2e_p90_s": worst,
    }


def balance(pools: Sequence[PoolSpec], rate: float) -> Mapping[str, float]:
    """Prompts need three machines' work, answers one: the busier side sets the pace."""
    sizes = {home: sum(pool.size for pool in pools if pool.home == home) for home in ("prefill", "decode", "mixed")}
    busiest = max(3 * rate / (sizes["prefill"] + 1e-9), rate / (sizes["decode"] + 1e-9))
    return figures(busiest if not sizes["mixed"] else 4 * rate)


def test_the_worker_that_is_missed_most_is_found() -> None:
    advice = advise(parse_pools("prefill=2xa,decode=2xb"), balance)
    role, machine = advice.best("role"), advice.best("machine")
    assert (
        role is not None and role.what == "one worker of b from decode to prefill" and role.worst == pytest.approx(1.0)
    )
    assert machine is not None and machine.what == "one machine more in a as prefill"
    assert [each.worst for each in advice.options] == sorted(each.worst for each in advice.options)
    assert set(advice.bears) == {"as it is", role.what, machine.what}
    assert 0.6 < advice.bears["as it is"] <= 2 / 3 and advice.bears[role.what] == pytest.approx(1.0, rel=1 / 16)


def test_nothing_is_advised_where_nothing_helps() -> None:
    advice = advise(parse_pools("prefill=1xa,decode=1xa"), lambda pools, rate: figures(0.5))
    assert advice.best("role") is None and advice.best("machine") is None
    assert advice.bears == {"as it is": 8.0}
    hopeless = advise(parse_pools("mixed=1xa"), lambda pools, rate: figures(1.0, refused=1.0))
    assert math.isinf(hopeless.now.worst) and hopeless.bears == {"as it is": 0.0}


def test_every_change_leaves_a_cluster_that_serves() -> None:
    for pools in ("prefill=1xa,decode=1xa", "mixed=1xa", "prefill=2xa,decode=1xb,mixed=1xa"):
        for what, change, to in changes(parse_pools(pools)):
            assert parse_pools(",".join(map(str, to))) == to, what
            before, after = (sum(pool.size for pool in each) for each in (parse_pools(pools), to))
            assert after - before == (change == "machine")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def gateway() -> Iterator[tuple[str, dict[str, Any]]]:
    """A gateway that has ledgers for who has the key."""
    told = "\n".join(lines(ledgers_of(poisson(2.0, 60, 1, prompt=300, output=60), "mixed=1xa")))
    state: dict[str, Any] = {"asked": []}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state["asked"].append(self.path)
            known = self.headers["authorization"] == "Bearer key"
            self.send_response(200 if known else 401)
            self.end_headers()
            self.wfile.write(told.encode() if known else b"")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", state
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_command_says_what_would_help(
    gateway: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def workers(url: str, cluster: str) -> tuple[WorkerState, ...]:
        assert (url, cluster) == ("redis://r", "c")
        return worker("p-0", "mixed"), worker("p-1", "mixed")

    monkeypatch.setattr(plan_live, "_workers", workers)
    url, state = gateway
    out = tmp_path / "out.json"
    command = ["plan", "--from-live", "--redis", "redis://r", "--cluster", "c", "--gateway", url]
    ran = CliRunner().invoke(app, [*command, "--token", "key", "--json", str(out)])
    assert ran.exit_code == 0, ran.output
    assert state["asked"] == ["/ledgers"]
    assert "one machine more in mixed as mixed: what is worst goes from" in ran.output
    written = json.loads(out.read_text())
    assert written["figures"]["worst_machine"] < written["figures"]["worst"]
    assert written["figures"]["bears"] < written["figures"]["bears_machine"]
    assert len(written["rows"]) == 1 + len(list(changes(parse_pools("mixed=2xmixed"))))
    assert "does not give its ledgers: 401" in CliRunner().invoke(app, [*command, "--token", "wrong"]).output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--from-live", "--trace", "t"], "say one of them"),
        ([], "say one of them"),
        (["--from-live", "--redis", "redis://r", "--gateway", "ftp://x"], "is no gateway"),
        (["--from-live", "--redis", "redis://r", "--gateway", "http://127.0.0.1:1"], "does not answer"),
        (["--from-live", "--redis", "redis://r", "--ledgers", "nowhere"], "cannot read the ledgers"),
    ],
)
def test_what_cannot_be_asked(arguments: list[str], says: str) -> None:
    ran = CliRunner().invoke(app, ["plan", *arguments])
    assert ran.exit_code and says in " ".join(ran.output.split())


def test_a_cluster_says_what_it_is() -> None:
    told = ledgers_of(poisson(1.5, 20, 1, prompt=300, output=2, spread=0), "mixed=1xa")
    found = seen([worker("p-0", "mixed", prefill_tokens_per_s=1.0, decode_step_ms=12.0)], told)
    assert isinstance(found, Cluster)
    assert found.guessed == ("mixed: every step of decoding 12.0 ms, whatever the batch",)
