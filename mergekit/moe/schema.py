"""The YAML language of mixtures as pydantic models, beside that of merges. Unknown keys are refused."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mergekit.recipe.schema import Dtype, Parameters, Reference, Strict, Whole

__all__ = ["GATE_MODES", "RANDOM_MODES", "Expert", "MoeConfiguration", "SharedMerge"]

GATE_MODES = ("router_input", "hidden", "hidden_last", "hidden_avg", "cheap_embed", "random", "uniform_random")
RANDOM_MODES = ("random", "uniform_random")
"""Gate modes that look at no prompt."""


class Expert(Strict):
    """One entry of ``experts:``: a model whose MLPs become one expert of each layer, and prompts that it is for.

    ``noise_scale``: standard deviation of noise added to the MLP; ``residual_scale``: factor on ``down_proj``.
    """

    source_model: Reference
    positive_prompts: list[str] | None = None
    negative_prompts: list[str] | None = None
    held_out_prompts: list[str] | None = None
    positive_prompts_file: str | None = None
    negative_prompts_file: str | None = None
    held_out_prompts_file: str | None = None
    noise_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    residual_scale: float | None = Field(default=None, allow_inf_nan=False)


class SharedMerge(Strict):
    """How the weights that all experts share are merged: any merge method, by default over the experts' models."""

    merge_method: str
    models: list[dict[str, Any]] | None = None
    parameters: Parameters | None = None


class MoeConfiguration(Strict):
    """A whole recipe of a mixture."""

    base_model: Reference
    experts: list[Expert] = Field(min_length=1)
    shared_experts: list[Expert] | None = None
    gate_mode: str = "router_input"
    experts_per_token: Whole = Field(default=2, ge=1)
    architecture: str | None = None
    attention: Literal["base", "average"] | SharedMerge = "base"
    dtype: Dtype = None
    apply_chat_template: bool = False
    allow_partial_adapters: bool = False
    base_quantization: Literal["none", "nf4", "nf4-double", "fp4", "auto"] = "none"
    seed: Whole | None = Field(default=None, ge=0, lt=1 << 63)

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
