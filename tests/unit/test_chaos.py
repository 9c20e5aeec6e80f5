"""`joinwise chaos`: what it draws, and that it finds every kind of bad answer, fault that did not fire, and leak."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import psutil
import pytest

from joinwise.actors.bench import link
from joinwise.actors.bench.link import own_network
from joinwise.actors.chaos import faults, partition, run, schedule
from joinwise.actors.chaos.kept import Kept
from joinwise.actors.chaos.load import Load, Outcome, Question, questions, verdict
from joinwise.actors.chaos.redis_server import RedisServer
from joinwise.actors.chaos.schedule import KINDS, Fault
from joinwise.actors.chaos.site import Site, cluster_config
from joinwise.cluster.client.failures import UnreachableError
from joinwise.cluster.config import load_config
from joinwise.cluster.config_check import problems
from joinwise.cluster.errors import ConfigError, InternalError

RIGHT = list(range(100, 120))


def test_a_seed_draws_every_fault_once_and_the_same_again() -> None:
    first = schedule.draw(7)
    assert sorted(fault.kind for fault in first) == sorted(KINDS)
    assert first == schedule.draw(7)
    assert len({tuple(fault.kind for fault in schedule.draw(seed)) for seed in range(10)}) > 5
    assert [fault.kind for fault in schedule.draw(3, ["kill-redis"])] == ["kill-redis"]
    few = schedule.draw(7, most=3)
    assert [fault.kind for fault in few] == [fault.kind for fault in first[:3]]


def test_every_kind_can_be_struck() -> None:
    assert set(faults._FAULTS) == set(KINDS)
    assert set(KINDS) >= schedule.NOTICED


@pytest.mark.parametrize(
    ("got", "whole", "said"),
    [
        (RIGHT, True, ""),
        (RIGHT[:7], False, ""),
        ([], False, ""),
        (RIGHT[:7], True, "torn"),  # it says that this is all
        ([], True, "torn"),
        ([*RIGHT, 5], False, "torn"),
        ([*RIGHT[:8], *RIGHT[6:]], True, "torn"),  # two positions came twice
        ([*RIGHT[:8], *RIGHT[9:]], True, "torn"),  # one never came
        ([*RIGHT[:8], 5, *RIGHT[9:]], True, "wrong"),
        ([5], False, "wrong"),
    ],
)
def test_verdict(got: list[int], whole: bool, said: str) -> None:
    assert verdict(got, RIGHT, whole=whole) == said


def answer(tokens: list[int], *, done: bool = True, error: dict[str, Any] | None = None) -> httpx.Response:
    chunks: list[dict[str, Any]] = [{"choices": [{"token_ids": [token]}]} for token in tokens]
    chunks += [{"error": error}] if error else []
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + (["data: [DONE]\n\n"] if done else [])
    return httpx.Response(200, text="".join(lines))


async def outcome_of(*replies: httpx.Response | Exception) -> Outcome:
    """What becomes of one request that is answered so, and so when asked again."""
    left = iter(replies)

    def reply(_: httpx.Request) -> httpx.Response:
        found = next(left)
        if isinstance(found, Exception):
            raise found
        return found

    over = asyncio.Event()
    over.set()
    asked = [Question((1, 2), len(RIGHT))]
    async with httpx.AsyncClient(transport=httpx.MockTransport(reply), base_url="http://gateway") as client:
        load = Load(client, None, "model", asked, [RIGHT], rate=1000)
        await load.run(1, over)
    assert load.midway == 0
    (found,) = load.outcomes
    return found


async def test_a_right_answer() -> None:
    found = await outcome_of(answer(RIGHT))
    assert found.right and not found.errors and not found.lost


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (httpx.Response(503, text="{}"), "no_worker"),
        (httpx.Response(429, text="{}"), "overloaded"),
        (httpx.RemoteProtocolError("closed"), "unreachable"),
        (answer(RIGHT[:4], error={"code": 502}), "worker_lost"),
    ],
)
async def test_an_error_that_says_again_is_asked_again(
    first: httpx.Response | Exception, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("joinwise.actors.chaos.load._ASK_AGAIN_S", 0)
    found = await outcome_of(first, answer(RIGHT))
    assert found.right and [error for _, error in found.errors] == [code]


async def test_an_error_that_does_not_is_a_lost_request() -> None:
    found = await outcome_of(httpx.Response(500, text="{}"))
    assert found.lost and [error for _, error in found.errors] == ["internal"]


async def test_a_stream_that_ends_without_a_word_is_torn() -> None:
    found = await outcome_of(answer(RIGHT[:5], done=False))
    assert found.torn == 1 and not found.lost and not found.right


async def test_wrong_tokens_before_an_error_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("joinwise.actors.chaos.load._ASK_AGAIN_S", 0)
    found = await outcome_of(answer([*RIGHT[:4], 7], error={"code": 503}), answer(RIGHT))
    assert found.wrong and found.right


async def test_it_knows_when_a_stream_is_midway() -> None:
    shown, go_on = asyncio.Event(), asyncio.Event()

    async def body() -> Any:
        yield f"data: {json.dumps({'choices': [{'token_ids': RIGHT[:1]}]})}\n\n".encode()
        await go_on.wait()
        yield f"data: {json.dumps({'choices': [{'token_ids': RIGHT[1:]}]})}\n\ndata: [DONE]\n\n".encode()

    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=body()))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        load = Load(client, None, "model", [Question((1,), len(RIGHT))], [RIGHT], rate=1000)
        shown.set()
        running = asyncio.create_task(load.run(1, shown))
        await asyncio.wait_for(load.wait_midway(), 5)
        assert load.midway == 1
        go_on.set()
        await running
    assert load.midway == 0 and load.outcomes[0].right


async def test_streams_that_are_midway_are_seen_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ends well, one that breaks and is asked again, and one that has not begun to answer."""
    monkeypatch.setattr("joinwise.actors.chaos.load._ASK_AGAIN_S", 0)
    go_on = asyncio.Event()
    calls = iter(range(10))

    async def body(number: int) -> Any:
        if number < 2:
            yield f"data: {json.dumps({'choices': [{'token_ids': RIGHT[:4]}]})}\n\n".encode()
        await go_on.wait()
        if number == 1:
            yield b"data: " + json.dumps({"error": {"code": 502}}).encode() + b"\n\n"
            return
        rest = RIGHT[4:] if number < 2 else RIGHT
        yield f"data: {json.dumps({'choices': [{'token_ids': rest}]})}\n\ndata: [DONE]\n\n".encode()

    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=body(next(calls))))
    over = asyncio.Event()
    over.set()
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        load = Load(client, None, "model", [Question((1,), len(RIGHT))], [RIGHT], rate=1000)
        assert await load.see_through(0.1) == (0, 0)
        running = asyncio.create_task(load.run(3, over))
        async with asyncio.timeout(5):
            while load.midway < 2 or len(load.outcomes) < 3:
                await asyncio.sleep(0.001)
        assert await load.see_through(0.01) == (2, 0)
        seeing = asyncio.create_task(load.see_through(5))
        await asyncio.sleep(0)
        go_on.set()
        assert await seeing == (2, 1)
        await running
    assert all(each.right for each in load.outcomes)


def test_questions_are_the_same_every_time() -> None:
    asked = questions(50)
    assert asked == questions(50)
    assert {10 <= len(each.prompt) <= 400 and 24 <= each.max_tokens <= 96 for each in asked} == {True}
    assert {1 <= each.max_tokens <= 2 for each in questions(50, answers=(1, 2))} == {True}


async def test_clients_reach_a_gateway_again_or_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("joinwise.actors.chaos.load._ASK_AGAIN_S", 0.001)
    answers: list[bool] = [False, False, True]

    async def status(timeout: float) -> None:
        if not (answers.pop(0) if answers else False):
            raise UnreachableError("not yet")

    async with httpx.AsyncClient() as http:
        grpc: Any = SimpleNamespace(status=status)
        load = Load(http, grpc, "model", [], [])
        assert await load.wait_reached(5) and not answers
        assert not await load.wait_reached(0.01)
        assert await Load(http, None, "model", [], []).wait_reached(0)


async def test_a_burst_is_asked_at_once_and_judged_as_the_rest() -> None:
    arrived, room = 0, asyncio.Event()

    async def reply(_: httpx.Request) -> httpx.Response:
        nonlocal arrived
        arrived += 1
        if arrived == 6:
            room.set()
        await room.wait()
        return answer(RIGHT)

    over = asyncio.Event()
    asked = [Question((1, 2), len(RIGHT))]
    async with httpx.AsyncClient(transport=httpx.MockTransport(reply), base_url="http://gateway") as client:
        load = Load(client, None, "model", asked, [RIGHT], rate=1000, at_once=1)
        running = asyncio.create_task(load.run(1, over))
        while not arrived:
            await asyncio.sleep(0)
        load.burst(5)
        over.set()
        async with asyncio.timeout(5):
            await running
    assert arrived == 6 and all(each.right for each in load.outcomes)
    assert [each.number for each in load.outcomes] == list(range(6))


# Faults.


@pytest.fixture
def own_net() -> Iterator[None]:
    """A network of this test's own."""
    if why := partition.refused():
        pytest.skip(why)
    with own_network():
        yield


@pytest.fixture
def redis_server(tmp_path: Path) -> Any:
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.kill()


def site_of(redis: Any, kept: Any = None, nodes: Any = None) -> Site:
    config = cluster_config("chaos", "redis://127.0.0.1:1/0", "127.0.0.1:2", prefill=1, decode=2)
    facts = {"addresses": {"http": "http://127.0.0.1:1", "grpc": "127.0.0.1:1"}}
    return Site(config, Path("unused"), kept or SimpleNamespace(facts=facts), redis, nodes)


def fault(kind: schedule.Kind) -> Fault:
    return Fault(kind, pause_s=0, outage_s=0.01, victim=0.5)


LOAD: Any = SimpleNamespace(midway=2, wait_midway=lambda: asyncio.sleep(0))


def put(server: RedisServer) -> None:
    import redis

    with redis.Redis.from_url(server.url) as client:
        client.set("key", "value")
        client.execute_command("WAITAOF", 1, 0, 5000)


async def test_redis_comes_back_with_its_data_or_without(redis_server: RedisServer) -> None:
    put(redis_server)
    kept = await faults.strike(fault("kill-redis"), site_of(redis_server), LOAD)
    assert kept.evidence["keys_before"] == kept.evidence["keys_after"] == 1
    lost = await faults.strike(fault("lose-redis"), site_of(redis_server), LOAD)
    assert (lost.evidence["keys_before"], lost.evidence["keys_after"]) == (1, 0)


async def test_a_redis_that_survives_is_no_fault(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(redis_server, "kill", lambda: None)
        with pytest.raises(faults.NotFiredError, match="still answers"):
            await faults.strike(fault("kill-redis"), site_of(redis_server), LOAD)


async def test_a_phase_that_never_comes_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_MOMENT_S", 0.01)
    load: Any = SimpleNamespace(wait_midway=asyncio.Event().wait)
    with pytest.raises(faults.NotFiredError, match="midway"):
        await faults.strike(fault("kill-decode"), site_of(None), load)


_LISTENER = """
import socket, sys
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def listener() -> Any:
    """A process that listens, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-c", _LISTENER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    yield process, f"127.0.0.1:{process.stdout.readline().strip()}"
    process.kill()
    process.communicate()


def worker_site(monkeypatch: pytest.MonkeyPatch, address: str, held: int) -> Site:
    """A site whose one worker is the process at that address."""
    worker = SimpleNamespace(worker_id="decode-0-1", engine_address=address)

    async def busy(self: Site, role: str) -> list[Any]:
        return [worker] if held else await asyncio.Event().wait()

    async def idle(self: Site, worker: Any) -> Any:
        return SimpleNamespace(scheduler_requests=held)

    monkeypatch.setattr(Site, "busy", busy)
    monkeypatch.setattr(Site, "idle", idle)
    return site_of(None)


@pytest.mark.parametrize(("kind", "state"), [("kill-decode", None), ("freeze-decode", psutil.STATUS_STOPPED)])
async def test_a_worker_is_hit(kind: Any, state: str | None, listener: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    process, address = listener
    fired = await faults.strike(fault(kind), worker_site(monkeypatch, address, held=3), LOAD)
    assert fired.gone == "decode-0-1" and fired.pid == process.pid
    assert fired.evidence["requests_in_engine"] == 3
    if state:
        assert psutil.Process(process.pid).status() == state
    else:
        assert not psutil.pid_exists(process.pid)


async def test_the_draft_actor_is_hit(listener: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    process, address = listener
    found: list[Any] = [None, SimpleNamespace(draft_id="draft-0-1", address=address)]

    async def draft(self: Site) -> Any:
        return found.pop(0)

    monkeypatch.setattr(Site, "draft", draft)
    site = site_of(None)
    with pytest.raises(faults.NotFiredError, match="no draft actor"):
        await faults.strike(fault("kill-draft"), site, LOAD)
    fired = await faults.strike(fault("kill-draft"), site, LOAD)
    assert (fired.gone, fired.pid) == ("draft-0-1", process.pid)
    assert not psutil.pid_exists(process.pid)


def load_of(midway: int, through: int, then: Any = lambda: None) -> Any:
    """A load whose streams that are midway come to their ends, or do not."""

    async def see_through(_: float) -> tuple[int, int]:
        then()
        return midway, through

    bursts: list[int] = []
    wait = lambda: asyncio.sleep(0)  # noqa: E731
    return SimpleNamespace(midway=midway, wait_midway=wait, see_through=see_through, burst=bursts.append, bursts=bursts)


async def test_a_launcher_dies_under_streams_that_go_on(listener: Any) -> None:
    process, _ = listener
    starts: list[int] = []
    kept = SimpleNamespace(process=psutil.Process(process.pid), start=lambda: starts.append(1))
    load = load_of(3, 2, lambda: starts.append(0) if psutil.pid_exists(process.pid) else None)
    fired = await faults.strike(fault("kill-launcher"), site_of(None, kept), load)
    assert not psutil.pid_exists(process.pid) and not starts, "streams are seen through without one"
    assert (fired.pid, fired.cut_short) == (process.pid, 1)
    assert fired.mend is not None
    fired.mend()
    assert starts == [1]


@pytest.mark.parametrize("kind", ["kill-launcher", "kill-head"])
async def test_what_dies_when_nothing_runs_is_no_fault(kind: Any, listener: Any) -> None:
    kept = SimpleNamespace(process=psutil.Process(listener[0].pid), start=None)
    nodes = SimpleNamespace(lose_control=lambda: 0, regain_control=lambda: None)
    with pytest.raises(faults.NotFiredError, match="midway"):
        await faults.strike(fault(kind), site_of(None, kept, nodes), load_of(0, 0))


async def test_a_control_store_comes_back_once_streams_are_through(listener: Any) -> None:
    process, _ = listener
    did: list[str] = []

    def lose_control() -> int:
        did.append("lost")
        process.kill()
        process.wait()
        return int(process.pid)

    nodes = SimpleNamespace(lose_control=lose_control, regain_control=lambda: did.append("regained"))
    load = load_of(3, 3, lambda: did.append("seen through"))
    fired = await faults.strike(fault("kill-head"), site_of(None, nodes=nodes), load)
    assert did == ["lost", "seen through"] and fired.mend is not None
    fired.mend()
    assert did[-1] == "regained"
    assert fired.cut_short == 0 and fired.evidence == {"streams_midway": 3, "finished": 3}


async def test_a_control_store_that_survives_is_no_fault(listener: Any) -> None:
    nodes = SimpleNamespace(lose_control=lambda: listener[0].pid)
    with pytest.raises(faults.NotFiredError, match="lives on"):
        await faults.strike(fault("kill-head"), site_of(None, nodes=nodes), load_of(1, 1))


async def test_a_worker_that_no_raylet_has_started_is_not_lost_with_one(
    listener: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = worker_site(monkeypatch, listener[1], held=1)
    with pytest.raises(faults.NotFiredError, match="not a child of a raylet"):
        await faults.strike(fault("kill-raylet"), site, LOAD)


@pytest.mark.parametrize("waits", [[4, 4, 7], [4]])
async def test_a_landing_buffer_is_full_when_kv_has_waited(
    waits: list[int], own_net: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, rates = load_of(1, 1), []

    async def workers(self: Site, role: str = "") -> list[Any]:
        return []

    async def landing_waits(self: Site, workers: Any) -> int:
        rates.append("tbf" in link.run("tc qdisc show dev lo"))
        return waits.pop(0) if len(waits) > 1 else waits[0]

    monkeypatch.setattr(Site, "workers", workers)
    monkeypatch.setattr(Site, "landing_waits", landing_waits)
    monkeypatch.setattr(faults, "_MOMENT_S", 0.5)
    if len(waits) == 1:
        with pytest.raises(faults.NotFiredError, match="has found room"):
            await faults.strike(fault("fill-landing"), site_of(None), load)
    else:
        fired = await faults.strike(fault("fill-landing"), site_of(None), load)
        assert fired.evidence == {"requests_more": 12, "frames_that_waited": 3}
    assert load.bursts == [12] and rates[0] is False and rates[1] is True
    assert "tbf" not in link.run("tc qdisc show dev lo"), "the network is as it was"


@pytest.mark.parametrize(
    ("after", "said"), [(["prefill-0-2"], ""), (["prefill-0-1"], "are now"), ([], "are now"), (None, "refused")]
)
async def test_a_change_has_replaced_its_workers(
    after: list[str] | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["prefill-0-1"]

    async def workers(self: Site, role: str = "") -> list[Any]:
        return [SimpleNamespace(worker_id=name) for name in names]

    def apply(self: Site, config: Any, timeout_s: float) -> None:
        if after is None:
            raise ConfigError("refused")
        changed = {pool.name for pool, old in zip(config.pools, self.config.pools, strict=True) if pool != old}
        assert changed == {"prefill"} and problems(config) == []
        names[:] = after

    monkeypatch.setattr(Site, "workers", workers)
    monkeypatch.setattr(Site, "apply", apply)
    if said:
        with pytest.raises(faults.NotFiredError, match=said):
            await faults.strike(fault("apply"), site_of(None), LOAD)
    else:
        fired = await faults.strike(fault("apply"), site_of(None), LOAD)
        assert (fired.evidence["replaced"], fired.evidence["by"]) == (["prefill-0-1"], ["prefill-0-2"])


def test_each_start_of_a_cluster_has_a_log_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Path] = []

    class Fake:
        pid = 1

        def __init__(self, cluster: str, file: Path, log: Path) -> None:
            started.append(log)

        def wait_ready(self, timeout_s: float) -> dict[str, Any]:
            return {"addresses": {}}

        def stop(self) -> bool:
            return len(started) > 1

    monkeypatch.setattr("joinwise.actors.chaos.kept.Launcher", Fake)
    kept = Kept("c", tmp_path / "c.yaml", tmp_path)
    kept.start()
    kept.start()
    assert len(set(started)) == 2
    assert kept.stop()
    with pytest.raises(InternalError, match="did not stop"), Kept("c", tmp_path / "c.yaml", tmp_path):
        started.clear()


def test_the_file_of_a_cluster_says_what_it_is_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = site_of(None)
    site.file = tmp_path / "c.yaml"
    changed = site.config.model_copy(deep=True)
    changed.pools[0].engine["max_num_seqs"] = 9
    answers = iter([False, True])
    monkeypatch.setattr("joinwise.actors.runfile.wish", lambda cluster, file: (cluster, load_config(file)))
    monkeypatch.setattr(
        "joinwise.actors.runfile.granted",
        lambda cluster, wanted: wanted[1].model_dump() == changed.model_dump() and next(answers),
    )
    site.apply(changed, 5)
    assert site.config == changed and next(answers, None) is None
    assert site.file.stat().st_mode & 0o777 == 0o600  # it may hold Redis' password


def test_a_change_that_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = site_of(None)
    site.file = tmp_path / "c.yaml"
    monkeypatch.setattr("joinwise.actors.runfile.wish", lambda *_: None)
    monkeypatch.setattr("joinwise.actors.runfile.granted", lambda *_: False)
    with pytest.raises(ConfigError, match="not there after 0 s"):
        site.apply(site.config, 0.1)


@pytest.mark.parametrize("draft", [False, True])
def test_its_cluster_can_work(draft: bool) -> None:
    config = cluster_config("chaos", "redis://127.0.0.1:1/0", "127.0.0.1:2", prefill=1, decode=2, draft=draft)
    assert problems(config) == []
    assert {pool.role for pool in config.pools} == {"prefill", "decode"} | ({"draft"} if draft else set())


def kv_site(monkeypatch: pytest.MonkeyPatch, address: str) -> Site:
    """A site whose one prefill worker gives KV away at that address."""
    site = worker_site(monkeypatch, address, held=1)

    async def busy(self: Site, role: str) -> list[Any]:
        return [SimpleNamespace(worker_id="prefill-0-1", engine_address="127.0.0.1:1", kv_address=f"grpc={address}")]

    monkeypatch.setattr(Site, "busy", busy)
    return site


async def test_a_port_is_cut_off_and_comes_back(own_net: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        striking = asyncio.create_task(faults.strike(Fault("cut-kv", 0, 0.3, 0), kv_site(monkeypatch, address), LOAD))
        await asyncio.sleep(0.1)
        with pytest.raises(TimeoutError):
            socket.create_connection(server.getsockname(), timeout=0.1)
        fired = await striking
        assert fired.evidence["packets_dropped"] > 0
        socket.create_connection(server.getsockname(), timeout=5).close()


async def test_a_cut_that_nobody_meets_is_no_fault(own_net: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(faults.NotFiredError, match="nobody has sent"):
        await faults.strike(Fault("cut-kv", 0, 0.01, 0), kv_site(monkeypatch, "127.0.0.1:9"), LOAD)


async def test_a_worker_that_is_never_busy_is_not_hit(listener: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_MOMENT_S", 0.01)
    process, address = listener
    with pytest.raises(faults.NotFiredError, match="was busy"):
        await faults.strike(fault("kill-decode"), worker_site(monkeypatch, address, held=0), LOAD)
    assert process.poll() is None


def test_processes_of_others_are_left_alone(listener: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    process, address = listener
    assert site_of(None).process_at(address).pid == process.pid
    with monkeypatch.context() as patch, pytest.raises(InternalError, match="not of this cluster"):
        patch.setattr("joinwise.actors.chaos.site.os.getpid", lambda: 1 << 22)
        site_of(None).process_at(address)


def test_a_process_is_found_by_its_host_as_well_as_its_port(listener: Any) -> None:
    """gRPC listens on a socket of both families; a port may be taken by somebody else at another address."""
    process, address = listener
    own = grpc.server(ThreadPoolExecutor(1))
    port = own.add_insecure_port("127.0.0.1:0")
    own.start()
    with socket.socket() as other, pytest.raises(InternalError, match="not of this cluster"):
        other.bind(("127.0.0.2", int(address.rpartition(":")[2])))
        other.listen()
        assert site_of(None).process_at(address).pid == process.pid
        site_of(None).process_at(f"127.0.0.1:{port}")  # this very process: found, and no child of itself
    own.stop(None)


# Figures.


def row(**more: Any) -> dict[str, Any]:
    return {"kind": "kill-decode", "fired": True, "recover_s": 3.0, "errors": {}, **more}


@pytest.mark.parametrize(
    ("change", "figure"),
    [
        (lambda: ([row(fired=False)], [], []), "not_fired"),
        (lambda: ([row(recover_s=None)], [], []), "not_recovered"),
        (lambda: ([row(cut_short=1)], [], []), "cut_short"),
        (lambda: ([row()], [Outcome(0, 0.0, errors=[(1.0, "no_worker")], right=True)], []), "noticed"),
        (lambda: ([row()], [Outcome(0, 0.0, wrong=True)], []), "wrong"),
        (lambda: ([row()], [Outcome(0, 0.0, torn=1)], []), "stream_faults"),
        (lambda: ([row()], [Outcome(0, 0.0)], []), "lost"),
        (lambda: ([row()], [Outcome(0, 0.0, right=True)], ["a lease"]), "leaked"),
    ],
)
def test_what_must_be_zero(change: Callable[[], Any], figure: str) -> None:
    figures = run.figures_of(1, *change())
    assert [name for name in run.MUST_BE_ZERO if figures[name]] == [figure]


def test_seeds_that_were_run_apart_count_together() -> None:
    parts = [
        run.figures_of(2, [row(recover_s=7.0, fired=False)], [Outcome(0, 0.0, right=True, received=5)], ["a lease"]),
        run.figures_of(1, [row(recover_s=4.0), row()], [Outcome(0, 0.0), Outcome(1, 0.0, right=True, received=3)], []),
    ]
    found = run.together(parts)
    named = {"seeds": 3, "faults": 3, "requests": 3, "right": 2, "lost": 1, "leaked": 1, "tokens": 8, "not_fired": 1}
    assert {name: found[name] for name in named} == named
    assert found["recover_s_max"] == 7.0


def test_a_dead_gateway_excuses_the_errors_around_it_only() -> None:
    met = [(0.5, "no_worker"), (5.5, "unreachable"), (6.0, "no_worker")]
    outcomes = [Outcome(0, 0.0, right=True, errors=met)]
    assert run._met(outcomes, 5.0, 9.0) == {"unreachable": 1, "no_worker": 1}
    rows = [row(kind="kill-gateway", errors=dict(run._met(outcomes, 5.0, 9.0))), row(errors={"no_worker": 1})]
    figures = run.figures_of(1, rows, outcomes, [])
    assert (figures["errors"], figures["noticed"]) == (3, 1)
