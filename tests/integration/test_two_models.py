"""Two models in one cluster, each with its own pool and its own adapter, behind one gateway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from helpers.adapters import make_adapter
from helpers.cluster import ENGINE, RunningCluster, cluster_config, running_cluster
from helpers.idle import assert_idle

from joinwise.cluster.client import AsyncClient
from joinwise.cluster.errors import InvalidRequestError, ModelNotFoundError
from joinwise.cluster.router.why import decisions_on
from joinwise.cluster.store.client import connect

pytestmark = [pytest.mark.cluster, pytest.mark.model]

_SERVED = {"wide": "alpha", "narrow": "beta", "wild": "beta"}
"""Name that a client asks for -> the pool that must serve it. The adapter `wild` is of `narrow`."""
_LIMITS = {"wide": 1024, "narrow": 256}
_PROMPT = "The capital of France is " * 20  # some full blocks, equal in both models


@pytest.fixture(scope="module")
def shared_by_two(small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """One checkpoint under two names, so that nothing but the name tells them apart."""
    folder = tmp_path_factory.mktemp("two")
    wild = make_adapter(small_model.path, folder / "wild", seed=1)
    models = [
        {"name": name, "model": "smollm2-135m-instruct", "dtype": "float32", "max_model_len": limit}
        for name, limit in _LIMITS.items()
    ]
    models[1]["adapters"] = [{"name": "wild", "path": str(wild)}]
    pools = [
        {
            "name": _SERVED[name],
            "model": name,
            "role": "mixed",
            "engine": {**ENGINE, "kv_cache_memory_bytes": 80_000_000},
        }
        for name in _LIMITS
    ]
    with running_cluster(cluster_config("two-models", models=models, pools=pools), folder) as cluster:
        yield cluster


@pytest.fixture
async def http(shared_by_two: RunningCluster) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"x-joinwise-ledger": "1", "x-session-id": "one-session-for-both"}
    async with httpx.AsyncClient(base_url=shared_by_two.http, timeout=60, headers=headers) as client:
        yield client
    await assert_idle(shared_by_two)


def body_of(path: str, model: str | None, **more: Any) -> dict[str, Any]:
    """A short greedy question; a ledger is asked for with it."""
    said = [{"role": "user", "content": _PROMPT}]
    asked: dict[str, Any] = {"prompt": _PROMPT, "max_tokens": 4}
    if path.endswith(("/chat/completions", "/messages")):
        asked = {"messages": said, "max_tokens": 4}
    elif path.endswith("/responses"):
        asked = {"input": _PROMPT, "max_output_tokens": 4}
    return {"model": model, "temperature": 0, **asked, **more}


def pools_of(answer: httpx.Response) -> set[str]:
    """The pools of the workers that served a call, as its ledger has it."""
    assert answer.status_code == 200, answer.text
    told = answer.headers.get("x-joinwise-ledger")
    if told is None:
        (told,) = (
            line.partition(" joinwise-ledger ")[2] for line in answer.text.splitlines() if line.startswith(": j")
        )
    ledgers = json.loads(told)
    return {ledger["decode_worker"].split("-")[0] for ledger in (ledgers if isinstance(ledgers, list) else [ledgers])}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
async def test_each_interface_serves_both(http: httpx.AsyncClient, path: str) -> None:
    names = [*_SERVED, *_SERVED]
    answers = await asyncio.gather(
        *(http.post(path, json=body_of(path, name, stream=index >= len(_SERVED))) for index, name in enumerate(names))
    )
    assert [pools_of(answer) for answer in answers] == [{_SERVED[name]} for name in names]
    unknown = await http.post(path, json=body_of(path, "none"))
    assert (unknown.status_code, "`none` does not exist" in unknown.text) == (404, True)
    unclear = await http.post(path, json=body_of(path, None))
    assert (unclear.status_code, "one of wide, narrow" in unclear.text) == (400, True)


async def test_what_is_listed_and_what_each_can_take(http: httpx.AsyncClient, shared_by_two: RunningCluster) -> None:
    listed = (await http.get("/v1/models")).json()["data"]
    assert [(each["id"], each["parent"], each["max_model_len"]) for each in listed] == [
        ("wide", None, 1024),
        ("narrow", None, 256),
        ("wild", "narrow", None),
    ]
    long = {"prompt": list(range(1000, 1400)), "max_tokens": 2}
    assert (await http.post("/v1/completions", json={"model": "wide", **long})).status_code == 200
    assert (await http.post("/v1/completions", json={"model": "narrow", **long})).status_code == 400
    for name, limit in {"wide": 1024, "narrow": 256, "wild": 256}.items():
        answer = (await http.post("/tokenize", json={"model": name, "prompt": "Paris"})).json()
        assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), limit)
        text = await http.post("/detokenize", json={"model": name, "tokens": answer["tokens"]})
        assert text.json()["prompt"] == "Paris"
    assert (await http.post("/tokenize", json={"model": "none", "prompt": "Paris"})).status_code == 404
    refused = await http.post("/sleep")
    assert (refused.status_code, refused.json()["error"]["code"]) == (501, "not_supported")


async def test_grpc_chooses_too(shared_by_two: RunningCluster) -> None:
    async with AsyncClient(shared_by_two.grpc, timeout=60) as client:
        assert [(each.name, each.parent) for each in await client.models()] == [
            ("wide", ""),
            ("narrow", ""),
            ("wild", "narrow"),
        ]
        for name, pool in _SERVED.items():
            answer = await client.generate(_PROMPT, model=name, max_tokens=4, temperature=0)
            assert answer.ledger is not None
            assert answer.ledger["decode_worker"].startswith(pool)
            assert answer.ledger["model"] == ("narrow" if name == "wild" else name)
        with pytest.raises(ModelNotFoundError, match="`none`"):
            await client.generate("x", model="none", max_tokens=1)
        with pytest.raises(InvalidRequestError, match="one of wide, narrow"):
            await client.generate("x", max_tokens=1)
        assert {(worker.pool, worker.model) for worker in (await client.status()).workers} == {
            ("alpha", "wide"),
            ("beta", "narrow"),
        }


async def test_a_prefix_and_a_session_draw_nobody_to_another_model(
    http: httpx.AsyncClient, shared_by_two: RunningCluster
) -> None:
    """Equal prompts have equal block names in both models."""
    redis = connect(shared_by_two.redis_url)
    try:
        for name in (*_SERVED, "wide"):
            answer = await http.post("/v1/completions", json=body_of("", name, n=2, temperature=0.5))
            assert pools_of(answer) == {_SERVED[name]}
            (decision,) = await decisions_on(redis, shared_by_two.name, f"{answer.json()['id']}-0")
            assert {each.worker_id.split("-")[0] for each in decision.candidates} == {_SERVED[name]}
    finally:
        await redis.aclose()


async def test_series_name_the_model(http: httpx.AsyncClient) -> None:
    for path in ("/metrics", "/federate"):
        text = (await http.get(path)).text
        counts = [
            line for line in text.splitlines() if line.startswith("vllm:request_success_total{") and "stop" in line
        ]
        for name in _LIMITS:
            assert any(f'model_name="{name}"' in line for line in counts), path
        assert 'http_requests_total{handler="/v1/completions",method="POST",status="2xx"}' in text, path
    assert 'model="narrow",pool="beta"' in text
