"""Random faults in one running cluster: no wrong token, nothing leaked, no engine dead.

FUZZ_SEED and FUZZ_ROUNDS change the seed and the number of rounds (`make fuzz-kv`).
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter

import pytest
from helpers.ask import Pair, Question, pair
from helpers.cluster import RunningCluster
from helpers.idle import assert_idle
from helpers.plain_vllm import PlainServer
from helpers.raw_gateway import RawGateway, attached, workers

from joinwise.cluster.router.registry import WorkerInfo
from joinwise.proto import engine_pb2

pytestmark = [pytest.mark.cluster, pytest.mark.model, pytest.mark.timeout(0)]

SEED = int(os.environ.get("FUZZ_SEED", "3"))
ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "50"))
FAULTS = ("none", "client_aborts", "nobody_listens", "old_epoch", "sender_cancelled", "receiver_cancelled")
NEW_TOKENS = 8


def _question(name: str, prompt: list[int]) -> Question:
    return Question(name, {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True})


async def _by_hand(
    name: str, fault: str, prompt: list[int], dice: random.Random, prefill: RawGateway, decode: RawGateway, peer: str
) -> list[int] | None:
    """Both halves of one request, one of which goes wrong; its tokens, None where it was cancelled."""
    from joinwise.actors.vllm.handoff import Handoff

    epoch = dice.randint(2, 1 << 40)
    address = "127.0.0.1:1" if fault == "nobody_listens" else peer
    send = Handoff("send", name, epoch)
    receive = Handoff("recv", name, epoch - (fault == "old_epoch"), address, timeout_s=10.0)
    await prefill.add(f"{name}.p", prompt, handoff=send, max_tokens=1)
    if fault == "sender_cancelled" and dice.random() < 0.5:
        await prefill.tokens(f"{name}.p")  # its KV waits for the receiver
    if fault == "sender_cancelled":
        await prefill.abort(f"{name}.p")
    await decode.add(f"{name}.d", prompt, handoff=receive, max_tokens=NEW_TOKENS)
    if fault == "receiver_cancelled":
        await asyncio.sleep(dice.random() * 0.2)
        await decode.abort(f"{name}.d")
        await prefill.abort(f"{name}.p")
        return None
    report = await decode.report(f"{name}.d")
    if fault != "sender_cancelled":  # that one may come too late
        assert report.recomputed, f"{fault} was not noticed"
    await decode.send(continue_request=engine_pb2.ContinueRequest(request_id=f"{name}.d", epoch=receive.epoch))
    tokens, _ = await decode.tokens(f"{name}.d")
    await prefill.abort(f"{name}.p")
    return tokens


async def _aborted(both: Pair, question: Question, dice: random.Random) -> None:
    """A client that goes away."""
    body = {"model": "smol", "stream": True, **question.body, "max_tokens": 200}
    async with both.cluster.stream("POST", question.path, json=body) as answer:
        lines = answer.aiter_lines()
        if dice.random() < 0.5:
            await anext(lines)


async def _round(index: int, both: Pair, prefill: RawGateway, decode: RawGateway, peer: str) -> str:
    dice = random.Random(f"{SEED}/{index}")
    fault = FAULTS[index % len(FAULTS)]
    prompts = [[dice.randint(1, 900) for _ in range(dice.randint(10, 200))] for _ in range(3)]
    try:
        bystanders = [
            asyncio.ensure_future(both.equal(_question(f"round {index} of seed {SEED}", each))) for each in prompts[1:]
        ]
        victim = _question(f"victim of round {index}", prompts[0])
        if fault == "none":
            await both.equal(victim)
        elif fault == "client_aborts":
            await _aborted(both, victim, dice)
        else:
            tokens = await _by_hand(f"fuzz{index}.0", fault, prompts[0], dice, prefill, decode, peer)
            if tokens is not None:
                _, expected = await both.ask(victim)
                assert tokens == expected.token_ids, f"wrong tokens after {fault}"
        await asyncio.gather(*bystanders)
    except BaseException as error:
        error.add_note(f"FUZZ_SEED={SEED}, round {index}: {fault}")
        raise
    return fault


async def test_no_wrong_token(cluster: RunningCluster, baseline: PlainServer) -> None:
    before: dict[str, WorkerInfo] = await workers(cluster)
    played = Counter[str]()
    async with (
        pair(cluster.http, baseline.http) as both,
        attached(cluster.name, before["prefill"]) as prefill,
        attached(cluster.name, before["decode"]) as decode,
    ):
        for index in range(ROUNDS):
            played[await _round(index, both, prefill, decode, before["prefill"].kv_address)] += 1
            if index % 10 == 9:
                await assert_idle(cluster)
    await assert_idle(cluster)
    after = await workers(cluster)
    assert {role: each.epoch for role, each in after.items()} == {role: each.epoch for role, each in before.items()}
    assert min(played[fault] for fault in FAULTS) >= ROUNDS // len(FAULTS), played
