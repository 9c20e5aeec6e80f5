"""Whose request it is, and on what terms: parsed from headers (HTTP) or metadata (gRPC), where nothing is trusted."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from joinwise.cluster.errors import InvalidRequestError

TENANT_HEADER = "x-tenant-id"
SESSION_HEADER = "x-session-id"
PRIORITY_HEADER = "x-priority"
TTFT_HEADER = "x-slo-ttft-ms"
TPOT_HEADER = "x-slo-tpot-ms"
FIRST_FINISH_HEADER = "x-first-finish"

#: Lower is sooner, as in vLLM; each step is worth `router.ageing_s` of waiting.
MAX_PRIORITY = 1000
_NAME = re.compile(r"[\x21-\x7e]{1,128}")
_MAX_OBJECTIVE_MS = 86_400_000.0
_MAX_SAMPLES = 16


@dataclass(frozen=True)
class Terms:
    """What a caller says beside the request itself.

    Attributes:
        tenant: who pays; empty is nobody in particular.
        session: requests of one session go to one worker while that costs little.
        priority: lower is sooner.
        slo_ttft_ms: most milliseconds to the first token; 0 is no objective.
        slo_tpot_ms: most milliseconds from token to token; 0 is no objective.
        first_finish: samples that are made at once, of which the first that is finished is the answer.
    """

    tenant: str = ""
    session: str = ""
    priority: int = 0
    slo_ttft_ms: float = 0.0
    slo_tpot_ms: float = 0.0
    first_finish: int = 1

    @classmethod
    def parse(cls, headers: Mapping[str, str]) -> Terms:
        """Read the headers above; names are in lower case, unknown ones are passed over.

        Raises:
            InvalidRequestError: a value that does not parse, or is out of range; the message names the header.
        """
        return cls(
            tenant=_name(headers, TENANT_HEADER),
            session=_name(headers, SESSION_HEADER),
            priority=_priority(headers),
            slo_ttft_ms=_objective(headers, TTFT_HEADER),
            slo_tpot_ms=_objective(headers, TPOT_HEADER),
            first_finish=_samples(headers),
        )


#: Nobody in particular, with nothing promised.
PLAIN = Terms()


def _name(headers: Mapping[str, str], header: str) -> str:
    text = headers.get(header, "")
    if text and not _NAME.fullmatch(text):
        raise InvalidRequestError(f"{header} must be 1 to 128 printable ASCII characters without spaces")
    return text


def _priority(headers: Mapping[str, str]) -> int:
    text = headers.get(PRIORITY_HEADER, "0")
    if not re.fullmatch(r"[+-]?[0-9]{1,4}", text) or abs(int(text)) > MAX_PRIORITY:
        raise InvalidRequestError(f"{PRIORITY_HEADER} must be a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}")
    return int(text)


def _samples(headers: Mapping[str, str]) -> int:
    text = headers.get(FIRST_FINISH_HEADER, "1")
    if not re.fullmatch(r"[0-9]{1,2}", text) or not 1 <= int(text) <= _MAX_SAMPLES:
        raise InvalidRequestError(f"{FIRST_FINISH_HEADER} must be a whole number from 1 to {_MAX_SAMPLES}")
    return int(text)


def _objective(headers: Mapping[str, str], header: str) -> float:
    text = headers.get(header)
    if text is None:
        return 0.0
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= _MAX_OBJECTIVE_MS:
        raise InvalidRequestError(f"{header} must be milliseconds, above 0 and at most {_MAX_OBJECTIVE_MS:.0f}")
    return value
