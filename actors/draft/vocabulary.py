"""Whether two models mean the same by a token id: read from their tokenizers' files, without loading either model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from joinwise.actors.models import resolve_model
from joinwise.cluster.config import JoinwiseConfig
from joinwise.cluster.errors import ConfigError
from joinwise.proto import draft_pb2


@dataclass(frozen=True)
class Vocabulary:
    """What token ids mean.

    Attributes:
        model: whose it is, for messages.
        size: one more than the largest id.
        digest: of all ids and their texts.
    """

    model: str
    size: int
    digest: str

    @classmethod
    def read(cls, model: str, folder: Path) -> Vocabulary:
        """The vocabulary of the model in `folder`.

        Raises:
            ConfigError: the folder holds no `tokenizer.json`, or one that says nothing of a vocabulary.
        """
        try:
            tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
            vocabulary = tokenizer["model"]["vocab"]
            if isinstance(vocabulary, list):  # unigram models list pairs of text and score
                vocabulary = {text: index for index, (text, _) in enumerate(vocabulary)}
            ids = {int(index): text for text, index in vocabulary.items()}
            ids |= {int(each["id"]): each["content"] for each in tokenizer.get("added_tokens", ())}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"the vocabulary of {model!r} cannot be read from {folder / 'tokenizer.json'}: {error!r}; "
                "speculation with a draft model needs it on both sides"
            ) from error
        if not ids:
            raise ConfigError(f"the vocabulary of {model!r} in {folder / 'tokenizer.json'} is empty")
        digest = hashlib.sha256(json.dumps(sorted(ids.items())).encode()).hexdigest()[:32]
        return cls(model, max(ids) + 1, digest)

    @classmethod
    def of(cls, message: draft_pb2.DraftVocabulary) -> Vocabulary:
        """As it came over the wire."""
        return cls(message.model, message.size, message.digest)

    def message(self) -> draft_pb2.DraftVocabulary:
        """For the wire."""
        return draft_pb2.DraftVocabulary(model=self.model, size=self.size, digest=self.digest)


def disagreement(target: Vocabulary, draft: Vocabulary | None) -> str:
    """Why a draft cannot work for a target, naming both; empty when it can. None drafts in any vocabulary."""
    if draft is None or draft.digest == target.digest:
        return ""
    return (
        f"the draft model {draft.model!r} has another vocabulary ({draft.size} ids, {draft.digest[:8]}) than "
        f"the target {target.model!r} ({target.size} ids, {target.digest[:8]}): take a draft of the same family"
    )


def check_vocabularies(config: JoinwiseConfig, progress: Callable[[str], None]) -> None:
    """Refuse a cluster whose engines and draft models do not mean the same by their ids; models are fetched for it.

    Raises:
        ConfigError: naming both models.
        ModelNotFoundError: a draft model that there is not.
    """
    drafts = {pool.name: pool.draft for pool in config.pools if pool.draft is not None and pool.draft.model is not None}
    for pool in config.pools:
        settings = drafts.get(pool.speculation.draft) if pool.speculation is not None else None
        if settings is None or settings.model is None:
            continue
        target = config.model_named(pool.model)
        target_path = resolve_model(target.model, revision=target.revision, progress=progress).path
        draft_path = resolve_model(settings.model, revision=settings.revision, progress=progress).path
        reason = disagreement(Vocabulary.read(target.name, target_path), Vocabulary.read(settings.model, draft_path))
        if reason:
            raise ConfigError(f"pool {pool.name!r}: {reason}")
