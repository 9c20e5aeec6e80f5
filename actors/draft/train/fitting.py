"""Trains a head on recordings. Every step follows from the settings and its number alone, so that training that goes on
from a checkpoint ends, on the same machine with as many threads, with the very same bits.

Where the CPU multiplies bfloat16 (AVX512-BF16, AMX), products are made of it; weights, sums, losses and the optimizer's
state are float32 anyhow. That is harmless: a head's guesses are verified, and it drafts in bfloat16 in any case.

What a step does:
* Half of the sequences show the features of their prompts, and are learnt from as a whole; of the others the head sees
  no feature before the answer's first token, as when the prompt was computed elsewhere, and only the answer counts.
* Some features are hidden, as those of rounds that were lost; some are replaced by what the head itself guesses for
  them, since that is what it goes on from when it drafts more than one token.
* Loss: smooth L1 between guessed and true features, in units of their root mean square, and cross entropy between the
  target's distribution and the one that its output matrix makes of the guess (EAGLE's two terms, arXiv:2401.15077).
  Distributions are over the ids that any recording holds: the others, most of a vocabulary, cost most of the time and
  teach next to nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from joinwise.actors.draft.head import DovetailHead
from joinwise.actors.draft.train.recording import Recording
from joinwise.cluster.errors import ConfigError

CHECKPOINT = "checkpoint.pt"
_PROMPTS_SEEN, _LOST, _OWN = 0.5, 0.05, 0.3
_DEPTH = 1
"""How many guesses in a row a guess may be made from."""
_JUDGED = 1024
"""Positions of a step whose distributions are compared, at most: each costs two products with the output matrix."""
_SORTED = 16
"""Batches whose sequences are dealt out by length, so that little is padded."""
_WARM_UP, _LAST_RATE = 0.05, 0.1
_CLIP = 1.0


@dataclass(frozen=True)
class Settings:
    """How a head is trained.

    Attributes:
        target, target_digest: what it is trained for.
        data: digest of the recordings.
        blocks: of the head.
        steps: in all; the rate falls to a tenth along a cosine.
        batch: sequences of a step.
        rate: of AdamW, at its highest.
        seed: of everything that is drawn.
    """

    target: str
    target_digest: str
    data: str
    blocks: int
    steps: int
    batch: int
    rate: float
    seed: int


@dataclass(frozen=True)
class StepFigures:
    """One step: its number, both terms of its loss, and the share of positions whose likeliest token was right."""

    step: int
    feature_loss: float
    token_loss: float
    right: float


@dataclass(frozen=True)
class _Batch:
    """Sequences, padded at their ends: ids, features by position (rows, n, size), lengths and those of prompts."""

    tokens: torch.Tensor
    hidden: torch.Tensor
    lengths: torch.Tensor
    prompts: torch.Tensor


class Trainer:
    """Owns a head's weights while they change.

    Args:
        head: on the CPU, in float32.
        recordings: what it learns from; at least one.
        settings: as the checkpoint must have them.
    """

    def __init__(self, head: DovetailHead, recordings: Sequence[Recording], settings: Settings) -> None:
        self.head = head.train()
        self.step = 0
        self._recordings = recordings
        self._settings = settings
        self._own = [each for each in head.parameters() if each.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._own, lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )
        squares = [np.square(each.hidden.astype(np.float32)).mean() for each in recordings]
        self._scale = float(np.sqrt(np.mean(squares)))
        self._quick = multiplies_bfloat16()
        ids = torch.from_numpy(np.unique(np.concatenate([each.tokens for each in recordings])).astype(np.int64))
        self._output = head.output.weight[ids].to(torch.bfloat16 if self._quick else torch.float32)
        self._orders: dict[int, list[np.ndarray]] = {}

    def run(self, until: int, each: Callable[[StepFigures], None] = lambda _: None) -> None:
        """Train up to this step, at most to the last of the settings."""
        while self.step < min(until, self._settings.steps):
            each(self._train_step())

    def save(self, folder: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        draft = folder / f".{CHECKPOINT}"
        state = {
            "settings": asdict(self._settings),
            "step": self.step,
            "head": self.head.trained(),
            "optimizer": self._optimizer.state_dict(),
        }
        torch.save(state, draft)
        draft.replace(folder / CHECKPOINT)

    def resume(self, folder: Path) -> bool:
        """Go on from the checkpoint in `folder`; False where there is none.

        Raises:
            ConfigError: it cannot be read, or was made with other settings, which are named.
        """
        file = folder / CHECKPOINT
        if not file.exists():
            return False
        try:
            state: dict[str, Any] = torch.load(file, weights_only=True)
            differ = different(state["settings"], asdict(self._settings))
            if differ:
                raise ConfigError(f"{file} was made with other settings: {differ}")
            self.head.load_state_dict(state["head"], strict=False)
            self._optimizer.load_state_dict(state["optimizer"])
            self.step = int(state["step"])
        except ConfigError:
            raise
        except Exception as error:  # torch and pickle have many for a broken file
            raise ConfigError(
                f"the checkpoint {file} cannot be read ({type(error).__name__}): remove it to train from the "
                "beginning, with what the target has answered"
            ) from error
        return True

    def _train_step(self) -> StepFigures:
        generator = torch.Generator().manual_seed(self._settings.seed * 1_000_003 + self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.rate * self._share_of_rate()
        feature_loss, token_loss, right = self._losses(self._batch(), generator)
        self._optimizer.zero_grad()
        (feature_loss + token_loss).backward()
        torch.nn.utils.clip_grad_norm_(self._own, _CLIP)
        self._optimizer.step()
        self.step += 1
        return StepFigures(self.step, feature_loss.item(), token_loss.item(), right)

    def _share_of_rate(self) -> float:
        done = self.step / self._settings.steps
        if done < _WARM_UP:
            return (self.step + 1) / (_WARM_UP * self._settings.steps + 1)
        return _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * done)) / 2

    def _chosen(self) -> list[Recording]:
        """The step's sequences: each epoch has an order of its own, of batches whose sequences are about as long."""
        count, size = len(self._recordings), self._settings.batch
        batches = -(-count // size)
        epoch, at = divmod(self.step, batches)
        if epoch not in self._orders:
            drawn = np.random.default_rng((self._settings.seed, epoch))
            order = np.resize(drawn.permutation(count), batches * size)  # the last batch is filled up with the first
            lengths = np.array([len(each.tokens) for each in self._recordings])
            found: list[np.ndarray] = []
            for begin in range(0, len(order), _SORTED * size):
                some = order[begin : begin + _SORTED * size]
                dealt = some[np.argsort(lengths[some], kind="stable")].reshape(-1, size)
                found.extend(drawn.permutation(dealt))
            self._orders = {epoch: found}
        return [self._recordings[int(index)] for index in self._orders[epoch][at]]

    def _batch(self) -> _Batch:
        some = self._chosen()
        longest = max(len(each.tokens) for each in some)
        tokens = torch.zeros(len(some), longest, dtype=torch.long)
        hidden = torch.zeros(len(some), longest, some[0].hidden.shape[1])
        for row, each in enumerate(some):
            tokens[row, : len(each.tokens)] = torch.from_numpy(each.tokens.astype(np.int64))
            hidden[row, : len(each.hidden)] = torch.from_numpy(each.hidden.astype(np.float32))
        lengths = torch.tensor([len(each.tokens) for each in some])
        return _Batch(tokens, hidden, lengths, torch.tensor([each.prompt for each in some]))

    def _losses(self, batch: _Batch, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, float]:
        rows, width = batch.tokens.shape
        at = torch.arange(width)
        whole = torch.rand(rows, 1, generator=generator) < _PROMPTS_SEEN
        begins = torch.where(whole, 1, batch.prompts[:, None])  # the first position whose feature may be known
        known = (at >= begins) & (torch.rand(rows, width, generator=generator) >= _LOST)
        own = known & (torch.rand(rows, width, generator=generator) < _OWN) & (at > begins)
        given = batch.hidden.roll(1, 1)  # a position is given the feature of the one before it
        mixed = given
        with torch.no_grad():
            for _ in range(_DEPTH):
                guessed = self._guesses(batch.tokens, mixed, known).roll(1, 1)
                mixed = torch.where(own[..., None], guessed, given)
        counts = (at >= begins) & (at < batch.lengths[:, None] - 1)
        guessed, true = self._guesses(batch.tokens, mixed, known)[counts], batch.hidden[counts]
        feature_loss = functional.smooth_l1_loss(guessed / self._scale, true / self._scale)
        judged = torch.randperm(len(true), generator=generator)[:_JUDGED]
        logits = self._logits(guessed[judged])
        with torch.no_grad():
            wanted = self._logits(true[judged])
            right = (logits.argmax(-1) == wanted.argmax(-1)).float().mean().item()
        token_loss = functional.cross_entropy(logits, wanted.softmax(-1))
        return feature_loss, token_loss, right

    def _guesses(self, tokens: torch.Tensor, features: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._quick):
            guessed: torch.Tensor = self.head(tokens, features, known)
        return guessed.float()

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        return functional.linear(features.to(self._output.dtype), self._output).float()


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it; without them float32 is faster."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def different(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Which settings differ, with both values; empty for none."""
    names = [name for name in now if before.get(name) != now[name]]
    return ", ".join(f"{name} {json.dumps(before.get(name))}, not {json.dumps(now[name])}" for name in names)
