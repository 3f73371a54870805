"""Checkpoints of a chosen size for benchmarks: a base and fine-tunes, Llama-shaped, random, written once and reused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from mergekit.checkpoint import build_header
from mergekit.dtypes import BF16

__all__ = ["Shape", "build", "llama_shapes"]

Shape = tuple[str, tuple[int, ...]]
_DELTA = 0.05
"""Size of a fine-tune's change, relative to the weights."""


def llama_shapes(layers: int, hidden: int, ffn: int, vocabulary: int, key_value: int) -> list[Shape]:
    """Names and shapes of a Llama-architecture model. The defaults of ``merge_speed`` give TinyLlama's 1.1B."""
    shapes: list[Shape] = [("model.embed_tokens.weight", (vocabulary, hidden))]
    for i in range(layers):
        prefix = f"model.layers.{i}."
        shapes += [
            (prefix + "input_layernorm.weight", (hidden,)),
            (prefix + "self_attn.q_proj.weight", (hidden, hidden)),
            (prefix + "self_attn.k_proj.weight", (key_value, hidden)),
            (prefix + "self_attn.v_proj.weight", (key_value, hidden)),
            (prefix + "self_attn.o_proj.weight", (hidden, hidden)),
            (prefix + "post_attention_layernorm.weight", (hidden,)),
            (prefix + "mlp.gate_proj.weight", (ffn, hidden)),
            (prefix + "mlp.up_proj.weight", (ffn, hidden)),
            (prefix + "mlp.down_proj.weight", (hidden, ffn)),
        ]
    return [*shapes, ("model.norm.weight", (hidden,)), ("lm_head.weight", (vocabulary, hidden))]


def build(
    folder: Path, shapes: list[Shape], models: tuple[str, ...] = ("base", "one", "two"), layers: int = 22
) -> None:
    """Write bfloat16 models into subfolders of ``folder``, unless they are there. The first is the base."""
    for number, name in enumerate(models):
        target = folder / name / "model.safetensors"
        header, offsets = build_header((n, BF16, s) for n, s in shapes)
        size = offsets[-1] + math.prod(shapes[-1][1]) * 2
        if target.exists() and target.stat().st_size == size:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers,
                  "vocab_size": shapes[0][1][0], "torch_dtype": "bfloat16", "tie_word_embeddings": False}  # fmt: skip
        (target.parent / "config.json").write_text(json.dumps(config))
        with target.open("wb") as stream:
            stream.write(header)
            for (_, shape), offset in zip(shapes, offsets, strict=True):
                assert stream.tell() == offset
                _write_tensor(stream, math.prod(shape), seed=offset, number=number)


def _write_tensor(stream, count: int, seed: int, number: int) -> None:  # type: ignore[no-untyped-def]
    """Normal weights of scale 0.02 (the same in every model), plus each fine-tune's own small change."""
    for start in range(0, count, 1 << 22):
        length = min(1 << 22, count - start)
        common = np.random.default_rng([seed, start])
        values = common.standard_normal(length, np.float32) * np.float32(0.02)
        if number:
            own = np.random.default_rng([seed, start, number])
            values += own.standard_normal(length, np.float32) * np.float32(0.02 * _DELTA)
        bits = values.view(np.uint32)
        stream.write((bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16).tobytes())
