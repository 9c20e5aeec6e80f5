"""`joinwise bench serve`: the split cluster against plain vLLM, in one run, on one machine.

The same greedy prompts go through three sides: the split cluster (two engines, one core each),
plain vLLM with one engine on one core, and plain vLLM with one engine on two cores. The sides take
turns, prompt by prompt, and every token is compared before any time is.
"""

import asyncio
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from joinwise.actors.bench.local import local_cluster
from joinwise.actors.bench.plain import plain_vllm
from joinwise.actors.models import resolve_model
from joinwise.cluster.config import JoinwiseConfig

MODEL = "smollm2-135m-instruct"
SHORT = 64
LONG = 1500
_CONCURRENT = 8
_ENGINE = {"enforce_eager": True, "kv_cache_memory_bytes": 400_000_000, "block_size": 32, "max_num_seqs": 8}
_MAX_MODEL_LEN = 2048


@dataclass
class Answer:
    """One streamed answer: token ids, and seconds after the request at which each chunk came."""

    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    ledger: dict[str, Any] | None = None

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [later - earlier for earlier, later in itertools.pairwise(self.times)]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 10 to 1,500 random tokens; the shortest and the longest are always among them."""
    rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
    lengths = [10, LONG, LONG, 16, 33]
    lengths += [round(10 * (LONG / 10) ** rng.random()) for _ in range(max(0, count - len(lengths)))]
    return [[rng.randrange(1000, 40_000) for _ in range(length)] for length in lengths[:count]]


def question(prompt: list[int], max_tokens: int) -> dict[str, Any]:
    """The body of a greedy completion, streamed with its token ids."""
    return {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


async def ask(client: httpx.AsyncClient, prompt: list[int], max_tokens: int) -> Answer:
    """Stream one greedy completion. Errors as for `stream_into`."""
    answer = Answer()
    headers = {"x-joinwise-ledger": "1"}
    await stream_into(answer, client, question(prompt, max_tokens), headers, time.perf_counter())
    return answer


async def stream_into(
    answer: Answer, client: httpx.AsyncClient, body: dict[str, Any], headers: dict[str, str], begin: float
) -> None:
    """Add a streamed completion to an answer.

    Args:
        answer: is added to.
        client: of the server.
        body: what is asked.
        headers: of the request.
        begin: `time.perf_counter()` from which the answer's times count.

    Raises:
        RuntimeError: the server refuses.
    """
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if line.startswith(": joinwise-ledger "):
                answer.ledger = json.loads(line.removeprefix(": joinwise-ledger "))
            elif line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    new = choice.get("token_ids") or []
                    answer.token_ids += new
                    answer.times += [time.perf_counter() - begin] * len(new)


async def compare(
    urls: dict[str, str], requests: list[list[int]], max_tokens: int, say: Callable[[str], None]
) -> tuple[dict[str, list[Answer]], list[Answer]]:
    """Every prompt through every side in turn, then through the split side, several at once."""
    answers: dict[str, list[Answer]] = {side: [] for side in urls}
    clients = {side: httpx.AsyncClient(base_url=url, timeout=600) for side, url in urls.items()}
    try:
        for client in clients.values():
            for warm in prompts(6, seed=99)[3:]:  # short: bfloat16 is slow on a CPU without instructions for it
                await ask(client, warm, 4)
        for number, prompt in enumerate(requests, 1):
            order = list(clients) if number % 2 else list(reversed(clients))
            for side in order:
                answers[side].append(await ask(clients[side], prompt, max_tokens))
            say(f"prompt {number} of {len(requests)} ({len(prompt)} tokens)")
        limit = asyncio.Semaphore(_CONCURRENT)

        async def limited(prompt: list[int]) -> Answer:
            async with limit:
                return await ask(clients["split"], prompt, max_tokens)

        say(f"{_CONCURRENT} at once through the split cluster")
        concurrent = await asyncio.gather(*(limited(prompt) for prompt in requests))
    finally:
        for client in clients.values():
            await client.aclose()
    return answers, concurrent


def figures_of(
    requests: list[list[int]], answers: dict[str, list[Answer]], concurrent: list[Answer]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures and rows of one dtype. Correctness first, then ratios of medians' parts."""
    split, one, two = answers["split"], answers["plain_1_core"], answers["plain_2_cores"]
    step = statistics.median(gap for answer in split for gap in answer.gaps[1:])
    ledgers = [answer.ledger or {} for answer in split]
    replay = statistics.median(ledger.get("replayed_step_s", 0.0) for ledger in ledgers)

    def gap_ms(wanted: Callable[[int], bool]) -> float:
        found = [
            answer.gaps[0] - statistics.median(answer.gaps[1:]) - (answer.ledger or {}).get("replayed_step_s", 0.0)
            for prompt, answer in zip(requests, split, strict=True)
            if wanted(len(prompt))
        ]
        return 1000 * statistics.median(found) if found else 0.0

    def ratio(other: list[Answer], of: Callable[[Answer], float]) -> float:
        return statistics.median(of(mine) / of(theirs) for mine, theirs in zip(split, other, strict=True))

    figures = {
        "requests": len(requests),
        "identical": sum(a.token_ids == b.token_ids for a, b in zip(split, one, strict=True)),
        "identical_concurrent": sum(a.token_ids == b.token_ids for a, b in zip(concurrent, one, strict=True)),
        "ttft_ratio_p50": ratio(one, lambda a: a.times[0]),
        "total_ratio_p50": ratio(one, lambda a: a.times[-1]),
        "total_ratio_2core_p50": ratio(two, lambda a: a.times[-1]),
        "handoff_gap_ms_short": gap_ms(lambda n: n <= SHORT),
        "handoff_gap_ms_1500": gap_ms(lambda n: n >= LONG),
        "replayed_step_ms": 1000 * replay,
        "decode_step_ms": 1000 * step,
        "kv_bytes": sum(ledger.get("wire_bytes", 0) for ledger in ledgers),
        "kv_seconds_hidden": sum(ledger.get("wire_seconds_hidden", 0.0) for ledger in ledgers),
        "kv_seconds_exposed": sum(ledger.get("wire_seconds_exposed", 0.0) for ledger in ledgers),
    }
    rows = [
        {
            "prompt_tokens": len(prompt),
            **{f"{side}_ttft_s": answers[side][i].times[0] for side in answers},
            **{f"{side}_total_s": answers[side][i].times[-1] for side in answers},
            "second_token_gap_s": split[i].gaps[0],
            "ledger": split[i].ledger,
        }
        for i, prompt in enumerate(requests)
    ]
    return figures, rows


def run(
    requests: int, max_tokens: int, dtypes: list[str], say: Callable[[str], None]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Run the benchmark; figures of float32 have plain names, those of other dtypes a suffix."""
    cores = _cores()
    model = resolve_model(MODEL, progress=say)
    figures: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for dtype in dtypes:
        engine = {"dtype": dtype, "max_model_len": _MAX_MODEL_LEN, **_ENGINE}
        with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="joinwise-bench-") as folder:
            logs = Path(folder)
            say(f"{dtype}: starting the split cluster")
            facts = stack.enter_context(local_cluster(_cluster(dtype), logs))
            urls = {"split": facts["addresses"]["http"]}
            for side, own in (("plain_1_core", cores[:1]), ("plain_2_cores", cores[:2])):
                say(f"{dtype}: starting plain vLLM on cores {own}")
                urls[side] = stack.enter_context(plain_vllm(str(model.path), MODEL, own, engine, logs / f"{side}.log"))
            asked = prompts(requests)
            answers, concurrent = asyncio.run(compare(urls, asked, max_tokens, say))
        found, found_rows = figures_of(asked, answers, concurrent)
        suffix = "" if dtype == "float32" else f"_{dtype}"
        figures |= {name + suffix: round(value, 4) for name, value in found.items()}
        rows += [{"dtype": dtype, **row} for row in found_rows]
    return figures, rows


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def _cluster(dtype: str) -> JoinwiseConfig:
    model = {"name": MODEL, "model": MODEL, "dtype": dtype, "max_model_len": _MAX_MODEL_LEN}
    pools = [{"name": role, "model": MODEL, "role": role, "engine": dict(_ENGINE)} for role in ("prefill", "decode")]
    gateway = {"http_port": 0, "grpc_port": 0, "drain_s": 2}
    return JoinwiseConfig.model_validate(
        {
            "cluster": f"bench-{dtype}",
            "models": [model],
            "pools": pools,
            "gateway": gateway,
            "router": {"split": "always", "moves": False},  # what is measured is the split
        }
    )
