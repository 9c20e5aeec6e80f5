"""The log: JSON lines with the request's id, and no secret in any of them, whoever wrote it."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joinwise.actors.logs import Formatter, redact, request_id, secrets_of
from joinwise.cluster import apikeys
from joinwise.cluster.config import default_config, load_config
from joinwise.cluster.errors import ConfigError

JWT = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("authorization: Bearer abc.def", "authorization: Bearer ***"),
        ("{'authorization': 'bearer abc'}", "{'authorization': 'bearer ***'}"),
        (f"token {JWT} refused", "token *** refused"),
        ("redis://:hunter2@host:6379/0", "redis://:***@host:6379/0"),
        ("rediss://user:p%40ss@host", "rediss://user:***@host"),
        ("-----BEGIN PRIVATE KEY-----\nMIIB\n-----END PRIVATE KEY-----", "***"),
        ("-----BEGIN EC PRIVATE KEY-----\nMIIB", "***"),
        ("HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz", "HF_TOKEN=***"),
        ("worker prefill-0 is ready after 3.1 s", "worker prefill-0 is ready after 3.1 s"),
        ("http://host:8000/v1/models", "http://host:8000/v1/models"),
    ],
)
def test_secrets_are_blacked_out(text: str, seen: str) -> None:
    assert redact(text) == seen


def test_a_key_keeps_its_public_part() -> None:
    key, entry = apikeys.make("search", ("user",))
    assert redact(f"key {key} refused") == f"key jw_{entry.id}_*** refused"


@given(st.text(alphabet="abcdefgh_-=/+", min_size=6, max_size=40), st.text(max_size=50), st.text(max_size=50))
def test_known_secrets_never_appear(secret: str, before: str, after: str) -> None:
    assert secret not in redact(f"{before}{secret}{after}", [secret]).replace("***", "\0")


def record(message: str, *arguments: object, error: BaseException | None = None) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("joinwise.x", logging.WARNING, __file__, 1, message, arguments, info)


def test_json_lines_have_the_request_s_id() -> None:
    formatter = Formatter(as_json=True, secrets=["open-sesame"])
    token = request_id.set("r-1")
    try:
        line = json.loads(formatter.format(record("said %s\nand left", "open-sesame")))
    finally:
        request_id.reset(token)
    assert (line["level"], line["logger"], line["request_id"]) == ("warning", "joinwise.x", "r-1")
    assert line["message"] == "said ***\nand left"
    assert "request_id" not in json.loads(formatter.format(record("later")))


@pytest.mark.parametrize("as_json", [True, False])
def test_tracebacks_are_redacted_too(as_json: bool) -> None:
    try:
        raise ConnectionError("redis://:hunter2@host refused Bearer open-sesame")
    except ConnectionError as error:
        text = Formatter(as_json=as_json, secrets=["open-sesame"]).format(record("failed", error=error))
    assert "ConnectionError" in text and "hunter2" not in text and "open-sesame" not in text
    assert not as_json or text.count("\n") == 0


def test_what_a_configuration_hides() -> None:
    config = default_config("cpu")
    config.gateway.api_keys = ["first-key"]
    config.redis.url = "redis://user:hunter2@host/0"
    assert secrets_of(config) == ["first-key", "hunter2"]


@pytest.mark.parametrize(
    "variable", ["JOINWISE_REDIS__URL", "JOINWISE_GATEWAY__API_KEYS"], ids=["redis.url", "gateway.api_keys"]
)
def test_errors_of_the_configuration_do_not_repeat_secrets(variable: str) -> None:
    value = "http://:hunter2@host" if "URL" in variable else "hunter2"
    with pytest.raises(ConfigError) as caught:
        load_config(None, {variable: value})
    assert "hunter2" not in str(caught.value)
