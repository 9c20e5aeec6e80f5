"""What fails while requests run: workers killed, transfers that cannot be, Redis gone; and starts that must be refused.

A request that can go on goes on, with the tokens of an undisturbed run; whoever cannot be served is told so at once.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import redis
import yaml
from helpers.cluster import MODEL, RunningCluster, cluster_config, running_cluster
from helpers.idle import assert_idle
from helpers.processes import Home, listener

from joinwise.actors.chaos.redis_server import RedisServer, folder_in_memory
from joinwise.cluster.client import AsyncClient, JoinwiseError
from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.errors import CannotResumeError, InvalidRequestError, error_from_code
from joinwise.cluster.router.registry import Registry, WorkerInfo
from joinwise.cluster.store.client import connect
from joinwise.cluster.store.keys import Keys
from joinwise.proto import engine_pb2, engine_pb2_grpc, inference_pb2, inference_pb2_grpc

pytestmark = [pytest.mark.cluster, pytest.mark.model]

COMPLETIONS = "/v1/completions"
TRANSFER_TIMEOUT_S = 2.0
MAX_PENDING_TOKENS = 3000
# Prefilled in many chunks: there is time to kill a worker in the middle.
_LONG = " ".join(f"{number} bottles of beer on the wall," for number in range(160))
_STORY = "Once upon a time, in a small village by the sea,"


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with folder_in_memory() as folder:
        server = RedisServer(folder / "data")
        server.start()
        yield server
        server.kill()


@pytest.fixture(scope="module")
def own_cluster(
    small_model: object, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningCluster]:
    """A cluster to be broken: one prefill worker, two decode workers, short time-outs."""
    config = cluster_config("failing", redis={"url": redis_server.url})
    for pool in config["pools"]:
        pool["engine"] |= {"max_num_batched_tokens": 128}
        pool["replicas"] = 2 if pool["role"] == "decode" else 1
    config["kv"] = {"transfer_timeout_s": TRANSFER_TIMEOUT_S}
    config["router"] |= {"worker_ttl_s": 3, "max_pending_tokens": MAX_PENDING_TOKENS}
    config["gateway"]["drain_s"] = 1
    with running_cluster(config, tmp_path_factory.mktemp("failing")) as cluster:
        yield cluster


@dataclass(frozen=True)
class Answer:
    """A finished completion, and where its time went."""

    tokens: list[int]
    ledger: dict[str, Any]


@dataclass
class Bench:
    """The cluster under test, and what tests do to it."""

    cluster: RunningCluster
    http: httpx.AsyncClient
    undisturbed: dict[str, list[int]] = field(default_factory=dict)

    def body(self, prompt: str, max_tokens: int, **more: Any) -> dict[str, Any]:
        """A greedy request whose answer has token ids."""
        fixed = {"model": MODEL, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        return {**fixed, "prompt": prompt, "max_tokens": max_tokens, **more}

    async def ask(self, prompt: str, max_tokens: int) -> Answer:
        """Ask; it must be answered in full."""
        wanted = {"x-joinwise-ledger": "1"}
        answer = await self.http.post(COMPLETIONS, json=self.body(prompt, max_tokens), headers=wanted)
        assert answer.status_code == 200, answer.text
        tokens = answer.json()["choices"][0]["token_ids"]
        assert len(tokens) == max_tokens
        return Answer(tokens, json.loads(answer.headers["x-joinwise-ledger"]))

    async def stream(self, prompt: str, max_tokens: int) -> AsyncIterator[int]:
        """Token ids as they come; an error in the stream fails the test."""
        body = self.body(prompt, max_tokens, stream=True)
        async with self.http.stream("POST", COMPLETIONS, json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                for choice in chunk["choices"]:
                    for token in choice["token_ids"] or ():
                        yield token

    async def workers(self, *, count: int = 0, without: frozenset[str] = frozenset()) -> list[WorkerInfo]:
        """Live workers; waits until there are `count`, none of them in `without`."""
        client = connect(self.cluster.redis_url)
        try:
            registry = Registry(client, self.cluster.name, RouterConfig(worker_ttl_s=3))
            deadline = time.monotonic() + 240
            while True:
                found = list(await registry.list())
                if not count or (len(found) == count and not without & {info.worker_id for info in found}):
                    return found
                assert time.monotonic() < deadline, f"still {[info.worker_id for info in found]}"
                await asyncio.sleep(0.2)
        finally:
            await client.aclose()

    async def of_role(self, role: str) -> list[WorkerInfo]:
        return [info for info in await self.workers(count=3) if info.role == role]

    async def busy(self, role: str) -> WorkerInfo:
        """The worker of a role that has a request now; waits for one."""
        candidates = await self.of_role(role)
        async with asyncio.timeout(60):
            while True:
                for worker in candidates:
                    if (await idle(worker)).scheduler_requests:
                        return worker
                await asyncio.sleep(0.005)


async def idle(worker: WorkerInfo) -> engine_pb2.IdleResponse:
    async with grpc.aio.insecure_channel(worker.engine_address) as channel:
        return await engine_pb2_grpc.EngineServiceStub(channel).Idle(engine_pb2.IdleRequest(), timeout=30)


def kill(worker: WorkerInfo) -> None:
    """SIGKILL to the worker's process: whoever listens on its port."""
    os.kill(listener(worker.engine_address), signal.SIGKILL)


@pytest.fixture
async def bench(own_cluster: RunningCluster) -> AsyncIterator[Bench]:
    """The cluster with all its workers; afterwards it has them again, and is idle."""
    async with httpx.AsyncClient(base_url=own_cluster.http, timeout=120) as http:
        bench = Bench(own_cluster, http)
        await bench.workers(count=3)
        yield bench
        await bench.workers(count=3)
    await assert_idle(own_cluster)


# Transfers that cannot be.


# The addresses are the last two texts of a worker's state (`scripts/common.lua`). Returns whether it had the old one.
_REDIRECT = """
local state, old = redis.call('HGET', KEYS[1], ARGV[1]), ARGV[2] .. '\\0'
if not state or string.sub(state, -#old) ~= old then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], string.sub(state, 1, -#old - 1) .. ARGV[3] .. '\\0')
return 1
"""


@contextmanager
def kv_address(bench: Bench, worker: WorkerInfo, address: str) -> Iterator[None]:
    """Let gateways believe that a worker sends its KV from this address."""
    client = redis.Redis.from_url(bench.cluster.redis_url)
    workers = Keys(bench.cluster.name).workers
    assert client.eval(_REDIRECT, 1, workers, worker.worker_id, worker.kv_address, address)
    try:
        yield
    finally:  # a worker that registered again in between has put its own address back itself
        client.eval(_REDIRECT, 1, workers, worker.worker_id, address, worker.kv_address)
        client.close()


@asynccontextmanager
async def silent_listener() -> AsyncIterator[str]:
    """An address that takes connections and never says a word."""
    writers = []

    async def keep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await reader.read()

    server = await asyncio.start_server(keep, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        for writer in writers:
            writer.close()
        server.close()


async def test_a_transfer_that_fails_is_recomputed(bench: Bench) -> None:
    expected = await bench.ask(_STORY, 24)
    assert not expected.ledger["recomputed"]
    assert expected.ledger["wire_bytes"] > 0
    (prefill,) = await bench.of_role("prefill")
    with kv_address(bench, prefill, "127.0.0.1:1"):  # nobody listens there
        refused = await bench.ask(_STORY, 24)
        answers = await asyncio.gather(*(bench.ask(_STORY, 24) for _ in range(4)))
    async with silent_listener() as address:
        with kv_address(bench, prefill, address):
            begin = time.monotonic()
            late = await bench.ask(_STORY, 24)
            assert time.monotonic() - begin > TRANSFER_TIMEOUT_S / 2
    for answer in (refused, late, *answers):
        assert answer.tokens == expected.tokens
        assert answer.ledger["recomputed"]
        assert answer.ledger["wire_bytes"] == 0
    # The prefill worker holds nothing, though nobody fetched: long before its lease ends.
    await assert_idle(bench.cluster, within_s=10)
    again = await bench.ask(_STORY, 24)
    assert again.tokens == expected.tokens
    assert not again.ledger["recomputed"]


# Too much to do.


async def test_overload_is_429_at_once(bench: Bench) -> None:
    begun = [asyncio.Event(), asyncio.Event()]

    async def fill(event: asyncio.Event) -> None:
        async for _ in bench.stream("Count to a thousand: 1, 2, 3,", 1900):
            event.set()

    fillers = []
    for event in begun:  # one on each decode worker
        fillers.append(asyncio.create_task(fill(event)))
        await event.wait()
    for stream in (False, True):
        for path in (COMPLETIONS, "/v1/chat/completions", "/v1/responses", "/v1/messages"):
            body = bench.body("more", 1800, stream=stream) | {"max_output_tokens": 1800, "input": "more"}
            body["messages"] = [{"role": "user", "content": "more"}]
            if path != COMPLETIONS:
                del body["prompt"]
            answer = await bench.http.post(path, json=body)
            assert answer.status_code == 429, (path, answer.text)
            assert int(answer.headers["retry-after"]) >= 1
            assert "is full" in answer.json()["error"]["message"], answer.text
    async with AsyncClient(bench.cluster.grpc) as client:
        with pytest.raises(JoinwiseError) as raised:
            await client.generate("more", max_tokens=1800)
    assert raised.value.code == "overloaded"
    assert raised.value.retry_after_s
    await bench.ask("a small one fits", 4)
    assert not any(filler.done() for filler in fillers)
    for filler in fillers:
        filler.cancel()
    await asyncio.gather(*fillers, return_exceptions=True)


# Workers that die.


async def test_a_prefill_worker_that_dies_costs_time_only(bench: Bench) -> None:
    expected = await bench.ask(_LONG, 12)
    (prefill,) = await bench.of_role("prefill")
    prompt = "0 " + _LONG  # nothing of it is in a cache
    asked = asyncio.create_task(bench.ask(prompt, 12))
    await bench.busy("prefill")
    kill(prefill)
    answer = await asked
    assert answer.ledger["recomputed"]
    assert answer.ledger["attempt"] == 0  # its decode worker has computed the prompt
    at_once = await bench.ask(_STORY, 8)  # still routed to the dead one, or already not
    await bench.workers(count=3, without=frozenset({prefill.worker_id}))
    after = await bench.ask(prompt, 12)
    assert after.tokens == answer.tokens
    assert after.ledger["prefill_worker"] not in (None, prefill.worker_id)
    assert (await bench.ask(_LONG, 12)).tokens == expected.tokens
    assert (await bench.ask(_STORY, 8)).tokens == at_once.tokens


async def test_a_decode_worker_that_dies_is_not_noticed_by_its_clients(bench: Bench) -> None:
    """And meanwhile others come and go: every one of them gets the right tokens, while the worker is replaced."""
    prompts = [f"{_STORY} number {number}" for number in range(3)]
    expected = [answer.tokens for answer in await asyncio.gather(*(bench.ask(prompt, 192) for prompt in prompts))]
    short = [tokens[:8] for tokens in expected]
    running = True

    async def load() -> int:
        count = 0
        while running:
            assert (await bench.ask(prompts[count % 3], 8)).tokens == short[count % 3]
            count += 1
        return count

    async def read(prompt: str, some: asyncio.Event) -> list[int]:
        tokens = []
        async for token in bench.stream(prompt, 192):
            tokens.append(token)
            if len(tokens) == 10:
                some.set()
        return tokens

    found = asyncio.create_task(bench.busy("decode"))  # looks already: the streams may be short
    begun = [asyncio.Event() for _ in prompts]
    streams = [asyncio.create_task(read(prompt, event)) for prompt, event in zip(prompts, begun, strict=True)]
    for event in begun:
        await event.wait()
    victim = await found
    kill(victim)
    loads = [asyncio.create_task(load()) for _ in range(2)]
    assert await asyncio.gather(*streams) == expected
    await bench.workers(count=3, without=frozenset({victim.worker_id}))
    # The new one serves: with the other one busy, the shorter queue is its.
    others = {info.worker_id for info in await bench.of_role("decode")} - {victim.worker_id}
    assert len(others) == 2
    served = set()
    async with asyncio.timeout(60):
        while served != others:
            answers = await asyncio.gather(*(bench.ask(prompt, 8) for prompt in prompts))
            assert [answer.tokens for answer in answers] == short
            served |= {answer.ledger["decode_worker"] for answer in answers}
    running = False
    assert all(count > 0 for count in await asyncio.gather(*loads))


async def test_no_worker_is_503_at_once(bench: Bench) -> None:
    expected = await bench.ask(_STORY, 8)
    old = await bench.workers(count=3)
    for worker in old:
        kill(worker)
    # Still registered, they are tried; then they are forgotten. Either way the client is told, and when to come again.
    at_once = await bench.http.post(COMPLETIONS, json=bench.body(_STORY, 8))
    assert at_once.status_code in (502, 503), at_once.text
    async with asyncio.timeout(20):
        while await bench.workers():
            await asyncio.sleep(0.05)
    for stream in (False, True):
        answer = await bench.http.post(COMPLETIONS, json=bench.body(_STORY, 8, stream=stream))
        assert answer.status_code == 503, answer.text
        assert int(answer.headers["retry-after"]) >= 1
        assert "no live worker" in answer.json()["error"]["message"].lower(), answer.text
    async with AsyncClient(bench.cluster.grpc) as client:
        with pytest.raises(JoinwiseError) as raised:
            await client.generate(_STORY, max_tokens=8)
        assert raised.value.code == "no_worker"
    await bench.workers(count=3, without=frozenset(info.worker_id for info in old))
    assert (await bench.ask(_STORY, 8)).tokens == expected.tokens


async def test_a_gateway_that_dies_is_not_noticed_by_clients_of_the_sdk(bench: Bench) -> None:
    """Its streams go on at its successor: every event once, text, tokens and log probabilities as undisturbed."""
    asks: list[dict[str, Any]] = [
        {"prompt": _STORY, "temperature": 0, "logprobs": 2},
        {"prompt": _STORY, "temperature": 0.8, "seed": 7, "presence_penalty": 0.5},
        {"messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 0},
    ]
    fixed = {"max_tokens": 256, "ignore_eos": True}
    async with AsyncClient(bench.cluster.grpc, resume=180) as client:
        expected = await asyncio.gather(*(client.generate(**ask, **fixed) for ask in asks))
        streams = [client.generate(**ask, **fixed, stream=True) for ask in asks]
        for stream in streams:
            for _ in range(20):
                await anext(stream)
        os.kill(listener(bench.cluster.grpc), signal.SIGKILL)
        answers = await asyncio.gather(*(stream.result() for stream in streams))
        for answer, right in zip(answers, expected, strict=True):
            assert (answer.text, answer.choices[0].token_ids) == (right.text, right.choices[0].token_ids)
            assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 256
        for mine, right in zip(answers[0].choices[0].logprobs, expected[0].choices[0].logprobs, strict=True):
            assert mine.token == right.token and mine.logprob == pytest.approx(right.logprob, abs=1e-3)
        with pytest.raises(InvalidRequestError, match="vocabulary"):
            await _resumed(bench.cluster.grpc, token_ids=[10**6])
        with pytest.raises(CannotResumeError, match="text"):
            await _resumed(bench.cluster.grpc, token_ids=expected[0].choices[0].token_ids[:3], characters=999)


async def _resumed(target: str, **resume: Any) -> None:
    """Ask for the rest of a stream by hand."""
    sampling = inference_pb2.SamplingOptions(temperature=0, max_tokens=8)
    request = inference_pb2.GenerateRequest(text=_STORY, sampling=sampling, request_id="by-hand")
    request.resume.CopyFrom(inference_pb2.Resume(next_sequence=4, **resume))
    async with grpc.aio.insecure_channel(target) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request)
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            trailer = dict(error.trailing_metadata() or ())
            raise error_from_code(str(trailer["joinwise-error"]), error.details() or "") from None


# Another configuration.


async def apply(
    bench: Bench, folder: Path, change: Callable[[dict[str, Any]], None]
) -> subprocess.CompletedProcess[str]:
    """`joinwise apply` with something changed in the cluster's first configuration."""
    config = copy.deepcopy(bench.cluster.config)
    change(config)
    file = folder / "new.yaml"
    file.write_text(yaml.safe_dump(config))
    return await asyncio.to_thread(Home(Path(os.environ["JOINWISE_HOME"])).joinwise, "apply", "-f", str(file))


def fewer_sequences(config: dict[str, Any]) -> None:
    """A change of the prefill pool alone."""
    config["pools"][0]["engine"].update(max_num_seqs=4)


async def test_apply_renews_what_it_touches_and_nobody_notices(bench: Bench, tmp_path: Path) -> None:
    """A refused one changes nothing; one of prefill's replaces its worker alone, while streams and requests go on."""
    old = {info.worker_id for info in await bench.workers(count=3)}
    (prefill,) = (info.worker_id for info in await bench.of_role("prefill"))
    story, short = (await bench.ask(_STORY, 400)).tokens, (await bench.ask(_STORY, 8)).tokens

    for change, said in (
        (lambda config: config["pools"][0].update(roll="mixed"), "roll"),
        (lambda config: config["models"][0].update(dtype="bfloat16"), "dtype stay while they run"),
        (lambda config: config["pools"][0]["engine"].update(block_sise=32), "block_sise"),
    ):
        refused = await apply(bench, tmp_path, change)
        assert refused.returncode == 1 and said in refused.stderr and "Traceback" not in refused.stderr, refused.stderr
    assert {info.worker_id for info in await bench.workers(count=3)} == old

    async def read() -> list[int]:
        return [token async for token in bench.stream(_STORY, 400)]

    changed = asyncio.create_task(apply(bench, tmp_path, fewer_sequences))
    streams = 0
    while not changed.done():
        read_now = asyncio.create_task(read())
        assert (await bench.ask(_STORY, 8)).tokens == short
        assert await read_now == story
        streams += 1
    assert (await changed).returncode == 0, (await changed).stderr
    assert streams
    renewed = {info.worker_id for info in await bench.workers(count=3, without=frozenset({prefill}))}
    assert renewed & old == old - {prefill}
    assert (await bench.ask("0 " + _STORY, 8)).ledger["prefill_worker"] in renewed - old


async def test_a_pool_lets_a_worker_go_and_takes_one_on_with_its_work(bench: Bench, tmp_path: Path) -> None:
    """Nobody asks: one of two decode workers leaves. Many ask: another comes. All are answered as ever."""
    expected = (await bench.ask(_STORY, 64)).tokens

    def follow(config: dict[str, Any]) -> None:
        fewer_sequences(config)  # as the test before has left it
        (pool,) = (pool for pool in config["pools"] if pool["role"] == "decode")
        pool["autoscale"] = {"least": 1, "most": 2, "target_s": 0.05, "up_s": 1, "down_s": 4}

    changed = await apply(bench, tmp_path, follow)
    assert changed.returncode == 0, changed.stderr
    left = {info.worker_id for info in await bench.workers(count=2)}
    asking = asyncio.create_task(_until_cancelled(bench, expected))
    try:
        come = {info.worker_id for info in await bench.workers(count=3)} - left
    finally:
        asking.cancel()
    assert len(come) == 1
    with suppress(asyncio.CancelledError):
        await asking
    assert (await apply(bench, tmp_path, fewer_sequences)).returncode == 0
    assert "pool decode: 2 -> 1 workers" in bench.cluster.log.read_text()
    await bench.workers(count=3)


async def _until_cancelled(bench: Bench, expected: list[int]) -> None:
    """Four streams at a time, each of which must bring what is expected."""
    while True:
        answers = await asyncio.gather(*(bench.ask(_STORY, len(expected)) for _ in range(4)))
        assert all(answer.tokens == expected for answer in answers)


# Redis.


async def test_without_redis_running_requests_end_and_new_ones_are_served(
    bench: Bench, redis_server: RedisServer
) -> None:
    expected = (await bench.ask(_STORY, 96)).tokens
    tokens = []
    async for token in bench.stream(_STORY, 96):
        tokens.append(token)
        if len(tokens) == 5:
            redis_server.kill()
            for stream in (False, True):
                answer = await bench.http.post(COMPLETIONS, json=bench.body("more", 8, stream=stream))
                assert answer.status_code == 200, answer.text  # on the workers that the gateway saw last
    assert tokens == expected
    redis_server.forget()
    redis_server.start()  # empty: the workers register again
    await bench.workers(count=3)
    assert (await bench.ask(_STORY, 96)).tokens == expected


# Starts that must be refused. Each under a home of its own, by which its processes are known.


def _refused(home: Home, config: dict[str, Any], timeout: float = 60) -> str:
    """Start a cluster that must not start; returns the one line that says why."""
    done = home.joinwise("up", "-f", home.write_config(config), timeout=timeout)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    home.wait_until_empty(10)
    assert not home.run_path(config["cluster"]).exists()
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return said


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def test_a_redis_that_is_not_there(home: Home, small_model: object) -> None:
    begin = time.monotonic()
    said = _refused(home, cluster_config("no-redis", redis={"url": "redis://:secret@127.0.0.1:1/0"}))
    assert "Redis does not answer" in said and "127.0.0.1:1" in said and "secret" not in said
    assert time.monotonic() - begin < 30, "nothing was started for it"


async def test_a_second_launcher_is_refused(bench: Bench, home: Home) -> None:
    """Of the same name under the same home; and of another name on the same ports."""
    theirs = os.environ["JOINWISE_HOME"]
    same = await asyncio.to_thread(Home(Path(theirs)).joinwise, "up", "-f", str(bench.cluster.file))
    assert same.returncode == 1
    assert "'failing' runs on this machine already" in same.stderr
    assert "Traceback" not in same.stderr
    for name, address in (("http_port", bench.cluster.http), ("grpc_port", bench.cluster.grpc)):
        config = cluster_config("another")
        config["gateway"][name] = int(address.rpartition(":")[2])
        said = await asyncio.to_thread(_refused, home, config)
        assert f"gateway.{name}" in said and "Address already in use" in said
    await bench.ask(_STORY, 4)
