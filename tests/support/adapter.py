"""Small LoRA adapters with random weights, as the PEFT library writes them."""

from __future__ import annotations

import array
import json
import random
from pathlib import Path

RANK = 4


def write(folder: Path, model: Path, seed: int) -> Path:
    """Writes an adapter of a model's attention into a folder. It changes what the model says, other seeds otherwise."""
    config = json.loads((model / "config.json").read_text())
    hidden, head = config["hidden_size"], config["head_dim"]
    keys = head * config["num_key_value_heads"]
    rng = random.Random(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, width in (("q_proj", head * config["num_attention_heads"]), ("k_proj", keys), ("v_proj", keys)):
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for half, shape in (("A", (RANK, hidden)), ("B", (width, RANK))):
                values = array.array("f", (rng.gauss(0, 0.5) for _ in range(shape[0] * shape[1])))
                tensors[f"{place}.lora_{half}.weight"] = shape, values.tobytes()
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(safetensors(tensors))
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0,
        "bias": "none", "target_modules": ["q_proj", "k_proj", "v_proj"], "modules_to_save": None,
        "base_model_name_or_path": model.name, "inference_mode": True, "fan_in_fan_out": False,
    }))
    return folder


def safetensors(tensors: dict[str, tuple[tuple[int, int], bytes]]) -> bytes:
    """A safetensors file of 32-bit numbers: the length of its header, the header, the values."""
    header, body = {}, b""
    for name, (shape, values) in tensors.items():
        offsets = [len(body), len(body) + len(values)]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        body += values
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def flags(**adapters: Path) -> tuple[str, ...]:
    """Engine flags that serve adapters under these names."""
    modules = (f"{name}={path}" for name, path in adapters.items())
    return "--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", "8", "--lora-modules", *modules
