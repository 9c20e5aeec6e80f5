"""Workers that differ give what one engine gives: in block size, and in tensor-parallel width."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.ask import Question, pair
from helpers.cluster import RunningCluster, cluster_config, running_cluster
from helpers.idle import assert_idle
from helpers.plain_vllm import PlainServer

pytestmark = [pytest.mark.cluster, pytest.mark.model]


def _config(kind: str) -> dict[str, Any]:
    config = cluster_config(kind)
    prefill, decode = (pool["engine"] for pool in config["pools"])
    if kind == "block-sizes":
        decode["block_size"] = 64
        prefill["max_num_batched_tokens"] = 512
    else:
        prefill["tensor_parallel_size"] = 3
    return config


@pytest.fixture(scope="module", params=["block-sizes", "ranks"])
def unequal(
    request: pytest.FixtureRequest, small_model: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningCluster]:
    """A cluster whose prefill and decode workers lay out their KV differently."""
    with running_cluster(_config(request.param), tmp_path_factory.mktemp(request.param)) as cluster:
        yield cluster


async def test_unequal_workers_answer_as_one_engine(unequal: RunningCluster, baseline: PlainServer) -> None:
    """Prompts that end inside a block, at its edge and beyond several, alone and together; then a prefix hit."""
    questions = [
        Question(f"{tokens} tokens", {"prompt": [(7 * i) % 900 + 1 for i in range(tokens)], "max_tokens": 12, "temperature": 0})
        for tokens in (10, 64, 100, 333, 700)
    ]
    async with pair(unequal.http, baseline.http) as both:
        for question in questions:
            answer = await both.equal(question)
            assert answer.ledgers[0]["transport"], "its KV has travelled"
            assert not answer.ledgers[0]["recomputed"]
        await asyncio.gather(*(both.equal(question) for question in questions))
    await assert_idle(unequal)
