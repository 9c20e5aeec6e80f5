"""`joinwise bench fidelity`: the same trace through a cluster on this machine and through the simulator of it.

The engines are measured by `joinwise profile` just before: both at once, each on the core that it will have, so that
each has the other beside it as in the cluster. What a profile of engines alone cannot hold (`Beside`) comes from one
trace; another one, of another seed, is what is compared, so that nothing is compared with what it was fitted to.
"""

import asyncio
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import httpx

from joinwise.actors import cpu
from joinwise.actors.bench.local import local_cluster
from joinwise.actors.bench.serve import MODEL, Answer, ask, question, stream_into
from joinwise.actors.models import resolve_model
from joinwise.actors.profile import profile as measure_profile
from joinwise.cluster.config import JoinwiseConfig
from joinwise.cluster.errors import ConfigError
from joinwise.cluster.simulate import profile as profiles
from joinwise.cluster.simulate.pools import PoolSpec
from joinwise.cluster.simulate.profile import Kind, Profile
from joinwise.cluster.simulate.report import PERCENTILES, percentile
from joinwise.cluster.simulate.run import simulate
from joinwise.cluster.simulate.trace import Arrival, Trace, poisson

Shape = Literal["split", "mixed"]
Say = Callable[[str], None]
METRICS = ("ttft_s", "tpot_s", "e2e_s")
_ROLES: dict[Shape, tuple[str, ...]] = {"split": ("prefill", "decode"), "mixed": ("mixed", "mixed")}
_MAX_MODEL_LEN = 2048
_MAX_SEQS = 16
_ENGINE = {"enforce_eager": True, "kv_cache_memory_bytes": 400_000_000, "block_size": 32}
_LONGEST, _BATCH, _CONTEXT = 256, 8, 96  # of the profile
_PROMPT, _OUTPUT = 64, 20  # medians of the traces
_FITTED, _COMPARED = 1, 2  # seeds


class Times(NamedTuple):
    """What a client saw of a request, or would have; None between tokens where there is one only."""

    ttft_s: float
    tpot_s: float | None
    e2e_s: float


class Got(NamedTuple):
    """An answer of the cluster: what the client saw of it, and the gateway's ledger."""

    times: Times
    ledger: Mapping[str, Any]


@dataclass(frozen=True)
class Seen:
    """A trace with what came of it in the cluster."""

    trace: Trace
    answers: Sequence[Got]


def run(
    shape: Shape, rate: float, seconds: float, profile_s: float, say: Say
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Run the benchmark; returns figures, and a row for each request that was compared."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise ConfigError("two engines need two cores")
    resolve_model(MODEL, progress=say)
    with tempfile.TemporaryDirectory(prefix="joinwise-bench-") as name:
        folder = Path(name)
        say("profiling an engine on each of two cores")
        profile = measured(cores, profile_s, folder)
        say("starting the cluster")
        with local_cluster(_cluster(shape), folder) as facts:
            seen = {}
            for seed in (_FITTED, _COMPARED):
                trace = poisson(rate, seconds, seed, _PROMPT, _OUTPUT)
                say(f"{len(trace.arrivals)} requests in {seconds:.0f} s, seed {seed}")
                seen[seed] = Seen(trace, asyncio.run(replay(facts["addresses"]["http"], trace, seed)))
    pools = [PoolSpec(role, f"core{core}", 1) for role, core in zip(_ROLES[shape], cores, strict=True)]
    beside = fitted(seen[_FITTED], profile.kind(pools[0].kind))
    figures, rows = compared(seen[_COMPARED], pools, profile, beside)
    itself, _ = compared(seen[_FITTED], pools, profile, beside)
    return {**figures, "median_error_fitted": itself["median_error"]}, rows


# --- the real one -----------------------------------------------------------------------------------------------------


def measured(cores: Sequence[int], seconds: float, folder: Path) -> Profile:
    """Profile an engine on each core, all at once; the kinds are called `core<number>`.

    Raises:
        RuntimeError: one of them has failed; its message is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    files = {core: folder / f"core{core}.yaml" for core in cores}
    running = [context.Process(target=_measure, args=(core, seconds, file)) for core, file in files.items()]
    for each in running:
        each.start()
    for each in running:
        each.join()
    if any(each.exitcode for each in running):
        raise RuntimeError("an engine could not be profiled")
    found = [profiles.load(file, MODEL) for file in files.values()]
    kinds = {name: kind for each in found for name, kind in each.kinds.items()}
    return Profile(MODEL, kinds, next(iter(kinds)))


def _measure(core: int, seconds: float, out: Path) -> None:
    """`joinwise profile`, in a process of its own."""
    cpu.pin([core])
    engine = {**_ENGINE, "dtype": "float32", "max_model_len": _MAX_MODEL_LEN}
    given = [f"{name}={value}" for name, value in engine.items()]
    with redirect_stdout(StringIO()):
        measure_profile(out, MODEL, f"core{core}", _LONGEST, _BATCH, _CONTEXT, seconds, engine=given)


async def replay(url: str, trace: Trace, seed: int) -> list[Got]:
    """Send every request when it is due, whatever has become of those before it; times count from then."""
    rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
    prompts = [[rng.randrange(1000, 40_000) for _ in range(each.prompt)] for each in trace.arrivals]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        for length in (20, 200, 50):
            await ask(client, [1000 + place for place in range(length)], 4)
        start = time.perf_counter() + 0.5

        async def one(arrival: Arrival, prompt: list[int]) -> Got:
            due = start + arrival.at
            await asyncio.sleep(due - time.perf_counter())
            answer = Answer()
            await stream_into(answer, client, question(prompt, arrival.output), {"x-joinwise-ledger": "1"}, due)
            if len(answer.times) != arrival.output or answer.ledger is None:
                raise RuntimeError(f"{arrival.output} tokens were asked for, and {len(answer.times)} came")
            return Got(times_of(answer.times[0], answer.times[-1], arrival.output), answer.ledger)

        return await asyncio.gather(*map(one, trace.arrivals, prompts))


def _cluster(shape: Shape) -> JoinwiseConfig:
    model = {"name": MODEL, "model": MODEL, "dtype": "float32", "max_model_len": _MAX_MODEL_LEN}
    engine = {**_ENGINE, "max_num_seqs": _MAX_SEQS}
    pools = [
        {"name": f"{role}-{number}", "model": MODEL, "role": role, "engine": engine}
        for number, role in enumerate(_ROLES[shape])
    ]
    return JoinwiseConfig.model_validate(
        {
            "cluster": f"fidelity-{shape}",
            "models": [model],
            "pools": pools,
            "gateway": {"http_port": 0, "grpc_port": 0, "drain_s": 2},
            "router": {"split": "always" if shape == "split" else "auto", "moves": False},
        }
    )


# --- the simulated one ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beside:
    """What a profile of engines alone does not hold.

    Attributes:
        send_s: seconds that a step takes longer whose layers are sent as it computes them.
        front_s: a request's seconds in the client and in the gateway before an engine has it.
    """

    send_s: float = 0.0
    front_s: float = 0.0


def simulated(trace: Trace, pools: Sequence[PoolSpec], profile: Profile, beside: Beside) -> list[Times]:
    """What a client of the simulated cluster would see."""
    kinds = {name: replace(kind, send_s=beside.send_s) for name, kind in profile.kinds.items()}
    policy = "always" if len({pool.home for pool in pools}) > 1 else "auto"
    known = Profile(profile.model, kinds, profile.reference)
    jobs = simulate(trace, pools, known, policy=policy, moves=False).outcome.jobs
    return [times_of(beside.front_s + job.ttft, beside.front_s + job.e2e, job.arrival.output) for job in jobs]


def times_of(first: float, last: float, tokens: int) -> Times:
    """From the times of the first and of the last token."""
    return Times(first, (last - first) / (tokens - 1) if tokens > 1 else None, last)


def fitted(seen: Seen, prefill: Kind) -> Beside:
    """From the requests of a trace whose prompts were computed alone, while nobody decoded: medians.

    Raises:
        RuntimeError: there is none.
    """
    spans = [_Span.of(each.ledger) for each in seen.answers]
    lone = [
        (arrival, answer)
        for arrival, answer, span in zip(seen.trace.arrivals, seen.answers, spans, strict=True)
        if not any(span.begun < other.ended and other.begun < span.first for other in spans if other is not span)
    ]
    if not lone:
        raise RuntimeError("no prompt of the trace was computed alone; lower --rate")
    sends = [answer.ledger["prefill_s"] - prefill.prefill(arrival.prompt) for arrival, answer in lone]
    fronts = [answer.times.ttft_s - answer.ledger["prefill_s"] for _, answer in lone]
    return Beside(max(0.0, statistics.median(sends)), max(0.0, statistics.median(fronts)))


class _Span(NamedTuple):
    """When a request was computed, on the gateway's clock: begun, first token, last token."""

    begun: float
    first: float
    ended: float

    @classmethod
    def of(cls, ledger: Mapping[str, Any]) -> Self:
        first = ledger["arrived"] + ledger["ttft_s"]
        return cls(first - ledger["prefill_s"], first, ledger["arrived"] + ledger["total_s"])


def compared(
    seen: Seen, pools: Sequence[PoolSpec], profile: Profile, beside: Beside
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Percentiles side by side, and a row for each request.

    Figures are `<metric>_p<percent>_real`, `_simulated` and `_error`, a share of the real one; `_error_alone` is that
    of the profile with nothing beside it. `median_error` is over all nine.
    """
    sides = {
        "real": [each.times for each in seen.answers],
        "simulated": simulated(seen.trace, pools, profile, beside),
        "alone": simulated(seen.trace, pools, profile, Beside()),
    }
    figures = {"requests": float(len(seen.answers)), "send_s": beside.send_s, "front_s": beside.front_s}
    for metric in METRICS:
        ordered = {
            side: sorted(value for each in times if (value := getattr(each, metric)) is not None)
            for side, times in sides.items()
        }
        for percent in PERCENTILES:
            real, ours, alone = (percentile(values, percent) for values in ordered.values())
            name = f"{metric}_p{percent}"
            figures |= {f"{name}_real": real, f"{name}_simulated": ours}
            figures |= {f"{name}_error": ours / real - 1, f"{name}_error_alone": alone / real - 1}
    for side in ("error", "error_alone"):
        errors = [abs(value) for name, value in figures.items() if name.endswith(f"_{side}")]
        figures[f"median_{side}"] = statistics.median(errors)
    rows = [
        {"at_s": each.at, "prompt_tokens": each.prompt, "output_tokens": each.output}
        | {f"{side}_{metric}": getattr(times[index], metric) for side, times in sides.items() for metric in METRICS}
        for index, each in enumerate(seen.trace.arrivals)
    ]
    return {name: round(value, 4) for name, value in figures.items()}, rows
