"""GGUF file -> Hugging Face folder that vLLM loads (bfloat16). Run as a program, so that no caller imports torch.

    python -m joinwise.actors.models.convert MODEL.gguf OUT_FOLDER

Prints one line a step on standard output. Quantized weights are dequantized: the result is larger, needs no GGUF
support in the engine, and is the same on every machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def say(step: str) -> None:
    print(step, flush=True)


def convert(source: Path, out: Path) -> None:
    """Convert `source` into the existing empty folder `out`: weights, tokenizer, chat template, generation config."""
    say("loading torch and transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()

    folder, name = str(source.parent), source.name
    say(f"reading and dequantizing {name}")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    say("writing safetensors and tokenizer")
    # Generation stops at the turn's end that the file's own tokenizer names, whatever the architecture's default is.
    stops = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.config.update(stops)
    model.generation_config = GenerationConfig(**stops)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _forget_quantization(out / "config.json")
    for file in out.iterdir():
        file.chmod(0o644)


def _forget_quantization(config_file: Path) -> None:
    """The saved weights are plain bfloat16: drop a left-over quantization entry, which an engine would act on."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if config.pop("quantization_config", None) is not None:
        config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
