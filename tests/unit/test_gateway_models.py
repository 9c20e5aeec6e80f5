"""What a gateway with several models keeps apart: adapters, who holds what, vLLM's series."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from helpers.router_rig import Make
from helpers.workers import worker
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, generate_latest
from redis.asyncio import Redis
from vllm.lora.request import LoRARequest
from vllm.parser.metrics import record_tool_parser_invocation
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from joinwise.actors.gateway import served as served_module
from joinwise.actors.gateway.adapters import Adapters, adapter_routes
from joinwise.actors.gateway.front import error_body
from joinwise.actors.gateway.gateway import Gateway
from joinwise.actors.gateway.links import Links
from joinwise.actors.gateway.served import ServedModel, front_end_args, membership
from joinwise.actors.gateway.utilities import Utilities
from joinwise.actors.vllm.series import ModelSeries
from joinwise.cluster.config import load_config
from joinwise.cluster.config_model import GatewayConfig, ModelConfig, RouterConfig
from joinwise.cluster.errors import ConfigError, JoinwiseError, StoreUnavailableError, WorkerLostError
from joinwise.cluster.router.registry import Registry
from joinwise.cluster.router.router import WorkerRef


class FakeUtilities:
    """Workers of one model; a load waits for `gate`."""

    def __init__(self) -> None:
        self.loaded: dict[str, str] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.resets = 0
        self.busy = False

    async def add_lora(self, lora: LoRARequest) -> bool:
        await self.gate.wait()
        self.loaded[lora.lora_name] = lora.lora_path
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        self.loaded.clear()
        return True

    async def reset_prefix_cache(self, reset_running_requests: bool) -> bool:
        self.resets += 1
        return not self.busy


class World:
    """The adapters of the models `a` and `b`, behind their routes."""

    def __init__(self, *names: str) -> None:
        self.workers = {name: FakeUtilities() for name in names}
        self.lists = {
            name: SimpleNamespace(lora_requests={}, registry=SimpleNamespace(is_base_model=name.__eq__))
            for name in names
        }
        self.adapters = [
            Adapters(
                cast(Any, None), cast(Utilities, self.workers[name]), cast(Any, self.lists[name]), name, enabled=True
            )
            for name in names
        ]
        app = FastAPI()
        app.include_router(adapter_routes(self.adapters, admin=True))
        app.add_exception_handler(JoinwiseError, self.on_error)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")

    async def on_error(self, request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, JoinwiseError)
        return JSONResponse(error_body(error), error.http_status)

    async def load(self, name: str, model: str | None = None) -> tuple[int, str]:
        body = {"lora_name": name, "lora_path": f"/{name}", **({"model": model} if model else {})}
        answer = await self.http.post("/v1/load_lora_adapter", json=body)
        return answer.status_code, answer.text

    async def unload(self, name: str) -> int:
        return (await self.http.post("/v1/unload_lora_adapter", json={"lora_name": name})).status_code


async def test_an_adapter_goes_to_the_workers_of_its_model() -> None:
    world = World("a", "b")
    assert (await world.load("law", "b"))[0] == 200
    assert (await world.load("med", "a"))[0] == 200
    assert (world.workers["a"].loaded, world.workers["b"].loaded) == ({"med": "/med"}, {"law": "/law"})
    assert await world.unload("law") == 200  # its name says whose it is
    assert (world.workers["a"].loaded, world.workers["b"].loaded) == ({"med": "/med"}, {})
    assert await world.unload("law") == 404


async def test_an_adapter_whose_model_is_not_clear() -> None:
    world = World("a", "b")
    status, text = await world.load("law")
    assert (status, "one of a, b" in text) == (400, True)
    assert (await world.load("law", "c"))[0] == 404
    assert (
        await world.http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "x", "model": 3})
    ).status_code == 422
    assert not world.workers["a"].loaded and not world.workers["b"].loaded


async def test_a_name_means_one_thing() -> None:
    world = World("a", "b")
    assert (await world.load("law", "a"))[0] == 200
    for name, model in (("law", "b"), ("law", "a"), ("a", "b"), ("b", "b")):
        status, text = await world.load(name, model)
        assert (status, "another" in text) == (400, True), (name, model)
    assert not world.workers["b"].loaded


async def test_of_two_that_take_one_name_at_once_one_gets_it() -> None:
    world = World("a", "b")
    for workers in world.workers.values():
        workers.gate.clear()
    loads = [asyncio.create_task(world.load("law", model)) for model in ("a", "b")]
    for _ in range(20):
        await asyncio.sleep(0)
    for workers in world.workers.values():
        workers.gate.set()
    assert sorted(status for status, _ in await asyncio.gather(*loads)) == [200, 400]
    assert sum(len(workers.loaded) for workers in world.workers.values()) == 1


async def test_one_model_needs_no_name() -> None:
    world = World("a")
    assert (await world.load("law"))[0] == 200
    assert (await world.load("med", "a"))[0] == 200
    assert (await world.load("dent", "b"))[0] == 404
    assert world.workers["a"].loaded == {"law": "/law", "med": "/med"}


async def test_prefixes_are_forgotten_by_all_models() -> None:
    world = World("a", "b")
    assert (await world.http.post("/v1/reset_prefix_cache")).json() == {"reset": True}
    world.workers["a"].busy = True
    assert (await world.http.post("/v1/reset_prefix_cache")).json() == {"reset": False}
    assert [workers.resets for workers in world.workers.values()] == [2, 2]


def test_a_model_has_its_own_template_and_parsers() -> None:
    gateway = GatewayConfig(
        tool_parser="hermes", enable_auto_tools=True, chat_template="{{ all }}", default_max_tokens=7
    )
    own = ModelConfig(name="a", model="x", tool_parser="mistral", chat_template="{{ own }}", reasoning_parser="qwen3")
    args = front_end_args(gateway, own, "/x", 64)
    assert (args.served_model_name, args.chat_template, args.tool_call_parser) == (["a"], "{{ own }}", "mistral")
    assert args.structured_outputs_config.reasoning_parser == "qwen3"
    args = front_end_args(gateway, ModelConfig(name="b", model="x", served_name="bee"), "/x", 64)
    assert (args.served_model_name, args.chat_template, args.tool_call_parser) == (["bee"], "{{ all }}", "hermes")
    assert args.structured_outputs_config.reasoning_parser == ""
    assert args.enable_auto_tool_choice and args.override_generation_config == {"max_new_tokens": 7}
    with pytest.raises(ConfigError, match="no argument 'nothing'"):
        front_end_args(gateway.model_copy(update={"vllm_args": {"nothing": 1}}), own, "/x", 64)


def test_a_model_knows_its_own_workers() -> None:
    llm = SimpleNamespace(holders=None, strangers=frozenset())
    served = ServedModel("a", "1", cast(Any, None), cast(Any, llm), cast(Any, None), cast(Any, None), cast(Any, None))
    workers: Any = [
        SimpleNamespace(worker_id="w0", model="a", model_digest="1", role="prefill"),
        SimpleNamespace(worker_id="w1", model="b", model_digest="1", role="mixed"),
        SimpleNamespace(worker_id="w2", model="a", model_digest="1", role="decode"),
        SimpleNamespace(worker_id="liar", model="a", model_digest="2", role="mixed"),
    ]
    assert served.observe(workers, alone=False) == {"prefill", "decode"}
    assert (llm.holders, llm.strangers) == ({"w0", "w2"}, {"liar"})
    assert served.observe(workers[1:2], alone=False) == frozenset()
    assert (llm.holders, llm.strangers) == (frozenset(), frozenset())
    served.observe(workers, alone=True)
    assert (llm.holders, llm.strangers) == (None, {"liar"})


def test_a_gateway_that_will_wake_a_pool_is_ready() -> None:
    parts = {"_draining": False, "_http": SimpleNamespace(started=True), "_served": {"m": frozenset()}}
    for wakes, said in (({"m": 60.0}, ""), ({}, "no worker for every role is registered, only: none")):
        gateway: Any = SimpleNamespace(**parts, _config=SimpleNamespace(wakes=wakes), _sick=lambda: "")
        assert Gateway._unready(gateway) == said


def test_blocks_are_named_as_by_the_first_worker_where_there_was_none_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(served_module, "BlockNames", lambda config, size: (config, size))
    llm = SimpleNamespace(holders=None, strangers=frozenset(), blocks=None, vllm_config="c")
    nothing: Any = None
    served = ServedModel("a", "1", nothing, cast(Any, llm), nothing, nothing, nothing, prefix_events=True)
    assert served.observe([], alone=True) == frozenset() and llm.blocks is None
    for size in (16, 32):
        served.observe([worker("w", model="a", model_digest="1", block_size=size)], alone=True)
        assert llm.blocks == ("c", 16)


async def test_a_worker_with_other_files_is_linked_to_by_nobody(
    redis_client: Redis, cluster_name: str, make_worker: Make
) -> None:
    """It came when nobody of its model was there to be compared with."""
    registry = Registry(redis_client, cluster_name, RouterConfig())
    liar = await registry.register(make_worker("liar", model_digest="2"))
    other = await registry.register(make_worker("other", model="n"))
    info = make_worker("honest")
    check = membership(registry, info.model, info.model_digest)
    for name, epoch in (("liar", liar), ("other", other)):
        with pytest.raises(WorkerLostError, match="other files"):
            await check(WorkerRef(name, epoch, "", ""))
        await check(WorkerRef(name, epoch - 1, "", ""))  # of another life: opening the link finds that out
    await check(WorkerRef("nobody", 1, "", ""))
    await registry.deregister("liar", liar)
    honest = WorkerRef("honest", await registry.register(info), "", "")
    await check(honest)

    async def away(ids: Sequence[str]) -> Any:
        raise StoreUnavailableError("gone")

    await membership(cast(Any, SimpleNamespace(states_of=away)), info.model, "other")(
        WorkerRef("honest", epoch, "", "")
    )


async def test_a_link_that_may_not_be_opened_is_not() -> None:
    async def refuse(worker: WorkerRef) -> None:
        raise WorkerLostError("it has other files")

    links = Links("c", "g", on_message=cast(Any, None), on_lost=cast(Any, None), check=refuse)
    worker = WorkerRef("liar", 1, "127.0.0.1:1", "")
    for _ in range(2):
        with pytest.raises(WorkerLostError, match="other files"):
            await links.get(worker)
    assert links.find(worker) is None


def _front_end(registry: CollectorRegistry, model: str) -> tuple[Any, Any]:
    """Registers as vLLM's front end does: as if it were alone."""
    requests = Counter("vllm:request_success", "Requests", ["model_name", "engine"], registry=registry)
    seconds = Histogram("vllm:e2e", "Seconds", ["model_name"], buckets=(1,), registry=registry)
    return requests.labels(model, "0"), seconds.labels(model)


def test_series_of_two_front_ends_are_shown_together() -> None:
    registry = CollectorRegistry(auto_describe=True)
    ours = Counter("joinwise:own", "Not vLLM's", registry=registry)
    series = ModelSeries(registry)
    fronts = []
    for model in ("a", "b"):
        fronts.append(_front_end(registry, model))
        with pytest.raises(ValueError, match="Duplicated"):
            _front_end(registry, "without taking aside")
        series.take()
    series.show(["a", "b"], tools=True)
    ours.inc()
    for count, (requests, seconds) in enumerate(fronts, 1):
        requests.inc(count)
        seconds.observe(0.5)
    text = generate_latest(registry).decode()
    assert 'vllm:request_success_total{engine="0",model_name="a"} 1.0' in text
    assert 'vllm:request_success_total{engine="0",model_name="b"} 2.0' in text
    assert text.count("# TYPE vllm:request_success_total counter") == text.count("# TYPE vllm:e2e histogram") == 1
    assert text.count('vllm:e2e_count{model_name="') == 2
    assert "joinwise:own_total 1.0" in text
    record_tool_parser_invocation(is_tool_called=True, is_streaming=False, request=None)
    called = 'mode="non_streaming",model_name="a,b",outcome="tool_call",request_type="other"} 1.0'
    assert called in generate_latest(REGISTRY).decode()
    assert generate_latest(registry).decode() == text  # looking changes nothing
    series.close()
    series.close()
    assert "vllm:request_success" not in generate_latest(registry).decode()


@pytest.fixture(autouse=True)
def _no_series_left() -> Any:
    yield
    unregister_vllm_metrics()


_TWO = """\
models:
  - {name: small, model: a, adapters: [{name: sql, path: /sql}]}
  - {name: large, model: b, served_name: big}
pools:
  - {name: one, model: small, role: mixed}
  - {name: two, model: large, role: prefill}
  - {name: three, model: large, role: decode}
"""


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("model: small, role: mixed", "model: large, role: mixed", "model 'small' has no pool with a replica"),
        ("model: large, role: decode", "model: small, role: decode", "model 'large' has only prefill pools"),
        (
            "model: large, role: decode",
            "model: huge, role: decode",
            "names the unknown model 'huge'; known: small, large",
        ),
        ("name: large, model", "name: small, model", "the name 'small' is used 2 times"),
        ("served_name: big", "served_name: small", "the served name 'small' is used 2 times"),
        ("served_name: big", "served_name: sql", "the served name 'sql' is used 2 times"),
        ("models:", "gateway: {enable_auto_tools: true}\nmodels:", "or one of model 'large'"),
    ],
)
def test_models_and_pools_that_do_not_fit(tmp_path: Path, old: str, new: str, expected: str) -> None:
    file = tmp_path / "joinwise.yaml"
    file.write_text(_TWO)
    assert [model.public_name for model in load_config(file, {}).models] == ["small", "big"]
    assert old in _TWO
    file.write_text(_TWO.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_config(file, {})
    assert any(expected in problem and "\n" not in problem for problem in caught.value.problems), caught.value.problems


def test_each_model_may_have_its_own_tools(tmp_path: Path) -> None:
    file = tmp_path / "joinwise.yaml"
    text = _TWO.replace("model: a,", "model: a, tool_parser: hermes,").replace(
        "model: b,", "model: b, tool_parser: mistral,"
    )
    file.write_text("gateway: {enable_auto_tools: true}\n" + text)
    assert [model.tool_parser for model in load_config(file, {}).models] == ["hermes", "mistral"]
