"""`joinwise bench handoff`: what a request waits for between its prefill's end and its second token.

One cluster per transport, the same prompts through each. *Exposed* is what the data plane alone
costs: seconds from the last layer's computation to the transfer's last frame. The *gap* is what a
client sees: first to second token, less a median decode step; it has the replayed step in it, which
is also taken out.
"""

import asyncio
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from joinwise.actors.bench.local import local_cluster
from joinwise.actors.bench.serve import MODEL, Answer, ask
from joinwise.cluster.config import JoinwiseConfig

LENGTHS = (128, 512, 1500, 4000)
_ENGINE = {"enforce_eager": True, "kv_cache_memory_bytes": 600_000_000, "block_size": 32, "max_num_seqs": 4}
_MAX_MODEL_LEN = 4608
_OUTPUT_TOKENS = 12


def run(
    transports: Sequence[str], dtype: str, repeats: int, say: Callable[[str], None]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Run the benchmark.

    Args:
        transports: values of `kv.transport`; figures without a suffix are of the first.
        dtype: element type of model and cache.
        repeats: prompts of each length.
        say: is told what happens.
    """
    figures: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for transport in transports:
        with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="joinwise-bench-") as folder:
            say(f"{transport}: starting a cluster")
            facts = stack.enter_context(local_cluster(_cluster(transport, dtype), Path(folder)))
            answers = asyncio.run(_measure(facts["addresses"]["http"], repeats, f"{transport}: ", say))
        mine = [_row(transport, length, found) for length, found in answers.items()]
        suffix = "" if transport == transports[0] else f"_{transport}"
        long = next(row for row in mine if row["prompt_tokens"] == 1500)
        figures |= {
            f"exposed_steps_1500{suffix}": long["exposed_ms"] / long["decode_step_ms"],
            f"exposed_prefill_share_1500{suffix}": long["exposed_ms"] / long["prefill_ms"],
            f"gap_ms_1500{suffix}": long["gap_ms"],
        }
        rows += mine
    return {name: round(value, 4) for name, value in figures.items()}, rows


async def _measure(url: str, repeats: int, who: str, say: Callable[[str], None]) -> dict[int, list[Answer]]:
    dice = random.Random(0)  # noqa: S311 - reproducible, not secret
    answers: dict[int, list[Answer]] = {length: [] for length in LENGTHS}
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        for repeat in range(-1, repeats):  # the first round warms up
            for length in LENGTHS:
                prompt = [dice.randrange(1000, 40_000) for _ in range(length)]
                answer = await ask(client, prompt, _OUTPUT_TOKENS)
                ledger = answer.ledger or {}
                if not ledger.get("transport") or ledger.get("recomputed"):
                    raise RuntimeError(f"a prompt of {length} tokens was not handed over: {ledger}")
                if repeat >= 0:
                    answers[length].append(answer)
            say(f"{who}round {repeat + 1} of {repeats}")
    return answers


def _row(transport: str, length: int, answers: list[Answer]) -> dict[str, Any]:
    def median_ms(of: Callable[[Answer, dict[str, Any]], float]) -> float:
        return round(1000 * statistics.median(of(answer, answer.ledger or {}) for answer in answers), 3)

    row = {
        "transport": transport,
        "used": (answers[0].ledger or {})["transport"],
        "prompt_tokens": length,
        "kv_bytes": (answers[0].ledger or {})["wire_bytes"],
        "prefill_ms": median_ms(lambda _, ledger: ledger["prefill_s"]),
        "decode_step_ms": median_ms(lambda answer, _: statistics.median(answer.gaps[1:])),
        "exposed_ms": median_ms(lambda _, ledger: ledger["wire_seconds_exposed"]),
        "import_ms": median_ms(lambda _, ledger: ledger["import_s"]),
        "replayed_step_ms": median_ms(lambda _, ledger: ledger["replayed_step_s"]),
        "gap_ms": median_ms(lambda answer, _: answer.gaps[0] - statistics.median(answer.gaps[1:])),
    }
    row["gap_without_replay_ms"] = round(row["gap_ms"] - row["replayed_step_ms"], 3)
    return row


def _cluster(transport: str, dtype: str) -> JoinwiseConfig:
    return JoinwiseConfig.model_validate(
        {
            "cluster": f"bench-handoff-{transport}",
            "models": [{"name": MODEL, "model": MODEL, "dtype": dtype, "max_model_len": _MAX_MODEL_LEN}],
            "pools": [
                {"name": role, "model": MODEL, "role": role, "engine": dict(_ENGINE)} for role in ("prefill", "decode")
            ],
            "kv": {"transport": transport},
            "gateway": {"http_port": 0, "grpc_port": 0, "drain_s": 2},
            "router": {"split": "always", "moves": False},
        }
    )
