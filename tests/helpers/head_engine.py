"""An engine that asks one draft actor, in a process of its own, as a decode worker does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.small_engine import finished, small_engine

from joinwise.actors.bench.remote import Remote
from joinwise.actors.cpu import environment


class HeadEngine:
    """vLLM's engine with our proposer, asking as a worker's does.

    Args:
        folder: of the model.
        k: drafts a step.
    """

    def __init__(self, folder: Path, k: int) -> None:
        from joinwise.actors.draft.vocabulary import Vocabulary
        from joinwise.actors.vllm import proposer

        self._engine = small_engine(
            folder,
            k,
            max_num_seqs=4,
            max_num_batched_tokens=32,  # some prompts take several steps
            kv_cache_memory_bytes=200_000_000,
            enable_prefix_caching=False,
        )
        self._executor: Any = self._engine.engine_core.engine_core.model_executor
        self._links: Any = proposer
        self._answers = 0
        vocabulary = Vocabulary.read("target", folder)
        proposer.open_links(self._executor, proposer.DraftSettings("c", "w", vocabulary, 20.0, adaptive=False))

    def point(self, address: str) -> None:
        """Ask there; nobody for an empty address."""
        self._links.point_links(self._executor, address)
        deadline = time.monotonic() + 30
        while self._executor.collective_rpc(_connected)[0] != bool(address):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def answer(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """Answer prompts greedily, all at once."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        self._answers += 1
        names = [f"{self._answers}-{place}" for place in range(len(prompts))]
        for name, prompt in zip(names, prompts, strict=True):
            self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
        found = {each.request_id: list(each.outputs[0].token_ids) for each in finished(self._engine)}
        return [found[name] for name in names]

    def close(self) -> None:
        """Ask nobody any more."""
        self._links.close_links(self._executor)


def _connected(worker: Any) -> bool:
    return bool(worker.model_runner.drafter.connected)


def head_engine(folder: Path, k: int) -> Remote:
    """Start one; to be closed."""
    return Remote(HeadEngine, folder, k, environment=environment(1), wait_s=240)
