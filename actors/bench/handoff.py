"""`joinwise bench handoff`: what a request waits for between its prefill's end and its second token.

One cluster per side (a transport and a codec), the same prompts through each; NIXL's pair takes turns with the first,
prompt by prompt. *Exposed* is what the data plane alone costs: seconds from the last layer's computation to the
transfer's last frame. The *gap* is what a client sees: from the prefill's end to the second token, less the two steps
that computed tokens there, the replayed step and a decode step.
"""

import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx

from joinwise.actors.bench.link import link
from joinwise.actors.bench.local import local_cluster
from joinwise.actors.bench.nixl_pair import NixlPair, ask_pair, nixl_pair
from joinwise.actors.bench.serve import MODEL, Answer, ask, question
from joinwise.actors.models import resolve_model
from joinwise.cluster.config import JoinwiseConfig

LENGTHS = (128, 512, 1500, 4000)
_SHOWN = 1500
"""Whose figures are shown."""
_ENGINE = {"enforce_eager": True, "kv_cache_memory_bytes": 600_000_000, "block_size": 32, "max_num_seqs": 4}
_MAX_MODEL_LEN = 4608
_OUTPUT_TOKENS = 16
_SETTLED_S = 60.0

Say = Callable[[str], None]
Answers = dict[int, list[Answer]]


@dataclass(frozen=True)
class Side:
    """A cluster to measure.

    Attributes:
        transport: value of `kv.transport`.
        codec: value of `kv.codec`.
        rate: of the link that everything goes over, as `tc` writes it; empty for the loopback as it is.
    """

    transport: str
    codec: str = "none"
    rate: str = ""

    @property
    def suffix(self) -> str:
        """Of its figures."""
        return "_".join(
            ["", self.transport, *([self.codec] if self.codec != "none" else []), *filter(None, [self.rate])]
        )


def run(
    sides: Sequence[Side], lengths: Collection[int], dtype: str, repeats: int, nixl: bool, say: Say
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Run the benchmark.

    Args:
        sides: figures without a suffix are of the first.
        lengths: tokens of the prompts, 1,500 among them.
        dtype: element type of model and cache.
        repeats: prompts of each length.
        nixl: measure NIXL's pair too, in turn with the first side of each link.
        say: is told what happens.
    """
    figures: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    first: dict[str, Answers] = {}
    for side in sides:
        with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="joinwise-bench-") as folder:
            if side.rate:
                stack.enter_context(link(side.rate))
            say(f"{side.transport}: starting a cluster")
            facts = stack.enter_context(local_cluster(_cluster(side, dtype), Path(folder)))
            pair = None
            if nixl and side.rate not in first:
                say("starting NIXL's pair")
                engine = {"dtype": dtype, "max_model_len": _MAX_MODEL_LEN, **_ENGINE}
                model, cores = resolve_model(MODEL, progress=say), sorted(os.sched_getaffinity(0))
                pair = stack.enter_context(nixl_pair(str(model.path), MODEL, cores, engine, Path(folder)))
            ours, theirs = asyncio.run(
                _measure(facts["addresses"]["http"], pair, lengths, repeats, f"{side.transport}: ", say)
            )
        reference = first.setdefault(side.rate, ours)
        mine = [_row(side, length, found, reference[length]) for length, found in ours.items()]
        rows += mine
        mine_long, suffix = _of(mine, _SHOWN), "" if side == sides[0] else side.suffix
        figures |= {
            f"exposed_steps_1500{suffix}": mine_long["exposed_ms"] / mine_long["decode_step_ms"],
            f"exposed_prefill_share_1500{suffix}": mine_long["exposed_ms"] / mine_long["prefill_ms"],
            f"gap_ms_1500{suffix}": mine_long["gap_ms"],
        }
        if theirs:
            baseline = [_nixl_row(side, length, found, ours[length]) for length, found in theirs.items()]
            rows += baseline
            figures[f"nixl_exposed_ratio_1500{suffix}"] = mine_long["gap_ms"] / _of(baseline, _SHOWN)["gap_ms"]
    return {name: round(value, 4) for name, value in (figures | crossovers(rows)).items()}, rows


def crossovers(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """From how many prompt tokens on a codec shortens what is exposed on its link and by its transport.

    Returns:
        `crossover_tokens_<transport>_<codec>_<link>`; -1 where it does not, at the longest prompts.
    """
    plain = {_place(row): row["exposed_ms"] for row in rows if row["codec"] == "none"}
    pays: dict[str, dict[int, bool]] = {}
    for row in rows:
        if row["codec"] != "none" and _place(row) in plain:
            name = f"crossover_tokens_{row['transport']}_{row['codec']}_{row['link']}"
            pays.setdefault(name, {})[row["prompt_tokens"]] = row["exposed_ms"] < plain[_place(row)]
    return {name: min(takewhile(of.get, sorted(of, reverse=True)), default=-1) for name, of in pays.items()}


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["link"], row["transport"], row["prompt_tokens"]


async def _measure(
    url: str, pair: NixlPair | None, lengths: Collection[int], repeats: int, who: str, say: Say
) -> tuple[Answers, Answers]:
    """Every prompt through the cluster and, in turn, through NIXL's pair. Returns the answers of both by length."""
    dice = random.Random(0)  # noqa: S311 - reproducible, not secret
    ours: Answers = {length: [] for length in lengths}
    theirs: Answers = {length: [] for length in lengths if pair}
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        servers = [httpx.AsyncClient(base_url=at, timeout=600) for at in ((pair.prefill, pair.decode) if pair else ())]
        for repeat in range(-1, repeats):  # the first round warms up
            for length in lengths:
                prompt = [dice.randrange(1000, 40_000) for _ in range(length)]
                if pair:
                    await _settled(client)
                answer = await ask(client, prompt, _OUTPUT_TOKENS)
                ledger = answer.ledger or {}
                if not ledger.get("transport") or ledger.get("recomputed"):
                    raise RuntimeError(f"a prompt of {length} tokens was not handed over: {ledger}")
                ours[length] += [answer] * (repeat >= 0)
                if pair:
                    with pair.awake():
                        answer = await ask_pair(servers[0], servers[1], question(prompt, _OUTPUT_TOKENS))
                    theirs[length] += [answer] * (repeat >= 0)
            say(f"{who}round {repeat + 1} of {repeats}")
        for server in servers:
            await server.aclose()
    return ours, theirs


async def _settled(client: httpx.AsyncClient) -> None:
    """Wait until prompts are handed over again: the pair has had the cores, and workers may have been late to say that
    they live."""
    deadline = time.monotonic() + _SETTLED_S
    while not ((await ask(client, [1] * 64, 2)).ledger or {}).get("transport"):
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing is handed over, {_SETTLED_S:g} s after NIXL's pair has been stopped")


def _row(side: Side, length: int, answers: list[Answer], reference: list[Answer]) -> dict[str, Any]:
    def median_ms(of: Callable[[Answer, dict[str, Any]], float]) -> float:
        return _ms(of(answer, answer.ledger or {}) for answer in answers)

    ledger = answers[0].ledger or {}
    return {
        "link": side.rate or "none",
        "transport": side.transport,
        "used": ledger["transport"],
        "codec": side.codec,
        "prompt_tokens": length,
        "kv_bytes": ledger["wire_bytes"],
        "prefill_ms": median_ms(lambda _, ledger: ledger["prefill_s"]),
        "decode_step_ms": median_ms(lambda answer, _: _step(answer)),
        "exposed_ms": median_ms(lambda _, ledger: ledger["wire_seconds_exposed"]),
        "import_ms": median_ms(lambda _, ledger: ledger["import_s"]),
        "replayed_step_ms": median_ms(lambda _, ledger: ledger["replayed_step_s"]),
        "gap_with_replay_ms": median_ms(lambda answer, _: answer.gaps[0] - _step(answer)),
        "gap_ms": median_ms(lambda answer, ledger: answer.gaps[0] - _step(answer) - ledger["replayed_step_s"]),
        **agreement(answers, reference),
    }


def _nixl_row(side: Side, length: int, answers: list[Answer], ours: list[Answer]) -> dict[str, Any]:
    """NIXL's pair has computed two tokens when it gives its second one, as joinwise's decode worker has."""
    empty = dict.fromkeys(_row(side, length, ours, ours))
    return empty | {
        "link": side.rate or "none",
        "transport": "nixl",
        "used": "ucx",
        "codec": "none",
        "prompt_tokens": length,
        "decode_step_ms": _ms(map(_step, answers)),
        "gap_with_replay_ms": _ms(answer.times[1] - _step(answer) for answer in answers),
        "gap_ms": _ms(answer.times[1] - 2 * _step(answer) for answer in answers),
        **agreement(answers, ours),
    }


def agreement(answers: Sequence[Answer], reference: Sequence[Answer]) -> dict[str, Any]:
    """How far answers are those of a reference, token by token.

    Returns:
        `first_divergence`: the first position, over all answers, where they differ; None where none does.
        `same_tokens`: share of the tokens that are equal.
    """
    pairs = [(a.token_ids, b.token_ids) for a, b in zip(answers, reference, strict=True)]
    differing = [next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None) for a, b in pairs]
    total = sum(len(b) for _, b in pairs)
    same = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=True))
    return {
        "first_divergence": min((at for at in differing if at is not None), default=None),
        "same_tokens": round(same / total, 4),
    }


def _of(rows: list[dict[str, Any]], length: int) -> dict[str, Any]:
    return next(row for row in rows if row["prompt_tokens"] == length)


def _step(answer: Answer) -> float:
    """Seconds of a decode step, once the hand-over is behind."""
    return statistics.median(answer.gaps[1:])


def _ms(seconds: Any) -> float:
    return round(1000 * statistics.median(seconds), 3)


def _cluster(side: Side, dtype: str) -> JoinwiseConfig:
    return JoinwiseConfig.model_validate(
        {
            "cluster": f"bench-handoff-{side.transport}",
            "models": [{"name": MODEL, "model": MODEL, "dtype": dtype, "max_model_len": _MAX_MODEL_LEN}],
            "pools": [
                {"name": role, "model": MODEL, "role": role, "engine": dict(_ENGINE)} for role in ("prefill", "decode")
            ],
            "kv": {"transport": side.transport, "codec": side.codec},
            "gateway": {"http_port": 0, "grpc_port": 0, "drain_s": 2},
            "router": {"split": "always", "moves": False},
        }
    )
