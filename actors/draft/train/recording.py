"""What a target answers to prompts, token by token, with its last hidden states: what a head learns from.

A folder of recordings is filled piece by piece, each whole or not there, so that it may be interrupted anywhere and
goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from joinwise.actors.draft.train.continuing import go_on
from joinwise.actors.draft.train.saying import Say
from joinwise.cluster.errors import ConfigError

_AT_ONCE = 32
Encode = Callable[[str], list[int]]


@dataclass(frozen=True, eq=False)
class Recording:
    """One answer.

    Attributes:
        tokens: of prompt and answer, int32, (n,).
        prompt: how many of them are the prompt's.
        hidden: the target's last hidden state at each but the last, float16, (n - 1, size).
    """

    tokens: np.ndarray
    prompt: int
    hidden: np.ndarray


class Recorder:
    """Lets a target answer, greedily.

    Args:
        model: a causal model of transformers with full attention, in evaluation mode.
        encode: ids of a prompt as a request would have them.
        ends: ids that end an answer.
        answer_tokens: of an answer at most.
        longest: tokens of a prompt; a longer one loses its beginning.
    """

    def __init__(
        self, model: Any, encode: Encode, ends: Sequence[int], *, answer_tokens: int, longest: int = 512
    ) -> None:
        self._model = model
        self._encode = encode
        self._ends = list(ends)
        self._answer_tokens = answer_tokens
        self._longest = longest

    def answers(self, prompts: Sequence[str]) -> list[Recording]:
        """Answers to some prompts, in one batch."""
        ids = [self._encode(prompt)[-self._longest :] for prompt in prompts]
        found = go_on(self._model, ids, lambda logits: logits.argmax(-1), ends=self._ends, most=self._answer_tokens)
        return [
            Recording(np.array(each.tokens, np.int32), len(prompt), each.hidden.to(torch.float16).numpy())
            for prompt, each in zip(ids, found, strict=True)
        ]


def record(make: Callable[[], Recorder], prompts: Sequence[str], folder: Path, say: Say) -> list[Recording]:
    """Recordings of these prompts, in their order: what `folder` lacks of them is made.

    Args:
        make: called once if anything is lacking; it may load a model.
        prompts: each is a name for its recording, so a folder serves one target and one way to answer.

    Raises:
        ConfigError: a recording that is there cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {prompt: folder / f"{hashlib.sha256(prompt.encode()).hexdigest()[:32]}.safetensors" for prompt in prompts}
    lacking = sorted((prompt for prompt in files if not files[prompt].exists()), key=len)
    recorder = make() if lacking else None
    for at in range(0, len(lacking), _AT_ONCE):
        say("answers", len(files) - len(lacking) + at, len(files), "")
        some = lacking[at : at + _AT_ONCE]
        assert recorder is not None
        for prompt, answer in zip(some, recorder.answers(some), strict=True):
            _write(files[prompt], answer)
    say("answers", len(files), len(files), "")
    return [_read(files[prompt]) for prompt in prompts]


def _write(file: Path, recording: Recording) -> None:
    draft = file.with_suffix(".part")
    tensors = {
        "tokens": torch.from_numpy(recording.tokens),
        "prompt": torch.tensor(recording.prompt),
        "hidden": torch.from_numpy(recording.hidden),
    }
    draft.write_bytes(save(tensors))  # `save_file` would let nobody else read it
    draft.replace(file)


def _read(file: Path) -> Recording:
    try:
        found = load_file(file)
        return Recording(found["tokens"].numpy(), int(found["prompt"]), found["hidden"].numpy())
    except (OSError, SafetensorError, KeyError) as error:
        raise ConfigError(f"the recording {file} cannot be read ({error}): remove it, and it is made again") from error
