"""API keys at rest: a file of hashes, tenants and roles, written by `joinwise keys` and read by gateways.

A key is `jw_<id>_<secret>`. The id is public: it finds the entry, and names the key in logs and audits. The secret is
256 bits from the system's generator, so a plain SHA-256 keeps it (a slow hash defends guessable passwords, which these
are not, and would hand everyone a way to keep a gateway busy). The file holds nothing that lets anybody in.

    version: 1
    keys:
      - {id: 3f9c2a71d04b, hash: "sha256:...", tenant: search, roles: [user], created: "2026-01-31", expires: null}
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import yaml

from joinwise.cluster.errors import ConfigError

#: What a caller may do: send requests; change the cluster (adapters, caches); read metrics.
ROLES = ("user", "admin", "metrics")
_KEY = re.compile(r"jw_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")
_NOBODY = "sha256:" + "0" * 64


@dataclass(frozen=True)
class KeyEntry:
    """One key, as it is kept. Dates are ISO days in UTC; a key holds through the day on which it expires."""

    id: str
    hash: str
    tenant: str
    roles: tuple[str, ...] = ("user",)
    created: str = ""
    expires: str | None = None

    def holds(self, today: date) -> bool:
        """Whether it has not expired."""
        return self.expires is None or today <= date.fromisoformat(self.expires)


def make(tenant: str, roles: tuple[str, ...], expires: str | None = None) -> tuple[str, KeyEntry]:
    """A new key, which is shown once, and its entry.

    Raises:
        ConfigError: an unknown role, a tenant's name that cannot be one, or no date.
    """
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    key = f"jw_{key_id}_{secret}"
    entry = KeyEntry(key_id, _digest(key), tenant, roles, _today().isoformat(), expires)
    return key, _checked(asdict(entry))


class KeyRing:
    """The keys of one file.

    Args:
        entries: what the file holds.
    """

    def __init__(self, entries: tuple[KeyEntry, ...] = ()) -> None:
        self.entries = entries
        self._by_id = {entry.id: entry for entry in entries}

    def find(self, key: str, today: date | None = None) -> KeyEntry | None:
        """The entry of a presented key, or None. Takes the same time for every key of a known form."""
        found = _KEY.fullmatch(key)
        entry = self._by_id.get(found[1]) if found else None
        same = hmac.compare_digest(_digest(key), entry.hash if entry else _NOBODY)
        return entry if entry is not None and same and entry.holds(today or _today()) else None

    def with_entry(self, entry: KeyEntry) -> KeyRing:
        """With one more, or with another in place of the one of its id."""
        return KeyRing((*(each for each in self.entries if each.id != entry.id), entry))

    def expiring(self, key_id: str, day: str | None) -> KeyRing:
        """With one key that ends on a day. Raises ConfigError for an unknown id."""
        return self.with_entry(replace(self._known(key_id), expires=day))

    def without(self, key_id: str) -> KeyRing:
        """Without one key. Raises ConfigError for an unknown id."""
        self._known(key_id)
        return KeyRing(tuple(each for each in self.entries if each.id != key_id))

    def entry(self, key_id: str) -> KeyEntry:
        """One entry. Raises ConfigError for an unknown id."""
        return self._known(key_id)

    def dump(self) -> str:
        """As the file holds it."""
        keys = [{**asdict(entry), "roles": list(entry.roles)} for entry in self.entries]
        return yaml.safe_dump({"version": 1, "keys": keys}, sort_keys=False)

    def save(self, path: Path) -> None:
        """Write the file in one step, for its owner only, so that a gateway never reads half of it."""
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            file.write(self.dump())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(file.name, 0o600)
        os.replace(file.name, path)

    def _known(self, key_id: str) -> KeyEntry:
        entry = self._by_id.get(key_id)
        if entry is None:
            raise ConfigError(f"there is no key {key_id!r}; `joinwise keys list` names them")
        return entry


def load(path: Path) -> KeyRing:
    """Read a file of keys.

    Raises:
        ConfigError: it cannot be read, or an entry is wrong; nothing of an entry's hash is repeated.
    """
    try:
        data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the file of keys {path} cannot be read: {type(error).__name__}") from None
    if not isinstance(data, dict) or data.get("version") != 1 or not isinstance(data.get("keys"), list):
        raise ConfigError(f"{path} is no file of keys of version 1; `joinwise keys add` makes one")
    ring = KeyRing(tuple(_checked(each) for each in data["keys"]))
    if len(ring.entries) != len({entry.id for entry in ring.entries}):
        raise ConfigError(f"{path} names a key twice")
    return ring


def _checked(data: Any) -> KeyEntry:
    if not isinstance(data, dict) or not re.fullmatch(r"[0-9a-f]{12}", str(data.get("id"))):
        raise ConfigError("a key needs an id of twelve hexadecimal digits")
    name = f"key {data['id']}"
    if unknown := data.keys() - KeyEntry.__dataclass_fields__.keys():
        raise ConfigError(f"{name}: unknown field {sorted(map(str, unknown))[0]!r}")
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", str(data.get("hash"))):
        raise ConfigError(f"{name}: its hash must be sha256: and 64 hexadecimal digits")
    if not isinstance(data.get("tenant"), str) or not _TENANT.fullmatch(data["tenant"]):
        raise ConfigError(f"{name}: a tenant's name has letters, digits, dot, hyphen, @ and underscore, at most 63")
    roles = data.get("roles", ["user"])
    if not isinstance(roles, list | tuple) or not roles or not set(roles) <= set(ROLES):
        raise ConfigError(f"{name}: its roles must be some of {', '.join(ROLES)}")
    expires = data.get("expires")
    try:
        expires = None if expires is None else date.fromisoformat(str(expires)).isoformat()
    except ValueError:
        raise ConfigError(f"{name}: `expires` must be a day like 2026-12-31") from None
    return KeyEntry(data["id"], data["hash"], data["tenant"], tuple(roles), str(data.get("created", "")), expires)


def _digest(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def _today() -> date:
    return datetime.now(UTC).date()
