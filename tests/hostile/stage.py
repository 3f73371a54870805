"""Sound models, and a hostile file put in its place among them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from files import Array, config, encode, llama, write_model, write_recipe, write_safetensors
from lora_files import low_rank, write_adapter

__all__ = ["CORPUS", "KINDS", "Case", "Kind", "cases", "sound", "stage", "tokenizer", "write_stage"]

CORPUS = Path(__file__).parent
VOCAB = 31
_MERGE = "merge_method: linear\nmodels:\n- model: x\n- model: b\nparameters: {weight: 1}\n"
_MOE = """base_model: base
gate_mode: cheap_embed
experts:
- source_model: one
  positive_prompts: [ab]
- source_model: two
  positive_prompts: [ca]
"""


@dataclass(frozen=True)
class Kind:
    """Where a hostile file goes, what is run on it, and how the stage is set: ``setting`` is a name or a recipe."""

    place: str
    command: tuple[str, ...] = ("merge", "r.yml", "out")
    recipe: str = _MERGE
    stage: str = "merge"


_MAKE = ("moe", "r.yml", "out", "--no-verify")
_LOOK = (*_MAKE, "--dry-run")
"""Reads recipe, configs and prompts, and stops before it loads a tokenizer (seconds); the fuzzer goes all the way."""
_BAKE = ("lora", "bake", "b", "adapter", "out")
KINDS: dict[str, Kind] = {
    "header": Kind("x/model.safetensors"),
    "index": Kind("x/model.safetensors.index.json", stage="sharded"),
    "pickle": Kind("x/pytorch_model.bin", stage="pickled"),
    "recipe": Kind("r.yml"),
    "reference": Kind("r.yml"),
    "config": Kind("x/config.json"),
    "generation": Kind("x/generation_config.json", recipe=_MERGE + "tokenizer_source: b\n"),
    "tokenizer": Kind("x/tokenizer.json", recipe=_MERGE + "tokenizer_source: union\n"),
    "tokenizer_config": Kind("x/tokenizer_config.json", recipe=_MERGE + "tokenizer_source: union\n"),
    "template": Kind("x/chat_template.jinja", recipe=_MERGE + "chat_template: auto\n"),
    "adapter": Kind("adapter/adapter_config.json", _BAKE),
    "adapter_weights": Kind("adapter/adapter_model.safetensors", _BAKE),
    "moe": Kind("r.yml", _LOOK, _MOE, "moe"),
    "moe_config": Kind("one/config.json", _MAKE, _MOE.replace("cheap_embed", "random"), "moe"),
    "prompts": Kind("p.jsonl", _LOOK, _MOE.replace("positive_prompts: [ab]", "positive_prompts_file: p.jsonl"), "moe"),
}
"""What can be hostile, by the name of its folder here."""


@dataclass(frozen=True)
class Case:
    """One hostile input: a committed file, or one that ``write`` makes at a path."""

    kind: str
    name: str
    write: Callable[[Path], object]

    @property
    def id(self) -> str:
        """``kind/name``."""
        return f"{self.kind}/{self.name}"


def cases() -> Iterator[Case]:
    """The corpus: committed files in order, then those that are built."""
    from hostile.build import BUILT

    for kind in KINDS:
        for path in sorted((CORPUS / kind).glob("*")):
            yield Case(kind, path.name, lambda place, path=path: shutil.copyfile(path, place))
    for name, write in BUILT.items():
        kind, _, rest = name.partition("/")
        yield Case(kind, rest, write)


def tokenizer(extra: str = "") -> dict[str, Any]:
    """A small byte-level BPE tokenizer.json of ``VOCAB`` tokens; one is ``extra`` if given."""
    letters = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxy", "\u0120", "ab", "ca"]
    letters.append(extra or "cab")
    added = [
        {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for i, t in enumerate(letters[:2])
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    merges = [["a", "b"], ["c", "a"]] + ([] if extra else [["c", "ab"]])
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {t: i for i, t in enumerate(letters)}, "merges": merges},
    }  # fmt: skip


def _tokenizer_config() -> dict[str, Any]:
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "added_tokens_decoder": {"0": {"content": "<s>", **special}, "1": {"content": "</s>", **special}},
        "bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
    }  # fmt: skip


def _tokenized(folder: Path, extra: str = "") -> None:
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(extra)))
    (folder / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config()))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1], "top_p": 0.9}))


def _dense(seed: int) -> dict[str, Array]:
    """A Llama that is complete, as mixtures ask for it."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, 8)}
    for layer in range(2):
        for name, shape in (
            ("input_layernorm", (8,)), ("self_attn.q_proj", (8, 8)), ("self_attn.k_proj", (4, 8)),
            ("self_attn.v_proj", (4, 8)), ("self_attn.o_proj", (8, 8)), ("post_attention_layernorm", (8,)),
            ("mlp.gate_proj", (12, 8)), ("mlp.up_proj", (12, 8)), ("mlp.down_proj", (8, 12)),
        ):  # fmt: skip
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    shapes |= {"model.norm.weight": (8,), "lm_head.weight": (VOCAB, 8)}
    random = np.random.default_rng(seed)
    return {name: encode("F32", random.standard_normal(shape)) for name, shape in shapes.items()}


def dense_config() -> dict[str, Any]:
    """The config.json of the dense models."""
    return config(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        hidden_act="silu", max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=10000.0, torch_dtype="float32",
        bos_token_id=0, eos_token_id=1, attention_bias=False, initializer_range=0.02,
    )  # fmt: skip


def write_stage(folder: Path, kind: Kind) -> None:
    """Everything sound that a hostile file of ``kind`` stands among."""
    for name, content in stage(kind).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@cache
def stage(kind: Kind) -> dict[str, bytes]:
    """The files of a stage; made once."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make(folder, kind)
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _make(folder: Path, kind: Kind) -> None:
    write_recipe(folder / "r.yml", kind.recipe)
    if kind.stage == "moe":
        for seed, name in enumerate(("base", "one", "two")):
            (folder / name).mkdir(exist_ok=True)
            write_safetensors(folder / name / "model.safetensors", _dense(seed))
            (folder / name / "config.json").write_text(json.dumps(dense_config()))
            _tokenized(folder / name)
        return
    for seed, name in enumerate("xb"):
        write_model(folder / name, seed)
        _tokenized(folder / name, "zz" if seed else "")
    if kind.stage == "sharded":
        (folder / "x/model.safetensors").rename(folder / "x/s1.safetensors")
    elif kind.stage == "pickled":
        (folder / "x/model.safetensors").unlink()
    elif "adapter" in kind.place:
        write_adapter(folder / "adapter", low_rank(3))


def sound(kind: str) -> list[bytes]:
    """Harmless files of a kind, to be made hostile by mutations."""
    text: Any
    if kind in ("recipe", "reference"):
        return [_MERGE.encode(), *RECIPES]
    if kind == "moe":
        return [_MOE.encode()]
    if kind == "index":
        text = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(llama(0), "s1.safetensors")}
        return [json.dumps(text).encode()]
    if kind == "prompts":
        return [b'{"prompt": "ab"}\n"ca"\n{"messages": [{"role": "user", "content": "abc"}]}\n{"text": "x"}\n']
    if kind == "moe_config":
        rope = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        long = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
        more = {"rope_scaling": long, "original_max_position_embeddings": 32, "model_type": "phi3"}
        return [
            json.dumps({**dense_config(), **c}).encode()
            for c in ({}, {"rope_scaling": rope}, more, {"sliding_window": 20, "head_dim": 2, "model_type": "mistral"})
        ]
    if kind == "config":
        section = {"text_config": {"num_hidden_layers": 3, "vocab_size": VOCAB}, "vision_config": {"depth": 1}}
        bits = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
        return [json.dumps(config(**c)).encode() for c in ({}, section, bits, {"eos_token_id": [1, 2]})]
    if kind == "template":
        return [b"{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}{{ bos_token }}"]
    if kind == "pickle":
        return []
    return [stage(KINDS[kind])[KINDS[kind].place]]


RECIPES = [
    b"merge_method: slerp\nbase_model: x\nmodels:\n- {model: x}\n- {model: b}\nparameters:\n  t:\n  - {filter: mlp, "
    b"value: [0, 0.5, 1]}\n  - {value: 0.5}\ndtype: float32\n",
    b"merge_method: ties\nbase_model: x\nmodels:\n- model: b\n  parameters: {weight: [0.25, 1], density: 0.5}\n"
    b"parameters: {int8_mask: true, normalize: true}\nout_dtype: bfloat16\nseed: 7\n",
    b"merge_method: passthrough\nslices:\n- sources:\n  - {model: x, layer_range: [0, 2]}\n- sources:\n"
    b"  - {model: b, layer_range: [1, 3]}\n",
    b"merge_method: linear\nmodels: [{model: {model: x}}, {model: {model: {path: b}}}]\nparameters: {weight: 1}\n"
    b"tokenizer:\n  source: union\n  tokens:\n    <s>: {source: x}\n    zz: {source: {kind: zero}, force: true}\n"
    b"  pad_to_multiple_of: 8\nchat_template: chatml\n",
    b"merge_method: dare_ties\nbase_model: {model: x}\nmodels:\n- model: b\n  parameters:\n    weight: 1\n"
    b"    density: {value: [0.1, 1]}\ninput_model_parameters: {b: {weight: 0.5}}\nrounding: stochastic\n",
]
"""Sound recipes that use most of the language."""
