"""Errors of LoRA adapters, alone and on their model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from error_cases_build import Build, Case, Group, changes, model, several, without
from files import HIDDEN, VOCAB, Array, encode
from lora_files import PREFIX, low_rank, write_adapter

__all__ = ["GROUPS"]

ONTO = changes("models/b", "models/b+adapters/b")
BAKE = "mergekit lora bake models/b adapters/b out --dry-run"
QUERY = f"{PREFIX}model.layers.0.self_attn.q_proj"
FILE = "adapters/b/adapter_model.safetensors"


def _adapter(more: dict[str, Array] | None = None, lost: str = "", **words: Any) -> Build:
    """A recipe with an adapter that has ``more`` tensors, and other settings."""

    def build(folder: Path) -> None:
        found = {**low_rank(1), **(more or {})}
        write_adapter(folder / "adapters/b", {n: array for n, array in found.items() if n != lost}, **words)

    return several(ONTO, build)


def _ones(*shape: int, code: str = "F32") -> Array:
    return encode(code, np.ones(shape))


FILES = [
    Case(
        title="There is no such adapter",
        build=changes("models/b", "models/b+./adapters/b"),
        message=("recipe.yml:5:5: no folder 'adapters/b'; after the + stands the folder or hub name of a LoRA adapter"),
        meaning="Check the path of the adapter; model and adapter are joined by a +.",
    ),
    Case(
        title="The adapter has no weights",
        build=several(_adapter(), without(FILE)),
        message=(
            "recipe.yml:5:5: adapters/b: neither adapter_model.safetensors nor adapter_model.bin; download the "
            "adapter again"
        ),
        meaning="Only its settings are there.",
    ),
    Case(
        title="The adapter is of another kind",
        build=_adapter(peft_type="IA3"),
        code=1,
        message=(
            "adapters/b/adapter_config.json: this adapter is of the kind 'IA3'; only LoRA can be baked into a model"
        ),
        meaning="Merge it with PEFT's `merge_and_unload()`, and name the result.",
    ),
    Case(
        title="The adapter does what can't be baked",
        build=_adapter(layer_replication=[[0, 2], [1, 3]]),
        code=1,
        message=(
            "adapters/b/adapter_config.json: this adapter repeats layers of the base ('layer_replication'), "
            "which can't be baked"
        ),
        meaning="Merge it with PEFT's `merge_and_unload()`, and name the result.",
    ),
    Case(
        title="The adapter is of an unknown variant",
        build=_adapter(use_new_thing=True),
        code=1,
        message=(
            "adapters/b/adapter_config.json: 'use_new_thing' asks for a variant of LoRA unknown here; update mergekit"
        ),
        meaning="The adapter is newer than this mergekit; passing over the setting would change what it does.",
    ),
    Case(
        title="The adapter changed its base",
        build=_adapter(init_lora_weights="pissa"),
        code=1,
        message=(
            "adapters/b/adapter_config.json: init_lora_weights 'pissa' changed the base model before training, "
            "so this adapter can't be baked onto the original; let PEFT convert it to a plain one "
            "(path_initial_model_for_weight_conversion)"
        ),
        meaning="Its product is a difference to another base than the one that is named.",
    ),
    Case(
        title="The adapter began in an unknown way",
        build=_adapter(init_lora_weights="zzz"),
        code=1,
        message=(
            "adapters/b/adapter_config.json: init_lora_weights 'zzz' is unknown, and may have changed the base model"
        ),
        meaning="The adapter is newer than this mergekit: update it, or merge with PEFT.",
    ),
    Case(
        title="A setting of the adapter is impossible",
        build=_adapter(r=0),
        code=1,
        message=(
            "adapters/b/adapter_config.json: 'r' is 0, expected a whole number from 1; mend it, or download "
            "the adapter again"
        ),
        meaning="The file was edited by hand, or is damaged.",
    ),
    Case(
        title="A pattern of the adapter is too intricate",
        build=_adapter(alpha_pattern={"(a+)+b": 3}),
        code=1,
        message=(
            "adapters/b/adapter_config.json: 'alpha_pattern' has the key '(a+)+b', which is no name or simple pattern"
        ),
        meaning="Such a pattern could take for ever; write the names of the modules.",
    ),
    Case(
        title="The adapter holds no tensors",
        build=several(ONTO, lambda folder: write_adapter(folder / "adapters/b", {})),
        code=1,
        message="adapters/b/adapter_model.safetensors: the adapter holds no tensors; download it again",
        meaning="It was saved without its weights.",
    ),
    Case(
        title="The adapter holds integers",
        build=_adapter({f"{QUERY}.lora_A.weight": ("I32", np.ones((3, HIDDEN), "<i4"))}),
        code=1,
        message=(
            "adapters/b/adapter_model.safetensors: tensor "
            "'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight' is [3, 7] int32; only floating "
            "adapters can be baked"
        ),
        meaning="Save the adapter in float32, float16 or bfloat16.",
    ),
    Case(
        title="Two adapters are in one file",
        build=_adapter({f"{QUERY}.lora_A.two.weight": _ones(3, HIDDEN)}),
        code=1,
        message=(
            "adapters/b/adapter_model.safetensors: "
            "'base_model.model.model.layers.0.self_attn.q_proj.lora_A.two.weight' and "
            "'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight' are of two adapters; keep one in "
            "a file"
        ),
        meaning="Save them one by one with PEFT.",
    ),
    Case(
        title="The adapter holds an unknown tensor",
        build=_adapter({f"{QUERY}.lora_diag.weight": _ones(3)}),
        code=1,
        message=(
            "adapters/b/adapter_model.safetensors: no way is known to bake tensor "
            "'base_model.model.model.layers.0.self_attn.q_proj.lora_diag.weight' [3] float32; is this a plain "
            "LoRA adapter?"
        ),
        meaning="It belongs to a variant that isn't known here; PEFT's `merge_and_unload()` may know it.",
    ),
    Case(
        title="Two tensors replace one",
        build=_adapter(
            {f"{PREFIX}model.norm.weight": _ones(HIDDEN), f"{PREFIX}model.norm.modules_to_save.weight": _ones(HIDDEN)}
        ),
        code=1,
        message=(
            "adapters/b/adapter_model.safetensors: two tensors replace 'model.norm.weight'; the adapter is "
            "damaged, download it again"
        ),
        meaning="It is not clear which of them counts.",
    ),
    Case(
        title="Half of a product is missing",
        build=_adapter(lost=f"{QUERY}.lora_B.weight"),
        code=1,
        message=(
            "adapters/b/adapter_model.safetensors: 'model.layers.0.self_attn.q_proj' has no 'lora_B'; the "
            "adapter is damaged, download it again"
        ),
        meaning="A LoRA module has two matrices, A and B.",
    ),
    Case(
        title="A product has a part too many",
        build=_adapter({f"{QUERY}.lora_magnitude_vector": _ones(HIDDEN)}),
        code=1,
        message=(
            "adapters/b/adapter_model.safetensors: 'model.layers.0.self_attn.q_proj' has a "
            "'lora_magnitude_vector' although use_dora is off; the adapter is damaged, download it again"
        ),
        meaning="Settings and weights are of two adapters.",
    ),
    Case(
        title="A product is not one of matrices",
        build=_adapter({f"{QUERY}.lora_A.weight": _ones(3)}),
        code=1,
        message=(
            "adapters/b/adapter_model.safetensors: "
            "'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight' is [3] float32; only adapters of "
            "linear layers and embeddings can be baked"
        ),
        meaning="Merge convolutions with PEFT's `merge_and_unload()`, and name the result.",
    ),
    Case(
        title="The rank is another one",
        build=_adapter(r=4),
        code=1,
        message=(
            "adapters/b/adapter_model.safetensors: 'model.layers.0.self_attn.q_proj' has matrices of rank 3 "
            "and 3, but the settings say 4; adapter_config.json belongs to another adapter, or was edited"
        ),
        meaning="The factor on the product depends on the rank, so the settings have to be the adapter's own.",
    ),
    Case(
        title="Magnitudes are too few",
        build=several(
            ONTO,
            lambda folder: write_adapter(
                folder / "adapters/b",
                {**low_rank(1, magnitude=True), f"{QUERY}.lora_magnitude_vector": _ones(5)},
                use_dora=True,
            ),
        ),
        code=1,
        message=(
            "adapters/b/adapter_model.safetensors: "
            "'base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector' is [5] float32, but "
            "'model.layers.0.self_attn.q_proj' has 7 outputs"
        ),
        meaning="DoRA has a magnitude for each output; the file is damaged.",
    ),
]
BASES = [
    Case(
        title="The model lacks what the adapter changes",
        build=several(
            ONTO,
            lambda folder: write_adapter(
                folder / "adapters/b", low_rank(1, layers=9), base_model_name_or_path="org/base"
            ),
        ),
        message=(
            "recipe.yml:5:5: models/b+adapters/b: the adapter changes "
            "'model.layers.3.self_attn.q_proj.weight', which the model does not have (and 23 more such "
            "tensors); every tensor of an adapter has to be used, so take the model that it was trained on, "
            "'org/base'"
        ),
        meaning="The adapter was trained on another model, which its settings name.",
    ),
    Case(
        title="The adapter does not fit the model's sizes",
        build=_adapter({f"{QUERY}.lora_A.weight": _ones(3, HIDDEN + 1)}),
        message=(
            "recipe.yml:5:5: models/b+adapters/b: 'model.layers.0.self_attn.q_proj.weight' is [7, 7] bfloat16, "
            "but the adapter adds a product of [7, 3] and [3, 8]; take the model that it was trained on"
        ),
        meaning="The adapter was trained on a model of another size.",
    ),
    Case(
        title="The adapter changes no numbers",
        build=several(
            _adapter(),
            model("b", {"model.layers.0.self_attn.q_proj.weight": ("I64", np.ones((HIDDEN, HIDDEN), "<i8"))}),
        ),
        message=(
            "recipe.yml:5:5: models/b+adapters/b: the adapter changes "
            "'model.layers.0.self_attn.q_proj.weight', which is [7, 7] int64, no matrix of numbers"
        ),
        meaning="Take the unquantised model that the adapter was trained on.",
    ),
    Case(
        title="Embeddings and head get different sizes",
        build=_adapter({f"{PREFIX}model.embed_tokens.weight": _ones(VOCAB + 1, HIDDEN)}),
        message=(
            "recipe.yml:5:5: models/b+adapters/b: with the adapter the embeddings have 32 rows and "
            "'lm_head.weight' 31; save both with the adapter (modules_to_save)"
        ),
        meaning="The adapter has new tokens, but no row of the head for them.",
    ),
    Case(
        title="Experts can't be quantised",
        build=several(
            _adapter(),
            model("b", {"model.layers.0.mlp.experts.0.w1.weight": _ones(HIDDEN, HIDDEN)}),
        ),
        command="mergekit lora bake models/b adapters/b out --dry-run --base-quantization nf4",
        message=(
            "models/b+adapters/b: quantising experts to 4 bits is not built; leave 'base_quantization' out, or "
            "take a base that is stored in 4 bits"
        ),
        meaning="How bitsandbytes would have quantised these tensors depends on the version of transformers.",
    ),
]
GROUPS = (
    Group("Adapter files", "Settings and weights of a LoRA adapter.", FILES),
    Group("Adapters on a model", "Every tensor of an adapter has to be used.", BASES),
)
