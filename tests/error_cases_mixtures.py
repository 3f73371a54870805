"""Errors of mixtures of experts: their recipes and their models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from error_cases_build import Build, Case, Group, recipe, several, text
from files import Array, encode, write_safetensors
from lora_files import low_rank, write_adapter

__all__ = ["GROUPS", "HIDDEN", "LAYERS", "PLAN", "RECIPE", "mixture", "says"]

VOCAB, HIDDEN, FFN, LAYERS = 31, 8, 12, 2
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN,
    "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2,
    "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
RECIPE = """base_model: models/base
gate_mode: hidden
experts:
  - source_model: models/a
    positive_prompts: ["w1 w2"]
  - source_model: models/b
    positive_prompts: ["w3 w4"]
"""
PLAN = "mergekit moe recipe.yml out --dry-run"


def dense(name: str, more: Mapping[str, Array] | None = None, lost: str = "", **changes: Any) -> Build:
    """A dense Llama below ``models/``, with other tensors and other entries in its config."""

    def build(folder: Path) -> None:
        entries = {**CONFIG, **changes}
        hidden, ffn = entries["hidden_size"], entries["intermediate_size"]
        query, key = (HIDDEN, entries["num_key_value_heads"] * HIDDEN // 2)
        layer = {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (key, hidden), "self_attn.v_proj": (key, hidden), "self_attn.o_proj": (hidden, query),
            "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn),
        }  # fmt: skip
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (entries["vocab_size"], hidden)}
        for number in range(LAYERS):
            shapes |= {f"model.layers.{number}.{module}": shape for module, shape in layer.items()}
        shapes |= {"model.norm": (hidden,), "lm_head": (entries["vocab_size"], hidden)}
        draw = np.random.default_rng(len(name))
        found = {f"{module}.weight": encode("F32", draw.standard_normal(shape)) for module, shape in shapes.items()}
        path = folder / "models" / name
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(
            json.dumps({**entries, "num_hidden_layers": changes.get("num_hidden_layers", LAYERS)})
        )
        kept = {n: array for n, array in {**found, **(more or {})}.items() if n != lost}
        write_safetensors(path / "model.safetensors", kept)

    return build


def mixture(*builds: Build, words: str = RECIPE) -> Build:
    """A recipe, a base and two experts; ``builds`` spoil something."""
    return several(recipe(words), *(dense(name) for name in ("base", "a", "b")), *builds)


def says(old: str, new: str) -> Build:
    """The recipe with other words."""
    assert old in RECIPE
    return mixture(words=RECIPE.replace(old, new))


WORDS = [
    Case(
        title="The recipe is one of a merge",
        build=lambda folder: None,
        command=PLAN,
        message="recipe.yml:1:1: this is the recipe of a merge; use `mergekit merge`",
        meaning="A mixture's recipe has `base_model` and `experts` ([phi3-moe.md](phi3-moe.md)).",
    ),
    Case(
        title="The gate mode does not exist",
        build=says("gate_mode: hidden", "gate_mode: hiden"),
        command=PLAN,
        message=(
            "recipe.yml:2:1: no gate mode 'hiden'. Valid: router_input, hidden, hidden_last, hidden_avg, "
            "cheap_embed, random, uniform_random."
        ),
        meaning="It says how routers are made; `router_input` is the default.",
    ),
    Case(
        title="A token is to go to more experts than there are",
        build=mixture(words=f"{RECIPE}experts_per_token: 3\n"),
        command=PLAN,
        message="recipe.yml:1:1: experts_per_token is 3, but there are 2 experts; list more experts, or lower it",
        meaning="Each token goes to so many experts, two by default.",
    ),
    Case(
        title="The form of the mixture does not exist",
        build=mixture(words=f"{RECIPE}architecture: mixtrall\n"),
        command=PLAN,
        message="recipe.yml:8:1: no architecture 'mixtrall'. Valid: mixtral, phi3moe.",
        meaning="Take the form that the program which runs the model knows.",
    ),
    Case(
        title="The form of the mixture is not built yet",
        build=mixture(words=f"{RECIPE}architecture: qwen moe\n"),
        command=PLAN,
        message="recipe.yml:8:1: 'qwen moe' is not built yet; Valid: mixtral, phi3moe.",
        meaning="Take one of the forms that are.",
    ),
    Case(
        title="There are shared experts",
        build=mixture(words=f"{RECIPE}shared_experts: [{{source_model: models/a}}]\n"),
        command=PLAN,
        message="recipe.yml:8:1: neither Mixtral nor Phi-3 MoE has shared experts; leave 'shared_experts' out",
        meaning="Make the model an ordinary expert.",
    ),
    Case(
        title="The shared weights are made in an unknown way",
        build=mixture(words=f"{RECIPE}attention: mean\n"),
        command=PLAN,
        message="recipe.yml:8:1: 'mean': write base, average, or a mapping with merge_method and parameters",
        meaning="`attention` says where the weights that all experts share come from.",
    ),
    Case(
        title="The shared weights lack their method",
        build=mixture(words=f"{RECIPE}attention: {{parameters: {{weight: 1}}}}\n"),
        command=PLAN,
        message="recipe.yml:8:1: write base, average, or a mapping with merge_method and parameters",
        meaning="Name the merge method.",
    ),
    Case(
        title="The merge of the shared weights has a fault",
        build=mixture(words=f"{RECIPE}attention: {{merge_method: tise}}\n"),
        command=PLAN,
        message="recipe.yml:8:1: no merge method 'tise'. Did you mean 'ties'?",
        meaning="What a recipe of a merge is refused for holds here, too.",
    ),
    Case(
        title="The shared weights are weighted by lengths",
        build=mixture(
            words=f"{RECIPE}attention: {{merge_method: ties, parameters: {{weight: 1, weighting: metagpt}}}}\n"
        ),
        command=PLAN,
        message="recipe.yml:8:1: 'weighting' is for merges of whole models; give weights instead",
        meaning="The lengths would be those of whole models, of which only a part is merged.",
    ),
    Case(
        title="All experts are one model",
        build=says("models/b", "models/a"),
        command=PLAN,
        message=(
            "recipe.yml:3:1: all 2 experts are 'models/a', so routing changes nothing until the result is "
            "trained; name different models, or pass --i-understand-this-is-not-useful-without-training"
        ),
        meaning="Such a mixture is of use only as the start of a training.",
    ),
    Case(
        title="An expert has no prompts",
        build=says('    positive_prompts: ["w3 w4"]\n', ""),
        command=PLAN,
        message=(
            "recipe.yml:6:5: expert 1 ('models/b') has no 'positive_prompts'; gate_mode 'hidden' makes routers "
            "from them (gate_mode: random needs none)"
        ),
        meaning="Prompts show the router what an expert is for; eight or more are good.",
    ),
    Case(
        title="All experts have the same prompts",
        build=says("w3 w4", "w1 w2"),
        command=PLAN,
        message=(
            "recipe.yml:3:1: all experts have the same prompts, so no router can tell them apart; say what each is for"
        ),
        meaning="Give each expert prompts of its own field.",
    ),
    Case(
        title="Prompts are the same in text and in a file",
        build=several(
            mixture(
                text("prompts.txt", "w3 w4\n"),
                words=RECIPE.replace('["w1 w2"]', '["w3 w4"]').replace(
                    'positive_prompts: ["w3 w4"]\n  -', "positive_prompts_file: prompts.txt\n  -"
                ),
            )
        ),
        command=PLAN,
        message="recipe.yml:3:1: all experts have the same prompts, so no router can tell them apart",
        meaning="Give each expert prompts of its own field.",
    ),
]
FITTING = [
    Case(
        title="The base is of another family",
        build=mixture(dense("base", model_type="qwen2")),
        command=PLAN,
        message=(
            "models/base is a 'qwen2' model, which has biases on query, key and value: no exact Mixtral exists "
            "for it. Experts and base must be phi3 or llama or mistral models"
        ),
        meaning="The mixture could not compute what the model does.",
    ),
    Case(
        title="The base has what no mixture has",
        build=mixture(dense("base", attention_bias=True)),
        command=PLAN,
        message="models/base has biases in attention (attention_bias), for which Mixtral has no place",
        meaning="The mixture could not compute what the model does.",
    ),
    Case(
        title="The base's config lacks a size",
        build=mixture(dense("base", max_position_embeddings="x")),
        command=PLAN,
        message="models/base: config.json has no usable 'max_position_embeddings' (found 'x')",
        meaning="Download config.json again.",
    ),
    Case(
        title="The base's rotary settings can't be read",
        build=mixture(dense("base", rope_theta="x")),
        command=PLAN,
        message="models/base: config.json has no usable rotary settings (rope_theta, rope_scaling)",
        meaning="Download config.json again.",
    ),
    Case(
        title="The base rotates a part of each head with scaling",
        build=mixture(dense("base", partial_rotary_factor=0.5, rope_scaling={"rope_type": "linear", "factor": 2.0})),
        command=PLAN,
        message=(
            "models/base rotates a part of each head with 'linear' scaling; only longrope without a 'factor' "
            "can be rewritten"
        ),
        meaning="Mixtral rotates whole heads; only some scalings can be rewritten so that nothing changes.",
    ),
    Case(
        title="The base scales as no Phi-3 does",
        build=mixture(dense("base", model_type="phi3", rope_scaling={"type": "linear", "factor": 2.0})),
        command=PLAN,
        message="models/base has 'linear' rotary scaling, which Phi-3 models don't have",
        meaning="Config and weights are of two models.",
    ),
    Case(
        title="The base sets an attention factor",
        build=mixture(
            dense(
                "base",
                model_type="phi3",
                original_max_position_embeddings=32,
                rope_scaling={
                    "type": "longrope",
                    "short_factor": [1.0] * 2,
                    "long_factor": [2.0] * 2,
                    "attention_factor": 1.1,
                },
            ),
            words=f"{RECIPE}architecture: phi3moe\n",
        ),
        command=PLAN,
        message="models/base sets 'attention_factor', which a Phi-3 MoE can't hold; use architecture: mixtral",
        meaning="Phi-3 MoE computes the factor itself.",
    ),
    Case(
        title="The base has other layers than its config says",
        build=mixture(dense("base", num_hidden_layers=5)),
        command=PLAN,
        message=(
            "models/base: config.json says 5 layers, but the files hold 2 layers; 'model.layers.0' to "
            "'model.layers.4' are wanted"
        ),
        meaning="Config and weights are of two models.",
    ),
    Case(
        title="A tensor of the base has another shape than its config says",
        build=mixture(dense("base", {"model.norm.weight": encode("F32", np.ones(9))})),
        command=PLAN,
        message="models/base: model.norm.weight has to be [8] by its config.json, but it is [9] float32",
        meaning="Config and weights are of two models.",
    ),
    Case(
        title="The base has a tensor too many",
        build=mixture(dense("base", {"model.layers.0.self_attn.q_proj.bias": encode("F32", np.ones(HIDDEN))})),
        command=PLAN,
        message="models/base: a mixture has no place for tensor model.layers.0.self_attn.q_proj.bias [8]",
        meaning="Leaving it out would change what the model computes.",
    ),
    Case(
        title="An expert is of another family",
        build=mixture(dense("b", model_type="mistral")),
        command=PLAN,
        message="recipe.yml:6:5: expert 'models/b' is a 'mistral' model, but the base is a 'llama'",
        meaning="Experts share everything but their MLPs with the base.",
    ),
    Case(
        title="An expert has other attention heads",
        build=mixture(dense("b", num_key_value_heads=1), words=f"{RECIPE}attention: average\n"),
        command=PLAN,
        message=(
            "recipe.yml:6:5: expert 'models/b' has other attention heads than the base; only 'attention: base' fits"
        ),
        meaning="Heads of different numbers can't be merged.",
    ),
    Case(
        title="An expert has another vocabulary",
        build=mixture(dense("b", vocab_size=33)),
        command=PLAN,
        message=(
            "recipe.yml:6:5: expert 'models/b' has 33 rows of embeddings, but the base has 31; experts must be "
            "fine-tuned from one base"
        ),
        meaning="Its MLPs were trained on other tokens.",
    ),
    Case(
        title="An expert has another size",
        build=mixture(dense("b", intermediate_size=14)),
        command=PLAN,
        message=(
            "recipe.yml:6:5: expert 1 ('models/b') does not fit: model.layers.0.mlp.gate_proj.weight is [12, "
            "8] in the base, but it has [14, 8]; experts must be fine-tuned from one base"
        ),
        meaning="All experts of a layer are of one size.",
    ),
    Case(
        title="An adapter changes more than the MLPs",
        build=mixture(
            lambda folder: write_adapter(
                folder / "adapters/b", low_rank(1, {"self_attn.q_proj": (HIDDEN, HIDDEN)}, layers=LAYERS)
            ),
            words=RECIPE.replace("models/b\n", "models/base+adapters/b\n"),
        ),
        command=PLAN,
        message=(
            "recipe.yml:6:5: expert 1 ('models/base+adapters/b') has an adapter on q_proj (2 modules), which "
            "the mixture can't hold; write 'allow_partial_adapters: true' to leave that part out, or "
            "'attention: average'"
        ),
        meaning="A mixture has one attention for all experts, so that part of the adapter has no place.",
    ),
]
GROUPS = (
    Group("Recipes of mixtures", "`mergekit moe` refuses these before it reads a weight.", WORDS),
    Group("Models of mixtures", "A mixture computes exactly what its parts do, or is refused.", FITTING),
)
