"""A short schedule of `joinwise chaos`: what it breaks, its clients do not notice, and nothing is left of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from helpers.cluster import MODEL
from helpers.plain_vllm import PlainServer

from joinwise.actors.chaos.load import questions
from joinwise.actors.chaos.run import MUST_BE_ZERO, Settings, break_one, right_answers

pytestmark = [pytest.mark.cluster, pytest.mark.model, pytest.mark.timeout(600)]


def test_a_short_schedule(baseline: PlainServer, tmp_path: Path) -> None:
    asked = questions(12)
    expected = asyncio.run(right_answers(baseline.http, MODEL, asked))
    settings = Settings(requests=20, kinds=("lose-redis", "kill-raylet", "kill-launcher"))
    figures, rows = break_one(settings, asked, expected, tmp_path, print)
    assert {name: figures[name] for name in MUST_BE_ZERO} == dict.fromkeys(MUST_BE_ZERO, 0), rows
    assert figures["faults"] == 3
    assert figures["right"] == figures["requests"] >= 20
    (raylet,) = [row["evidence"] for row in rows if row["kind"] == "kill-raylet"]
    assert raylet["workers_lost"], "what was on its node ended with it"
