"""The main job, end to end: a chat request through split prefill and decode."""

from __future__ import annotations

import json

import httpx
import pytest
from helpers.cluster import MODEL, RunningCluster

pytestmark = [pytest.mark.cluster, pytest.mark.model]


async def test_chat_is_split_and_accounted_for(cluster: RunningCluster) -> None:
    async with httpx.AsyncClient(base_url=cluster.http, timeout=60) as http:
        response = await http.post(
            "/v1/chat/completions",
            headers={"x-joinwise-ledger": "1"},
            json={
                "model": MODEL,
                "messages": [{"role": "user", "content": "Say hello."}],
                "max_tokens": 12,
                "temperature": 0,
            },
        )
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["choices"][0]["message"]["content"]
    ledger = json.loads(response.headers["x-joinwise-ledger"])
    assert ledger["prefill_worker"] != ledger["decode_worker"]
    assert ledger["transport"] == "shm"
    assert ledger["wire_bytes"] > 0
    assert ledger["replayed_steps"] == 1
    assert ledger["output_tokens"] == body["usage"]["completion_tokens"]
