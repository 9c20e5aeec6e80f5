"""How a process writes its log: as text or as JSON lines, and never a secret.

Whatever a line holds, from us or from a library, its text and its traceback pass `redact` on their way out: bearer
tokens, API keys, JSON web tokens, passwords in URLs, private keys, and the secrets that the process has been told.
"""

from __future__ import annotations

import json
import logging
import re
import traceback
from collections.abc import Iterable
from contextvars import ContextVar
from datetime import UTC, datetime

from joinwise.cluster.config_model import JoinwiseConfig

#: The request that is being served, for the lines written meanwhile.
request_id: ContextVar[str] = ContextVar("joinwise_request_id", default="")

_MASK = "***"
_PATTERNS = (
    (re.compile(r"(?i)\b(bearer\s+)[^\s\"',;]+"), rf"\1{_MASK}"),
    (re.compile(r"\bjw_([0-9a-f]{12})_[A-Za-z0-9_-]+"), rf"jw_\1_{_MASK}"),
    (re.compile(r"\beyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"), _MASK),
    (re.compile(r"(\w+://)([^/@\s:]*):[^/@\s]+@"), rf"\1\2:{_MASK}@"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|$)", re.DOTALL), _MASK),
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}"), _MASK),
)
_SHORTEST_SECRET = 6  # a shorter one would black out ordinary words


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` without what looks like a secret, and without `secrets` themselves."""
    for secret in secrets:
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, _MASK)
    for pattern, mask in _PATTERNS:
        text = pattern.sub(mask, text)
    return text


class Formatter(logging.Formatter):
    """One line a record, redacted.

    Args:
        as_json: a JSON object with time, level, logger, message and, where there are any, request and traceback.
        secrets: what must never be seen.
    """

    def __init__(self, *, as_json: bool, secrets: Iterable[str] = ()) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")
        self._as_json = as_json
        self._secrets = sorted(secrets, key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        if not self._as_json:
            return redact(super().format(record), self._secrets)
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact(record.getMessage(), self._secrets),
        }
        if current := request_id.get():
            line["request_id"] = current
        if record.exc_info:
            line["traceback"] = redact("".join(traceback.format_exception(*record.exc_info)), self._secrets)
        return json.dumps(line, ensure_ascii=False)


def secrets_of(config: JoinwiseConfig) -> list[str]:
    """What a configuration holds that nobody should read."""
    found = re.search(r"://[^/@\s]*:([^/@\s]+)@", config.redis.url)
    return [*config.gateway.api_keys, *([found[1]] if found else [])]


def setup(config: JoinwiseConfig, level: str | None = None) -> None:
    """Write this process's log as configured, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter(as_json=config.log.format == "json", secrets=secrets_of(config)))
    logging.basicConfig(level=(level or config.log.level).upper(), handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
