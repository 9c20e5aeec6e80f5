"""Training a draft head: what it learns from, that it learns, and that an interruption changes no bit."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.threads import single_thread
from helpers.tiny_target import IDS, saved, tiny
from transformers import AutoTokenizer
from typer.testing import CliRunner

from joinwise.actors.draft.drafter import Ask
from joinwise.actors.draft.head import DovetailHead, HeadShape, TargetEnds, load_head
from joinwise.actors.draft.head_drafter import HeadDrafter
from joinwise.actors.draft.lookup import PromptLookup
from joinwise.actors.draft.train.continuing import ATTENTION, go_on
from joinwise.actors.draft.train.fitting import CHECKPOINT, Settings, Trainer
from joinwise.actors.draft.train.measuring import AT_ONCE, measure
from joinwise.actors.draft.train.own_prompts import Asker, own_prompts
from joinwise.actors.draft.train.prompts import Asked, read_prompts, split
from joinwise.actors.draft.train.recording import Recorder, Recording, record
from joinwise.actors.models import resolve_model
from joinwise.cluster.cli.main import app
from joinwise.cluster.errors import ConfigError

SETTINGS = Settings("tiny", "a" * 32, "d", blocks=1, steps=12, batch=3, rate=2e-3, seed=5)


one_thread = pytest.fixture(single_thread, autouse=True, scope="module")


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
    return HeadDrafter(head.eval(), slots=AT_ONCE, max_tokens=200, name="head", threads=1)


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
    without = split(prompts, 0.25, parts.train[:4])
    assert sorted([*without.train, *without.held_out]) == sorted(set(prompts) - set(parts.train[:4]))


def test_what_is_measured_with_is_in_neither_part() -> None:
    given, own = [f"given {each}" for each in range(12)], [f"own {each}" for each in range(9)]
    asked = Asked(tuple(given), 0.25, 8, {"a": ("own 3", "elsewhere"), "b": (given[0],)})
    parts = asked.with_own([*own, "elsewhere"])
    found = [*parts.train, *parts.held_out]
    assert not {"own 3", "elsewhere", given[0]} & set(found)
    assert set(own) - {"own 3"} <= set(found)  # the limit is of those that are given
    assert sum(each.startswith("given") for each in found) in (7, 8)
    assert Asked((), 0.5).with_own(own).held_out


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
        assert len(found.hidden) == len(found.tokens) - 1
        assert logits.argmax(-1)[found.prompt - 1 : -1].tolist() == found.tokens[found.prompt :].tolist()
        torch.testing.assert_close(again, logits[:-1], atol=0.02, rtol=0.01)


def test_an_answer_ends_where_it_ends() -> None:
    (whole,) = Recorder(tiny(), encode, [], answer_tokens=8).answers([text(3)])
    end = int(whole.tokens[whole.prompt + 2])
    first = whole.tokens[whole.prompt :].tolist().index(end)
    cut, other = Recorder(tiny(), encode, [end], answer_tokens=8).answers([text(3), text(4)])
    assert cut.tokens.tolist() == whole.tokens[: whole.prompt + first + 1].tolist()
    assert len(other.tokens) - other.prompt <= 8


def test_rows_that_are_over_disturb_no_other() -> None:
    """They end one after the other, so that rows are cleared away again and again; heads share KV in `tiny`."""
    model = tiny()
    model.set_attn_implementation(ATTENTION)
    texts = [encode(text(seed, 3 + 2 * seed)) for seed in range(9)]
    ends = {each for each in range(IDS) if each % 9 == 4}
    found = go_on(model, texts, lambda logits: logits.argmax(-1), ends=ends, most=12)
    assert len({len(each.tokens) - len(given) for each, given in zip(found, texts, strict=True)}) > 3
    plain = tiny()
    for each, given in zip(found, texts, strict=True):
        tokens = torch.tensor([given])
        while tokens.shape[1] < len(given) + 12 and (tokens.shape[1] == len(given) or int(tokens[0, -1]) not in ends):
            with torch.inference_mode():
                states = plain.base_model(tokens).last_hidden_state
                tokens = torch.cat([tokens, plain.lm_head(states[:, -1:]).argmax(-1)], 1)
        assert each.tokens == tokens[0].tolist()
        torch.testing.assert_close(each.hidden, states[0], atol=1e-4, rtol=1e-3)


def test_recordings_are_made_once_and_go_on_where_they_were(tmp_path: Path) -> None:
    prompts = [text(seed) for seed in range(70)]
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
    assert len(there) == 64
    assert len({file.stat().st_mode for file in [*there, _touched(tmp_path / "usual")]}) == 1  # others may read them
    found = record(lambda: Recorder(tiny(), encode, [], answer_tokens=4), prompts, tmp_path, say)
    assert [each.tokens[: each.prompt].tolist() for each in found] == [encode(prompt) for prompt in prompts]
    assert all(file.stat().st_mtime_ns == when for file, when in there.items())
    record(lambda: pytest.fail("a model was loaded for nothing"), prompts, tmp_path, say)
    next(iter(there)).write_bytes(b"half")
    with pytest.raises(ConfigError, match="remove it, and it is made again"):
        record(lambda: pytest.fail("loaded"), prompts, tmp_path, say)


def _touched(file: Path) -> Path:
    file.touch()
    return file


# Prompts of the target's own.


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with a chat template, in which w2 ends what somebody says."""
    folder = saved(tmp_path_factory.mktemp("chatty"), tiny())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for each in messages %}w1 {{ each['content'] }} w2 {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def asker(folder: Path, *openings: str) -> Asker:
    return Asker(tiny(), AutoTokenizer.from_pretrained(folder), openings or [""])


def test_a_target_asks_itself(chatty: Path, tmp_path: Path) -> None:
    def say(*_: object) -> None: ...

    found = own_prompts(lambda: asker(chatty, "", "w7 w8"), 60, 3, tmp_path / "a", say)
    assert len(set(found)) == len(found) == 60
    assert all(len(each.split()) >= 4 and "w2" not in each.split() for each in found)
    pieces = [json.loads(file.read_text()) for file in sorted((tmp_path / "a").iterdir())]
    assert found == [prompt for piece in pieces for prompt in piece][:60]
    assert all(each.startswith("w7 w8 ") for each in pieces[1])
    assert not all(each.startswith("w7 w8 ") for each in pieces[0])
    # Taken up again after the first piece, and with another seed.
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "00000.json", tmp_path / "b")
    assert own_prompts(lambda: asker(chatty, "", "w7 w8"), 60, 3, tmp_path / "b", say) == found
    assert own_prompts(lambda: pytest.fail("a model was loaded for nothing"), 60, 3, tmp_path / "b", say) == found
    assert not set(own_prompts(lambda: asker(chatty), 60, 4, tmp_path / "c", say)) & set(pieces[0])
    (tmp_path / "b" / "00001.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"00001\.json cannot be read .*remove it, and it is made again"):
        own_prompts(lambda: pytest.fail("loaded"), 60, 3, tmp_path / "b", say)


def test_a_target_that_has_nothing_new_to_say(tmp_path: Path) -> None:
    class Monotonous:
        def piece(self, _seed: int, number: int) -> list[str]:
            return ["the same as ever", f"one of {number % 3}"]

    with pytest.raises(ConfigError, match="no more than 4 different prompts"):
        own_prompts(Monotonous, 5, 0, tmp_path, lambda *_: None)  # type: ignore[arg-type]


def test_a_target_without_a_chat_template_asks_nothing(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no chat template .*give --prompts"):
        asker(folder)


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


def test_answers_are_measured_alike_at_once_and_one_by_one(folder: Path, recordings: list[Recording]) -> None:
    head = fresh(folder)
    some = [*recordings, *recordings[:9]]
    assert len(some) > AT_ONCE
    at_once, singly = measure(drafter(head), some, 3), [measure(drafter(head), [each], 3) for each in some]
    assert at_once.rounds == sum(each.rounds for each in singly)
    assert at_once.tokens == sum(each.tokens for each in singly)
    assert at_once.right == [sum(each.right[depth] for each in singly) for depth in range(3)]


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
    assert {row["drafter"] for row in report["rows"]} == {"head", "lookup", "both"}
    assert all(row["rounds"] > 0 for row in report["rows"])
    assert load_head(out, resolve_model(str(folder))).shape.blocks == 1
    status, printed = run(*asked, "--resume")  # all is done: only measured again
    assert status == 0
    assert "lookup" in printed


def test_the_command_trains_on_what_the_target_asks(
    chatty: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOINWISE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "head"
    asked = ["--target", chatty, "--own-prompts", 12, "--measure", prompts, "--out", out, "--steps", 5, "--seed", 3]
    asked += ["--threads", 1, "--held-out", 0.25, "--answer-tokens", 6]
    status, printed = run(*asked)
    assert status == 0, printed
    assert "held-out prompts" in printed
    assert "prompts prompts" in printed  # by its file's name
    report = json.loads((out / "report.json").read_text())
    assert (report["figures"]["held_out_prompts"], report["figures"]["prompts_prompts"]) == (3, 8)
    assert {(row["prompts"], row["drafter"]) for row in report["rows"]} == {
        (name, drafts) for name in ("held-out", "prompts") for drafts in ("head", "lookup", "both")
    }
    assert report["figures"]["accepted_length_lookup_prompts"] >= 0
    assert len(list((out / "answers").iterdir())) == 12 + 8
    assert "was begun with own_prompts 12, not 13" in run(*asked, "--resume", "--own-prompts", 13)[1]
    assert "was begun with openings" in run(*asked, "--resume", "--opening", "w1")[1]
    prompts.write_text('{"prompt": "w1 w2"}')
    assert "was begun with prompts" in run(*asked, "--resume")[1]


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
    assert "two kinds of prompts 'prompts'" in said({}, "--measure", prompts, "--measure", prompts)
    (tmp_path / "empty.jsonl").touch()
    assert "there are no prompts in" in said({}, "--measure", tmp_path / "empty.jsonl")
    assert "there is no model folder" in said({"--target": tmp_path / "nothing"})
    assert "no training was begun" in said({}, "--resume")
    assert "Invalid value" in said({"--blocks": 7})
