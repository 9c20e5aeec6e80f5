"""LoRA adapters on a split cluster: from the configuration and at run time, on all workers or on none."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import msgspec
import psutil
import pytest
from helpers.adapters import make_adapter
from helpers.cluster import MODEL, RunningCluster, cluster_config, running_cluster
from helpers.idle import assert_idle

from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.router.registry import Registry, WorkerInfo
from joinwise.cluster.store.client import connect
from joinwise.proto import engine_pb2, engine_pb2_grpc

pytestmark = [pytest.mark.cluster, pytest.mark.model]

_PROMPT = "The capital of France is"
_TOKENS = 12


@dataclass
class Adapted:
    """A cluster whose engines take adapters.

    Attributes:
        calm: folder of the adapter that the configuration names.
        wild: folder of one that nobody knows yet.
    """

    cluster: RunningCluster
    calm: Path
    wild: Path


@pytest.fixture(scope="module")
def adapted(small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adapted]:
    folder = tmp_path_factory.mktemp("adapters")
    calm, wild = (make_adapter(small_model.path, folder / name, seed=seed) for seed, name in enumerate(("a", "b")))
    config = cluster_config("adapters")
    config["models"][0]["adapters"] = [{"name": "calm", "path": str(calm)}]
    for pool in config["pools"]:
        pool["engine"]["max_loras"] = 2
    config["gateway"]["admin"] = True
    with running_cluster(config, folder) as cluster:
        yield Adapted(cluster, calm, wild)


@pytest.fixture
async def http(adapted: Adapted) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=adapted.cluster.http, timeout=60) as client:
        yield client
    await assert_idle(adapted.cluster)


async def test_an_adapter_of_the_configuration_is_served(
    adapted: Adapted, http: httpx.AsyncClient, small_model: Any
) -> None:
    assert await names(http) == {MODEL, "calm"}
    assert [worker.adapters for worker in await workers(adapted)] == [{"calm"}, {"calm"}]
    base, calm = await complete(http, MODEL), await complete(http, "calm")
    assert base != calm
    assert calm == merged_greedy(small_model.path, adapted.calm), (
        "as with the adapter's weights merged into the model's"
    )


async def test_one_that_is_added_is_everywhere_and_gone_again_when_removed(
    adapted: Adapted, http: httpx.AsyncClient
) -> None:
    await post(http, "/v1/load_lora_adapter", lora_name="wild", lora_path=str(adapted.wild))
    assert await names(http) == {MODEL, "calm", "wild"}
    wild = await complete(http, "wild")
    assert wild not in (await complete(http, MODEL), await complete(http, "calm"))
    assert {len(await held(worker)) for worker in await workers(adapted)} == {2}
    again = await http.post("/v1/load_lora_adapter", json={"lora_name": "wild", "lora_path": str(adapted.wild)})
    assert again.status_code == 400

    # A worker that joins has it before it takes requests.
    (decode,) = [worker for worker in await workers(adapted) if worker.role == "decode"]
    kill_worker(decode)
    joined = await wait_for_another(adapted, decode)
    assert joined.adapters == {"calm", "wild"}
    assert await complete(http, "wild") == wild

    await post(http, "/v1/unload_lora_adapter", lora_name="wild")
    assert await names(http) == {MODEL, "calm"}
    gone = await http.post("/v1/completions", json={"model": "wild", "prompt": _PROMPT, "max_tokens": 2})
    assert gone.status_code == 404
    assert {len(await held(worker)) for worker in await workers(adapted)} == {1}
    assert (await http.post("/v1/unload_lora_adapter", json={"lora_name": "wild"})).status_code == 404


async def test_one_that_a_worker_refuses_is_nowhere(
    adapted: Adapted, http: httpx.AsyncClient, small_model: Any, tmp_path: Path
) -> None:
    too_large = make_adapter(small_model.path, tmp_path / "large", seed=3, rank=64)
    for path, reason in ((too_large, "rank"), (tmp_path / "missing", "missing")):
        refused = await http.post("/v1/load_lora_adapter", json={"lora_name": "bad", "lora_path": str(path)})
        assert refused.status_code == 400
        assert reason in refused.json()["error"]["message"]
    assert await names(http) == {MODEL, "calm"}
    assert [worker.adapters for worker in await workers(adapted)] == [{"calm"}, {"calm"}]
    assert {len(await held(worker)) for worker in await workers(adapted)} == {1}


async def test_cached_prefixes_are_forgotten_everywhere(adapted: Adapted, http: httpx.AsyncClient) -> None:
    prompt = "All work and no play makes Jack a dull boy. " * 12

    async def cached() -> int:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 1}
        usage = (await http.post("/v1/completions", json=body)).json()["usage"]
        return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)

    await cached()
    assert await cached() > 0
    await assert_idle(adapted.cluster)
    assert (await http.post("/v1/reset_prefix_cache")).json() == {"reset": True}
    assert await cached() == 0


async def test_calls_to_one_engine_are_not_implemented(http: httpx.AsyncClient) -> None:
    for path in ("/sleep", "/pause", "/collective_rpc"):
        refused = await http.post(path)
        assert refused.status_code == 501
        assert refused.json()["error"]["code"] == "not_supported"


async def complete(http: httpx.AsyncClient, model: str) -> list[int]:
    """The tokens of a greedy completion, which must have been split."""
    body = {"model": model, "prompt": _PROMPT, "max_tokens": _TOKENS, "temperature": 0, "return_token_ids": True}
    response = await http.post("/v1/completions", json=body, headers={"x-joinwise-ledger": "1"})
    assert response.status_code == 200, response.text
    ledger = json.loads(response.headers["x-joinwise-ledger"])
    assert ledger["prefill_worker"] != ledger["decode_worker"]
    tokens: list[int] = response.json()["choices"][0]["token_ids"]
    return tokens


async def names(http: httpx.AsyncClient) -> set[str]:
    return {model["id"] for model in (await http.get("/v1/models")).json()["data"]}


async def post(http: httpx.AsyncClient, path: str, **body: str) -> None:
    response = await http.post(path, json=body)
    assert response.status_code == 200, response.text


async def workers(adapted: Adapted) -> tuple[WorkerInfo, ...]:
    client = connect(adapted.cluster.redis_url)
    try:
        return await Registry(client, adapted.cluster.name, RouterConfig()).list()
    finally:
        await client.aclose()


async def held(worker: WorkerInfo) -> list[int]:
    """Adapters that a worker's engine itself says it has."""
    request = engine_pb2.UtilityRequest(method="list_loras", arguments=msgspec.msgpack.encode([]))
    async with grpc.aio.insecure_channel(worker.engine_address) as channel:
        answer = await engine_pb2_grpc.EngineServiceStub(channel).Utility(request, timeout=30)
    loaded: list[int] = msgspec.msgpack.decode(answer.result)
    return loaded


def kill_worker(worker: WorkerInfo) -> None:
    """SIGKILL to whoever listens on the worker's port."""
    port = int(worker.engine_address.rpartition(":")[2])
    (pid,) = {each.pid for each in psutil.net_connections("tcp") if each.status == "LISTEN" and each.laddr.port == port}
    assert pid
    os.kill(pid, signal.SIGKILL)


async def wait_for_another(adapted: Adapted, lost: WorkerInfo, timeout_s: float = 120) -> WorkerInfo:
    deadline = time.monotonic() + timeout_s
    while True:
        for worker in await workers(adapted):
            if worker.role == lost.role and worker.worker_id != lost.worker_id:
                return worker
        assert time.monotonic() < deadline, "no worker took the lost one's place"
        await asyncio.sleep(0.5)


def merged_greedy(model: Path, adapter: Path) -> list[int]:
    """Greedy tokens of transformers' own model with the adapter added to its weights: another implementation."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights, tensors = dict(network.named_parameters()), load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    with torch.no_grad():
        for name in [name for name in tensors if name.endswith("lora_A.weight")]:
            target = name.removeprefix("base_model.model.").replace("lora_A.", "")
            change = tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
            weights[target] += change * (config["lora_alpha"] / config["r"])
        tokens = AutoTokenizer.from_pretrained(model)(_PROMPT, return_tensors="pt")["input_ids"]
        answer = network.generate(tokens, max_new_tokens=_TOKENS, do_sample=False)
    return [int(token) for token in answer[0, tokens.shape[1] :]]
