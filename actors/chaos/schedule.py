"""What is broken, in which order, how long after the last: drawn from a seed, so that a run can be had again."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal[
    "kill-prefill", "kill-decode", "kill-gateway", "freeze-prefill", "freeze-decode", "drain-decode", "kill-redis",
    "lose-redis", "kill-draft", "cut-kv", "fill-landing", "apply", "kill-launcher", "kill-raylet", "kill-head",
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)

#: Its clients may have to ask again: the gateway holds their connections.
NOTICED: frozenset[Kind] = frozenset({"kill-gateway"})

_LONGEST_PAUSE_S = 2.0
_OUTAGE_S = (2.0, 8.0)


@dataclass(frozen=True)
class Fault:
    """One thing to break.

    Attributes:
        pause_s: seconds between the recovery from the one before and the look for this one's moment.
        outage_s: seconds for which Redis is down, or ports are cut off.
        victim: which of several workers in the right phase, as a share of their number: 0 up to 1.
    """

    kind: Kind
    pause_s: float
    outage_s: float
    victim: float


def draw(seed: int, kinds: Sequence[Kind] = KINDS, most: int | None = None) -> list[Fault]:
    """Every kind once, in an order of the seed's; or the first `most` of them."""
    rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
    order = rng.sample(list(kinds), len(kinds))[:most]
    return [Fault(kind, rng.uniform(0, _LONGEST_PAUSE_S), rng.uniform(*_OUTAGE_S), rng.random()) for kind in order]
