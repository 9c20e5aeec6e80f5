"""`kv.transport: nixl`: vLLM's NixlConnector carries the KV, and everything else stays as it is."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from helpers.cluster import MODEL, RunningCluster, cluster_config, running_cluster
from helpers.idle import assert_idle

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.model,
    pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="NIXL is not installed: pip install nixl"),
]

_STORY = "Once upon a time, in a small village by the sea, "
_TOKENS = 24


@pytest.fixture(scope="module")
def nixl_cluster(small_model: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    with running_cluster(
        cluster_config("nixl", kv={"transport": "nixl", "lease_s": 5}), tmp_path_factory.mktemp("nixl")
    ) as it:
        yield it


async def _ask(http: httpx.AsyncClient, prompt: str, **more: Any) -> tuple[list[int], dict[str, Any]]:
    fixed = {"model": MODEL, "temperature": 0, "ignore_eos": True, "return_token_ids": True, "max_tokens": _TOKENS}
    answer = await http.post(
        "/v1/completions", json={**fixed, "prompt": prompt, **more}, headers={"x-joinwise-ledger": "1"}
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"], json.loads(answer.headers["x-joinwise-ledger"])


async def test_split_requests_get_the_tokens_of_whole_ones(nixl_cluster: RunningCluster) -> None:
    prompts = [f"{number} {_STORY}" * (1 + 9 * number) for number in range(4)]
    async with httpx.AsyncClient(base_url=nixl_cluster.http, timeout=120) as http:
        split = await asyncio.gather(*(_ask(http, prompt) for prompt in prompts))
        for prompt, (tokens, ledger) in zip(prompts, split, strict=True):
            assert ledger["prefill_worker"] not in (None, ledger["decode_worker"])
            assert (ledger["transport"], ledger["recomputed"]) == ("nixl", False), ledger
            assert ledger["replayed_steps"] == 1
            whole, alone = await _ask(http, prompt, prompt_logprobs=0)
            assert alone["prefill_worker"] is None
            assert tokens == whole
    await assert_idle(nixl_cluster)


async def test_a_client_that_leaves_holds_nothing(nixl_cluster: RunningCluster) -> None:
    body = {"model": MODEL, "prompt": "9 " + _STORY * 40, "max_tokens": 400, "ignore_eos": True, "stream": True}
    async with httpx.AsyncClient(base_url=nixl_cluster.http, timeout=120) as http:
        for chunks in range(3):  # before the KV is asked for, perhaps, and after
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.aiter_lines()
                for _ in range(chunks):
                    await anext(lines)
    await assert_idle(nixl_cluster)
