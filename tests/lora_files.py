"""Small adapters for tests, in the form that PEFT writes, and what they should make of a matrix, from the papers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from files import HIDDEN, INTERMEDIATE, KEYS, LAYERS, Array, encode, to_float, write_safetensors

__all__ = ["MODULES", "PREFIX", "dora", "lora", "low_rank", "settings", "write_adapter"]

PREFIX = "base_model.model."
MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
"""Linear layers of ``files.llama``: outputs and inputs."""


def settings(**changes: Any) -> dict[str, Any]:
    """An adapter_config.json; a change to None removes the key."""
    record = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6, "bias": "none",
              "init_lora_weights": True, "base_model_name_or_path": "org/base", **changes}  # fmt: skip
    return {key: value for key, value in record.items() if value is not None}


def low_rank(
    seed: int, modules: Mapping[str, tuple[int, int]] | None = None, *, rank: int = 3, code: str = "F32",
    layers: int = LAYERS, suffix: str = "", magnitude: bool = False,
) -> dict[str, Array]:  # fmt: skip
    """The tensors of a LoRA (with ``magnitude``: DoRA) adapter on ``modules`` of each layer, with random values."""
    random = np.random.default_rng(seed)
    found = {}
    for layer in range(layers):
        for module, (outputs, inputs) in (modules or MODULES).items():
            name = f"{PREFIX}model.layers.{layer}.{module}."
            found[f"{name}lora_A{suffix}.weight"] = encode(code, random.standard_normal((rank, inputs)))
            found[f"{name}lora_B{suffix}.weight"] = encode(code, random.standard_normal((outputs, rank)))
            if magnitude:
                found[f"{name}lora_magnitude_vector"] = encode(code, 1 + random.random(outputs))
    return found


def write_adapter(folder: Path, tensors: Mapping[str, Array], **changes: Any) -> Path:
    """An adapter's folder: adapter_config.json and adapter_model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings(**changes)))
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder


def lora(weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """Hu et al. 2021, "LoRA": W + scale B A, W [out, in]; plain loops, float64."""
    result = weight.astype(np.float64)
    for o in range(b.shape[0]):
        for i in range(a.shape[1]):
            result[o, i] += scale * sum(float(b[o, r]) * float(a[r, i]) for r in range(a.shape[0]))
    return result


def dora(weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float, magnitude: np.ndarray) -> np.ndarray:
    """Liu et al. 2024, "DoRA": the sum of LoRA, the weights of each output brought to its magnitude."""
    result = lora(weight, a, b, scale)
    for o in range(len(result)):
        result[o] *= float(magnitude[o]) / np.sqrt(sum(value**2 for value in result[o]))
    return result


def expected(
    base: Mapping[str, Array], adapter: Mapping[str, Array], scale: float | Mapping[str, float], *, suffix: str = ""
) -> dict[str, np.ndarray]:
    """Every tensor of a Llama with an adapter of ``low_rank`` on it; ``scale`` for all, or by module."""
    found = {}
    for name, array in base.items():
        module = name.removesuffix(".weight")
        a, b = (adapter.get(f"{PREFIX}{module}.lora_{x}{suffix}.weight") for x in "AB")
        magnitude = adapter.get(f"{PREFIX}{module}.lora_magnitude_vector")
        found[name] = to_float(array)
        if a is not None and b is not None:
            factor = scale if isinstance(scale, (int, float)) else next(f for m, f in scale.items() if m in module)
            given = (found[name], to_float(a), to_float(b), factor)
            found[name] = lora(*given) if magnitude is None else dora(*given, to_float(magnitude))
    return found


__all__ += ["expected"]
