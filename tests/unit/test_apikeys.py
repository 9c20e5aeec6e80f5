"""API keys at rest: made, found, expired, replaced, removed; files that are wrong; the commands."""

from __future__ import annotations

import json
import stat
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from joinwise.cluster import apikeys
from joinwise.cluster.apikeys import KeyRing
from joinwise.cluster.cli.main import app
from joinwise.cluster.errors import ConfigError


def test_a_key_is_found_and_nothing_like_it() -> None:
    key, entry = apikeys.make("search", ("user", "metrics"))
    other, another = apikeys.make("search", ("user",))
    ring = KeyRing((entry, another))
    assert ring.find(key) == entry and ring.find(other) == another
    prefix, key_id, secret = key.split("_", 2)
    swapped = f"{prefix}_{another.id}_{secret}"
    for wrong in (
        "",
        key[:-1],
        f"{key}x",
        key.upper(),
        f" {key}",
        swapped,
        f"jw_{'0' * 12}_{secret}",
        entry.hash,
        key_id,
    ):
        assert ring.find(wrong) is None, wrong


def test_the_file_lets_nobody_in(tmp_path: Path) -> None:
    key, entry = apikeys.make("search", ("user",))
    path = tmp_path / "keys.yaml"
    KeyRing((entry,)).save(path)
    text = path.read_text()
    secret = key.split("_", 2)[2]
    assert secret not in text and key not in text and entry.id in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]
    assert apikeys.load(path).find(key) == entry


def test_keys_expire_after_their_day() -> None:
    key, entry = apikeys.make("search", ("user",), "2030-05-31")
    ring = KeyRing((entry,))
    assert ring.find(key, date(2030, 5, 31)) == entry
    assert ring.find(key, date(2030, 6, 1)) is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"id": "x"}, "twelve hexadecimal digits"),
        ({"hash": "plain-secret"}, "its hash must be"),
        ({"tenant": "a b"}, "tenant's name"),
        ({"tenant": None}, "tenant's name"),
        ({"roles": []}, "roles must be some of"),
        ({"roles": ["root"]}, "roles must be some of"),
        ({"roles": "admin"}, "roles must be some of"),
        ({"expires": "soon"}, "a day like"),
        ({"secret": "s"}, "unknown field 'secret'"),
    ],
)
def test_wrong_entries(change: dict[str, object], sentence: str, tmp_path: Path) -> None:
    _, entry = apikeys.make("search", ("user",))
    path = tmp_path / "keys.yaml"
    KeyRing((entry,)).save(path)
    data = yaml.safe_load(path.read_text())
    data["keys"][0] |= change
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=sentence) as caught:
        apikeys.load(path)
    assert "plain-secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "version: 2\nkeys: []", "version: 1", "version: 1\nkeys: [1]", "{", "\x00"])
def test_wrong_files(text: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        apikeys.load(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        apikeys.load(tmp_path / "missing")


def test_a_key_named_twice(tmp_path: Path) -> None:
    _, entry = apikeys.make("search", ("user",))
    path = tmp_path / "keys.yaml"
    KeyRing((entry, entry)).save(path)
    with pytest.raises(ConfigError, match="twice"):
        apikeys.load(path)


# The commands.


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["keys", *arguments])
    assert result.exit_code == code, result.output
    return result.output.strip()


def test_a_key_s_life_on_the_command_line(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.yaml")
    first = run("add", "--tenant", "search", "--role", "user", "--role", "metrics", "--file", file)
    entry = apikeys.load(Path(file)).find(first)
    assert entry is not None and (entry.tenant, entry.roles) == ("search", ("user", "metrics"))
    second = run("rotate", entry.id, "--file", file, "--overlap-days", "3")
    ring, today = apikeys.load(Path(file)), datetime.now(UTC).date()
    assert ring.find(first) and ring.find(second) and first != second
    assert ring.find(first, today + timedelta(days=4)) is None
    assert ring.find(second, today + timedelta(days=4)) is not None
    listed = json.loads(run("list", "--file", file, "--json"))
    assert [(row["tenant"], row["holds"]) for row in listed] == [("search", True)] * 2
    assert "hash" not in listed[0]
    assert first.split("_")[2] not in run("list", "--file", file)
    run("revoke", entry.id, "--file", file)
    assert apikeys.load(Path(file)).find(first) is None
    assert apikeys.load(Path(file)).find(second) is not None


def test_unknown_keys_and_roles_on_the_command_line(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.yaml")
    run("add", "--tenant", "a", "--file", file)
    before = Path(file).read_text()
    for arguments in (
        ("revoke", "000000000000"),
        ("rotate", "000000000000"),
        ("add", "--tenant", "a", "--role", "root"),
    ):
        run(*arguments, "--file", file, code=1)
    run("add", "--tenant", "a", "--expires", "never", "--file", file, code=1)
    assert Path(file).read_text() == before
