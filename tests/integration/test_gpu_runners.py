"""Connector and replay on a GPU, on both of vLLM's model runners: the split cluster against one plain engine.

Two engines share one device. Every question is split, so its first token is replayed on the decode worker, and its KV
crosses layer by layer: with CUDA graphs, whose pieces the connector asks for, and without.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import gpu
from helpers.ask import Pair, Question, pair
from helpers.cluster import ENGINE, RunningCluster, cluster_config, running_cluster
from helpers.idle import assert_idle
from helpers.plain_vllm import PlainServer, plain_server

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.cluster,
    pytest.mark.model,
    gpu.needs_vllm("connector and replay on both model runners"),
]

PROMPT = [1 + 37 * index % 40000 for index in range(1500)]
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}, "required": ["name"]}
QUESTIONS = [
    *(
        Question(f"{length} tokens", {"prompt": PROMPT[:length], "temperature": 0, "max_tokens": 8})
        for length in (1, 16, 31, 33, 512, 513, 1500)
    ),
    Question("seed", {"prompt": PROMPT[:40], "temperature": 0.8, "seed": 7, "max_tokens": 16}),
    Question("seed, two samples", {"prompt": PROMPT[:40], "temperature": 0.8, "seed": 7, "n": 2, "max_tokens": 8}),
    Question(
        "penalties",
        {
            "prompt": PROMPT[:40],
            "temperature": 0,
            "presence_penalty": 1.5,
            "frequency_penalty": 0.5,
            "max_tokens": 16,
        },
    ),
    Question(
        "a schema",
        {
            "prompt": "A person as JSON: ",
            "temperature": 0,
            "max_tokens": 24,
            "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
        },
    ),
]


def config(*, eager: bool) -> dict[str, Any]:
    """One device for both engines, each with a part of it."""
    found = cluster_config("gpu")
    for pool in found["pools"]:
        pool |= {"device": "gpu", "resources": {"num_cpus": 1, "num_gpus": 0.5}}
        pool["engine"] |= {"enforce_eager": eager, "max_num_batched_tokens": 512}
    return found


@pytest.fixture(
    scope="module",
    params=[("0", True), ("1", True), ("1", False)],
    ids=["first runner", "second runner", "second runner, graphs"],
)
def servers(
    request: pytest.FixtureRequest, small_model: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningCluster, PlainServer]]:
    """The cluster, and plain vLLM with the same runner; both inherit which."""
    runner, eager = request.param
    folder: Path = tmp_path_factory.mktemp("gpu")
    arguments = {name: ENGINE[name] for name in ("block_size", "kv_cache_memory_bytes")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
        with (
            plain_server(str(small_model.path), folder, max_model_len=2048, **arguments) as plain,
            running_cluster(config(eager=eager), folder, timeout_s=600) as cluster,
        ):
            yield cluster, plain


@pytest.fixture
async def both(servers: tuple[RunningCluster, PlainServer]) -> AsyncIterator[Pair]:
    cluster, plain = servers
    async with pair(cluster.http, plain.http) as ends:
        yield ends
    await assert_idle(cluster)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.name)
async def test_it_answers_as_one_engine_does(both: Pair, question: Question) -> None:
    answer = await both.equal(question)
    for ledger in answer.ledgers:
        assert ledger["prefill_worker"] and ledger["prefill_worker"] != ledger["decode_worker"], ledger
        assert not ledger["recomputed"] and ledger["wire_bytes"], ledger
