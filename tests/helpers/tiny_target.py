"""A target of a few thousand weights, with a tokenizer, in a folder: for what needs a model, but no good one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

IDS = 97


def tiny(seed: int = 3, *, layers: int = 4, tied: bool = True) -> Any:
    """A random Llama of hidden size 64, whose likeliest token is so by far."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=IDS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def tiny_draft(ids: int, positions: int, seed: int) -> Any:
    """A random Llama that drafts: of hidden size 32, with its own output matrix; its likeliest token is so by far."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=ids,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def saved(folder: Path, model: Any) -> Path:
    """The model with a tokenizer of words w0, w1, ..."""
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{each}": each for each in range(IDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder
