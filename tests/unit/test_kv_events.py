"""The seam to vLLM's KV events, on vLLM's own block pool and hasher, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from joinwise.actors.vllm.kv_events import BlockNames, events_config, report_blocks

BLOCK = 16


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", "1")  # set back afterwards


def names() -> BlockNames:
    config: Any = SimpleNamespace(cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256"))
    return BlockNames(config, BLOCK)


def request(tokens: list[int], **changes: Any) -> Request:
    init_none_hash(sha256)
    params = SamplingParams(max_tokens=4)
    return Request("r", tokens, params, None, block_hasher=get_request_block_hasher(BLOCK, sha256), **changes)


def numbers(request: Request) -> list[int]:
    return [int.from_bytes(block_hash[:8], "little") for block_hash in request.block_hashes]


@pytest.mark.parametrize("length", [0, 15, 16, 17, 100])
def test_a_prompts_blocks_are_named_as_vllm_does(length: int) -> None:
    tokens = list(range(1, length + 1))
    assert list(names().of(tokens)) == numbers(request(tokens))
    assert len(list(names().of(tokens))) == length // BLOCK


def test_adapters_and_salts_make_other_blocks() -> None:
    tokens = list(range(64))
    lora = LoRARequest("tone", 7, "/a/tone")
    assert list(names().of(tokens, lora=lora)) == numbers(request(tokens, lora_request=lora))
    assert list(names().of(tokens, cache_salt="s")) == numbers(request(tokens, cache_salt="s"))
    assert len({next(names().of(tokens, **each)) for each in ({}, {"lora": lora}, {"cache_salt": "s"})}) == 3


class Cache:
    """vLLM's block pool, reporting as in a scheduler."""

    def __init__(self, blocks: int = 8) -> None:
        events_config()  # sets what vLLM reads from the environment
        self.pool = BlockPool(blocks + 1, True, BLOCK, enable_kv_cache_events=True)
        self.known: set[int] = set()
        self.scheduler: Any = SimpleNamespace(kv_cache_manager=SimpleNamespace(block_pool=self.pool))
        report_blocks(self.scheduler, self.note)

    def note(self, present: Any, absent: Any, cleared: bool) -> None:
        if cleared:
            self.known.clear()
        self.known = (self.known - set(absent)) | set(present)

    def step(self) -> None:
        if events := self.pool.take_events():
            self.scheduler.kv_event_publisher.publish(SimpleNamespace(events=events))

    def store(self, tokens: list[int]) -> list[Any]:
        one = request(tokens)
        blocks = self.pool.get_new_blocks(len(one.block_hashes))
        self.pool.cache_full_blocks(one, blocks, 0, len(blocks), BLOCK, 0)
        return blocks


def test_stored_and_evicted_blocks_are_noted() -> None:
    cache, tokens = Cache(blocks=8), list(range(64))
    blocks = cache.store(tokens)
    cache.step()
    assert cache.known == set(names().of(tokens))
    cache.pool.free_blocks(reversed(blocks))
    cache.step()
    assert cache.known == set(names().of(tokens))  # free, and still cached
    cache.store(list(range(1000, 1096)))
    cache.step()
    expected = set(names().of(range(1000, 1096))) | set(list(names().of(tokens))[:2])
    assert cache.known == expected


def test_a_block_that_is_cached_twice_and_evicted_once_is_still_there() -> None:
    cache, tokens = Cache(blocks=4), list(range(32))
    first, second = cache.store(tokens), cache.store(tokens)
    cache.pool.free_blocks(reversed(first))
    cache.step()
    cache.store(list(range(500, 532)))  # takes the first copy's blocks
    cache.step()
    assert set(names().of(tokens)) <= cache.known
    cache.pool.free_blocks(reversed(second))
    cache.store(list(range(600, 632)))
    cache.step()
    assert not set(names().of(tokens)) & cache.known


def test_a_cleared_cache_is_noted() -> None:
    cache = Cache()
    cache.pool.free_blocks(cache.store(list(range(32))))
    cache.step()
    assert cache.known
    assert cache.pool.reset_prefix_cache()
    cache.step()
    assert not cache.known


def test_events_are_on_and_go_nowhere_else() -> None:
    config = events_config()
    assert config.enable_kv_cache_events
    assert config.publisher == "null"
