"""One training from prompts to a head and a report, in a folder that it can be taken up in again.

The folder: `plan.json` (what was asked for), `own_prompts/` (what the target asked itself), `answers/` (recordings of
the target), `checkpoint.pt`, and at the end the head (`head.json`, `head.safetensors`) with `report.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from joinwise.actors.bench import report
from joinwise.actors.draft.train.prompts import HELD_OUT, Asked
from joinwise.actors.draft.train.saying import Say
from joinwise.actors.models import LocalModel
from joinwise.cluster.errors import ConfigError

_PLAN, _OWN_PROMPTS, _ANSWERS, REPORT = "plan.json", "own_prompts", "answers", "report.json"
_SAVED_EVERY = 25


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        blocks, steps, batch, rate, seed: as `fitting.Settings` says.
        own_prompts: that the target is to make, beside those that are given.
        openings: what these begin with, in turn.
        answer_tokens: of an answer of the target at most.
        k: drafts of a round in the report.
        threads: compute threads. These two may be others when a training is taken up again.
    """

    blocks: int
    steps: int
    batch: int
    rate: float
    seed: int
    own_prompts: int
    openings: tuple[str, ...]
    answer_tokens: int
    k: int
    threads: int


def prepare(out: Path, target: LocalModel, asked: Asked, plan: Plan, *, resume: bool) -> None:
    """Make the folder, or find that this very training was begun in it.

    Raises:
        ConfigError: there is something in it and nothing was to be resumed; or the other way round; or what was begun
            there differs, and in what.
    """
    from joinwise.actors.draft.train.fitting import different

    prompts = [sorted(set(asked.prompts)), asked.share, asked.limit, sorted(asked.measured.items())]
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
    wanted = {"target": target.name, "target_digest": target.digest, "prompts": digest, **asdict(plan)}
    for may_change in ("k", "threads"):
        del wanted[may_change]
    wanted = json.loads(json.dumps(wanted))
    file = out / _PLAN
    if not resume:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out} is there already: take an empty folder, or go on with what is in it by --resume")
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
        return
    try:
        begun = json.loads(file.read_text(encoding="utf-8"))
        differs = different(begun, wanted)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"no training was begun in {out}: {error}; leave out --resume") from error
    if differs:
        raise ConfigError(f"the training in {out} was begun with {differs}: say the same, or take another folder")


def train(out: Path, target: LocalModel, asked: Asked, plan: Plan, say: Say) -> dict[str, float]:
    """Do what is not done yet of a training.

    Args:
        out: as `prepare` left it.
        say: told what is being done.

    Returns:
        The figures of the report.

    Raises:
        ConfigError: the target cannot have a head, or what is in the folder cannot be used.
    """
    import torch

    from joinwise.actors.draft.head import DovetailHead, HeadShape, TargetEnds, save_head
    from joinwise.actors.draft.train.fitting import Settings, StepFigures, Trainer
    from joinwise.actors.draft.train.own_prompts import own_prompts
    from joinwise.actors.draft.train.recording import record

    torch.set_num_threads(plan.threads)
    shape = HeadShape.like(target.path, plan.blocks)
    ends = TargetEnds.read(target.path, torch.float32)
    own: list[str] = []
    if plan.own_prompts:
        own = own_prompts(lambda: _asker(target.path, plan), plan.own_prompts, plan.seed, out / _OWN_PROMPTS, say)
    parts = asked.with_own(own)
    kept = {HELD_OUT: parts.held_out, **asked.measured}
    every = dict.fromkeys([*parts.train, *(prompt for some in kept.values() for prompt in some)])
    recordings = dict(
        zip(every, record(lambda: _recorder(target.path, plan), list(every), out / _ANSWERS, say), strict=True)
    )
    learnt = [recordings[prompt] for prompt in parts.train if _says(recordings[prompt])]
    spoken = {name: [recordings[prompt] for prompt in some] for name, some in kept.items()}
    if not learnt or not all(any(map(_says, some)) for some in spoken.values()):
        raise ConfigError(f"{target.name!r} has nothing to say to these prompts: take others")
    digest = hashlib.sha256(b"".join(each.tokens.tobytes() for each in learnt)).hexdigest()[:16]
    settings = Settings(target.name, target.digest, digest, plan.blocks, plan.steps, plan.batch, plan.rate, plan.seed)
    head = DovetailHead(shape, ends, plan.seed)
    head.begin_like(target.path)
    trainer = Trainer(head, learnt, settings)
    trainer.resume(out)

    def told(step: StepFigures) -> None:
        losses = f"loss {step.feature_loss:.3f} + {step.token_loss:.3f}"
        say("steps", step.step, plan.steps, f"{losses}, {step.right:.0%} as the target")

    while trainer.step < plan.steps:
        trainer.run(trainer.step + _SAVED_EVERY, told)
        trainer.save(out)
    save_head(trainer.head, out, target)
    rows = _measured(out, target, spoken, plan, say)
    figures = {"trained_tokens": float(_tokens(learnt))}
    for row in rows:
        of = "" if row["prompts"] == HELD_OUT else f"_{row['prompts']}"
        figures[f"prompts{of}" if of else "held_out_prompts"] = float(len(spoken[row["prompts"]]))
        for what in ("accepted_length", "tokens_per_round", "accepted_share"):
            figures[f"{what}_{row['drafter']}{of}"] = row[what]
    described = report.machine(target=target.name, target_digest=target.digest, **asdict(plan))
    report.write(out / REPORT, "train-draft", figures, rows, described)
    return figures


def _measured(
    out: Path, target: LocalModel, spoken: Mapping[str, Sequence[Any]], plan: Plan, say: Say
) -> list[dict[str, Any]]:
    """What the head, lookup, and an engine's usual mixture of both are worth, by where prompts are from."""
    from joinwise.actors.draft.head import load_head
    from joinwise.actors.draft.head_drafter import HeadDrafter
    from joinwise.actors.draft.lookup import PromptLookup
    from joinwise.actors.draft.train.measuring import AT_ONCE, measure

    longest = max(len(each.tokens) for some in spoken.values() for each in some) + plan.k
    head = load_head(out, target)

    def drafter() -> HeadDrafter:
        return HeadDrafter(head, slots=AT_ONCE, max_tokens=longest, name="head", threads=plan.threads)

    rows = []
    for done, (name, some) in enumerate(spoken.items()):
        say("measured", done, len(spoken), name)
        for drafts, with_ in (("head", drafter()), ("lookup", PromptLookup()), ("both", drafter())):
            worth = measure(with_, some, plan.k, lookup=drafts == "both")
            rates = {
                "accepted_length": round(worth.accepted_length, 4),
                "tokens_per_round": round(worth.tokens_per_round, 4),
                "accepted_share": round(worth.accepted_share, 4),
            }
            rows.append({"prompts": name, "drafter": drafts, "k": plan.k, **rates, **asdict(worth)})
    say("measured", len(spoken), len(spoken), "")
    return rows


def _says(recording: Any) -> bool:
    """Whether there is anything to draft: the first token is the target's in any case."""
    return len(recording.tokens) > recording.prompt + 1


def _tokens(recordings: Sequence[Any]) -> int:
    return sum(len(each.tokens) - each.prompt for each in recordings)


def _loaded(folder: Path, dtype: str) -> tuple[Any, Any]:
    """The target and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from joinwise.actors.draft.train.continuing import ATTENTION

    element = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=element, attn_implementation=ATTENTION).eval()
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ConfigError(f"no draft head can be made for {folder}: its layers are of {', '.join(sorted(kinds))}")
    return model, AutoTokenizer.from_pretrained(folder)


def _asker(folder: Path, plan: Plan) -> Any:
    """Loads the target, for as long as it asks; bfloat16 is good enough for that."""
    from joinwise.actors.draft.train.own_prompts import Asker

    return Asker(*_loaded(folder, "bfloat16"), plan.openings)


def _recorder(folder: Path, plan: Plan) -> Any:
    """Loads the target, for as long as it answers."""
    from joinwise.actors.draft.train.recording import Recorder

    model, tokenizer = _loaded(folder, "float32")

    def encode(prompt: str) -> list[int]:
        if tokenizer.chat_template is None:
            return list(tokenizer(prompt)["input_ids"])
        turn = [{"role": "user", "content": prompt}]
        return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False))

    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    return Recorder(model, encode, ends, answer_tokens=plan.answer_tokens)
