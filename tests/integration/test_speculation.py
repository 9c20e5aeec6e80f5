"""A real engine that verifies what a real draft actor, in a process of its own, proposes: output is that of plain vLLM,
whatever becomes of the actor, and requests that speculation cannot serve exactly go elsewhere.

The draft is the target itself, so that drafts are nearly always accepted: what would change a token has every chance.
"""

from __future__ import annotations

import asyncio
import copy
import math
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
import yaml
from helpers.ask import Answer, Question, ask
from helpers.cluster import ENGINE, MODEL, RunningCluster, cluster_config, running_cluster
from helpers.drawn import FALSE_ALARM, p_value
from helpers.idle import assert_idle
from helpers.plain_vllm import PlainServer
from helpers.processes import Home

from joinwise.actors.draft.head import DovetailHead, HeadShape, TargetEnds, save_head
from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.drafts import DraftInfo, Drafts
from joinwise.cluster.router.registry import Registry, WorkerInfo
from joinwise.cluster.store.client import connect

pytestmark = [pytest.mark.cluster, pytest.mark.model]

PROMPTS = [
    "The capital of France is",
    "Count: one, two, three, four,",
    "def fibonacci(n):\n    ",
    " ".join(f"{number} bottles of beer on the wall," for number in range(20)),
]
TOKENS = 24
LONGEST = 512
FIRST_TOKENS = 120


def _config() -> dict[str, Any]:
    """Prompts on one engine, which also serves what is not plain; plain answers on another, with a draft actor."""
    # Not adaptive: a draft as large as its target, on the same cores, does not pay.
    speculation = {"draft": "drafts", "k": 4, "deadline_ms": 2000, "adaptive": False}
    draft = {"model": "smollm2-135m-instruct", "dtype": "float32", "max_tokens": LONGEST, "lookup": False}
    pools: list[dict[str, Any]] = [
        {"name": "whole", "model": MODEL, "role": "mixed", "engine": dict(ENGINE)},
        {"name": "fast", "model": MODEL, "role": "decode", "engine": dict(ENGINE), "speculation": speculation},
        {"name": "drafts", "model": MODEL, "role": "draft", "draft": draft},
    ]
    config = cluster_config("speculating", pools=pools)
    config["models"][0]["max_model_len"] = LONGEST
    return config


@pytest.fixture(scope="module")
def running(small_model: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    with running_cluster(_config(), tmp_path_factory.mktemp("speculating")) as cluster:
        yield cluster
        asyncio.run(assert_draft_idle(cluster))


@pytest.fixture
async def cluster(running: RunningCluster) -> AsyncIterator[RunningCluster]:
    """The cluster; it must be idle after the test."""
    yield running
    await assert_idle(running)


async def assert_draft_idle(cluster: RunningCluster, within_s: float = 20.0) -> None:
    """Wait until the draft actor holds nothing of any sequence: engines that are idle tell it nothing."""
    deadline = time.monotonic() + within_s
    while True:
        found = await draft_metrics(cluster)
        if not found["joinwise:draft_slots_used"] and not found["joinwise:draft_sequences"]:
            return
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.2)


async def draft_of(cluster: RunningCluster) -> DraftInfo:
    """The draft actor that lives now."""
    client = connect(cluster.redis_url)
    try:
        async with asyncio.timeout(60):
            while True:
                drafts = Drafts(client, cluster.name, RouterConfig())
                info = await drafts.bind("drafts", "test")
                await drafts.unbind("drafts", "test")
                if info is not None:
                    return info
                await asyncio.sleep(0.1)
    finally:
        await client.aclose()


async def fast_worker(cluster: RunningCluster) -> WorkerInfo:
    client = connect(cluster.redis_url)
    try:
        (worker,) = [
            each for each in await Registry(client, cluster.name, RouterConfig()).list() if each.pool == "fast"
        ]
        return worker
    finally:
        await client.aclose()


async def metrics(address: str) -> dict[str, float]:
    """Sums of all series of a process, by family."""
    async with httpx.AsyncClient(timeout=30) as http:
        text = (await http.get(f"http://{address}/metrics")).text
    sums: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name = line.partition("{")[0].partition(" ")[0]
            sums[name] = sums.get(name, 0.0) + float(line.rpartition(" ")[2])
    return sums


async def draft_metrics(cluster: RunningCluster) -> dict[str, float]:
    return await metrics((await draft_of(cluster)).metrics_address)


async def accepted(cluster: RunningCluster) -> float:
    """Drafts that the engine has accepted so far."""
    found = await metrics((await fast_worker(cluster)).metrics_address)
    return found.get("vllm:spec_decode_num_accepted_tokens_total", 0.0)


def process_of(address: str) -> psutil.Process:
    """Who listens there."""
    port = int(address.rpartition(":")[2])
    (pid,) = {each.pid for each in psutil.net_connections("tcp") if each.status == "LISTEN" and each.laddr.port == port}
    return psutil.Process(pid)


async def complete(http: str, prompt: Any, **body: Any) -> Answer:
    asked = {"model": MODEL, "prompt": prompt, "max_tokens": TOKENS, "return_token_ids": True, **body}
    async with httpx.AsyncClient(base_url=http, timeout=120) as client:
        return await ask(client, Question("completion", asked))


async def ids(http: str, prompt: Any, **body: Any) -> list[int]:
    return (await complete(http, prompt, temperature=0, **body)).token_ids


async def all_of(http: str) -> list[list[int]]:
    """Every prompt at once."""
    return await asyncio.gather(*(ids(http, prompt) for prompt in PROMPTS))


@pytest.fixture(scope="module")
def expected(baseline: PlainServer) -> list[list[int]]:
    """What plain vLLM says to each prompt, one after the other."""

    async def ask() -> list[list[int]]:
        return [await ids(baseline.http, prompt) for prompt in PROMPTS]

    return asyncio.run(ask())


async def test_greedy_output_is_that_of_plain_vllm_and_drafts_are_accepted(
    cluster: RunningCluster, expected: list[list[int]]
) -> None:
    before = await accepted(cluster)
    assert await all_of(cluster.http) == expected
    gained = await accepted(cluster) - before
    assert gained > len(PROMPTS) * TOKENS / 3
    assert (await draft_metrics(cluster))["joinwise:draft_tokens_total"] >= gained


async def test_a_draft_actor_that_stalls_and_one_that_is_killed_change_nothing(
    cluster: RunningCluster, expected: list[list[int]]
) -> None:
    draft = await draft_of(cluster)
    process = process_of(draft.address)
    asking = asyncio.create_task(all_of(cluster.http))
    await asyncio.sleep(0.3)  # in the middle of it
    process.send_signal(signal.SIGSTOP)
    try:
        assert await asking == expected
        begin = time.monotonic()
        assert await ids(cluster.http, PROMPTS[0]) == expected[0]
        assert time.monotonic() - begin < 20
    finally:
        process.send_signal(signal.SIGCONT)
    asking = asyncio.create_task(all_of(cluster.http))
    await asyncio.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    assert await asking == expected
    async with asyncio.timeout(90):
        while (await draft_of(cluster)).draft_id == draft.draft_id:
            await asyncio.sleep(0.2)
        before = await accepted(cluster)
        while await accepted(cluster) == before:  # the new one is found, and told everything
            assert await ids(cluster.http, PROMPTS[2]) == expected[2]


async def test_what_is_plain_is_handed_over_and_what_is_not_goes_to_the_engine_without(
    cluster: RunningCluster, baseline: PlainServer
) -> None:
    special: list[dict[str, Any]] = [
        {"seed": 5, "temperature": 1.0},
        {"presence_penalty": 1.5},
        {"logit_bias": {"11": 5}},
    ]
    for asked in ({}, *special):
        body = {"temperature": 0, "max_tokens": 12, **asked}
        answer, plain = await asyncio.gather(
            complete(cluster.http, PROMPTS[0], **body), complete(baseline.http, PROMPTS[0], **body)
        )
        assert answer.token_ids == plain.token_ids, asked
        (ledger,) = answer.ledgers
        assert ledger["decode_worker"].startswith("whole-" if asked else "fast-"), ledger
        assert bool(ledger["prefill_worker"]) == bool(ledger["transport"]) == (not asked), ledger
        assert not ledger["recomputed"]
        assert not (asked and ledger["draft_rounds"]), ledger
        assert 0 <= ledger["accepted_drafts"] <= ledger["draft_tokens"], ledger


async def test_the_first_token_after_an_import_is_drawn_from_the_targets_distribution(cluster: RunningCluster) -> None:
    """Were the step after a KV import padded with drafts that nobody made, its token would be drawn from garbage.

    The first token of an answer comes from the prefill engine, the second from the step after the import. The prompt
    fills no KV block, so that it is imported each time. `test_speculation_sampling` shows that garbage is noticed.
    """
    body = {"temperature": 1.0, "top_k": 3, "max_tokens": 2, "logprobs": 5, "ignore_eos": True}
    at_once = asyncio.Semaphore(8)

    async def draw() -> Answer:
        async with at_once:
            return await complete(cluster.http, PROMPTS[0], **body)

    answers = await asyncio.gather(*(draw() for _ in range(FIRST_TOKENS)))
    chances: dict[Any, float] = {}
    for answer in answers:
        first, second = (_chances(best, 3) for best in answer.choices[0]["logprobs"]["top_logprobs"])
        said = answer.choices[0]["logprobs"]["tokens"]
        chances |= {(said[0], token): first.get(said[0], 0.0) * chance for token, chance in second.items()}
    chances["of a first token that was never drawn"] = max(0.0, 1 - sum(chances.values()))
    drawn = [tuple(answer.choices[0]["logprobs"]["tokens"]) for answer in answers]
    assert p_value(drawn, chances) > FALSE_ALARM
    assert sum(bool(answer.ledgers[0]["transport"]) for answer in answers) > FIRST_TOKENS * 0.9


def _chances(logprobs: dict[str, float], top_k: int) -> dict[str, float]:
    """Of each token, where the most likely few are drawn from."""
    best = sorted(logprobs, key=lambda token: -logprobs[token])[:top_k]
    total = sum(math.exp(logprobs[token]) for token in best)
    return {token: math.exp(logprobs[token]) / total for token in best}


async def test_a_sequence_may_be_as_long_as_the_model_allows(cluster: RunningCluster) -> None:
    prompt = list(range(1000, 1000 + LONGEST - 12))
    assert len(await ids(cluster.http, prompt, ignore_eos=True, max_tokens=12)) == 12


async def test_a_head_takes_the_models_place_and_changes_no_token(
    cluster: RunningCluster, small_model: Any, expected: list[list[int]], tmp_path: Path
) -> None:
    """By `joinwise apply`. It has learnt nothing, and needs what the engine thought of each token."""
    head = DovetailHead(HeadShape.like(small_model.path, 1), TargetEnds.read(small_model.path, torch.float32))
    save_head(head.eval(), tmp_path / "head", small_model)
    engine, before = await fast_worker(cluster), await draft_of(cluster)
    config = copy.deepcopy(cluster.config)
    config["pools"][2]["draft"] = {
        "head": str(tmp_path / "head"), "dtype": "float32", "max_tokens": LONGEST, "lookup": False
    }  # fmt: skip
    file = tmp_path / "head.yaml"
    file.write_text(yaml.safe_dump(config))
    done = await asyncio.to_thread(Home(Path(os.environ["JOINWISE_HOME"])).joinwise, "apply", "-f", str(file))
    assert done.returncode == 0, done.stderr
    assert (await draft_of(cluster)).draft_id != before.draft_id
    async with asyncio.timeout(60):
        while not (await draft_metrics(cluster))["joinwise:draft_tokens_total"]:  # the engine has found it
            assert await all_of(cluster.http) == expected
    assert await fast_worker(cluster) == engine, "an engine tells hidden states to whoever wants them"
