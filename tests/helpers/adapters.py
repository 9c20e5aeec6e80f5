"""Small LoRA adapters in peft's format, with random weights that change the model's answers."""

from __future__ import annotations

import json
from pathlib import Path


def make_adapter(model: Path, out: Path, *, seed: int, rank: int = 4) -> Path:
    """Write an adapter of the attention's query and value projections for the model in a folder."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    outputs = {"q_proj": width * heads, "v_proj": width * config["num_key_value_heads"]}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, size in outputs.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, hidden, generator=generator) * 0.1
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(size, rank, generator=generator) * 0.1
    out.mkdir(parents=True)
    save_file(tensors, out / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(outputs),
        "bias": "none",
        "lora_dropout": 0.0,
    }
    (out / "adapter_config.json").write_text(json.dumps(described))
    return out
