"""A running cluster as a plan sees it: its pools, its traffic and its machines' speed, from registry and ledgers.

A pool's machines are a kind of their own, named like the pool. Their times come from the ledgers of the last hour: a
prompt's from the quickest quarter of its length (the others waited beside something), a step's from the gaps between
tokens over how many requests decoded on the worker meanwhile. Pure functions.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from joinwise.cluster.errors import ConfigError
from joinwise.cluster.ledger import RequestLedger
from joinwise.cluster.router.registry import WorkerState
from joinwise.cluster.simulate.fit import rising
from joinwise.cluster.simulate.pools import PoolSpec
from joinwise.cluster.simulate.profile import Curve, Kind, Profile
from joinwise.cluster.simulate.trace import Arrival, Trace

LAST_S = 3600.0
_LAYERS = 32  # neither registry nor ledgers say; decides only how much of a cache is still to be sent after its prompt
_FEW = 3  # tokens of an answer below which its gaps say nothing of a step
_TYPICAL = 1024


@dataclass(frozen=True)
class Cluster:
    """What was seen.

    Attributes:
        pools: machines by role and pool; a kind is named like its pool.
        trace: the last hour's requests, without prompt tokens that a prefix cache had.
        profile: of the pools' machines; the quickest at prompts is the reference.
        guessed: what no ledger told, and what stands in for it.
    """

    pools: tuple[PoolSpec, ...]
    trace: Trace
    profile: Profile
    guessed: tuple[str, ...]


def read(lines: Iterable[str | bytes], model: str | None = None) -> list[RequestLedger]:
    """Ledgers of the hour before the newest, each request once, by arrival; those without an answer are left out.

    Args:
        lines: a ledger as JSON each; empty ones are passed over.
        model: of this model only.

    Raises:
        ConfigError: a line that is no ledger, or nothing that could be used.
    """
    found: dict[str, RequestLedger] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                ledger = RequestLedger.from_json(line)
            except ValueError:
                raise ConfigError(f"line {number} of the ledgers is none") from None
            if ledger.output_tokens >= 1 and ledger.prompt_tokens >= 1 and model in (None, ledger.model):
                found[ledger.request_id] = ledger
    newest = max((each.arrived for each in found.values()), default=0.0)
    recent = [each for each in found.values() if each.arrived >= newest - LAST_S]
    if len(recent) < 2:
        raise ConfigError(f"{len(recent)} requests with an answer in the ledgers; a plan needs traffic to go by")
    return sorted(recent, key=lambda each: each.arrived)


def seen(workers: Sequence[WorkerState], ledgers: Sequence[RequestLedger], profile: Profile | None = None) -> Cluster:
    """Put together what is known of a cluster.

    Args:
        workers: live ones of one model; those that drain do not count.
        ledgers: from `read`.
        profile: measured times, with a kind named like each pool; None makes them from the ledgers.

    Raises:
        ConfigError: no worker, workers of several models, or a profile without one of the pools.
    """
    workers = [each for each in workers if each.info.role != "draining"]
    models = {each.info.model for each in workers}
    if len(models) != 1:
        raise ConfigError(f"a plan is for one model; the live workers serve {', '.join(sorted(models)) or 'none'}")
    counted = Counter((each.info.role, each.info.pool) for each in workers)
    pools = tuple(PoolSpec(role, pool, count) for (role, pool), count in sorted(counted.items()))
    start = ledgers[0].arrived
    arrivals = [
        Arrival(each.arrived - start, max(1, each.prompt_tokens - each.cached_tokens), each.output_tokens)
        for each in ledgers
    ]
    guessed: list[str] = []
    if profile is None:
        by_pool: dict[str, list[WorkerState]] = defaultdict(list)
        for each in workers:
            by_pool[each.info.pool].append(each)
        kinds = {pool: _kind(pool, mine, ledgers, guessed) for pool, mine in sorted(by_pool.items())}
        quickest = min(kinds.values(), key=lambda kind: kind.prefill(_TYPICAL)).name
        profile = Profile(models.pop(), kinds, quickest)
    for pool in pools:
        profile.kind(pool.kind)
    return Cluster(pools, Trace("the last hour", arrivals), profile, tuple(guessed))


def _kind(pool: str, workers: Sequence[WorkerState], ledgers: Sequence[RequestLedger], guessed: list[str]) -> Kind:
    ids = {each.info.worker_id for each in workers}
    load = max((each.load for each in workers), key=lambda load: load.prefill_tokens_per_s)
    prompts = _prompt_points(ledger for ledger in ledgers if (ledger.prefill_worker or ledger.decode_worker) in ids)
    if not prompts and load.prefill_tokens_per_s:
        prompts = {tokens: tokens / load.prefill_tokens_per_s for tokens in (_TYPICAL // 16, _TYPICAL)}
        guessed.append(f"{pool}: prompts at the {load.prefill_tokens_per_s:.0f} tokens a second that it last measured")
    elif not prompts:
        prompts = _prompt_points(ledgers)
        guessed.append(f"{pool}: prompts as quick as elsewhere in the cluster; it has computed none")
    if not prompts:
        raise ConfigError(f"nothing is known of how fast the pool {pool!r} computes prompts; give it a --profile")
    steps = _step_points([ledger for ledger in ledgers if ledger.decode_worker in ids])
    if not steps:
        known = load.decode_step_ms or max((each.load.decode_step_ms for each in workers), default=0.0)
        steps = {1: known / 1000 if known else _alike(ledgers)}
        guessed.append(f"{pool}: every step of decoding {steps[1] * 1000:.1f} ms, whatever the batch")
    elif len(steps) == 1:
        guessed.append(f"{pool}: steps of every batch like those of {next(iter(steps))}, the only one that was seen")
    sent = [(each.wire_bytes, each) for each in ledgers if each.wire_bytes]
    per_token = statistics.median(size / each.prompt_tokens for size, each in sent) if sent else 1.0
    speeds = [size / (each.wire_seconds_hidden + each.wire_seconds_exposed or 1e-3) for size, each in sent]
    step = Curve(steps)
    return Kind(
        name=pool,
        prefill=Curve(prompts),
        tokens=Curve({1: step(1)}),
        batch=step,
        context_s=0.0,
        kv_bytes=max(1, round(per_token)),
        kv_tokens=min(each.info.num_blocks * each.info.block_size for each in workers),
        link_bytes_s=max(speeds, default=1e12),  # the quickest transfer waited least for its layers
        layers=_LAYERS,
        price=1.0,
        power=1.0,
    )


def _prompt_points(ledgers: Iterable[RequestLedger]) -> dict[int, float]:
    """Prompt tokens -> seconds, by lengths that double: the lower quartile of each."""
    groups: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for each in ledgers:
        tokens = each.prompt_tokens - each.cached_tokens
        if tokens > 0 and each.prefill_s > 0 and not each.recomputed:
            groups[tokens.bit_length()].append((tokens, each.prefill_s))
    points = {}
    for _, found in sorted(groups.items()):
        count = round(statistics.median(tokens for tokens, _ in found))
        per_token = sorted(seconds / tokens for tokens, seconds in found)[len(found) // 4]
        points[count] = per_token * count
    return _risen(points, [len(found) for _, found in sorted(groups.items())])


def _step_points(ledgers: Sequence[RequestLedger]) -> dict[int, float]:
    """Sequences in a batch -> seconds of a step: medians, by batches that double."""
    groups: dict[int, list[tuple[float, float]]] = defaultdict(list)
    by_worker: dict[str | None, list[RequestLedger]] = defaultdict(list)
    for each in ledgers:
        if each.total_s > each.ttft_s:
            by_worker[each.decode_worker].append(each)
    for mine in by_worker.values():
        for each, beside in zip(mine, together(mine), strict=True):
            if each.output_tokens > _FEW and each.token_gap_median_s > 0:
                groups[round(beside).bit_length()].append((beside, each.token_gap_median_s))
    points = {
        max(1, round(statistics.median(beside for beside, _ in found))): statistics.median(gap for _, gap in found)
        for _, found in sorted(groups.items())
    }
    return _risen(points, [len(found) for _, found in sorted(groups.items())])


def together(ledgers: Sequence[RequestLedger]) -> list[float]:
    """For each request of one worker: how many decoded there while it did, itself included, on average."""
    begins = [each.arrived + each.ttft_s for each in ledgers]
    ends = [each.arrived + each.total_s for each in ledgers]
    order = sorted(range(len(ledgers)), key=begins.__getitem__)
    ordered = [begins[index] for index in order]
    found = []
    for begin, end in zip(begins, ends, strict=True):
        others = (index for index in order[: bisect_left(ordered, end)] if ends[index] > begin)
        found.append(sum(min(end, ends[index]) - max(begin, begins[index]) for index in others) / (end - begin))
    return found


def _risen(points: Mapping[int, float], weights: list[int]) -> dict[int, float]:
    return dict(zip(points, rising(list(points.values()), weights), strict=True)) if points else {}


def _alike(ledgers: Sequence[RequestLedger]) -> float:
    """Seconds of a step anywhere in the cluster."""
    gaps = [each.token_gap_median_s for each in ledgers if each.token_gap_median_s > 0]
    if not gaps:
        raise ConfigError("nothing is known of how long a step of decoding takes; give a --profile")
    return statistics.median(gaps)
