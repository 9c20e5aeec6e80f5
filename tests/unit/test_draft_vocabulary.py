"""Vocabularies are compared by what their ids mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from joinwise.actors.draft.vocabulary import Vocabulary, check_vocabularies, disagreement
from joinwise.cluster.config import JoinwiseConfig
from joinwise.cluster.errors import ConfigError


def write(folder: Path, vocabulary: Any, added: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    model = {"model": {"vocab": vocabulary}, "added_tokens": added or []}
    (folder / "tokenizer.json").write_text(json.dumps(model))
    return folder


def test_equal_ids_are_one_vocabulary_however_they_are_written(tmp_path: Path) -> None:
    first = Vocabulary.read("a", write(tmp_path / "a", {"x": 0, "y": 1, "<end>": 2}))
    added = write(tmp_path / "b", {"y": 1, "x": 0}, [{"id": 2, "content": "<end>"}])
    listed = write(tmp_path / "c", [["x", -1.0], ["y", -2.0], ["<end>", 0.0]])
    assert first.size == 3
    for other in (Vocabulary.read("b", added), Vocabulary.read("c", listed)):
        assert not disagreement(first, other)
    assert not disagreement(first, None)
    assert Vocabulary.of(first.message()) == first


@pytest.mark.parametrize("other", [{"x": 1, "y": 0, "<end>": 2}, {"x": 0, "y": 1}, {"x": 0, "y": 1, "<end>": 3}])
def test_others_are_refused_naming_both(tmp_path: Path, other: dict[str, int]) -> None:
    target = Vocabulary.read("big-target", write(tmp_path / "a", {"x": 0, "y": 1, "<end>": 2}))
    reason = disagreement(target, Vocabulary.read("small-draft", write(tmp_path / "b", other)))
    assert "'big-target'" in reason
    assert "'small-draft'" in reason


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"model": {}}', '{"model": {"vocab": {}}}', '{"model": {"vocab": 3}}']
)
def test_a_file_that_says_nothing_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match=r"vocabulary of 'm'"):
        Vocabulary.read("m", tmp_path)


def test_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Vocabulary.read("m", tmp_path)


@pytest.mark.parametrize(("draft", "refused"), [({"x": 0, "y": 1}, False), ({"y": 0, "x": 1}, True), (None, False)])
def test_a_cluster_is_refused_before_it_starts(tmp_path: Path, draft: dict[str, int] | None, refused: bool) -> None:
    target = write(tmp_path / "target", {"x": 0, "y": 1})
    small = write(tmp_path / "small", draft or {})
    for folder in (target, small):
        (folder / "config.json").write_text("{}")
    pools = [
        {"name": "all", "model": "m", "role": "mixed"},
        {"name": "fast", "model": "m", "role": "decode", "speculation": {"draft": "drafts"}},
        {"name": "drafts", "model": "m", "role": "draft", "draft": {"model": str(small)} if draft else None},
    ]
    config = JoinwiseConfig.model_validate({"models": [{"name": "m", "model": str(target)}], "pools": pools})
    if not refused:
        check_vocabularies(config, print)
        return
    with pytest.raises(ConfigError, match=rf"'fast'.*'{small}'.*'m'"):
        check_vocabularies(config, print)
