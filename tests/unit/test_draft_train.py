"""Training a draft head: what it learns from, that it learns, and that an interruption changes no bit."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_target import IDS, saved, tiny
from typer.testing import CliRunner

from joinwise.actors.draft.drafter import Ask
from joinwise.actors.draft.head import DovetailHead, HeadShape, TargetEnds, load_head
from joinwise.actors.draft.head_drafter import HeadDrafter
from joinwise.actors.draft.lookup import PromptLookup
from joinwise.actors.draft.train.fitting import CHECKPOINT, Settings, Trainer
from joinwise.actors.draft.train.measuring import measure
from joinwise.actors.draft.train.prompts import read_prompts, split
from joinwise.actors.draft.train.recording import Recorder, Recording, record
from joinwise.actors.models import resolve_model
from joinwise.cluster.cli.main import app
from joinwise.cluster.errors import ConfigError

SETTINGS = Settings("tiny", "a" * 32, "d", blocks=1, steps=12, batch=3, rate=2e-3, seed=5)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Several would wait for each other where other tests run beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text(seed: int, size: int = 8) -> str:
    return " ".join(f"w{each}" for each in random.Random(seed).choices(range(IDS), k=size))


def encode(prompt: str) -> list[int]:
    return [int(word[1:]) for word in prompt.split()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("tiny"), tiny())


@pytest.fixture(scope="module")
def recordings() -> list[Recording]:
    return Recorder(tiny(), encode, [], answer_tokens=16).answers([text(seed, 4 + seed % 5) for seed in range(12)])


def fresh(folder: Path, blocks: int = 1) -> DovetailHead:
    return DovetailHead(HeadShape.like(folder, blocks), TargetEnds.read(folder, torch.float32), seed=1)


def drafter(head: DovetailHead) -> HeadDrafter:
    return HeadDrafter(head.eval(), slots=1, max_tokens=200, name="head", threads=1)


# Prompts.


def test_prompts_of_both_forms(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text('{"turns": ["first", "not this"]}\n\n{"prompt": "second"}\n')
    two.write_text('{"prompt": "third"}')
    assert read_prompts([one, two]) == ["first", "second", "third"]


@pytest.mark.parametrize("line", ["{", "[]", '{"turns": []}', '{"prompt": 5}', '{"prompt": " "}', "{}", "3"])
def test_what_is_no_prompt_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(ConfigError, match=r"p\.jsonl:2 is no prompt"):
        read_prompts([file])


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl cannot be read"):
        read_prompts([Path("nowhere.jsonl")])


def test_no_prompt_is_in_both_parts_whatever_their_order() -> None:
    prompts = [f"prompt {each}" for each in range(40)]
    parts = split([*prompts, *prompts[:9]], 0.25)
    assert len(parts.held_out) == 10
    assert sorted([*parts.train, *parts.held_out]) == sorted(prompts)
    assert split(prompts[::-1], 0.25) == parts
    assert len(split(prompts, 0.001).held_out) == 1
    assert len(split(prompts, 0.999).train) == 1
    few = split(prompts, 0.25, 8)
    assert (len(few.train), len(few.held_out)) == (6, 2)


def test_too_few_prompts() -> None:
    with pytest.raises(ConfigError, match="4 different prompts are too few"):
        split(["a", "b", "c", "d", "d", "a"], 0.2)


# Recordings.


def test_a_recording_is_what_the_target_says_and_thinks() -> None:
    model = tiny()
    prompts = [text(1, 9), text(2, 3)]  # of unequal length in one batch
    for prompt, found in zip(prompts, Recorder(model, encode, [], answer_tokens=6).answers(prompts), strict=True):
        assert found.tokens[: found.prompt].tolist() == encode(prompt)
        assert len(found.tokens) == found.prompt + 6
        with torch.inference_mode():
            logits = model(torch.from_numpy(found.tokens.astype(np.int64))[None]).logits[0]
            again = model.lm_head(torch.from_numpy(found.hidden.astype(np.float32)))
        assert logits.argmax(-1)[found.prompt - 1 : -1].tolist() == found.tokens[found.prompt :].tolist()
        torch.testing.assert_close(again, logits, atol=0.02, rtol=0.01)


def test_an_answer_ends_where_it_ends() -> None:
    (whole,) = Recorder(tiny(), encode, [], answer_tokens=8).answers([text(3)])
    end = int(whole.tokens[whole.prompt + 2])
    first = whole.tokens[whole.prompt :].tolist().index(end)
    cut, other = Recorder(tiny(), encode, [end], answer_tokens=8).answers([text(3), text(4)])
    assert cut.tokens.tolist() == whole.tokens[: whole.prompt + first + 1].tolist()
    assert len(other.tokens) - other.prompt <= 8


def test_recordings_are_made_once_and_go_on_where_they_were(tmp_path: Path) -> None:
    prompts = [text(seed) for seed in range(20)]
    made: list[int] = []

    class Broken(Recorder):
        def answers(self, some: object) -> list[Recording]:
            if len(made) == 2:
                raise KeyboardInterrupt
            made.append(1)
            return super().answers(some)  # type: ignore[arg-type]

    def say(*_: object) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        record(lambda: Broken(tiny(), encode, [], answer_tokens=4), prompts, tmp_path, say)
    there = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    assert len(there) == 16
    found = record(lambda: Recorder(tiny(), encode, [], answer_tokens=4), prompts, tmp_path, say)
    assert [each.tokens[: each.prompt].tolist() for each in found] == [encode(prompt) for prompt in prompts]
    assert all(file.stat().st_mtime_ns == when for file, when in there.items())
    record(lambda: pytest.fail("a model was loaded for nothing"), prompts, tmp_path, say)
    next(iter(there)).write_bytes(b"half")
    with pytest.raises(ConfigError, match="remove it, and it is made again"):
        record(lambda: pytest.fail("loaded"), prompts, tmp_path, say)


# Training.


def test_training_that_was_interrupted_ends_with_the_same_bits(
    folder: Path, recordings: list[Recording], tmp_path: Path
) -> None:
    whole = Trainer(fresh(folder), recordings, SETTINGS)
    whole.run(SETTINGS.steps)
    first = Trainer(fresh(folder), recordings, SETTINGS)
    assert not first.resume(tmp_path)
    first.run(5)
    first.save(tmp_path)
    first.run(7)  # lost: it was not saved
    second = Trainer(fresh(folder), recordings, SETTINGS)
    assert second.resume(tmp_path)
    assert second.step == 5
    second.run(SETTINGS.steps)
    assert second.step == whole.step == 12
    for name, weight in whole.head.trained().items():
        assert torch.equal(weight, second.head.trained()[name]), name
        assert not torch.equal(weight, fresh(folder).trained()[name]), name  # every weight is learnt


def test_a_checkpoint_that_cannot_be_gone_on_from(folder: Path, recordings: list[Recording], tmp_path: Path) -> None:
    trainer = Trainer(fresh(folder), recordings, SETTINGS)
    trainer.run(1)
    trainer.save(tmp_path)
    other = Trainer(fresh(folder), recordings, replace(SETTINGS, steps=99, target="other"))
    with pytest.raises(ConfigError, match='other settings: target "tiny", not "other", steps 12, not 99'):
        other.resume(tmp_path)
    whole = (tmp_path / CHECKPOINT).read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"nonsense"):
        (tmp_path / CHECKPOINT).write_bytes(broken)
        with pytest.raises(ConfigError, match="cannot be read"):
            Trainer(fresh(folder), recordings, SETTINGS).resume(tmp_path)


def test_a_head_learns(folder: Path, recordings: list[Recording]) -> None:
    """Overfitted to what it is asked: far above chance, above lookup, and above a head that has learnt nothing."""
    head = fresh(folder)
    before = measure(drafter(head), recordings, 4)
    figures = []
    Trainer(head, recordings, replace(SETTINGS, steps=150, batch=6, rate=1e-2)).run(150, figures.append)
    assert figures[-1].token_loss < figures[0].token_loss / 2
    assert figures[-1].feature_loss < figures[0].feature_loss
    after = measure(drafter(head), recordings, 4)
    lookup = measure(PromptLookup(), recordings, 4)
    assert before.accepted_length < 0.3
    assert after.accepted_length > max(1.5, 2 * lookup.accepted_length)
    assert after.tokens_per_round > lookup.tokens_per_round
    told_nothing = measure(_Deaf(drafter(head)), recordings, 4)
    assert told_nothing.accepted_length < after.accepted_length  # it is the target's features that tell it


class _Deaf(HeadDrafter):
    """Hears no features."""

    def __init__(self, inner: HeadDrafter) -> None:
        self._inner = inner

    def draft(self, asks: list[Ask]) -> list[list[int]]:  # type: ignore[override]
        return self._inner.draft([replace(each, hidden=None) for each in asks])

    def catch_up(self) -> bool:
        return self._inner.catch_up()

    def forget(self, key: object) -> None:
        self._inner.forget(key)  # type: ignore[arg-type]


# Measuring.


def test_drafts_are_counted_as_greedy_verification_would() -> None:
    tokens = np.array([9, 9, 1, 2, 3, 4, 5, 6], np.int32)
    recording = Recording(tokens, 2, np.arange(8, dtype=np.float16)[:, None].repeat(2, 1))
    heard: list[tuple[int, list[float]]] = []

    class Scripted(PromptLookup):
        def draft(self, asks: object) -> list[list[int]]:
            (each,) = asks  # type: ignore[misc]
            heard.append((len(each.tokens), each.hidden[:, 0].tolist()))
            return [[[2, 3, 9], [5, 6]][len(heard) - 1]]

    worth = measure(Scripted(), [recording], 3)
    # The first token is the target's. Two of three are right and it adds the next; then both, and the answer ends.
    assert heard == [(3, [1.0]), (6, [2.0, 3.0, 4.0])]
    assert (worth.rounds, worth.tokens, worth.drafted, worth.right) == (2, 5, 5, [2, 2, 0])
    assert (worth.accepted_length, worth.tokens_per_round, worth.accepted_share) == (2.0, 2.5, 0.8)


# The command.


def run(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["train-draft", *map(str, arguments)])
    error = f"{type(found.exception).__name__}: {found.exception}" if found.exception else ""
    return found.exit_code, found.output + error


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"turns": [text(seed)]}) + "\n" for seed in range(8)))
    return file


def test_the_command_trains_reports_and_goes_on(
    folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOINWISE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "head"
    asked = ["--target", folder, "--prompts", prompts, "--out", out, "--steps", 30, "--answer-tokens", 6]
    asked += ["--threads", 1, "--held-out", 0.25]
    trained = Trainer.run

    def interrupted(self: Trainer, until: int, *more: object) -> None:
        trained(self, until, *more)  # type: ignore[arg-type]
        if until == 25:
            self.save(out)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", interrupted)
        assert run(*asked)[0] != 0
    assert "is there already" in run(*asked)[1]
    assert "was begun with steps 30, not 31" in run(*asked, "--resume", "--steps", 31)[1]
    status, printed = run(*asked, "--resume", "--json")
    assert status == 0
    report = json.loads(printed[printed.index("{") : printed.rindex("}") + 1])
    assert report == json.loads((out / "report.json").read_text())
    assert report["bench"] == "train-draft"
    assert report["figures"]["held_out_prompts"] == 2
    assert {row["drafter"] for row in report["rows"]} == {"head", "lookup"}
    assert all(row["rounds"] > 0 for row in report["rows"])
    assert load_head(out, resolve_model(str(folder))).shape.blocks == 1
    status, printed = run(*asked, "--resume")  # all is done: only measured again
    assert status == 0
    assert "lookup" in printed


def test_the_command_says_what_is_wrong(folder: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "head"
    usual = {"--target": folder, "--prompts": prompts, "--out": out}

    def said(change: dict[str, object], *more: object) -> str:
        status, printed = run(*(each for pair in {**usual, **change}.items() for each in pair), *more)
        assert status != 0
        assert not out.exists()
        return printed

    assert "cannot be read" in said({"--prompts": tmp_path / "none.jsonl"})
    assert "too few" in said({}, "--limit", 4)
    assert "there is no model folder" in said({"--target": tmp_path / "nothing"})
    assert "no training was begun" in said({}, "--resume")
    assert "Invalid value" in said({"--blocks": 7})
