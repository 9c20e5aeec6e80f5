"""`joinwise bench speculate` without a target: what it makes of answers, and the draft actors that it asks."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.draft_rig import ask, linked, opened
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from joinwise.actors.bench import speculate, speculate_rows
from joinwise.actors.bench.commands import bench
from joinwise.actors.bench.report import rows_of
from joinwise.actors.bench.speculate_drafts import Drafts
from joinwise.actors.bench.speculate_plan import CLUSTER, Answers, Plan
from joinwise.actors.draft.asking import AskFigures
from joinwise.actors.draft.vocabulary import Vocabulary
from joinwise.actors.draft.wire import PROTOCOL_VERSION
from joinwise.cluster.errors import ConfigError
from joinwise.proto import draft_pb2

PLAN = Plan("big", "small", "bfloat16", "bfloat16", k=4, most=8, max_tokens=5, together=True)
GROUP = speculate._Group("humaneval", 1, [0])


def answers(ids: list[int], seconds: float, steps: list[tuple[int, float]], **asked: Any) -> Answers:
    return Answers([ids], 9.0, seconds, len(steps), steps, AskFigures(**asked))


def rows(taken: list[tuple[str, Answers]], plan: Plan = PLAN) -> list[dict[str, Any]]:
    fresh = [speculate._fresh(plan, GROUP, side, sample) for side, sample in speculate._samples(plan, GROUP, taken)]
    return speculate_rows.merged([], fresh)


def test_a_side_is_compared_with_the_mean_of_the_baseline_around_it() -> None:
    slow, fast = ([(1, 1.0)] * 4, 4.0), ([(1, 0.5)] * 4, 2.0)
    asked = {"asked": 2, "missed": 1, "drafted": 8, "bytes": 300, "waited_s": 0.4, "drafting_s": 0.3}
    found = rows(
        [
            ("none", answers([1, 2, 3, 4, 5], slow[1], slow[0])),
            ("fixed", answers([1, 2, 3, 4, 6], 1.0, [(5, 0.9), (5, 0.6)], **asked)),
            ("none", answers([1, 2, 3, 4, 5], fast[1], fast[0])),
        ]
    )
    none, fixed = found
    assert (none["tokens_per_s"], none["speedup"], none["divergences"]) == (1.5, 1.0, 0)
    assert fixed["speedup"] == pytest.approx(4 / 1.5, abs=1e-3)
    assert (fixed["accepted_length"], fixed["divergences"], fixed["missed"]) == (2.0, 1, 1)
    assert fixed["step_ratio"] == 1.0  # medians of 0.75 and 0.75
    assert (fixed["draft_ms"], fixed["wait_ms"], fixed["round_bytes"]) == (300, 200, 150)


def test_drafts_on_a_core_of_their_own_are_rows_of_their_own_and_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = [("none", answers([1, 2], 1.0, [(1, 1.0)])), ("adaptive", answers([1, 2], 0.5, [(9, 1.0)]))]
    apart = replace(PLAN, draft_core=1)
    both = speculate_rows.merged(rows(taken), rows(taken, apart))
    assert [(row["side"], row["draft_core"]) for row in both] == [
        (s, c) for c in (None, 1) for s in ("none", "adaptive")
    ]
    assert speculate_rows.figures(rows(taken))["speedup_adaptive_min"] == 2
    assert speculate_rows.figures(rows(taken, apart))["speedup_adaptive_min"] is None
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert (PLAN.cores, apart.cores) == (([0, 1, 2], [0, 1, 2]), ([0, 2], [1]))
    for missing in (replace(PLAN, draft_core=3), apart):
        with pytest.raises(ConfigError, match="no core"):
            assert missing.cores
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1})


def test_drafts_of_a_gpu_are_rows_of_their_own_with_a_figure_of_their_own() -> None:
    taken = [("none", answers([1, 2], 1.0, [(1, 1.0)])), ("adaptive", answers([1, 2], 0.25, [(9, 1.0)]))]
    beside = replace(PLAN, draft_gpu=True)
    assert (PLAN.drafter("adaptive"), beside.drafter("adaptive")) == ("causal", "ahead")
    assert PLAN.drafter("fixed") == beside.drafter("fixed") == "causal"
    figures = speculate_rows.figures(speculate_rows.merged(rows(taken), rows(taken, beside)))
    assert figures["speedup_gpu_draft_humaneval_bf16"] == 4
    assert speculate_rows.figures(rows(taken))["speedup_gpu_draft_humaneval_bf16"] is None
    assert speculate_rows.figures(rows(taken, beside))["speedup_adaptive_min"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="says nothing where there is a GPU")
def test_drafts_of_a_gpu_say_why_they_are_not_measured() -> None:
    for python, said in (([], "built without CUDA"), (["--draft-python", "/no/such/python"], "does not run joinwise")):
        shown = CliRunner().invoke(bench, ["speculate", "--draft-gpu", *python])
        assert (shown.exit_code, said in shown.output) == (0, True), shown.output


def test_an_interpreter_that_is_not_there_is_refused_before_anything_starts() -> None:
    shown = CliRunner().invoke(bench, ["speculate", "--draft-python", "/no/such/python"])
    assert (shown.exit_code, "/no/such/python" in shown.output) == (2, True), shown.output


def test_pieces_are_put_together() -> None:
    def piece(place: int, speedup: float) -> list[dict[str, Any]]:
        (_, row) = rows([("none", answers([1, 2], 1.0, [(1, 1.0)])), ("adaptive", answers([1, 2], 1.0, [(9, 1.0)]))])
        row["samples"][0] |= {"places": [place], "speedup": speedup}
        return [row]

    once = speculate_rows.merged(piece(0, 1.0), piece(1, 2.0))
    again = speculate_rows.merged(once, piece(1, 4.0))  # measured anew
    assert [row["speedup"] for row in again] == [2.5]
    assert [row["prompts"] for row in again] == [2]
    figures = speculate_rows.figures(again)
    assert figures["speedup_adaptive_humaneval_bf16"] == figures["speedup_adaptive_min"] == 2.5
    assert figures["divergences_float32"] is None


def test_only_float32_must_not_diverge() -> None:
    plan = Plan("big", "small", "float32", "bfloat16", k=4, most=8, max_tokens=5, together=False)
    taken = [("none", answers([1, 2], 1.0, [(1, 1.0)])), ("lookup", answers([1, 3], 1.0, [(5, 1.0)]))]
    found = rows(taken, plan)
    assert [row["speedup"] for row in found] == [None, None]  # they did not take turns
    assert speculate_rows.figures(found)["divergences_float32"] == 1
    assert speculate_rows.figures(rows(taken))["divergences_float32"] is None


def test_turns() -> None:
    assert speculate._turns(["none", "a", "b"], 0) == ["none", "a", "b", "none"]
    assert speculate._turns(["none", "a", "b"], 1) == ["none", "b", "a", "none"]
    assert speculate._turns(["none"], 0) == ["none"]
    assert speculate._turns(["a", "b"], 1) == ["b", "a"]


def test_prompts_that_are_not_there(tmp_path: Path) -> None:
    lines = [json.dumps({"question_id": n, "turns": [f"prompt {n}"]}) for n in range(3)]
    (tmp_path / "small.jsonl").write_text("\n".join(lines) + "\n")
    assert speculate.texts(tmp_path, "small", 1, 2) == {1: "prompt 1", 2: "prompt 2"}
    with pytest.raises(ConfigError, match="holds 3 prompts"):
        speculate.texts(tmp_path, "small", 2, 2)
    with pytest.raises(ConfigError, match="--data"):
        speculate.texts(tmp_path, "other", 0, 1)


@pytest.mark.parametrize("content", ["", "[]", '{"bench": "kv", "rows": []}'])
def test_a_result_of_another_benchmark_is_not_added_to(tmp_path: Path, content: str) -> None:
    (tmp_path / "out.json").write_text(content)
    with pytest.raises(ConfigError, match="could be added to"):
        rows_of(tmp_path / "out.json", "speculate")


def test_what_was_recorded_along_an_answer_is_replayed_and_nothing_else(tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {str(n): n for n in range(50)}}}))
    end = Drafts(tmp_path, "float32", 1, 256, {"own_device": 0.0})
    addresses = end.addresses()
    hello = draft_pb2.DraftHello(
        protocol_version=PROTOCOL_VERSION,
        cluster=CLUSTER,
        worker_id="w",
        vocabulary=Vocabulary.read("t", tmp_path).message(),
    )
    prompt = [n * 7 % 50 for n in range(100)]  # long enough to be put off at first
    answer = [3, 1, 4, 1, 5, 9, 2, 6]
    end.record(prompt, answer, 3)

    def drafted(name: str, text: list[int]) -> list[int]:
        with linked(addresses[name], hello) as link:
            round_ = draft_pb2.DraftRound(asks=[ask(1, np.array(text, np.int32), k=3)])
            found = opened(link).ask(round_, 10)
            assert found is not None
            return list(found.drafts[0].token_ids)

    text = [*prompt, answer[0]]
    replayed = drafted("own_device", text)
    assert len(replayed) == 3
    short = text[-40:]  # the real one drafts at once what is short
    end.record(short[:-1], [short[-1], 0], 3)
    assert drafted("own_device", short) == drafted("causal", short)
    assert drafted("own_device", [*text, 49]) == []
