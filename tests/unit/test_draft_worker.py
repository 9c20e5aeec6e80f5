"""The draft actor as a whole: found through Redis, guarded as the other workers' ports are, gone without a trace."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from helpers.certificates import Authority
from helpers.draft_rig import HELLO, ask, tokens
from helpers.tiny_target import IDS, saved, tiny
from redis.asyncio import Redis

from joinwise.actors.auth import bearer
from joinwise.actors.draft.head import DovetailHead, HeadShape, TargetEnds, save_head
from joinwise.actors.draft.hidden import packed
from joinwise.actors.draft.link import channel_to
from joinwise.actors.draft.worker import DraftWorker
from joinwise.actors.models import resolve_model
from joinwise.actors.spec import WorkerSpec
from joinwise.actors.tls import peers
from joinwise.cluster.config import JoinwiseConfig
from joinwise.cluster.config_model import PeerTlsConfig
from joinwise.cluster.drafts import Drafts
from joinwise.cluster.errors import ConfigError, ModelNotFoundError
from joinwise.cluster.router.registry import Registry
from joinwise.cluster.store.embedded import EmbeddedRedis
from joinwise.proto import draft_pb2, draft_pb2_grpc

TEXT = tokens(1, 2, 3, 1, 2)


def configured(cluster: str, draft: dict[str, Any] | None = None, **sections: Any) -> JoinwiseConfig:
    pools = [
        {"name": "all", "model": "m", "role": "mixed"},
        {"name": "fast", "model": "m", "role": "decode", "speculation": {"draft": "drafts"}},
        {"name": "drafts", "model": "m", "role": "draft", "draft": draft},
    ]
    models = [{"name": "m", "model": "org/m"}]
    config = {"cluster": cluster, "models": models, "pools": pools, "router": {"heartbeat_s": 0.05}, **sections}
    return JoinwiseConfig.model_validate(config)


@asynccontextmanager
async def working(
    config: JoinwiseConfig, redis_url: str, host: str = "127.0.0.1"
) -> AsyncIterator[tuple[DraftWorker, dict[str, Any]]]:
    worker = DraftWorker(config, WorkerSpec("drafts", "drafts-0-1", host=host), redis_url)
    try:
        yield worker, await worker.start()
    finally:
        await worker.stop()


async def drafted(channel: grpc.aio.Channel, cluster: str, token: str = "") -> list[int]:
    """What an engine gets."""
    call = draft_pb2_grpc.DraftServiceStub(channel).Draft(metadata=bearer(token), timeout=10)
    hello = draft_pb2.DraftHello()
    hello.CopyFrom(HELLO)
    hello.cluster = cluster
    await call.write(draft_pb2.DraftRequest(hello=hello))
    assert (await call.read()).WhichOneof("message") == "welcome"
    asked = draft_pb2.DraftRound(number=1, patience_us=10_000_000, asks=[ask(1, TEXT, k=2)])
    await call.write(draft_pb2.DraftRequest(round=asked))
    answer = await call.read()
    await call.done_writing()
    return list(answer.answer.drafts[0].token_ids)


def page(address: str, path: str) -> str:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
        return str(answer.read().decode())


async def test_it_is_found_drafts_counts_and_leaves(
    redis_server: EmbeddedRedis, redis_client: Redis, cluster_name: str
) -> None:
    config = configured(cluster_name)
    drafts = Drafts(redis_client, cluster_name, config.router)
    async with working(config, redis_server.url) as (worker, facts):
        found = await drafts.bind("drafts", "engine")
        assert found is not None
        assert (found.address, found.drafter, found.vocabulary_digest) == (facts["draft_address"], "lookup", "")
        async with grpc.aio.insecure_channel(found.address) as channel:
            assert await drafted(channel, cluster_name) == [3, 1]
        text = page(found.metrics_address, "/metrics")
        assert "joinwise:draft_rounds_total 1.0" in text
        assert "joinwise:draft_tokens_total 2.0" in text
        assert page(found.metrics_address, "/livez")
        assert worker.failure() == ""
    assert await drafts.bind("drafts", "engine") is None


async def test_beyond_the_machine_it_wants_the_clusters_token(
    redis_server: EmbeddedRedis, redis_client: Redis, cluster_name: str
) -> None:
    config = configured(cluster_name)
    token = await Registry(redis_client, cluster_name, config.router).token()
    async with (
        working(config, redis_server.url, host="0.0.0.0") as (_, facts),
        grpc.aio.insecure_channel(facts["draft_address"]) as channel,
    ):
        for wrong in ("", "another"):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await drafted(channel, cluster_name, wrong)
            assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert await drafted(channel, cluster_name, token) == [3, 1]


async def test_with_tls_it_talks_to_the_clusters_own_only(
    redis_server: EmbeddedRedis, cluster_name: str, tmp_path: Path
) -> None:
    files = Authority().issue(tmp_path)
    settings = PeerTlsConfig(cert=str(files.cert), key=str(files.key), ca=str(files.ca))
    config = configured(cluster_name, tls=settings.model_dump())
    async with working(config, redis_server.url) as (_, facts):
        async with grpc.aio.insecure_channel(facts["draft_address"]) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await drafted(channel, cluster_name)
        with channel_to(peers(settings), facts["draft_address"]) as secure:
            grpc.channel_ready_future(secure).result(10)


async def test_a_drafter_that_fails_makes_it_sick(
    redis_server: EmbeddedRedis, cluster_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> list[list[int]]:
        raise RuntimeError("no memory")

    monkeypatch.setattr("joinwise.actors.draft.lookup.PromptLookup.draft", broken)
    async with working(configured(cluster_name), redis_server.url) as (worker, facts):
        async with grpc.aio.insecure_channel(facts["draft_address"]) as channel:
            with pytest.raises((grpc.aio.AioRpcError, AttributeError)):  # the stream ends instead of an answer
                await drafted(channel, cluster_name)
        deadline = time.monotonic() + 10
        while "no memory" not in worker.failure():
            assert time.monotonic() < deadline


async def test_a_draft_model_that_there_is_not(redis_server: EmbeddedRedis, cluster_name: str, tmp_path: Path) -> None:
    worker = DraftWorker(
        configured(cluster_name, {"model": str(tmp_path / "nothing")}), WorkerSpec("drafts", "d"), redis_server.url
    )
    with pytest.raises(ModelNotFoundError):
        await worker.start()
    await worker.stop()


async def test_a_draft_model_that_cannot_draft(redis_server: EmbeddedRedis, cluster_name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"x": 0}}}')
    worker = DraftWorker(
        configured(cluster_name, {"model": str(tmp_path)}), WorkerSpec("drafts", "d"), redis_server.url
    )
    with pytest.raises(ConfigError, match="cannot draft with"):
        await worker.start()
    await worker.stop()


async def test_a_head_drafts_for_the_target_that_it_was_trained_for_alone(
    redis_server: EmbeddedRedis, redis_client: Redis, cluster_name: str, tmp_path: Path
) -> None:
    target = resolve_model(str(saved(tmp_path / "tiny", tiny(layers=1))))
    other = resolve_model(str(saved(tmp_path / "other", tiny(seed=4, layers=1))))
    ends = TargetEnds.read(target.path, torch.float32)
    save_head(DovetailHead(HeadShape.like(target.path, 1), ends), tmp_path / "head", target)
    draft = {"head": str(tmp_path / "head"), "slots": 2, "max_tokens": 64}
    models = [{"name": "m", "model": str(target.path)}]
    async with working(configured(cluster_name, draft, models=models), redis_server.url) as (worker, facts):
        found = await Drafts(redis_client, cluster_name, worker._config.router).bind("drafts", "engine")
        assert found is not None
        assert (found.drafter, found.vocabulary_model) == ("head of tiny", "m")
        vocabulary = draft_pb2.DraftVocabulary(model="m", size=IDS, digest=found.vocabulary_digest)
        hello = draft_pb2.DraftHello(protocol_version=1, cluster=cluster_name, worker_id="w", vocabulary=vocabulary)
        async with grpc.aio.insecure_channel(facts["draft_address"]) as channel:
            call = draft_pb2_grpc.DraftServiceStub(channel).Draft(timeout=20)
            await call.write(draft_pb2.DraftRequest(hello=hello))
            assert (await call.read()).welcome.hidden_size == 64
            one = ask(1, tokens(5, 6, 7), k=3)
            one.hidden = packed(np.ones((1, 64), np.float32))
            asked = draft_pb2.DraftRound(number=1, patience_us=10_000_000, asks=[one])
            await call.write(draft_pb2.DraftRequest(round=asked))
            assert len((await call.read()).answer.drafts[0].token_ids) == 3
            await call.done_writing()
    models = [{"name": "m", "model": str(other.path)}]
    worker = DraftWorker(configured(cluster_name, draft, models=models), WorkerSpec("drafts", "d"), redis_server.url)
    with pytest.raises(ConfigError, match=r"trained for 'tiny' .* not for 'other'"):
        await worker.start()
    await worker.stop()


def test_a_pool_drafts_with_a_model_or_with_a_head() -> None:
    with pytest.raises(ValueError, match="leave out `model` or `head`"):
        configured("c", {"model": "a", "head": "b"})
