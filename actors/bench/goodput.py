"""`joinwise bench goodput`: how much traffic two cores serve within limits, split by phase or not.

Two engines, one core each, behind joinwise with its policy `auto`; the same two as plain vLLM servers behind
`vllm-router`; and, for information and with the first seed alone, joinwise with `split: always`, and the plain pair
with short steps. Requests arrive as in a trace whose lengths are scaled to the small model, whether or not earlier ones
are done; prompts are random tokens, so that no cache helps.

A decode pool computes few prompts, so its steps are short (Sarathi-Serve, arXiv 2403.02310: what a step may hold bounds
the gaps of those that decode in it); plain engines have vLLM's own, since they compute all prompts.

A request *attains* when its first token comes within `ttft_limit_s` and the mean of its later gaps is within
`tpot_limit_s`. Both are multiples of what one plain engine alone needs for the trace's typical request, measured in the
same run. The *goodput* of a side is the rate up to which 90% attain (DistServe, arXiv 2401.09670, section 2). The plain
pair's is looked for first; then all sides meet the same requests at rates around it, in turns. At another rate they are
the same requests too, closer together: what differs between two rates is not who came. Before its turn each side
answers some requests that do not count.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from joinwise.actors.bench.gateway import foreign_router
from joinwise.actors.bench.local import local_cluster
from joinwise.actors.bench.plain import plain_vllm
from joinwise.actors.bench.serve import MODEL, Answer, question, stream_into
from joinwise.actors.models import resolve_model
from joinwise.cluster.config import JoinwiseConfig
from joinwise.cluster.errors import ConfigError
from joinwise.cluster.simulate.trace import Trace, load

RATES = (0.5, 0.75, 1.0, 1.25, 1.5)
OURS, PLAIN = "joinwise auto", "plain pair"
ALWAYS, SHORT = "joinwise always split", "plain pair, short steps"
_INFORMATION = (ALWAYS, SHORT)
_ENOUGH = 0.9
_TTFT_FACTOR, _TPOT_FACTOR = 8.0, 4.0
_MAX_MODEL_LEN = 2048
_ENGINE = {"enforce_eager": True, "kv_cache_memory_bytes": 400_000_000, "block_size": 32, "max_num_seqs": 32}
_SHORT_STEPS = {"max_num_batched_tokens": 64}
_PATIENCE_S = 60.0
_STEPS = 8
_WAKING = 8

Say = Callable[[str], None]


@dataclass(frozen=True)
class Limits:
    """What a request must keep, in seconds: to the first token, and from token to token on average."""

    ttft_s: float
    tpot_s: float

    def kept(self, answer: Answer, tokens: int) -> bool:
        """Whether a whole answer came in time."""
        if len(answer.times) < tokens:
            return False
        gaps = answer.gaps
        return answer.times[0] <= self.ttft_s and (not gaps or statistics.fmean(gaps) <= self.tpot_s)


def run(
    traces: Sequence[tuple[Trace, float, float]], requests: int, seeds: int, say: Say
) -> Iterator[list[dict[str, Any]]]:
    """Run the benchmark, one trace after another.

    Args:
        traces: each with the factors of its prompts' and answers' lengths.
        requests: at each rate.
        seeds: of requests and their arrivals.
        say: is told what happens.

    Yields:
        For each trace a row for each rate, side and seed.

    Raises:
        ConfigError: `vllm-router` is not on the PATH.
    """
    if shutil.which("vllm-router") is None:
        raise ConfigError("vllm-router is not on the PATH: pip install vllm-router")
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="joinwise-bench-") as folder:
        urls, alone = _start(stack, Path(folder), say)
        for trace, prompt, output in traces:
            scaled = trace.scaled(prompt=prompt, output=output)
            yield asyncio.run(_measure(scaled, urls, alone, requests, seeds, say))


def parse(text: str) -> tuple[Trace, float, float]:
    """A trace and the factors of its prompts' and answers' lengths, from `FILE:PROMPT:ANSWER`.

    Raises:
        ConfigError: another form, or no such trace.
    """
    try:
        file, prompt, output = text.rsplit(":", 2)
        return load(Path(file)), float(prompt), float(output)
    except ValueError:
        raise ConfigError(f"{text!r} is not FILE:PROMPT:ANSWER, such as trace.csv:0.15:0.2") from None


def _start(stack: ExitStack, folder: Path, say: Say) -> tuple[dict[str, str], str]:
    """All sides' URLs, and that of one plain engine."""
    model = resolve_model(MODEL, progress=say)
    urls = {}
    for side, router in ((OURS, {"split": "auto"}), (ALWAYS, {"split": "always", "moves": False})):
        say(f"starting {side}")
        facts = stack.enter_context(local_cluster(_cluster(side, router), folder))
        urls[side] = facts["addresses"]["http"]
    engine = {"dtype": "float32", "max_model_len": _MAX_MODEL_LEN, **_ENGINE}
    alone = ""
    for side, more in ((SHORT, _SHORT_STEPS), (PLAIN, {})):
        servers = []
        for number, core in enumerate(sorted(os.sched_getaffinity(0))[:2]):
            say(f"starting {side} on core {core}")
            log = folder / f"{side}-{number}.log"
            servers.append(stack.enter_context(plain_vllm(str(model.path), MODEL, [core], engine | more, log)))
        log = folder / f"{side}.log"
        urls[side] = stack.enter_context(foreign_router("vllm-router", servers, "power_of_two", log))
        alone = servers[0]
    return urls, alone


async def _measure(
    trace: Trace, urls: dict[str, str], alone: str, requests: int, seeds: int, say: Say
) -> list[dict[str, Any]]:
    """Rows of one trace."""
    limits = await _limits(trace, alone, say)
    for url in urls.values():
        await _one_after_another(url, trace, 4)
    goodput = await _goodput(trace, urls[PLAIN], limits, requests, seeds, say)
    rows = []
    for turn, (seed, share) in enumerate(itertools.product(range(seeds), RATES)):
        sides = [side for side in urls if side not in _INFORMATION or not seed]
        for side in sides if turn % 2 else sides[::-1]:
            say(f"{trace.name}: {side} at {share:g} of {goodput:.2f}/s, seed {seed}")
            row = await _load(trace, urls[side], limits, share * goodput, requests, seed)
            rows.append(
                {"trace": trace.name, "side": side, "share": share, "rate": share * goodput, "seed": seed} | row
            )
    return rows


async def _limits(trace: Trace, url: str, say: Say) -> Limits:
    """From one engine's answers to typical requests, one at a time."""
    say(f"{trace.name}: one plain engine alone")
    answers = await _one_after_another(url, trace, 12)
    ttft = statistics.median(answer.times[0] for answer in answers)
    tpot = statistics.median(gap for answer in answers for gap in answer.gaps)
    return Limits(_TTFT_FACTOR * ttft, _TPOT_FACTOR * tpot)


async def _one_after_another(url: str, trace: Trace, count: int) -> list[Answer]:
    """Answers to requests of the trace's mean lengths."""
    prompt = round(statistics.fmean(each.prompt for each in trace.arrivals))
    rng = random.Random(os.urandom(8))  # noqa: S311 - other prompts whenever this is called
    async with httpx.AsyncClient(base_url=url, timeout=_PATIENCE_S) as client:
        answers = []
        for _ in range(count):
            answers.append(Answer())
            await stream_into(answers[-1], client, question(_prompt(rng, prompt), 16), {}, time.perf_counter())
    return answers[count // 3 :]  # the first warm up


async def _wake(url: str, trace: Trace) -> None:
    """Let a side do what it will do: while others had their turns the system took from it what it could."""
    rng = random.Random(os.urandom(8))  # noqa: S311 - other prompts whenever this is called
    prompt = round(statistics.fmean(each.prompt for each in trace.arrivals))
    async with httpx.AsyncClient(base_url=url, timeout=_PATIENCE_S) as client:
        begin = time.perf_counter()
        await asyncio.gather(*(_ask(client, begin, 0.2 * number, _prompt(rng, prompt), 8) for number in range(_WAKING)))


async def _goodput(trace: Trace, url: str, limits: Limits, requests: int, seeds: int, say: Say) -> float:
    """The rate up to which 90% attain, between two rates that were tried."""
    rate, good, bad = 1.0, 0.0, 0.0
    for _ in range(_STEPS):
        rows = [await _load(trace, url, limits, rate, requests, seed) for seed in range(seeds)]
        attained = statistics.median(row["attained"] for row in rows)
        say(f"{trace.name}: {PLAIN} at {rate:.2f}/s attains {attained:.0%}")
        if attained >= _ENOUGH:
            good = rate
        else:
            bad = rate
        if good and bad and bad / good < 1.2:
            break
        rate = (good * bad) ** 0.5 if good and bad else 2 * rate if good else rate / 2
    if not good:
        raise ConfigError(f"{trace.name}: the plain pair keeps its limits at no rate: scale its lengths down")
    return good


async def _load(trace: Trace, url: str, limits: Limits, rate: float, requests: int, seed: int) -> dict[str, Any]:
    """Wake a side, send it so many requests as they arrive, wait for all of them, and say how it went."""
    await _wake(url, trace)
    rng = random.Random(seed)  # noqa: S311 - the same for all sides
    first = rng.randrange(len(trace.arrivals) // 2)
    part = Trace(trace.name, trace.arrivals[first : first + requests]).redrawn(rate, seed)
    words = random.Random(os.urandom(8))  # noqa: S311 - other prompts in each run: no cache has them
    asks = [(each.at, _prompt(words, min(each.prompt, 1500)), min(each.output, 400)) for each in part.arrivals]
    limit = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=_PATIENCE_S, limits=limit) as client:
        begin = time.perf_counter()
        answers = await asyncio.gather(*(_ask(client, begin, *ask) for ask in asks))
    whole = [answer for answer, (_, _, tokens) in zip(answers, asks, strict=True) if len(answer.times) >= tokens]
    gaps = sorted(gap for answer in whole for gap in answer.gaps)
    kept = sum(limits.kept(answer, tokens) for answer, (_, _, tokens) in zip(answers, asks, strict=True))
    return {
        "requests": len(asks),
        "whole": len(whole),
        "attained": kept / len(asks),
        "ttft_limit_s": limits.ttft_s,
        "tpot_limit_s": limits.tpot_s,
        "ttft_p50_s": _quantile([answer.times[0] for answer in whole], 0.5),
        "ttft_p90_s": _quantile([answer.times[0] for answer in whole], 0.9),
        "tpot_p90_s": _quantile([statistics.fmean(answer.gaps) for answer in whole if answer.gaps], 0.9),
        "gap_p99_s": _quantile(gaps, 0.99),
        "seconds": time.perf_counter() - begin,
    }


async def _ask(client: httpx.AsyncClient, begin: float, at: float, prompt: list[int], tokens: int) -> Answer:
    """One request at its time; whatever ends it early, its answer is not whole."""
    await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
    answer = Answer()
    try:
        await stream_into(answer, client, question(prompt, tokens), {}, begin + at)
    except (httpx.HTTPError, RuntimeError):
        answer.times.clear()
    return answer


def figures_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Figures of each trace, and the worst over all traces."""
    found = {
        trace: _figures_of_one([row for row in rows if row["trace"] == trace])
        for trace in dict.fromkeys(row["trace"] for row in rows)
    }
    worst = {"goodput_ratio_best_other": min, "attainment_margin_min": min, "p99_gap_ratio_plain_pair": max}
    figures = {name: choose(each[name] for each in found.values()) for name, choose in worst.items()}
    for trace, each in found.items():
        figures |= {f"{name}_{trace}": value for name, value in each.items()}
    return {name: round(value, 4) for name, value in figures.items()}


def _figures_of_one(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Goodput over the plain pair's, the least difference in attainment, and the ratio of P99 gaps."""

    def median(side: str, share: float, name: str) -> float:
        return statistics.median(row[name] for row in rows if row["side"] == side and row["share"] == share)

    def margin(share: float) -> float:
        ours, plain = (
            [row["attained"] for row in rows if row["side"] == side and row["share"] == share] for side in (OURS, PLAIN)
        )
        return statistics.median(mine - theirs for mine, theirs in zip(ours, plain, strict=True))

    shares = sorted({row["share"] for row in rows})
    reached = {side: _reached([(share, median(side, share, "attained")) for share in shares]) for side in (OURS, PLAIN)}
    equal = max(
        (share for share in shares if all(median(side, share, "attained") >= _ENOUGH for side in (OURS, PLAIN))),
        default=shares[0],
    )
    return {
        "goodput_ratio_best_other": reached[OURS] / max(reached[PLAIN], 1e-9),
        "attainment_margin_min": min(map(margin, shares)),
        "p99_gap_ratio_plain_pair": median(OURS, equal, "gap_p99_s") / median(PLAIN, equal, "gap_p99_s"),
        "equal_load_share": equal,
    }


def _reached(points: Sequence[tuple[float, float]]) -> float:
    """Where attainment falls below 90%, between the points; the last where it never does."""
    before, high = 0.0, 1.0
    for share, attained in points:
        if attained < _ENOUGH:
            return before + (share - before) * (high - _ENOUGH) / max(high - attained, 1e-9)
        before, high = share, attained
    return before


def _prompt(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(1000, 40_000) for _ in range(tokens)]


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("inf")


def _cluster(side: str, router: dict[str, Any]) -> JoinwiseConfig:
    model = {"name": MODEL, "model": MODEL, "dtype": "float32", "max_model_len": _MAX_MODEL_LEN}
    engines = {"prefill": _ENGINE, "decode": _ENGINE | _SHORT_STEPS}
    pools = [{"name": role, "model": MODEL, "role": role, "engine": engine} for role, engine in engines.items()]
    return JoinwiseConfig.model_validate(
        {
            "cluster": f"bench-{side.replace(' ', '-')}",
            "models": [model],
            "pools": pools,
            "gateway": {"http_port": 0, "grpc_port": 0, "drain_s": 2},
            "router": router,
        }
    )
