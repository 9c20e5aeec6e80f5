"""Workers that differ give what one engine gives: in block size, and in tensor-parallel width."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from helpers.ask import Answer, Question, ask, assert_same
from helpers.cluster import ENGINE, RunningCluster, cluster_config, running_cluster
from helpers.idle import assert_idle
from helpers.plain_vllm import PlainServer, plain_server

from joinwise.actors.models import resolve_model

pytestmark = [pytest.mark.cluster, pytest.mark.model]

_QWEN = "qwen2.5-coder-0.5b-instruct"
_QUESTIONS = [
    Question(
        f"{tokens} tokens",
        {"prompt": [(7 * index) % 900 + 1 for index in range(tokens)], "max_tokens": 12, "temperature": 0},
    )
    for tokens in (10, 64, 100, 333, 700)
]
"""Prompts that end inside a block, at its edge and beyond several."""


async def _answers(url: str, questions: list[Question]) -> list[Answer]:
    """The answers of one server: each question alone, then all at once."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        alone = [await ask(http, question) for question in questions]
        return alone + await asyncio.gather(*(ask(http, question) for question in questions))


async def _assert_answers(cluster: RunningCluster, questions: list[Question], expected: list[Answer]) -> None:
    answers = await _answers(cluster.http, questions)
    for question, ours, theirs in zip(questions * 2, answers, expected, strict=True):
        assert (ours.status, theirs.status) == (200, 200), f"{question}: {ours.body} {theirs.body}"
        assert_same(str(question), ours.body, theirs.body)
    for answer in answers[: len(questions)]:
        assert answer.ledgers[0]["transport"], "its KV has travelled"
        assert not answer.ledgers[0]["recomputed"]
    await assert_idle(cluster)


async def test_block_sizes_may_differ(small_model: object, baseline: PlainServer, tmp_path: Path) -> None:
    config = cluster_config("block-sizes")
    prefill, decode = (pool["engine"] for pool in config["pools"])
    prefill["max_num_batched_tokens"] = 512
    decode["block_size"] = 64
    with running_cluster(config, tmp_path) as cluster:
        await _assert_answers(cluster, _QUESTIONS, await _answers(baseline.http, _QUESTIONS))


@pytest.mark.timeout(600)
async def test_two_ranks_prefill_for_one(tmp_path: Path) -> None:
    """Each rank of the prefill worker holds one of the model's two KV heads."""
    model, questions = resolve_model(_QWEN, progress=print), _QUESTIONS[:4]
    config = cluster_config("ranks")
    config["models"][0]["model"] = _QWEN
    config["pools"][0]["engine"]["tensor_parallel_size"] = 2
    with plain_server(str(model.path), tmp_path, max_model_len=2048, **ENGINE) as server:  # gone before the cluster
        expected = await _answers(server.http, questions)
    with running_cluster(config, tmp_path) as cluster:
        await _assert_answers(cluster, questions, expected)
