"""The bundled model with fewer layers and an even number of heads: as real as its attention, and quick to start."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path


def prune(model: Path, out: Path, *, layers: int, kv_heads: int) -> Path:
    """Write the first `layers` of a Llama-like model, with the first `kv_heads` of each and the queries that ask them.

    What it says makes no sense, and every word of it hangs on the whole prompt.
    """
    from safetensors.torch import load_file, save_file

    config = json.loads((model / "config.json").read_text())
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads = config["num_attention_heads"] // config["num_key_value_heads"] * kv_heads
    out.mkdir(parents=True)
    for file in model.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copy(file, out)
    tensors = {name: each for file in model.glob("*.safetensors") for name, each in load_file(file).items()}
    kept = {}
    for name, tensor in tensors.items():
        found = re.search(r"\.layers\.(\d+)\.", name)
        if found and int(found[1]) >= layers:
            continue
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            tensor = tensor[: kv_heads * width]
        elif name.endswith("q_proj.weight"):
            tensor = tensor[: heads * width]
        elif name.endswith("o_proj.weight"):
            tensor = tensor[:, : heads * width]
        kept[name] = tensor.contiguous()
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    config |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    (out / "config.json").write_text(json.dumps(config | {"head_dim": width}))
    return out
