"""What an engine answered lately, searched for how an answer goes on: what is written again is drafted for nothing.

Answers to others stand one after the other, and each place knows the one before it at which the same three tokens
stand, as deflate finds matches (RFC 1951, section 4). Of the latest places the one counts at which most tokens match.
That drafts from earlier answers pay, above all where agents write the same again, is SuffixDecoding's finding
(Oliaro et al., arXiv:2411.04975), which keeps a suffix tree and counts what followed how often.
"""

from __future__ import annotations

import numpy as np

from joinwise.actors.draft.length import Acceptance

_KEY, _SHORTEST, _LONGEST = 3, 4, 16
"""Tokens by which places are found; that must match at the end of a sequence; and that are compared."""
_PLACES = 16
"""That are looked at, the latest first."""
_BITS = 21
"""Of a token's id in a key; vocabularies are a tenth of that."""
_GAP = -1
_PRIOR_TRIALS, _PRIOR_RATE, _MEMORY = 8.0, 0.6, 0.99


class Recall:
    """The answers that one engine gave lately.

    Args:
        size: tokens that are kept at most; at least half as many, once there were so many.

    Attributes:
        worth: how often what it said was right, of all sequences.
    """

    def __init__(self, size: int) -> None:
        self._half = max(size // 2, 2 * _LONGEST)
        self._young, self._old = _Kept(self._half), _Kept(0)
        self.worth = Acceptance(_PRIOR_TRIALS, _PRIOR_TRIALS * _PRIOR_RATE, _MEMORY)

    def add(self, tokens: np.ndarray, start: int) -> None:
        """Keep what was answered: a sequence's tokens, (n,), from `start` on."""
        if start >= len(tokens):
            return
        piece = tokens[max(0, start - _LONGEST) :][-self._half :]  # with what it is known by
        if len(piece) < _KEY:
            return
        if not self._young.has_room(len(piece)):
            self._young, self._old = _Kept(self._half), self._young
        self._young.add(piece)

    def continued(self, tokens: np.ndarray, k: int) -> list[int]:
        """At most `k` ids that followed where the most tokens stood as at the end of these, (n,); none without one."""
        if len(tokens) < _SHORTEST:
            return []
        key = int(_keys(tokens[-_KEY:])[0])
        length, at, kept = max(
            ((*kept.longest(tokens, key), kept) for kept in (self._young, self._old)), key=lambda found: found[0]
        )
        return kept.after(at, k) if length >= _SHORTEST else []


class _Kept:
    """Answers that are forgotten together.

    `_before` is the place before each at which the same key ends, -1 for none; `_newest` the latest place of each key.
    """

    def __init__(self, size: int) -> None:
        self._tokens = np.full(size + 1, _GAP, np.int32)
        self._before = np.full(size + 1, -1, np.int32)
        self._newest: dict[int, int] = {}
        self._used = 0

    def has_room(self, size: int) -> bool:
        return self._used + size < len(self._tokens)

    def add(self, piece: np.ndarray) -> None:
        begin = self._used
        self._tokens[begin : begin + len(piece)] = piece
        for at, key in enumerate(_keys(piece).tolist(), begin + _KEY - 1):
            self._before[at] = self._newest.get(key, -1)
            self._newest[key] = at
        self._used = begin + len(piece) + 1  # no text goes on in the next

    def longest(self, tokens: np.ndarray, key: int) -> tuple[int, int]:
        """How many tokens before a place match the end of these, and the place: the best of the latest ones."""
        best, place = 0, -1
        at = self._newest.get(key, -1)
        for _ in range(_PLACES):
            if at < 0:
                break
            size = min(_LONGEST, at + 1, len(tokens))
            differ = np.flatnonzero(self._tokens[at + 1 - size : at + 1] != tokens[len(tokens) - size :])
            length = size - 1 - int(differ[-1]) if len(differ) else size
            if length > best and self._tokens[at + 1] != _GAP:
                best, place = length, at
            at = int(self._before[at])
        return best, place

    def after(self, place: int, k: int) -> list[int]:
        """At most `k` tokens after a place, to the end of its answer."""
        ids: list[int] = self._tokens[place + 1 : place + 1 + k].tolist()
        return ids[: ids.index(_GAP)] if _GAP in ids else ids


def _keys(tokens: np.ndarray) -> np.ndarray:
    """A number for each three tokens in a row, (n - 2,)."""
    wide = tokens.astype(np.int64)
    return (wide[:-2] << 2 * _BITS) | (wide[1:-1] << _BITS) | wide[2:]
