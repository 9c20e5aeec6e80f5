"""The seam to vLLM's KV events: what a worker's cache holds, and what a prompt's blocks are called.

A worker reports from its stepping thread, at the end of every step that changed its cache. An event says only which
blocks to look at; whether each is there is asked of vLLM's block pool itself, so that a block that is cached twice and
evicted once is not lost. Both sides name a block by the first 8 bytes of vLLM's own hash of it, which is the same in
every process: SHA-256 over a fixed seed (`prefix_caching_hash_algo` must be a cryptographic one).
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

from vllm.config import KVEventsConfig, VllmConfig
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, EventBatch, EventPublisher
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched.scheduler import Scheduler

Note = Callable[[Iterable[int], Iterable[int], bool], None]
"""`note(present, absent, cleared)`, as `PrefixLog.note`."""


def events_config() -> KVEventsConfig:
    """Engine argument `kv_events_config`: events are made, and published by nobody but `report_blocks`.

    Events must name blocks by their whole hashes, which vLLM reads from the environment of its process: it is set here.
    """
    os.environ["VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES"] = "0"
    return KVEventsConfig(enable_kv_cache_events=True, publisher="null")


def report_blocks(scheduler: Scheduler, note: Note) -> None:
    """Have an engine's scheduler tell `note` which blocks its cache holds. Before the engine's first step."""
    scheduler.kv_event_publisher = _Reporter(scheduler, note)


def report_now(scheduler: Scheduler) -> None:
    """Tell what has changed between two steps: an idle engine may not step for long. On the stepping thread."""
    if events := scheduler.kv_cache_manager.take_events():
        scheduler.kv_event_publisher.publish(EventBatch(ts=time.time(), events=events))


class _Reporter(EventPublisher):
    """Called by vLLM's scheduler at the end of a step, on its thread."""

    def __init__(self, scheduler: Scheduler, note: Note) -> None:
        super().__init__()
        self._pool = scheduler.kv_cache_manager.block_pool
        self._note = note

    def publish(self, events: EventBatch) -> None:
        """Note the blocks of one step."""
        touched: dict[bytes, None] = {}
        cleared = False
        for event in events.events:
            if isinstance(event, AllBlocksCleared):
                cleared = True
                touched.clear()
            elif isinstance(event, BlockStored | BlockRemoved):
                touched.update(dict.fromkeys(cast(list[bytes], event.block_hashes)))
        present = [block for block in touched if self._pool.get_cached_block(cast(Any, block), [0])]
        absent = touched.keys() - set(present)
        self._note(map(_number, present), map(_number, absent), cleared)

    def shutdown(self) -> None:
        """Nothing is held."""


class BlockNames:
    """Names the blocks of prompts as the workers of one model do.

    Args:
        config: vLLM's configuration of the model; decides the hash function.
        block_size: tokens of a block on the workers.
    """

    def __init__(self, config: VllmConfig, block_size: int) -> None:
        self.block_size = block_size
        self._hash = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        kv_cache_utils.init_none_hash(self._hash)

    def of(self, token_ids: Sequence[int], *, lora: Any = None, cache_salt: str | None = None) -> Iterator[int]:
        """Numbers of a prompt's full blocks, in order, each computed when it is asked for.

        Args:
            token_ids: the prompt.
            lora: the request's `LoRARequest`.
            cache_salt: as the client gave it.
        """
        request = SimpleNamespace(lora_request=lora, cache_salt=cache_salt, mm_features=[], prompt_embeds=None)
        parent = None
        for start in range(0, len(token_ids) - self.block_size + 1, self.block_size):
            end = start + self.block_size
            extra, _ = kv_cache_utils.generate_block_hash_extra_keys(cast(Any, request), start, end, 0)
            parent = kv_cache_utils.hash_block_tokens(self._hash, parent, token_ids[start:end], extra)
            yield _number(parent)


def _number(block_hash: bytes) -> int:
    return int.from_bytes(block_hash[:8], "little")
