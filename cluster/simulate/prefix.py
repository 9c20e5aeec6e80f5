"""Prefix caches of a simulated cluster: which worker has which blocks of prompts.

A block's id stands for its whole prefix, as in Mooncake's traces, so a worker that has a block was given all before it.
Each worker keeps as many blocks as its KV memory holds, the last used ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from joinwise.cluster.simulate.engine import Engine
from joinwise.cluster.simulate.job import Job


class PrefixCaches:
    """All caches of a cluster.

    Args:
        engines: their KV memory bounds what each keeps.
        block_tokens: prompt tokens of a block.

    Attributes:
        asked, hit: blocks of prompts that were looked for, and found where the prompt went.
        ideal: blocks that one cache without bounds would have found.
    """

    def __init__(self, engines: Iterable[Engine], block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._room = {engine.worker_id: engine.kind.kv_tokens // block_tokens for engine in engines}
        self._blocks: dict[str, OrderedDict[int, None]] = {worker: OrderedDict() for worker in self._room}
        self._where: dict[int, set[str]] = {}
        self._seen: set[int] = set()
        self.asked = self.hit = self.ideal = 0

    def held(self, job: Job) -> Mapping[str, int]:
        """Worker -> tokens of the longest prefix of a prompt that it has; those that have nothing are left out."""
        found: dict[str, int] = {}
        alive: set[str] | None = None
        for depth, block in enumerate(job.arrival.blocks):
            there = self._where.get(block, set())
            left = set() if alive is None else alive - there
            found.update(dict.fromkeys(left, depth * self.block_tokens))
            alive = set(there) if alive is None else alive & there
            if not alive:
                break
        found.update(dict.fromkeys(alive or (), len(job.arrival.blocks) * self.block_tokens))
        return {worker: min(tokens, job.prompt - 1) for worker, tokens in found.items()}

    def count(self, job: Job, tokens: int) -> None:
        """A prompt has gone where so many tokens of it were."""
        blocks = job.arrival.blocks
        self.asked += len(blocks)
        self.hit += min(len(blocks), -(-tokens // self.block_tokens))
        self.ideal += sum(block in self._seen for block in blocks)
        self._seen.update(blocks)

    def store(self, worker: str, blocks: Sequence[int]) -> None:
        """A worker has computed, or received, a prompt."""
        cache, room = self._blocks[worker], self._room[worker]
        for block in blocks:
            cache[block] = None
            cache.move_to_end(block)
            self._where.setdefault(block, set()).add(worker)
        while len(cache) > room:
            block, _ = cache.popitem(last=False)
            self._where[block].discard(worker)

    def forget(self, worker: str) -> None:
        """A worker is gone, and its cache with it."""
        for block in self._blocks[worker]:
            self._where[block].discard(worker)
        self._blocks[worker].clear()

    def figures(self) -> dict[str, float]:
        """The share of blocks that were found, that of an ideal cache, and the first over the second."""
        share, best = (count / self.asked if self.asked else 0.0 for count in (self.hit, self.ideal))
        return {
            "prefix_hit_share": share,
            "prefix_hit_ideal": best,
            "prefix_hit_of_ideal": share / best if best else 0.0,
        }
