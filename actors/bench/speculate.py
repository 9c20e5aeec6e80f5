"""`joinwise bench speculate`: answers with drafts against answers without, same engine arguments, same cores.

Two engines in processes of their own take turns: one without `speculative_config`, which is the baseline, and one that
speculates, whose proposers take turns as well. The draft actors share a third process and all cores with them, so that
what drafting costs is in every figure. Every group of prompts goes through each side once, and through the baseline
before and after the others; tokens are compared before times. Prompts are computed beforehand: rates are of decoding.
`lookup` and `fixed` draft by prompt lookup and by the model alone, `ahead` by the model that drafts further while the
target verifies; `adaptive` is what an engine does by itself: it looks up where the text repeats itself, asks the model
elsewhere, and has as many drafts as pay. `recall` looks up in its earlier answers too, and so does `again`, which has
given the very answer before.

The sides `own_device...` are a projection: the real draft model has drafted along the answers beforehand, and what it
drafted, wrong ids included, is replayed at no cost, as if it had a device of its own so many milliseconds away.
"""

import json
import os
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joinwise.actors import cpu
from joinwise.actors.bench.remote import Remote
from joinwise.actors.bench.speculate_plan import Answers, Plan
from joinwise.actors.bench.speculate_rows import ADAPTIVE, BASELINE, OWN, RECALLING, SIDES, Row
from joinwise.actors.models import resolve_model
from joinwise.cluster.errors import ConfigError

_MAX_MODEL_LEN = 1024
_ENGINE = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 400_000_000,
    "block_size": 32,
    "max_model_len": _MAX_MODEL_LEN,
    "max_num_batched_tokens": 2 * _MAX_MODEL_LEN,
}
_PATIENCE_S = 5.0
_RECALL = 1 << 16
_WAIT_S = 600.0

Say = Callable[[str], None]


def texts(folder: Path, dataset: str, first: int, count: int) -> dict[int, str]:
    """Prompts of a dataset, by their place in its file.

    Raises:
        ConfigError: the file is missing, or is shorter than that.
    """
    file = folder / f"{dataset}.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"the prompts {file} cannot be read ({error.strerror}): --data names their folder") from error
    if len(lines) < first + count:
        raise ConfigError(f"{file} holds {len(lines)} prompts, so there are none from {first} to {first + count - 1}")
    return {place: json.loads(lines[place])["turns"][0] for place in range(first, first + count)}


def run(
    plan: Plan, asked: Mapping[str, Mapping[int, str]], batches: Collection[int], sides: Collection[str], say: Say
) -> Iterator[list[Row]]:
    """Run the benchmark.

    Args:
        plan: what is measured.
        asked: prompts by dataset and place.
        batches: how many of them are answered at once.
        sides: some of SIDES.
        say: is told what happens.

    Yields:
        After each group of prompts a row for each side, of that group alone: `merged` puts them together.
    """
    groups = [
        _Group(dataset, batch, places[at : at + batch])
        for dataset, prompts in asked.items()
        for places in [sorted(prompts)]
        for batch in sorted(batches)
        for at in range(0, len(places) - batch + 1, batch)
    ]
    found: dict[_Group, list[tuple[str, Answers]]] = {group: [] for group in groups}
    others = [side for side in SIDES if side in sides]
    phases = [[BASELINE, *others]] if plan.together else [[BASELINE], others]
    with _drafts(plan, say) as drafts:
        for phase in phases:
            with _targets(plan, phase, max(batches), drafts("addresses"), say) as targets:
                tokens = _tokens(next(iter(targets.values())), asked)
                for number, group in enumerate(groups):
                    prompts = [tokens[group.dataset][place] for place in group.places]
                    for target in set(targets.values()):
                        target("answer", "", prompts, 1)  # its prefix is known from here on
                    for side in _turns(phase, number):
                        say(f"{group}: {side}")
                        if side == "again":
                            targets[side]("answer", side, prompts, plan.max_tokens)
                        answers = targets[side]("answer", side, prompts, plan.max_tokens)
                        found[group].append((side, answers))
                        if len(found[group]) == 1 and set(OWN) & set(others):
                            for prompt, answer in zip(prompts, answers.token_ids, strict=True):
                                drafts("record", prompt, answer, plan.most)
                    if phase is phases[-1]:
                        yield [_fresh(plan, group, *each) for each in _samples(plan, group, found[group])]


def _fresh(plan: Plan, group: "_Group", side: str, sample: Row) -> Row:
    return {
        "target": plan.target,
        "draft": plan.draft,
        "dtype": plan.dtype,
        "draft_dtype": plan.draft_dtype,
        "engine": " ".join(f"{name}={value}" for name, value in sorted(plan.engine.items())),
        "draft_core": plan.draft_core,
        "draft_device": "gpu" if plan.draft_gpu else None,
        "dataset": group.dataset,
        "batch": group.batch,
        "side": side,
        "k": plan.wanted(side),
        "samples": [sample],
    }


@dataclass(frozen=True)
class _Group:
    dataset: str
    batch: int
    places: Sequence[int]

    def __hash__(self) -> int:
        return hash((self.dataset, self.batch, self.places[0]))

    def __str__(self) -> str:
        return f"{self.dataset} {self.places[0]}, {self.batch} at once"


def _turns(sides: Sequence[str], number: int) -> list[str]:
    """Order of the sides in a group: the baseline around the others, which change ends from group to group."""
    others = [side for side in sides if side != BASELINE]
    ends = [BASELINE] if BASELINE in sides else []
    return [*ends, *(reversed(others) if number % 2 else others), *(ends if others else [])]


@contextmanager
def _drafts(plan: Plan, say: Say) -> Iterator[Remote]:
    say(f"loading the draft model {plan.draft}")
    folder, (_, cores) = resolve_model(plan.draft, progress=say).path, plan.cores
    arguments = (cores, folder, plan.draft_dtype, len(cores), _MAX_MODEL_LEN, OWN, "cuda" if plan.draft_gpu else "cpu")
    environment = cpu.environment(len(cores))
    remote = Remote(_make_drafts, *arguments, environment=environment, wait_s=_WAIT_S, python=plan.draft_python)
    try:
        yield remote
    finally:
        remote.close()


@contextmanager
def _targets(
    plan: Plan, sides: Sequence[str], batch: int, addresses: Mapping[str, str], say: Say
) -> Iterator[dict[str, Remote]]:
    """The engine of each side."""
    folder, (cores, _) = resolve_model(plan.target, progress=say).path, plan.cores
    environment = cpu.environment(len(cores))
    engine = {**_ENGINE, **plan.engine, "dtype": plan.dtype, "max_num_seqs": batch}
    targets: dict[str, Remote] = {}
    with ExitStack() as stack:
        for speculates in (False, True):
            mine = [side for side in dict.fromkeys(sides) if (side != BASELINE) == speculates]
            if not mine:
                continue
            say(f"starting an engine {'with' if speculates else 'without'} speculation")
            most = max(plan.k, plan.most) if speculates else 0
            remote = Remote(_make_target, cores, folder, engine, most, environment=environment, wait_s=_WAIT_S)
            stack.callback(remote.close)
            for side in mine:
                targets[side] = remote
                if speculates:
                    address = addresses[plan.drafter(side)] if side != "silent" else ""
                    recall = _RECALL if side in RECALLING else 0
                    remote("side", side, plan.wanted(side), address, side in ADAPTIVE, _PATIENCE_S, recall)
        yield targets


def _make_target(cores: Sequence[int], *arguments: Any) -> Any:
    from joinwise.actors.bench.speculate_engine import Target

    cpu.pin(cores)
    return Target(*arguments)


def _make_drafts(cores: Sequence[int], *arguments: Any) -> Any:
    from joinwise.actors.bench.speculate_drafts import Drafts

    cpu.pin(cores)
    return Drafts(*arguments)


def _tokens(target: Remote, asked: Mapping[str, Mapping[int, str]]) -> dict[str, dict[int, list[int]]]:
    return {
        dataset: dict(zip(prompts, target("prompts", list(prompts.values())), strict=True))
        for dataset, prompts in asked.items()
    }


def _samples(plan: Plan, group: _Group, taken: Sequence[tuple[str, Answers]]) -> Iterator[tuple[str, Row]]:
    """What each side's answers to a group come to; those of the baseline are the mean of its turns."""
    base = [answers for side, answers in taken if side == BASELINE]
    base_rate = statistics.mean(answers.rate for answers in base)
    base_step = statistics.median(seconds for each in base for size, seconds in each.steps if size == group.batch)
    for side, answers in taken:
        if side == BASELINE and answers is not base[0]:
            continue
        rate = base_rate if side == BASELINE else answers.rate
        size = group.batch * (plan.wanted(side) + 1)
        steps = [seconds for tokens, seconds in answers.steps if tokens == size]
        asked = answers.asked
        heard = asked.asked - asked.missed
        yield (
            side,
            {
                "places": list(group.places),
                "tokens": sum(len(ids) for ids in answers.token_ids),
                "tokens_per_s": rate,
                "speedup": rate / base_rate if plan.together else None,
                "accepted_length": answers.gained / answers.row_steps if answers.row_steps else None,
                "step_ms": 1000 * statistics.median(steps) if steps else None,
                "step_ratio": statistics.median(steps) / base_step if steps else None,
                "draft_ms": 1000 * asked.drafting_s / heard if heard else None,
                "wait_ms": 1000 * asked.waited_s / asked.asked if asked.asked else None,
                "round_bytes": asked.bytes / asked.asked if asked.asked else None,
                "rounds": asked.asked,
                "drafted": asked.drafted,
                "missed": asked.missed,
                "divergences": sum(
                    ids != right for ids, right in zip(answers.token_ids, base[0].token_ids, strict=True)
                ),
                "load_average": os.getloadavg()[0],
            },
        )
