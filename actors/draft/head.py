"""The draft head: a few decoder blocks that go on from what the target was thinking.

At each position it takes the token there and the target's last hidden state of the position before (the *feature*),
and predicts the target's next one; the target's own output matrix makes a token of that. So it guesses one token from a
feature that the target has sent, and the ones after it from features of its own. Features are hidden states after the
target's last normalisation, as its output matrix takes them. Where none was sent (a prompt that was computed elsewhere,
a round that was lost) a learned vector stands for it, so that the head always has an answer, if a worse one.

Source: Dovetail (Zhang et al., arXiv:2412.18934): the division of work, Dynamic Gating Fusion, one block or a few;
EAGLE (Li et al., arXiv:2401.15077): recursion over features. Embeddings and output matrix are the target's, frozen and
not stored; a head works for the target alone that it was trained for, which it knows by its digest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from joinwise.actors.models import LocalModel
from joinwise.cluster.errors import ConfigError

VERSION = 1
MOST_BLOCKS = 6
BUILT_IN = Path(__file__).parent / "heads"
_STREAM = 8.0
WEIGHTS, CONFIG = "head.safetensors", "head.json"
_BIAS = "model.layers.0.self_attn.q_proj.bias"
_EMBEDDINGS, _OUTPUT, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class HeadShape:
    """What the blocks look like, in the words of a Llama configuration; all but their number is the target's."""

    blocks: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    attention_bias: bool = False

    @classmethod
    def like(cls, folder: Path, blocks: int) -> HeadShape:
        """Blocks such as the target in `folder` has.

        Raises:
            ConfigError: the target's configuration does not say what Llama's would.
        """
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            rope = config.get("rope_parameters") or {}
            return cls(
                blocks=blocks,
                hidden_size=hidden,
                intermediate_size=int(config["intermediate_size"]),
                num_attention_heads=heads,
                num_key_value_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or hidden // heads),
                max_position_embeddings=int(config["max_position_embeddings"]),
                rms_norm_eps=float(config["rms_norm_eps"]),
                rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
                attention_bias=any(_BIAS in names for names in _names(folder)),  # Qwen2's configuration is silent
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise ConfigError(f"no draft head can be made for {folder}: its config.json: {error!r}") from error


@dataclass(frozen=True)
class TargetEnds:
    """What a head borrows of its target: `embeddings` and `output`, (ids, size), and the last `norm`, (size,)."""

    embeddings: torch.Tensor
    output: torch.Tensor
    norm: torch.Tensor

    @classmethod
    def read(cls, folder: Path, dtype: torch.dtype) -> TargetEnds:
        """From the target's safetensors; nothing else of it is loaded.

        Raises:
            ConfigError: the folder holds no safetensors, or none with these tensors.
        """
        found: dict[str, torch.Tensor] = {}
        try:
            for file in sorted(folder.glob("*.safetensors")):
                with safe_open(file, framework="pt") as tensors:
                    for name in {_EMBEDDINGS, _OUTPUT, _NORM} & set(tensors.keys()):
                        found[name] = tensors.get_tensor(name).to(dtype)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"the weights in {folder} cannot be read: {error}") from error
        if missing := {_EMBEDDINGS, _NORM} - found.keys():
            raise ConfigError(f"no draft head can be made for {folder}: no {', '.join(sorted(missing))} in its weights")
        return cls(found[_EMBEDDINGS], found.get(_OUTPUT, found[_EMBEDDINGS]), found[_NORM])


class DynamicGatingFusion(nn.Module):
    """Mixes feature and embedding, each (..., size), by a gate for each element that both decide.

    `g * W_f f + (1 - g) * W_e e` with `g = sigmoid(W_g [f; e])`, of normalised f and e.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.feature_norm, self.embedding_norm = nn.RMSNorm(size, eps), nn.RMSNorm(size, eps)
        self.feature = nn.Linear(size, size, bias=False)
        self.embedding = nn.Linear(size, size, bias=False)
        self.gate = nn.Linear(2 * size, size)
        nn.init.eye_(self.feature.weight)
        nn.init.eye_(self.embedding.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, feature: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """See the class."""
        feature, embedding = self.feature_norm(feature), self.embedding_norm(embedding)
        gate = torch.sigmoid(self.gate(torch.cat([feature, embedding], -1)))
        return gate * self.feature(feature) + (1 - gate) * self.embedding(embedding)


class DovetailHead(nn.Module):
    """See the module.

    Args:
        shape: of its blocks.
        ends: of its target.
        seed: of what its weights begin with.
    """

    def __init__(self, shape: HeadShape, ends: TargetEnds, seed: int = 0) -> None:
        from transformers import LlamaConfig, LlamaModel

        super().__init__()
        self.shape = shape
        words = {name: value for name, value in asdict(shape).items() if name not in ("blocks", "rope_theta")}
        config = LlamaConfig(
            **words,
            num_hidden_layers=shape.blocks,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            vocab_size=1,  # embeddings are the target's
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            attn_implementation="sdpa",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.fusion = DynamicGatingFusion(shape.hidden_size, shape.rms_norm_eps)
            self.blocks = LlamaModel(config)
            self.absent = nn.Parameter(torch.randn(shape.hidden_size) * ends.norm.float().std())
        del self.blocks.embed_tokens
        with torch.no_grad():
            # Features were scaled by the target's last normalisation. Undone at the one end and done at the other, what
            # the blocks begin with is what the target's own would go on from.
            norm = ends.norm.float()
            self.blocks.norm.weight.copy_(norm)
            usual = norm.square().mean().sqrt()
            self.fusion.feature_norm.weight.copy_(torch.where(norm.abs() > 1e-2 * usual, usual / norm, 0.0))
        self.register_buffer("embeddings", ends.embeddings, persistent=False)
        self.output = nn.Linear(shape.hidden_size, len(ends.output), bias=False)
        self.output.weight = nn.Parameter(ends.output, requires_grad=False)
        self.to(ends.embeddings.dtype)

    @property
    def ids(self) -> int:
        """Token ids that there are."""
        return len(self.embeddings)

    def forward(self, tokens: torch.Tensor, features: torch.Tensor, known: torch.Tensor, **more: Any) -> torch.Tensor:
        """Features of these positions, as the head guesses them.

        Args:
            tokens: ids, (rows, n).
            features: the target's of the position before each, (rows, n, size).
            known: where `features` are such, (rows, n); what stands elsewhere is not looked at.
            more: mask, positions and cache for the blocks, as transformers' Llama takes them; without any, rows are
                whole sequences from position 0 on, causal.

        Returns:
            (rows, n, size).
        """
        features = torch.where(known[..., None], features.to(self.absent.dtype), self.absent)
        fused = self.fusion(features, nn.functional.embedding(tokens, self.embeddings))
        guessed: torch.Tensor = self.blocks(inputs_embeds=fused, **{"use_cache": False, **more}).last_hidden_state
        return guessed

    def begin_like(self, folder: Path) -> None:
        """Let its blocks begin as the last ones of the target in `folder`: from there it has less to learn.

        What the target does not have, or has in another shape, stays as it is. Its layers go on from a stream that is
        larger than what a normalisation makes, so that theirs is made larger too.
        """
        first = int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])
        first -= self.shape.blocks
        own = {
            f"model.layers.{first + block}.{name}": weight
            for block, layer in enumerate(self.blocks.layers)
            for name, weight in layer.named_parameters()
        }
        with torch.no_grad():
            for mixed in (self.fusion.feature, self.fusion.embedding):
                mixed.weight.mul_(_STREAM)
            for file in folder.glob("*.safetensors"):
                with safe_open(file, framework="pt") as tensors:
                    for name in own.keys() & set(tensors.keys()):
                        if (theirs := tensors.get_tensor(name)).shape == own[name].shape:
                            own[name].copy_(theirs)

    def trained(self) -> dict[str, torch.Tensor]:
        """The weights that are its own, by name."""
        return {name: each.detach() for name, each in self.named_parameters() if each.requires_grad}


def _names(folder: Path) -> Iterator[set[str]]:
    """Of the tensors in each file of a model."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            yield set(tensors.keys())


def save_head(head: DovetailHead, folder: Path, target: LocalModel) -> None:
    """Write a head, each file whole or not at all. Weights are stored as bfloat16: a guess needs no more."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{WEIGHTS}"
    draft.write_bytes(save({name: each.to(torch.bfloat16).contiguous() for name, each in head.trained().items()}))
    draft.replace(folder / WEIGHTS)
    facts = {"version": VERSION, "target": target.name, "target_digest": target.digest, **asdict(head.shape)}
    draft = folder / f".{CONFIG}"
    draft.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    draft.replace(folder / CONFIG)


def head_folder(name: str) -> Path:
    """Where the head is that a configuration names: one that joinwise brings, or a folder."""
    built_in = {each.name: each for each in BUILT_IN.iterdir()} if BUILT_IN.is_dir() else {}
    return built_in.get(name, Path(name))


def load_head(folder: Path, target: LocalModel, dtype: torch.dtype = torch.float32) -> DovetailHead:
    """The head in `folder`, for this target.

    Raises:
        ConfigError: there is none, it is broken, or it is another target's; the message names both.
    """
    try:
        facts = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        version, trained_for, digest = (facts.pop(name) for name in ("version", "target", "target_digest"))
        if version != VERSION:
            raise ConfigError(f"the draft head in {folder} is of version {version}, this release reads {VERSION}")
        shape = HeadShape(**facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"there is no draft head in {folder}: {CONFIG}: {error!r}") from error
    if digest != target.digest:
        raise ConfigError(
            f"the draft head in {folder} was trained for {trained_for!r} ({digest[:8]}), "
            f"not for {target.name!r} ({target.digest[:8]}): train one with `joinwise train-draft`"
        )
    head = DovetailHead(shape, TargetEnds.read(target.path, dtype))
    try:
        weights = load_file(folder / WEIGHTS)
        if weights.keys() != head.trained().keys():
            raise ValueError(f"its tensors are not those of a head: {sorted(weights.keys() ^ head.trained().keys())}")
        head.load_state_dict(weights, strict=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"the draft head in {folder} cannot be read: {WEIGHTS}: {error}") from error
    return head.eval()
