"""The YAML language of mixtures as pydantic models, beside that of merges. Unknown keys are refused."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mergekit.recipe.schema import Dtype, Parameters, Reference, Seed, Strict, Whole

__all__ = ["GATE_MODES", "RANDOM_MODES", "Expert", "MoeConfiguration", "SharedMerge"]

GATE_MODES = ("router_input", "hidden", "hidden_last", "hidden_avg", "cheap_embed", "random", "uniform_random")
RANDOM_MODES = ("random", "uniform_random")
"""Gate modes that look at no prompt."""


class Expert(Strict):
    """One entry of ``experts:``: a model whose MLPs become one expert of each layer, and prompts that it is for.

    ``noise_scale``: standard deviation of noise added to the MLP; ``residual_scale``: factor on ``down_proj``.
    """

    source_model: Reference = Field(description="the model whose MLPs become the expert")
    positive_prompts: list[str] | None = Field(default=None, description="texts that the expert is for")
    negative_prompts: list[str] | None = Field(default=None, description="texts that it is not for")
    held_out_prompts: list[str] | None = Field(default=None, description="texts that only measure the routing")
    positive_prompts_file: str | None = Field(
        default=None, description="the same, in a file beside the recipe: .txt or .jsonl"
    )
    negative_prompts_file: str | None = Field(
        default=None, description="the same, in a file beside the recipe: .txt or .jsonl"
    )
    held_out_prompts_file: str | None = Field(
        default=None, description="the same, in a file beside the recipe: .txt or .jsonl"
    )
    noise_scale: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="standard deviation of noise added to the MLP"
    )
    residual_scale: float | None = Field(default=None, allow_inf_nan=False, description="factor on down_proj")


class SharedMerge(Strict):
    """How the weights that all experts share are merged: any merge method, by default over the experts' models."""

    merge_method: str = Field(description="any merge method")
    models: list[dict[str, Any]] | None = Field(
        default=None, description="the models to merge (default: those of the experts)"
    )
    parameters: Parameters | None = Field(default=None, description="parameters of the method")


class MoeConfiguration(Strict):
    """A whole recipe of a mixture."""

    base_model: Reference = Field(description="gives attention, norms, embeddings, head, config and tokenizer")
    experts: list[Expert] = Field(min_length=1, description="the experts, in order")
    shared_experts: list[Expert] | None = Field(
        default=None,
        description="experts that every token goes through; refused where the architecture has no place for them",
    )
    gate_mode: str = Field(default="router_input", description="how routers are made")
    experts_per_token: Whole = Field(default=2, ge=1, description="how many experts a token goes through")
    architecture: str | None = Field(default=None, description="mixtral or phi3moe")
    attention: Literal["base", "average"] | SharedMerge = Field(
        default="base", description="where everything but the experts comes from: base, average, or a merge"
    )
    dtype: Dtype = Field(default=None, description="element type of the result")
    apply_chat_template: bool = Field(default=False, description="write prompts as a user's messages")
    allow_partial_adapters: bool = Field(
        default=False, description="accept that experts can't hold an adapter's attention"
    )
    base_quantization: Literal["none", "nf4", "nf4-double", "fp4", "auto"] = Field(
        default="none", description="to what models below adapters are quantised first"
    )
    seed: Seed | None = Field(default=None, description="seed of random gate modes and of noise")

    @field_validator("gate_mode")
    @classmethod
    def _known_mode(cls, value: str) -> str:
        if value not in GATE_MODES:
            raise ValueError(f"no gate mode '{value}'. Valid: {', '.join(GATE_MODES)}.")
        return value

    @field_validator("attention", mode="before")
    @classmethod
    def _known_attention(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in ("base", "average"):
            raise ValueError(f"'{value}': write base, average, or a mapping with merge_method and parameters")
        if not isinstance(value, str | dict | SharedMerge) or (isinstance(value, dict) and "merge_method" not in value):
            raise ValueError("write base, average, or a mapping with merge_method and parameters")
        return value

    @model_validator(mode="after")
    def _enough_experts(self) -> MoeConfiguration:
        if len(self.experts) < self.experts_per_token:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}, but there are {len(self.experts)} experts; "
                f"list more experts, or lower it"
            )
        return self
