"""The YAML language as pydantic models: the one place where recipes meet types. Unknown keys are refused.

The classes carry the names that notebooks import from ``mergekit.config``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mergekit.dtypes import recipe_dtype, recipe_dtypes
from mergekit.errors import RecipeError
from mergekit.recipe.settings import setting_fault
from mergekit.refs import ModelReference

__all__ = [
    "ConditionalParameter",
    "InputModelDefinition",
    "InputSliceDefinition",
    "MergeConfiguration",
    "OutputModuleDefinition",
    "OutputSliceDefinition",
    "ParameterSetting",
    "ScalarOrGradient",
    "TokenizerConfig",
    "setting_schema",
]


def _reference(value: object) -> ModelReference:
    try:
        return ModelReference.model_validate(value)
    except RecipeError as error:
        raise ValueError(str(error)) from None


def _setting(value: object) -> Any:
    if isinstance(value, BaseModel):
        value = value.model_dump()
    elif isinstance(value, list):
        value = [v.model_dump() if isinstance(v, BaseModel) else v for v in value]
    fault = setting_fault(value)
    if fault:
        raise PydanticCustomError("setting", "{text}", {"path": fault[0], "text": fault[1]})
    return value


def _dtype(value: object) -> object:
    if isinstance(value, str) and recipe_dtype(value) is None:
        raise ValueError(f"no dtype '{value}'. Valid: bfloat16, float16, float32, float64.")
    return value


def _tokenizer_source(value: object) -> object:
    if not isinstance(value, (str, dict, ModelReference)):
        raise ValueError("expected union, base or a model")
    return value


def _reference_text(value: object) -> object:
    if isinstance(value, str):
        _reference(value)
    return value


def _whole(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticCustomError("int_type", "a whole number")
    return value


def _base_quantization(value: object) -> object:
    if value not in ("none", "nf4", "nf4-double", "fp4", "auto"):
        raise ValueError(f"no quantisation '{value}'. Valid: none, nf4, nf4-double, fp4, auto.")
    return value


def _rounding(value: object) -> object:
    if value not in ("nearest", "stochastic"):
        raise ValueError(f"no rounding '{value}'. Valid: nearest, stochastic.")
    return value


_PATH: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {"path": {"type": "string"}, "revision": {"type": ["string", "null"]}},
            "required": ["path"],
            "additionalProperties": False,
        },
    ]
}
_REFERENCE = {
    "description": "a model: a folder or a name on the hub, as path[@revision][+adapter[@revision]] or a mapping",
    "anyOf": [
        {"type": "string", "minLength": 1},
        {
            "type": "object",
            "properties": {
                "model": _PATH,
                "lora": {"anyOf": [*_PATH["anyOf"], {"type": "null"}]},
                "override_architecture": {"type": ["string", "null"]},
            },
            "required": ["model"],
            "additionalProperties": False,
        },
    ],
}
_SCALAR = {"type": ["number", "boolean", "string"]}


def setting_schema(scalar: Mapping[str, Any] = _SCALAR) -> dict[str, Any]:
    """What editors are told of a parameter's setting, whose values are described by ``scalar``."""
    value = {"anyOf": [scalar, {"type": "array", "items": scalar}]}
    condition = {
        "type": "object",
        "properties": {"value": value, "filter": {"type": ["string", "null"]}},
        "required": ["value"],
        "additionalProperties": False,
    }
    return {"anyOf": [*value["anyOf"], condition, {"type": "array", "items": condition}]}


ScalarOrGradient = float | int | bool | str | list[float | int | bool | str]
Reference = Annotated[
    ModelReference,
    BeforeValidator(_reference),
    PlainSerializer(lambda r: r.dump(), return_type=Any),
    WithJsonSchema(_REFERENCE),
]
ParameterSetting = Annotated[Any, BeforeValidator(_setting), WithJsonSchema(setting_schema())]
Parameters = dict[str, ParameterSetting]
Dtype = Annotated[
    str | None,
    BeforeValidator(_dtype),
    WithJsonSchema({"enum": [*recipe_dtypes(), *(f"torch.{name}" for name in recipe_dtypes()), None]}),
]
BaseQuantization = Annotated[
    str, BeforeValidator(_base_quantization), WithJsonSchema({"enum": ["none", "nf4", "nf4-double", "fp4", "auto"]})
]
"""To what the models below adapters are quantised before the adapters are baked onto them."""
Rounding = Annotated[str, BeforeValidator(_rounding), WithJsonSchema({"enum": ["nearest", "stochastic"]})]
"""How results become 16-bit numbers."""
Whole = Annotated[int, BeforeValidator(_whole)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63), BeforeValidator(_whole)]
Multiple = Annotated[int, Field(gt=0, le=1 << 16), BeforeValidator(_whole)]
ReferenceText = Annotated[str, BeforeValidator(_reference_text)]
TokenizerSource = Annotated[
    Any,
    BeforeValidator(_tokenizer_source),
    WithJsonSchema({"anyOf": [{"enum": ["base", "union"]}, *_REFERENCE["anyOf"]]}),
]


class Strict(BaseModel):
    """A mapping of a recipe: keys that it does not declare are refused."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, ser_json_inf_nan="constants")


class ConditionalParameter(Strict):
    """A value for the tensors whose name contains ``filter`` (all, where there is none)."""

    value: Any = Field(description="a scalar, or a gradient")
    filter: str | None = Field(
        default=None, description="a part of the names of the tensors that it is for; none, or *: all"
    )


class InputModelDefinition(Strict):
    """One entry of ``models:``."""

    model: Reference = Field(description="the model")
    parameters: Parameters | None = Field(default=None, description="parameters of this model")


class InputSliceDefinition(Strict):
    """One source of an output slice: the layers ``layer_range = [start, end)`` of a model."""

    model: Reference = Field(description="the model")
    layer_range: tuple[Whole, Whole] = Field(description="layers to take: the first, and one past the last")
    parameters: Parameters | None = Field(default=None, description="parameters of this model in this slice")

    @field_validator("layer_range")
    @classmethod
    def _range(cls, value: tuple[int, int]) -> tuple[int, int]:
        start, end = value
        if not 0 <= start < end:
            raise ValueError(f"layer_range [{start}, {end}) is empty or negative; write [first, one past the last]")
        return value


class OutputSliceDefinition(Strict):
    """One entry of ``slices:``: sources of equal length, merged layer by layer."""

    sources: list[InputSliceDefinition] = Field(
        min_length=1, description="models whose layers are merged with each other, as many of each"
    )
    base_model: Reference | None = Field(default=None, description="the base in this slice")
    parameters: Parameters | None = Field(default=None, description="parameters of this slice")
    residual_weight: float | None = Field(default=None, description="accepted, changes nothing")


class OutputModuleDefinition(Strict):
    """One entry of ``modules:``: a part of a model with its own slices or models."""

    slices: list[OutputSliceDefinition] | None = Field(default=None, description="ranges of layers, stacked")
    models: list[InputModelDefinition] | None = Field(default=None, description="whole models")
    parameters: Parameters | None = Field(default=None, description="parameters of this module")

    @model_validator(mode="after")
    def _one_source(self) -> OutputModuleDefinition:
        if bool(self.slices) == bool(self.models):
            raise ValueError("a module needs exactly one of 'slices' and 'models'")
        return self


class TokenEntry(Strict):
    """What one token of the output vocabulary is made of."""

    source: Any = Field(
        default=None,
        description="whose row the token takes: a model, or a mapping with kind zero, model or model_token",
    )
    force: bool = Field(default=False, description="take it even where a model has a row of its own")


class TokenizerConfig(Strict):
    """The ``tokenizer:`` section."""

    source: TokenizerSource = Field(
        default="union", description="whose vocabulary the result has: base, union, or a model"
    )
    tokens: dict[str, TokenEntry] | None = Field(default=None, description="what single tokens are made of, by token")
    pad_to_multiple_of: Multiple | None = Field(default=None, description="rows of the embeddings: a multiple of this")


class MergeConfiguration(Strict):
    """A whole recipe. Exactly one of ``models``, ``slices`` and ``modules`` is given."""

    merge_method: str = Field(description="how models are merged")
    models: list[InputModelDefinition] | None = Field(default=None, description="whole models to merge")
    slices: list[OutputSliceDefinition] | None = Field(default=None, description="ranges of layers, stacked")
    modules: dict[str, OutputModuleDefinition] | None = Field(
        default=None, description="parts of a model by name; only the one called default is built yet"
    )
    base_model: Reference | None = Field(
        default=None,
        description="the origin of task vectors; also gives config, tokenizer and the names of tensors",
    )
    parameters: Parameters | None = Field(default=None, description="parameters of everything")
    input_model_parameters: dict[ReferenceText, Parameters] | None = Field(
        default=None, description="parameters by model"
    )
    dtype: Dtype = Field(default=None, description="element type of the result")
    out_dtype: Dtype = Field(default=None, description="the same; wins over dtype")
    tokenizer_source: TokenizerSource | None = Field(
        default=None, description="whose vocabulary the result has: base, union, or a model"
    )
    tokenizer: TokenizerConfig | None = Field(default=None, description="the same, with settings for single tokens")
    chat_template: str | None = Field(
        default=None, description="auto, a name such as chatml, or the text of a Jinja template"
    )
    seed: Seed | None = Field(default=None, description="seed of random methods")
    base_quantization: BaseQuantization = Field(
        default="none", description="to what models below adapters are quantised first"
    )
    rounding: Rounding = Field(default="nearest", description="how results become 16-bit numbers")

    @model_validator(mode="after")
    def _one_form(self) -> MergeConfiguration:
        given = [key for key in ("models", "slices", "modules") if getattr(self, key)]
        if len(given) > 1:
            raise ValueError(f"both '{given[0]}' and '{given[1]}' are given; keep one of them")
        if not given:
            raise ValueError("nothing to merge: give 'models' or 'slices' with at least one entry")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError("both 'tokenizer' and 'tokenizer_source' are given; keep one of them")
        return self

    def referenced_models(self) -> list[ModelReference]:
        """Every model of the recipe, once, in the order of first mention; the base is last unless mentioned."""
        found: dict[ModelReference, None] = {}
        parts: list[MergeConfiguration | OutputModuleDefinition] = [self, *(self.modules or {}).values()]
        for part in parts:
            for model in part.models or []:
                found.setdefault(model.model)
            for output in part.slices or []:
                for source in output.sources:
                    found.setdefault(source.model)
                if output.base_model is not None:
                    found.setdefault(output.base_model)
        if self.base_model is not None:
            found.setdefault(self.base_model)
        return list(found)

    def to_yaml(self) -> str:
        """The recipe as YAML, without what is default; lists of numbers stay on one line."""
        from mergekit.recipe.text import dump_yaml

        return dump_yaml(self.model_dump(exclude_defaults=True, mode="json"))
