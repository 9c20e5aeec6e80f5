"""The audit log: who changed the cluster, when, from where, and whether it was allowed.

One JSON object a line, to a file that only its owner reads or to the logger `joinwise.audit`. What is asked is recorded
by name; bodies are not, since they may hold secrets.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime

from joinwise.actors.gateway.identity import Identity
from joinwise.cluster.errors import ConfigError

logger = logging.getLogger("joinwise.audit")


class Audit:
    """Where calls of administration are recorded.

    Args:
        path: the file; None takes the log.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: str | None) -> None:
        self._file: int | None = None
        if path is not None:
            try:
                self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise ConfigError(f"gateway.audit_file: {path} cannot be written: {error.strerror}") from error

    def record(self, action: str, status: int, *, identity: Identity | None, client: str) -> None:
        """Write one line, in one piece.

        Args:
            action: method and path.
            status: what the caller was told.
            identity: who asked; None for somebody unknown.
            client: the caller's address.
        """
        line = json.dumps(
            {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "action": action,
                "status": status,
                "tenant": identity.tenant if identity else None,
                "key": identity.key if identity else None,
                "client": client,
            }
        )
        if self._file is None:
            logger.warning("%s", line)
        else:
            os.write(self._file, f"{line}\n".encode())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
