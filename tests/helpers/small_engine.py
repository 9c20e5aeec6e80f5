"""vLLM's engine with our proposer, small, in the process that asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BLOCK = 32
"""Tokens of a KV block."""


def small_engine(folder: Path, k: int, **arguments: Any) -> Any:
    """Start one that speculates with `k` drafts a step; further arguments are vLLM's."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from joinwise.actors.vllm.proposer import speculation

    ours: dict[str, Any] = {
        "model": str(folder),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "block_size": BLOCK,
        "async_scheduling": False,
        "disable_log_stats": True,
        "speculative_config": speculation(k),
    }
    return LLMEngine.from_engine_args(EngineArgs(**ours, **arguments))


def finished(engine: Any) -> list[Any]:
    """Step until nothing is left; the outputs, as they came to their ends."""
    found: list[Any] = []
    while engine.has_unfinished_requests():
        found += [output for output in engine.step() if output.finished]
    return found
