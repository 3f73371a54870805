"""Convert a Phi-3 checkpoint folder to the Llama architecture, without changing what it computes.

    python models/to_llama.py models/base out/llama-base

Phi-3 is Llama with two pairs of matrices stored as one: query, key and value rows in `qkv_proj`, gate and up rows
in `gate_up_proj`. Splitting them gives a second architecture for tests and examples at no training cost.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")

# What means the same in both configs.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rms_norm_eps",
    "initializer_range",
    "attention_bias",
    "attention_dropout",
    "tie_word_embeddings",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "torch_dtype",
)


def convert(src: Path, dst: Path) -> None:
    """Write the Llama form of the Phi-3 checkpoint `src` into the folder `dst`, same dtype, same logits.

    `src` holds one `model.safetensors`. Raises ValueError for a config that Llama cannot express.
    """
    config = json.loads((src / "config.json").read_text(encoding="utf-8"))
    tensors = split_tensors(load_file(src / "model.safetensors"), config)
    dst.mkdir(parents=True, exist_ok=True)
    save_file(tensors, dst / "model.safetensors", metadata={"format": "pt"})
    (dst / "model.safetensors").chmod(0o644)  # save_file makes it private to its owner
    (dst / "config.json").write_text(json.dumps(llama_config(config), indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (src / name).is_file():
            (dst / name).write_bytes((src / name).read_bytes())


def llama_config(config: dict[str, Any]) -> dict[str, Any]:
    """The Llama config of a Phi-3 config."""
    if config.get("model_type") != "phi3":
        raise ValueError(f"expected a phi3 config, not {config.get('model_type')!r}")
    # A sliding window at least as long as any input is none; a partial rotary embedding is not Llama's.
    window = config.get("sliding_window")
    if window is not None and window < config["max_position_embeddings"]:
        raise ValueError(f"Llama has no sliding window, and this model has one of {window} tokens")
    if config.get("partial_rotary_factor", 1.0) != 1.0 or config.get("rope_scaling") is not None:
        raise ValueError("only the plain rotary embedding is converted, not a partial or scaled one")
    shared = {key: config[key] for key in _SHARED if key in config}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False, **shared}


def split_tensors(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Phi-3 tensors under Llama's names, the fused ones cut along their rows."""
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    query, key = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    half = config["intermediate_size"]
    parts = {
        "self_attn.qkv_proj.weight": (("q_proj", "k_proj", "v_proj"), (query, key, key)),
        "mlp.gate_up_proj.weight": (("gate_proj", "up_proj"), (half, half)),
    }
    result = {}
    for name, tensor in tensors.items():
        suffix = next((suffix for suffix in parts if name.endswith(suffix)), None)
        if suffix is None:
            result[name] = tensor
            continue
        fused = suffix.split(".")[1]
        for new, rows in zip(parts[suffix][0], tensor.split(parts[suffix][1]), strict=True):
            # Pieces of one tensor share its memory, which safetensors refuses: copy.
            result[name.replace(fused, new)] = rows.clone()
    return result


def main(argv: list[str] | None = None) -> int:
    """Command line: convert one folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("src", type=Path, help="Phi-3 checkpoint folder")
    parser.add_argument("dst", type=Path, help="folder to write")
    options = parser.parse_args(argv)
    convert(options.src, options.dst)
    return 0


if __name__ == "__main__":
    sys.exit(main())
