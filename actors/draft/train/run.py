"""One training from prompts to a head and a report, in a folder that it can be taken up in again.

The folder: `plan.json` (what was asked for), `answers/` (recordings of the target), `checkpoint.pt`, and at the end the
head (`head.json`, `head.safetensors`) with `report.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from joinwise.actors.bench import report
from joinwise.actors.draft.train.prompts import Split
from joinwise.actors.draft.train.saying import Say
from joinwise.actors.models import LocalModel
from joinwise.cluster.errors import ConfigError

_PLAN, _ANSWERS, REPORT = "plan.json", "answers", "report.json"
_SAVED_EVERY = 25


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        blocks, steps, batch, rate, seed: as `fitting.Settings` says.
        answer_tokens: of an answer of the target at most.
        k: drafts of a round in the report.
        threads: compute threads. These two may be others when a training is taken up again.
    """

    blocks: int
    steps: int
    batch: int
    rate: float
    seed: int
    answer_tokens: int
    k: int
    threads: int


def prepare(out: Path, target: LocalModel, prompts: Split, plan: Plan, *, resume: bool) -> None:
    """Make the folder, or find that this very training was begun in it.

    Raises:
        ConfigError: there is something in it and nothing was to be resumed; or the other way round; or what was begun
            there differs, and in what.
    """
    from joinwise.actors.draft.train.fitting import different

    digest = hashlib.sha256(json.dumps([prompts.train, prompts.held_out]).encode()).hexdigest()[:16]
    wanted = {"target": target.name, "target_digest": target.digest, "prompts": digest, **asdict(plan)}
    for may_change in ("k", "threads"):
        del wanted[may_change]
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


def train(out: Path, target: LocalModel, prompts: Split, plan: Plan, say: Say) -> dict[str, float]:
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

    from joinwise.actors.draft.head import DovetailHead, HeadShape, TargetEnds, load_head, save_head
    from joinwise.actors.draft.head_drafter import HeadDrafter
    from joinwise.actors.draft.lookup import PromptLookup
    from joinwise.actors.draft.train.fitting import Settings, StepFigures, Trainer
    from joinwise.actors.draft.train.measuring import measure
    from joinwise.actors.draft.train.recording import record

    torch.set_num_threads(plan.threads)
    shape = HeadShape.like(target.path, plan.blocks)
    ends = TargetEnds.read(target.path, torch.float32)
    recordings = record(lambda: _recorder(target.path, plan), [*prompts.train, *prompts.held_out], out / _ANSWERS, say)
    learnt, kept = recordings[: len(prompts.train)], recordings[len(prompts.train) :]
    learnt = [each for each in learnt if len(each.tokens) > each.prompt]
    if not learnt or not any(len(each.tokens) > each.prompt + 1 for each in kept):
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

    say("held-out answers", 0, 1, "")
    longest = max(len(each.tokens) for each in kept) + plan.k
    drafter = HeadDrafter(load_head(out, target), slots=1, max_tokens=longest, name="head", threads=plan.threads)
    found = {"head": measure(drafter, kept, plan.k), "lookup": measure(PromptLookup(), kept, plan.k)}
    figures = {"held_out_prompts": float(len(kept)), "trained_tokens": float(_tokens(learnt))}
    for name, worth in found.items():
        figures[f"accepted_length_{name}"] = round(worth.accepted_length, 4)
        figures[f"tokens_per_round_{name}"] = round(worth.tokens_per_round, 4)
        figures[f"accepted_share_{name}"] = round(worth.accepted_share, 4)
    say("held-out answers", 1, 1, "")
    rows = [{"drafter": name, "k": plan.k, **asdict(worth)} for name, worth in found.items()]
    described = report.machine(target=target.name, **asdict(plan))
    report.write(out / REPORT, "train-draft", figures, rows, described)
    return figures


def _tokens(recordings: Sequence[Any]) -> int:
    return sum(len(each.tokens) - each.prompt for each in recordings)


def _recorder(folder: Path, plan: Plan) -> Any:
    """Loads the target, for as long as it answers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from joinwise.actors.draft.train.recording import Recorder

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()

    def encode(prompt: str) -> list[int]:
        if tokenizer.chat_template is None:
            return list(tokenizer(prompt)["input_ids"])
        turn = [{"role": "user", "content": prompt}]
        return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False))

    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    return Recorder(model, encode, ends, answer_tokens=plan.answer_tokens)
